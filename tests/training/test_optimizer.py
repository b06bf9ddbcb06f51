import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.training import optimizer as optimizer_lib
from kepo_jax.training import update as update_lib
from tests.training.runs import equal

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def optimizer_of(dtype="float32", rate=lambda _: 0.1):
  return optimizer_lib.make_optimizer(rate, **ADAM, weight_decay=0.0, clip_norm=1.0, moments_dtype=dtype)


def test_rounding_is_to_a_neighbour_and_right_on_average():
  values = np.float32([1.0, 1.003, -1.003, 3.1415927, 1e-30, -250.4])
  shape = (4096, len(values))
  # Evenly spaced words of random bits: a mean over them is an expected value.
  bits = jnp.broadcast_to((jnp.arange(4096, dtype=jnp.uint32) << 4)[:, None], shape)
  found = np.asarray(optimizer_lib.rounded(jnp.broadcast_to(values, shape), bits), np.float32)
  np.testing.assert_allclose(np.float64(found).mean(axis=0), values, rtol=2.0**-7 / 4000)
  # One step of bfloat16 is 2^-7 of the power of two below.
  assert (np.abs(found - values) < 2.0 ** (np.floor(np.log2(np.abs(values))) - 7)).all() and (found[:, 0] == 1).all()


def test_the_first_update_is_that_of_optax():
  # Nothing is rounded yet: the maths is optax's, on stacks of layers as on single arrays.
  gradient = {"a": jax.random.normal(jax.random.key(0), (3, 4, 5)), "b": jnp.array([0.5, -2.0])}
  ours, theirs = optimizer_lib.scale_by_adam(**ADAM, dtype="bfloat16"), optax.scale_by_adam(**ADAM)
  change, after = ours.update(gradient, ours.init(gradient))
  expected, _ = theirs.update(gradient, theirs.init(gradient))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), change, expected)
  assert int(after.count) == 1


def placed(mesh):
  """Parameters of a stack cut over fsdp and tensor, a table cut over both, and a vector."""
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
  tree = {"stack": np.ones((3, 8, 16)), "table": np.ones((8, 16)), "norm": np.ones(16)}
  places = {"stack": place(None, "tensor", "fsdp"), "table": place("tensor", "fsdp"), "norm": place()}
  return jax.device_put(jax.tree.map(np.float32, tree), places)


def gradients(params, n):
  draw = lambda x: np.random.RandomState(n).normal(size=x.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), params)


def test_one_device_and_eight_store_the_same_numbers_where_the_parameters_lie(mesh_of):
  # Adam alone: the norm of a clip would be summed in another order.
  adam, ends = optimizer_lib.scale_by_adam(**ADAM, dtype="bfloat16"), []
  for mesh in (mesh_of(), mesh_of(data=2, fsdp=2, tensor=2)):
    params = placed(mesh)
    moved = optimizer_lib.initial_state(params, adam).opt_state
    for tree in (moved.mu, moved.nu):
      for leaf, parameter in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim)
    update = jax.jit(adam.update, out_shardings=(None, jax.tree.map(lambda x: x.sharding, moved)))
    for n in range(3):
      changes, moved = update(gradients(params, n), moved)
    ends.append(jax.device_get((changes, moved)))
  (one, stored), (eight, again) = ends
  # What is stored is the same to the bit; what moves the parameters is so but for the order of a multiply and an add.
  assert equal(stored, again)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), one, eight)


def test_each_array_layer_moment_and_update_has_bits_of_its_own():
  adam = optimizer_lib.scale_by_adam(b1=0.5, b2=0.5, eps=1e-8, dtype="bfloat16")
  value = jnp.full((2, 3, 64), 1.003)
  tree, moved, seen = {"a": value, "b": value}, adam.init({"a": value, "b": value}), []
  for _ in range(2):
    _, moved = adam.update(tree, moved._replace(mu=jax.tree.map(jnp.zeros_like, tree), nu=moved.nu))
    seen += [np.float32(moved.mu[name])[layer].tobytes() for name in "ab" for layer in range(2)]
  assert len(set(seen)) == 8


def test_the_state_is_donated_whole(mesh_of):
  params, optimizer = placed(mesh_of()), optimizer_of("bfloat16")
  first = optimizer_lib.initial_state(params, optimizer)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(first.opt_state) if leaf.ndim)
  assert size == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))  # two bytes each
  apply = jax.jit(functools.partial(update_lib.apply_gradients, optimizer, steps=1), donate_argnums=0)
  compiled = apply.lower(first, gradients(params, 0), jnp.float32(1)).compile()
  assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(first))


def test_schedule_by_hand():
  # Up to 0.4 in four updates, the first of which moves already; then 6 / 6, 5 / 6, ... of it.
  decay = [0.4 * left / 6 for left in (6, 5, 4, 3, 2, 1, 0)]
  for warmup, steps, expected in (
    (4, 10, [0.1, 0.2, 0.3, 0.4, *decay]),
    (0, 6, decay),
    (4, 2, [0.1, 0.2]),  # a warmup longer than the run
  ):
    schedule = optimizer_lib.learning_rate_schedule(learning_rate=0.4, warmup_steps=warmup, steps=steps)
    np.testing.assert_allclose([schedule(i) for i in range(len(expected))], expected, rtol=1e-6, atol=1e-9)
    assert all(schedule(i) >= 0 for i in range(steps + 5))


def test_the_rate_is_that_of_the_step_whatever_the_number_of_updates():
  schedule = optimizer_lib.learning_rate_schedule(learning_rate=0.4, warmup_steps=0, steps=4)
  optimizer = optimizer_of(rate=schedule)
  params, gradient = {"a": jnp.zeros(1)}, {"a": jnp.array([0.5])}
  moments, moved = optimizer.init(params), []
  for step in (0, 0, 1, 3, 3):
    change, moments = optimizer.update(gradient, moments, params, step=jnp.int32(step))
    moved.append(-float(change["a"][0]))
  # Under a constant gradient every step of Adam is the learning rate.
  np.testing.assert_allclose(moved, [0.4, 0.4, 0.3, 0.1, 0.1], rtol=1e-4, atol=1e-9)


def test_the_optimizer_is_adamw_of_optax():
  chain = {"b1": 0.9, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
  schedule = optax.linear_schedule(0.3, 0.1, 3)
  ours = optimizer_lib.make_optimizer(schedule, clip_norm=1.0, **chain)
  theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, **chain))
  left = right = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
  mine, other = ours.init(left), theirs.init(right)
  for step in range(3):
    gradient = jax.tree.map(lambda x, step=step: jnp.sin(x + step), left)
    change, mine = ours.update(gradient, mine, left, step=jnp.int32(step))
    expected, other = theirs.update(gradient, other, right)
    jax.tree.map(np.testing.assert_array_equal, change, expected)
    left, right = optax.apply_updates(left, change), optax.apply_updates(right, expected)


def test_frozen_parts_have_no_moments(mesh_of):
  params = placed(mesh_of(fsdp=2, tensor=2))
  first = optimizer_lib.initial_state(params, optimizer_of(), ("table",))
  assert first.params is params  # they stay in the state, for the forward pass and the export
  for name in ("mu", "nu"):
    moment = optax.tree_utils.tree_get(first.opt_state, name)
    assert jax.tree.map(jnp.shape, moment) == {"norm": (16,), "stack": (3, 8, 16)}
