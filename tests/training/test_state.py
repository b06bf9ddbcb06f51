"""The schedule and the optimizer are what they say; moments lie where their parameters lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax import sharding
from kepo_jax.training import optimizer as optimizer_lib

OPTIMIZER = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}


def constant(rate):
  return lambda step: rate


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
  optimizer = optimizer_lib.make_optimizer(schedule, **OPTIMIZER)
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


@pytest.fixture
def params(mesh_of):
  """float32 parameters on four devices: one tensor cut over fsdp, one over tensor, one whole."""
  mesh = mesh_of(fsdp=2, tensor=2)
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
  tree = {"visual": {"w": np.ones((4, 2))}, "language_model": {"w": np.ones((4, 6)), "b": np.ones(3)}}
  places = {"visual": {"w": place("fsdp")}, "language_model": {"w": place(None, "tensor"), "b": place()}}
  return jax.device_put(jax.tree.map(np.float32, tree), places)


def test_the_first_state(params):
  optimizer = optimizer_lib.make_optimizer(constant(0.1), **OPTIMIZER)
  first = optimizer_lib.initial_state(params, optimizer)
  assert first.params is params
  assert all(counter.dtype == jnp.int32 and int(counter) == 0 for counter in (first.step, first.skipped))
  mu, nu = (optax.tree_utils.tree_get(first.opt_state, name) for name in ("mu", "nu"))
  for moment in (mu, nu):
    assert jax.tree.structure(moment) == jax.tree.structure(params)
    for value, parameter in zip(jax.tree.leaves(moment), jax.tree.leaves(params), strict=True):
      assert (value.shape, value.dtype) == (parameter.shape, jnp.float32) and not value.any()
      assert value.sharding.is_equivalent_to(parameter.sharding, value.ndim)
  # Counters lie on every device, as the number of steps does.
  whole = sharding.replicated(params["visual"]["w"].sharding.mesh)
  counts = [leaf for leaf in jax.tree.leaves(first.opt_state) if not leaf.ndim]
  assert counts and all(leaf.sharding.is_equivalent_to(whole, 0) for leaf in (*counts, first.step, first.skipped))


def test_frozen_parts_have_no_moments(params):
  optimizer = optimizer_lib.make_optimizer(constant(0.1), **OPTIMIZER)
  first = optimizer_lib.initial_state(params, optimizer, ("visual",))
  assert first.params is params  # they stay in the state, for the forward pass and the export
  moving = optimizer_lib.trained(params, ("visual",))
  for name in ("mu", "nu"):
    moment = optax.tree_utils.tree_get(first.opt_state, name)
    assert (
      jax.tree.map(jnp.shape, moment) == jax.tree.map(jnp.shape, moving) == {"language_model": {"b": (3,), "w": (4, 6)}}
    )
