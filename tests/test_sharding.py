"""Arrays on their way to the mesh and back."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kepo_jax import sharding


@pytest.mark.parametrize(
  ("axes", "shape", "expected"),
  [
    ({"data": 8}, (16, 3), PartitionSpec("data")),
    ({"data": 2, "fsdp": 4}, (8, 3), PartitionSpec(("data", "fsdp"))),
    ({"data": 2, "fsdp": 4}, (6, 3), PartitionSpec("data")),  # six prompts do not divide over eight devices
    ({"data": 8}, (6, 3), PartitionSpec()),
    ({"data": 2, "tensor": 4}, (4,), PartitionSpec("data")),
    ({"data": 8}, (), PartitionSpec()),
  ],
)
def test_rows_go_to_the_devices_that_they_divide_over(mesh_of, axes, shape, expected):
  mesh, array = mesh_of(**axes), np.arange(np.prod(shape)).reshape(shape)
  placed = sharding.place(mesh, array)
  assert placed.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, expected), len(shape))
  np.testing.assert_array_equal(sharding.to_host(placed), array)


def test_rollouts_go_where_prompts_do_not_divide(mesh_of):
  # Two prompts on data 2, four rollouts on fsdp 4.
  mesh, array = mesh_of(data=2, fsdp=4), np.arange(24).reshape(2, 4, 3)
  placed = sharding.place(mesh, {"x": array}, ("prompt", "rollout"))["x"]
  assert placed.addressable_shards[0].data.shape == (1, 1, 3)
  np.testing.assert_array_equal(sharding.to_host(placed), array)


def test_what_lies_on_the_mesh_stays(mesh_of):
  mesh = mesh_of(data=2, fsdp=2)
  placed = sharding.place(mesh, np.arange(8))
  elsewhere = jax.device_put(np.arange(8), sharding.replicated(mesh))
  again = sharding.place(mesh, {"host": np.arange(8), "placed": placed, "elsewhere": elsewhere})
  assert again["placed"] is placed
  # However it lies there: a caller that pinned it knows why.
  assert again["elsewhere"] is elsewhere
  assert again["host"].sharding == placed.sharding


def test_what_lies_on_another_mesh_or_device_is_brought(mesh_of):
  mesh = mesh_of(data=4)
  for stranger in (sharding.place(mesh_of(data=2), np.arange(8)), jax.numpy.arange(8)):
    placed = sharding.place(mesh, stranger)
    assert placed.sharding == sharding.batch_sharding(mesh, (8,))
    assert sharding.to_host(placed).tolist() == list(range(8))


def test_host_arrays_pass_through_to_host(mesh_of):
  array = np.arange(4.0)
  assert sharding.to_host(array) is array
  back = sharding.to_host(sharding.place(mesh_of(data=2), array))
  assert isinstance(back, np.ndarray) and back.tolist() == [0, 1, 2, 3]


def test_a_single_process_holds_every_row(mesh_of):
  for axes, prompts in (({"data": 8}, 16), ({"data": 2, "fsdp": 4}, 4), ({"data": 4}, 6)):
    assert sharding.held_rows(mesh_of(**axes), prompts) == frozenset(range(prompts))


def test_held_rows_are_those_that_placing_reads(mesh_of, monkeypatch):
  # A process that could address two of eight devices would be asked for their rows alone.
  mesh = mesh_of(data=8)
  whole = jax.sharding.NamedSharding.addressable_devices_indices_map

  def part(self, shape):
    return {device: index for device, index in whole(self, shape).items() if device.id in (1, 6)}

  monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", part)
  assert sharding.held_rows(mesh, 16) == {2, 3, 12, 13}
