import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kepo_jax import sharding


@pytest.mark.parametrize(("axes", "shape", "expected"), [
  ({"data": 8}, (16, 3), PartitionSpec("data")),
  ({"data": 2, "fsdp": 4}, (8, 3), PartitionSpec(("data", "fsdp"))),
  ({"data": 2, "fsdp": 4}, (6, 3), PartitionSpec("data")),  # six prompts do not divide over eight devices
  ({"data": 8}, (6, 3), PartitionSpec()),
  ({"data": 2, "tensor": 4}, (4,), PartitionSpec("data")),
  ({"data": 8}, (), PartitionSpec()),
])  # fmt: skip
def test_rows_go_to_the_devices_that_they_divide_over(mesh_of, axes, shape, expected):
  mesh, array = mesh_of(**axes), np.arange(np.prod(shape)).reshape(shape)
  placed = sharding.place(mesh, array)
  assert placed.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, expected), len(shape))
  np.testing.assert_array_equal(sharding.to_host(placed), array)


@pytest.mark.parametrize(("prompts", "part"), [(2, (1, 1, 3)), (3, (3, 1, 3))])
def test_rollouts_go_where_prompts_do_not_divide(mesh_of, prompts, part):
  # Two prompts on data 2, or three on none; four rollouts on fsdp 4.
  mesh, array = mesh_of(data=2, fsdp=4), np.arange(12 * prompts).reshape(prompts, 4, 3)
  placed = sharding.place(mesh, {"x": array}, ("prompt", "rollout"))["x"]
  assert placed.addressable_shards[0].data.shape == part
  np.testing.assert_array_equal(sharding.to_host(placed), array)


def test_what_lies_on_the_mesh_stays_and_all_else_is_brought(mesh_of):
  mesh = mesh_of(data=2, fsdp=2)
  placed = sharding.place(mesh, np.arange(8))
  # However it lies there: a caller that pinned it knows why.
  elsewhere = jax.device_put(np.arange(8), sharding.replicated(mesh))
  strangers = [np.arange(8), sharding.place(mesh_of(data=2), np.arange(8)), jnp.arange(8)]
  kept, pinned, *brought = sharding.place(mesh, [placed, elsewhere, *strangers])
  assert kept is placed and pinned is elsewhere
  for each in brought:
    assert each.sharding == placed.sharding and sharding.to_host(each).tolist() == list(range(8))
  assert sharding.to_host(strangers[0]) is strangers[0]


def test_held_rows_are_those_that_placing_reads(mesh_of, monkeypatch):
  for axes, prompts in (({"data": 8}, 16), ({"data": 2, "fsdp": 4}, 4), ({"data": 4}, 6)):
    assert sharding.held_rows(mesh_of(**axes), prompts) == frozenset(range(prompts))
  # A process that could address two of eight devices would be asked for their rows alone.
  mesh = mesh_of(data=8)
  whole = jax.sharding.NamedSharding.addressable_devices_indices_map

  def part(self, shape):
    return {device: index for device, index in whole(self, shape).items() if device.id in (1, 6)}

  monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", part)
  assert sharding.held_rows(mesh, 16) == {2, 3, 12, 13}


ROWS, PROMPT = [("data", "fsdp")], ("prompt", "rollout")


@pytest.mark.parametrize(("shape", "axes", "usual", "beside"), [
  # What goes into products and comes out of them: width where a weight has it, rows over data alone.
  ((4, 2, 1, 8), (*PROMPT, None, "embed"), ROWS, ["data", None, None, "fsdp"]),
  ((4, 2, 1, 8), (*PROMPT, None, "mlp"), [*ROWS, None, None, "tensor"], ["data", None, None, "tensor"]),
  # A width that does not divide is whole; so are rows.
  ((3, 2, 1, 7), (*PROMPT, None, "embed"), [None, "fsdp"], []),
  # Attention, its caches and what is counted per row lie as ever.
  ((4, 2, 2, 8, 3), ("prompt", "kv_heads", "rollout", None, None), [*ROWS, "tensor"], [*ROWS, "tensor"]),
  ((4, 2), PROMPT, ROWS, ROWS),
])  # fmt: skip
def test_where_activations_lie_beside_weights_that_stay(mesh_of, shape, axes, usual, beside):
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  # One function for both, so that a trace of the one would be found for the other if JAX did not keep them apart.
  pinned = jax.jit(lambda x: sharding.constrain(x, *axes))
  with jax.set_mesh(mesh):
    found = [pinned(jnp.zeros(shape)).sharding]
    with sharding.weight_stationary(True):
      found.append(pinned(jnp.zeros(shape)).sharding)
      with sharding.weight_stationary(False):
        found.append(pinned(jnp.zeros(shape)).sharding)
    found.append(pinned(jnp.zeros(shape)).sharding)
  for place, expected in zip(found, (usual, beside, usual, usual), strict=True):
    assert place.is_equivalent_to(jax.sharding.NamedSharding(mesh, PartitionSpec(*expected)), len(shape))
