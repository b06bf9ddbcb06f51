import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import ratios

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


class ClippedSurrogateTest(chex.TestCase):
  # Ratio, advantage -> objective and its derivative with respect to the log-ratio, by hand.
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    (1.0, 2.0, 2.0, 2.0),  # on-policy: the derivative is A
    (1.0, -2.0, -2.0, -2.0),
    (1.5, 2.0, 2.6, 0.0),  # above 1.3 with A > 0: no more to gain
    (1.5, -2.0, -3.0, -3.0),  # above 1.3 with A < 0: still pushed down
    (0.5, 2.0, 1.0, 1.0),
    (0.5, -2.0, -1.6, 0.0),  # below 0.8 with A < 0: clipped
    (1.25, 2.0, 2.5, 2.5),  # inside the upper bound only
  )
  def test_worked_examples(self, ratio, advantage, value, slope):
    def surrogate(log_ratio):
      return ratios.clipped_surrogate(log_ratio, jnp.float32(advantage), **CLIP)

    actual, gradient = self.variant(jax.value_and_grad(surrogate))(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose((actual, gradient), (value, slope), rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_clip_active_where_the_gradient_is_cut(self):
    log_ratio, advantages = jnp.meshgrid(jnp.log(jnp.array([0.5, 0.79, 0.81, 1.0, 1.29, 1.31])), jnp.array([-1.0, 1.0]))
    slope = jax.jit(jax.grad(lambda x: ratios.clipped_surrogate(x, advantages, **CLIP).sum()))(log_ratio)
    active = self.variant(lambda *x: ratios.clip_active(*x, **CLIP))(log_ratio, advantages)
    np.testing.assert_array_equal(active, slope == 0)
    self.assertEqual(int(active.sum()), 3)


def test_on_policy_gradient_is_the_advantage_exactly(rng):
  # min and clip meet at ratio 1; the two half gradients must add to A, not to A/2 or 2A.
  advantages = jnp.array(rng.normal(size=(4, 8)), jnp.float32)
  slope = jax.jit(jax.grad(lambda x: ratios.clipped_surrogate(x, advantages, **CLIP).sum()))(jnp.zeros((4, 8)))
  np.testing.assert_array_equal(slope, advantages)


class ShapedSurrogateTest(chex.TestCase):
  # rho, gamma, A -> A rho / (rho + gamma), and its derivative in log rho, A rho gamma / (rho + gamma)^2.
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    (1.0, 0.1, 2.0, 2 / 1.1, 0.2 / 1.21),
    (0.1, 0.1, 2.0, 1.0, 0.5),  # half of the bound, where the slope is largest: A / 4
    (0.1, 0.1, -2.0, -1.0, -0.5),
    (3.0, 1.0, 1.0, 0.75, 3 / 16),
    (0.5, 2.0, 4.0, 0.8, 4.0 / 6.25),
  )
  def test_worked_examples(self, ratio, gamma, advantage, value, slope):
    def surrogate(log_ratio):
      return ratios.shaped_surrogate(log_ratio, jnp.float32(advantage), log_gamma=np.log(gamma))

    actual, gradient = self.variant(jax.value_and_grad(surrogate))(jnp.log(jnp.float32(ratio)))
    np.testing.assert_allclose((actual, gradient), (value, slope), rtol=2e-6)


def test_shaped_surrogate_equals_a_slow_loop(rng):
  log_ratio, advantages, log_gamma = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(3))
  expected = np.zeros((3, 5))
  for i in np.ndindex(3, 5):
    rho, gamma = np.exp(np.float64(log_ratio[i])), np.exp(np.float64(log_gamma[i]))
    expected[i] = rho / (rho + gamma) * advantages[i]
  actual = ratios.shaped_surrogate(jnp.array(log_ratio), jnp.array(advantages), log_gamma=jnp.array(log_gamma))
  np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_shaped_surrogate_is_monotone_and_bounded():
  log_ratio = jnp.linspace(-200.0, 200.0, 4001)
  slope = jax.jit(jax.vmap(jax.grad(lambda x: ratios.shaped_surrogate(x, jnp.float32(3.0), log_gamma=-2.3))))(log_ratio)
  value = ratios.shaped_surrogate(log_ratio, jnp.full(4001, 3.0), log_gamma=-2.3)
  # exp(200) is no float32: the ratio itself would be inf, and the quotient nan.
  assert np.isfinite(value).all() and np.isfinite(slope).all()
  assert (np.diff(value) >= 0).all() and value[0] >= 0 and value[-1] == 3.0
  assert (slope >= 0).all()
  # Where a clip has long ended the gradient (a ratio of 20), a shaped ratio still has one.
  far = np.searchsorted(log_ratio, np.log(20.0))
  assert slope[far] > 1e-2


class SequenceLogRatioTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example(self):
    # Means of 0.3; of 0.1, 0.2, 0.6; and of nothing. What stands off the mask is not looked at.
    log_ratio = jnp.array([[0.3, jnp.nan, jnp.inf], [0.1, 0.2, 0.6], [jnp.nan, 7.0, 7.0]])
    mask = jnp.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    np.testing.assert_allclose(self.variant(ratios.sequence_log_ratio)(log_ratio, mask), [0.3, 0.3, 0.0], rtol=1e-6)


def test_sequence_log_ratio_equals_a_slow_loop(rng):
  log_ratio, lengths = rng.normal(size=(3, 4, 6)).astype(np.float32), rng.integers(0, 7, (3, 4))
  expected = np.zeros((3, 4))
  for i in np.ndindex(3, 4):
    for t in range(lengths[i]):
      expected[i] += log_ratio[(*i, t)] / lengths[i]
  actual = ratios.sequence_log_ratio(jnp.array(log_ratio), jnp.array(np.arange(6) < lengths[..., None]))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_gradient_of_the_sequence_ratio(rng):
  # d exp(mean) / d log rho_t = s / |y| on the mask, and exactly 0 elsewhere, whatever stands there.
  mask = jnp.array(np.arange(6) < np.array([[6], [2], [0]]))
  log_ratio = jnp.where(mask, jnp.array(rng.normal(size=(3, 6)), jnp.float32), jnp.nan)
  slope = jax.jit(jax.grad(lambda x: jnp.exp(ratios.sequence_log_ratio(x, mask)).sum()))(log_ratio)
  ratio = np.exp(ratios.sequence_log_ratio(log_ratio, mask))
  np.testing.assert_allclose(slope, np.where(mask, ratio[:, None] / [[6.0], [2.0], [1.0]], 0.0), rtol=1e-5)


class ImportanceWeightTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example(self):
    # Ratios 1/2, 1, 3/2, 4 and (never sampled) infinity under a cap of 2: large weights are cut, small ones are not.
    logps = jnp.log(jnp.array([0.2, 0.3, 0.6, 0.8, 0.5]))
    sampler_logps = jnp.log(jnp.array([0.4, 0.3, 0.4, 0.2, 0.0]))
    actual = self.variant(lambda *x: ratios.importance_weight(*x, cap=2.0))(logps, sampler_logps)
    np.testing.assert_allclose(actual, [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)


def test_importance_weights_have_mean_one_without_a_cap(rng):
  # Sum over a vocabulary of q (p / q); the cap can only lower it.
  p, q = (jnp.log(jnp.array(rng.dirichlet(np.ones(6)), jnp.float32)) for _ in range(2))
  mean = lambda cap: (jnp.exp(q) * ratios.importance_weight(p, q, cap=cap)).sum()  # noqa: E731
  np.testing.assert_allclose(mean(1e9), 1.0, rtol=1e-5)
  assert mean(1.5) < 0.99


class KlEstimatorsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(("k1", np.log(2)), ("k2", np.log(2) ** 2 / 2), ("k3", np.log(2) - 0.5))
  def test_worked_example(self, name, expected):
    # pi = 1/2, reference = 1/4: gap = -log 2, exp(gap) - gap - 1 = log 2 - 1/2. Equal policies give 0.
    logps, reference = jnp.log(jnp.array([0.5, 0.3])), jnp.log(jnp.array([0.25, 0.3]))
    np.testing.assert_allclose(self.variant(ratios.KL_ESTIMATORS[name])(logps, reference), [expected, 0.0], rtol=1e-6)


def two_policies(rng, size=6):
  """Logits of pi, log pi and log pi_ref in float64."""
  logits = rng.normal(size=size)
  return logits, logits - np.log(np.exp(logits).sum()), np.log(rng.dirichlet(np.ones(size)))


@pytest.mark.parametrize("name", ratios.KL_ESTIMATORS)
def test_expectation_of_the_estimate(name, rng):
  _, p, q = two_policies(rng)
  estimate = (np.exp(p) * ratios.KL_ESTIMATORS[name](jnp.array(p), jnp.array(q))).sum()
  kl = (np.exp(p) * (p - q)).sum()
  half_square = (np.exp(p) * (p - q) ** 2).sum() / 2
  assert abs(half_square - kl) > 0.01  # k2 is biased, and the test would see it unbiased
  np.testing.assert_allclose(estimate, {"k1": kl, "k2": half_square, "k3": kl}[name], rtol=1e-5)


@pytest.mark.parametrize("name", ratios.KL_ESTIMATORS)
def test_expectation_of_the_gradient(name, rng):
  logits, p, q = two_policies(rng)

  @jax.jit
  @jax.grad
  def gradient(logits):
    # The tokens come from pi, but the sampling has no gradient: the sum over the vocabulary is weighted with data.
    return (np.exp(p) * ratios.KL_ESTIMATORS[name](jax.nn.log_softmax(logits), jnp.array(q))).sum()

  pi, ref, kl = np.exp(p), np.exp(q), (np.exp(p) * (p - q)).sum()
  # In the logits: d KL(pi || ref) = pi (log pi - log ref - KL), d KL(ref || pi) = pi - ref.
  expected = {"k1": np.zeros(6), "k2": pi * (p - q - kl), "k3": pi - ref}[name]
  np.testing.assert_allclose(gradient(jnp.array(logits, jnp.float32)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ratios.KL_ESTIMATORS)
def test_gradient_of_an_estimate_against_finite_differences(name):
  # Of one token, in log pi, with gap = log pi - log pi_ref.
  gap = np.float64([-1.0, -0.1, 0.3, 2.0])
  slope = jax.vmap(jax.grad(ratios.KL_ESTIMATORS[name]), (0, None))(jnp.array(gap - 2, jnp.float32), jnp.float32(-2.0))
  value = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: np.exp(-x) + x - 1}[name]
  np.testing.assert_allclose(slope, (value(gap + 1e-5) - value(gap - 1e-5)) / 2e-5, rtol=1e-5)


def test_k2_and_k3_are_never_negative(rng):
  logps, reference = (jnp.array(-rng.exponential(3, size=500), jnp.float32) for _ in range(2))
  assert (ratios.k2_kl(logps, reference) >= 0).all() and (ratios.k3_kl(logps, reference) >= 0).all()
  assert (ratios.k1_kl(logps, reference) < 0).any()


def test_k3_keeps_small_gaps():
  # gap^2 / 2 + gap^3 / 6 for small gaps. exp(gap) - gap - 1 is a multiple of 2^-23: some per cent off, or 0.
  gap = np.float32([1e-3, -7e-4, 3e-4])
  np.testing.assert_allclose(ratios.k3_kl(jnp.zeros(3), jnp.array(gap)), gap**2 / 2 + gap**3 / 6, rtol=1e-3)


def test_sharded_equals_unsharded(mesh_of, rng):
  logps, other, advantages = (jnp.array(rng.normal(size=(8, 2, 6)), jnp.float32) for _ in range(3))
  mask = jnp.array(rng.integers(0, 2, (8, 2, 6)), bool)

  def everything(logps, other, advantages, mask):
    return (
      ratios.clipped_surrogate(logps - other, advantages, **CLIP),
      ratios.shaped_surrogate(logps, advantages, log_gamma=other),
      ratios.sequence_log_ratio(logps - other, mask),
      ratios.importance_weight(logps, other, cap=2.0),
      *(estimate(logps, other) for estimate in ratios.KL_ESTIMATORS.values()),
    )

  arguments = (logps, other, advantages, mask)
  sharded = jax.device_put(arguments, NamedSharding(mesh_of(data=4, fsdp=2), PartitionSpec("data", "fsdp")))
  chex.assert_trees_all_close(jax.jit(everything)(*sharded), everything(*arguments), rtol=2e-5, atol=1e-6)
