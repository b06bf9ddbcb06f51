import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import advantages


def slow_group_std(rewards, epsilon=1e-4):
  """Rollout by rollout, in float64."""
  out = np.zeros(np.shape(rewards))
  for p, group in enumerate(np.asarray(rewards, np.float64)):
    mean = sum(group) / len(group)
    deviation = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
    for g, reward in enumerate(group):
      out[p, g] = (reward - mean) / (deviation + epsilon)
  return out


class GroupAdvantagesTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example(self):
    # Rewards 1 0 0 1 -> mean 1/2, sample deviation sqrt(1/3) -> +-0.866; all wrong -> no signal.
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    x = 0.5 / (3**-0.5 + 1e-4)
    actual = self.variant(advantages.group_advantages)(rewards)
    np.testing.assert_allclose(actual, [[x, -x, -x, x], [0, 0, 0, 0]], rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters((1, 2.47, -0.35), (2, 1.62, -0.54))
  def test_eight_rollouts_with_few_successes(self, successes, high, low):
    # k of 8: mean k/8, sample variance k (8 - k) / 56; the figures of METHOD.md to two digits.
    rewards = (jnp.arange(8) < successes).astype(jnp.float32)[None]
    actual = self.variant(advantages.group_advantages)(rewards)[0]
    deviation = (successes * (8 - successes) / 56) ** 0.5 + 1e-4
    np.testing.assert_allclose(actual[0], (1 - successes / 8) / deviation, rtol=1e-6)
    np.testing.assert_allclose(actual[-1], -successes / 8 / deviation, rtol=1e-6)
    np.testing.assert_allclose((actual[0], actual[-1]), (high, low), atol=5e-3)


@pytest.mark.parametrize("variant", [jax.jit, lambda function: function], ids=["with jit", "without jit"])
def test_dead_groups_give_exact_zeros(variant):
  # 0.1 has no exact float: the mean of equal rewards may differ from them in the last bit.
  rewards = jnp.array([[0.1] * 7, [0.3] * 7, [2.0] * 7, [0.1] * 6 + [0.2]])
  actual = variant(advantages.group_advantages)(rewards)
  np.testing.assert_array_equal(actual[:3], 0.0)
  assert actual[3, -1] > 2.0


def test_close_rewards_are_not_dead():
  rewards = jnp.array([[1.0, 1.0, 1.0, 1.0 + 2**-20]])
  assert advantages.group_advantages(rewards)[0, -1] > 0


def test_equals_a_slow_loop(rng):
  rewards = rng.choice([0.0, 0.5, 1.0, 2.0], size=(6, 8)).astype(np.float32)
  np.testing.assert_allclose(advantages.group_advantages(jnp.array(rewards)), slow_group_std(rewards), rtol=2e-6)


def test_a_single_rollout_has_no_advantage():
  np.testing.assert_array_equal(advantages.group_advantages(jnp.array([[3.0], [0.0]])), 0.0)


def test_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="group_std"):
    advantages.group_advantages(jnp.zeros((1, 2)), kind="group-std")


def test_sharded_equals_unsharded(mesh_of, rng):
  rewards = jnp.array(rng.normal(size=(8, 4)), jnp.float32)
  expected = advantages.group_advantages(rewards)
  sharded = jax.device_put(rewards, NamedSharding(mesh_of(data=8), PartitionSpec("data")))
  np.testing.assert_allclose(jax.jit(advantages.group_advantages)(sharded), expected, rtol=1e-6)
