import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import advantages

KINDS = tuple(advantages.ESTIMATORS)


def slow_advantages(rewards, kind, epsilon=1e-4):
  """Rollout by rollout, in float64."""
  rewards = np.asarray(rewards, np.float64)
  out = np.zeros(rewards.shape)

  def deviation(values):
    mean = sum(values) / len(values)
    return (sum((r - mean) ** 2 for r in values) / (len(values) - 1)) ** 0.5

  for p, group in enumerate(rewards):
    for g, reward in enumerate(group):
      others = [r for i, r in enumerate(group) if i != g]
      centred = reward - sum(group) / len(group)
      out[p, g] = {
        "group_std": centred / (deviation(group) + epsilon),
        "no_std": centred,
        "rloo": reward - sum(others) / len(others),
        "batch_std": centred / (deviation(rewards.ravel()) + epsilon),
      }[kind]
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

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    # Rewards 1 0 0 1 and 0 0 0 1: means 1/2 and 1/4.
    ("no_std", [[1 / 2, -1 / 2, -1 / 2, 1 / 2], [-1 / 4, -1 / 4, -1 / 4, 3 / 4]]),
    # The others of a right answer have mean 1/3 and 0, those of a wrong one 2/3 and 1/3.
    ("rloo", [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-1 / 3, -1 / 3, -1 / 3, 1.0]]),
  )
  def test_worked_examples_without_deviation(self, kind, expected):
    rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    actual = self.variant(lambda rewards: advantages.group_advantages(rewards, kind=kind))(rewards)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example_of_the_batch_deviation(self):
    # Eight rewards with three ones: squares about 3/8 sum to 3 - 9/8 = 15/8, sample variance 15/56. The group of zeros
    # is silent but counts in it.
    rewards = jnp.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    deviation = (15 / 56) ** 0.5 + 1e-4
    actual = self.variant(lambda rewards: advantages.group_advantages(rewards, kind="batch_std"))(rewards)
    np.testing.assert_allclose(actual, np.array([[1, -3, 1, 1], [0, 0, 0, 0]]) / 4 / deviation, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [jax.jit, lambda function: function], ids=["with jit", "without jit"])
def test_dead_groups_give_exact_zeros(variant, kind):
  # 0.1 has no exact float: the mean of equal rewards may differ from them in the last bit.
  rewards = jnp.array([[0.1] * 7, [0.3] * 7, [2.0] * 7, [0.1] * 6 + [0.2]])
  actual = variant(lambda rewards: advantages.group_advantages(rewards, kind=kind))(rewards)
  np.testing.assert_array_equal(actual[:3], 0.0)
  # 0.1 above the others: alone in its group it is 6/7 of that away from the mean, and 2.27 deviations.
  at_least = {"group_std": 2.2, "no_std": 0.085, "rloo": 0.099, "batch_std": 0.1}[kind]
  assert actual[3, -1] > at_least


def test_close_rewards_are_not_dead():
  rewards = jnp.array([[1.0, 1.0, 1.0, 1.0 + 2**-20]])
  assert advantages.group_advantages(rewards)[0, -1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_slow_loop(kind, rng):
  rewards = rng.choice([0.0, 0.5, 1.0, 2.0], size=(6, 8)).astype(np.float32)
  actual = advantages.group_advantages(jnp.array(rewards), kind=kind)
  np.testing.assert_allclose(actual, slow_advantages(rewards, kind), rtol=2e-6, atol=1e-7)


def test_leaving_one_out_scales_the_centred_reward(rng):
  # r_i - mean of the others = (G / (G - 1)) (r_i - mean).
  for group in (2, 4, 7):
    rewards = jnp.array(rng.normal(size=(5, group)), jnp.float32)
    rloo, centred = (advantages.group_advantages(rewards, kind=kind) for kind in ("rloo", "no_std"))
    np.testing.assert_allclose(rloo, centred * (group / (group - 1)), rtol=1e-5, atol=1e-6)


def test_batch_deviation_is_that_of_all_rewards(rng):
  # What TRL does with scale_rewards="batch": the group's mean, the deviation (ddof 1) of everything, 1e-4 added.
  rewards = rng.normal(size=(5, 4)) * rng.uniform(0.1, 3, size=(5, 1))
  expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(ddof=1) + 1e-4)
  actual = advantages.group_advantages(jnp.array(rewards, jnp.float32), kind="batch_std")
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_rollout_has_no_advantage(kind):
  np.testing.assert_array_equal(advantages.group_advantages(jnp.array([[3.0], [0.0]]), kind=kind), 0.0)


def test_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="group_std"):
    advantages.group_advantages(jnp.zeros((1, 2)), kind="group-std")


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_unsharded(kind, mesh_of, rng):
  rewards = jnp.array(rng.normal(size=(8, 4)), jnp.float32)
  expected = advantages.group_advantages(rewards, kind=kind)
  sharded = jax.device_put(rewards, NamedSharding(mesh_of(data=8), PartitionSpec("data")))
  actual = jax.jit(lambda rewards: advantages.group_advantages(rewards, kind=kind))(sharded)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
