import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax.objectives import ratios

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def value_and_slope(surrogate, log_ratio):
  """Value of a function of each log-ratio, and its derivative there."""
  return jax.jit(lambda x: (surrogate(x), jax.grad(lambda x: surrogate(x).sum())(x)))(log_ratio)


def test_clipped_surrogate_worked_examples():
  # Ratio, advantage -> objective and its derivative with respect to the log-ratio, by hand.
  ratio, advantage, value, slope = np.float32(
    [
      (1.0, 2.0, 2.0, 2.0),  # on-policy: the derivative is A
      (1.0, -2.0, -2.0, -2.0),
      (1.5, 2.0, 2.6, 0.0),  # above 1.3 with A > 0: no more to gain
      (1.5, -2.0, -3.0, -3.0),  # above 1.3 with A < 0: still pushed down
      (0.5, 2.0, 1.0, 1.0),
      (0.5, -2.0, -1.6, 0.0),  # below 0.8 with A < 0: clipped
      (1.25, 2.0, 2.5, 2.5),  # inside the upper bound only
    ]
  ).T
  actual = value_and_slope(lambda x: ratios.clipped_surrogate(x, advantage, **CLIP), np.log(ratio))
  np.testing.assert_allclose(actual, (value, slope), rtol=1e-6)


def test_clip_active_where_the_gradient_is_cut():
  log_ratio, advantages = np.meshgrid(np.log(np.float32([0.5, 0.79, 0.81, 1.0, 1.29, 1.31])), np.float32([-1, 1]))
  _, slope = value_and_slope(lambda x: ratios.clipped_surrogate(x, advantages, **CLIP), log_ratio)
  active = ratios.clip_active(log_ratio, advantages, **CLIP)
  np.testing.assert_array_equal(active, slope == 0)
  assert active.sum() == 3


def test_shaped_surrogate_worked_examples():
  # rho, gamma, A -> A rho / (rho + gamma), and its derivative in log rho, A rho gamma / (rho + gamma)^2.
  ratio, gamma, advantage, value, slope = np.float32(
    [
      (1.0, 0.1, 2.0, 2 / 1.1, 0.2 / 1.21),
      (0.1, 0.1, 2.0, 1.0, 0.5),  # half of the bound, where the slope is largest: A / 4
      (0.1, 0.1, -2.0, -1.0, -0.5),
      (3.0, 1.0, 1.0, 0.75, 3 / 16),
      (0.5, 2.0, 4.0, 0.8, 4.0 / 6.25),
    ]
  ).T
  actual = value_and_slope(lambda x: ratios.shaped_surrogate(x, advantage, log_gamma=np.log(gamma)), np.log(ratio))
  np.testing.assert_allclose(actual, (value, slope), rtol=2e-6)


def test_shaped_surrogate_is_monotone_and_bounded():
  log_ratio = jnp.linspace(-200.0, 200.0, 4001)
  value, slope = value_and_slope(lambda x: ratios.shaped_surrogate(x, jnp.full(4001, 3.0), log_gamma=-2.3), log_ratio)
  # exp(200) is no float32: the ratio itself would be inf, and the quotient nan.
  assert np.isfinite(value).all() and np.isfinite(slope).all()
  assert (np.diff(value) >= 0).all() and value[0] >= 0 and value[-1] == 3.0
  assert (slope >= 0).all()
  # Where a clip has long ended the gradient (a ratio of 20), a shaped ratio still has one.
  assert slope[np.searchsorted(log_ratio, np.log(20.0))] > 1e-2


def test_sequence_ratio_is_a_mean_over_the_mask():
  # Means of 0.3; of 0.1, 0.2, 0.6; and of nothing. What stands off the mask is not looked at.
  log_ratio = jnp.array([[0.3, jnp.nan, jnp.inf], [0.1, 0.2, 0.6], [jnp.nan, 7.0, 7.0]])
  mask = jnp.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
  ratio, slope = value_and_slope(lambda x: jnp.exp(ratios.sequence_log_ratio(x, mask)), log_ratio)
  np.testing.assert_allclose(np.log(ratio), [0.3, 0.3, 0.0], rtol=1e-6)
  # d exp(mean) / d log rho_t = s / |y| on the mask, and exactly 0 elsewhere, whatever stands there.
  s = np.exp(0.3)
  np.testing.assert_allclose(slope, [[s, 0, 0], [s / 3] * 3, [0, 0, 0]], rtol=1e-6)


def test_importance_weight_worked_example():
  # Ratios 1/2, 1, 3/2, 4 and (never sampled) infinity under a cap of 2: large weights are cut, small ones are not.
  logps, sampler_logps = np.float32([0.2, 0.3, 0.6, 0.8, 0.5]), np.float32([0.4, 0.3, 0.4, 0.2, 0.0])
  actual = ratios.importance_weight(jnp.log(logps), jnp.log(sampler_logps), cap=2.0)
  np.testing.assert_allclose(actual, [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)


def test_expectations_of_kl_estimates_and_of_their_gradients(rng):
  logits, q = rng.normal(size=6), np.log(rng.dirichlet(np.ones(6)))
  p = logits - np.log(np.exp(logits).sum())

  @jax.jit
  def expectations(logits):
    # The tokens come from pi, but the sampling has no gradient: the sum over the vocabulary is weighted with data.
    mean = lambda x, estimate: (np.exp(p) * estimate(jax.nn.log_softmax(x), jnp.array(q))).sum()  # noqa: E731
    return {name: jax.value_and_grad(mean)(logits, estimate) for name, estimate in ratios.KL_ESTIMATORS.items()}

  pi, ref, kl = np.exp(p), np.exp(q), (np.exp(p) * (p - q)).sum()
  half_square = (pi * (p - q) ** 2).sum() / 2
  assert abs(half_square - kl) > 0.01  # k2 is biased, and the test would see it unbiased
  values = {"k1": kl, "k2": half_square, "k3": kl}
  # In the logits: d KL(pi || ref) = pi (log pi - log ref - KL), d KL(ref || pi) = pi - ref.
  gradients = {"k1": np.zeros(6), "k2": pi * (p - q - kl), "k3": pi - ref}
  for name, (value, gradient) in expectations(jnp.array(logits, jnp.float32)).items():
    np.testing.assert_allclose(value, values[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(gradient, gradients[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_k3_keeps_small_gaps():
  # gap^2 / 2 + gap^3 / 6 for small gaps. exp(gap) - gap - 1 is a multiple of 2^-23: some per cent off, or 0.
  gap = np.float32([1e-3, -7e-4, 3e-4])
  np.testing.assert_allclose(ratios.k3_kl(jnp.zeros(3), jnp.array(gap)), gap**2 / 2 + gap**3 / 6, rtol=1e-3)
