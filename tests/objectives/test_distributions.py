import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax.objectives import distributions


def test_masked_log_softmax_worked_example():
  # Without the banned 9 the masses at temperature 2 are e^0 and e^(log 9 / 2) = 3: shares 1/4 and 3/4.
  logits = jnp.array([[0.0, 9.0, np.log(9.0)]])
  logps = distributions.masked_log_softmax(logits, jnp.array([True, False, True]), 2.0)
  np.testing.assert_allclose(jnp.exp(logps), [[0.25, 0.0, 0.75]], rtol=1e-6)
  assert logps[0, 1] == -jnp.inf
  np.testing.assert_allclose(distributions.entropy(logps), [-0.25 * np.log(0.25) - 0.75 * np.log(0.75)], rtol=1e-6)


def test_float32_inside(rng):
  logits = jnp.array(rng.normal(size=(4, 50)) * 8, jnp.bfloat16)
  actual = distributions.masked_log_softmax(logits, jnp.ones(50, bool))
  assert actual.dtype == jnp.float32
  exact = np.asarray(logits, np.float64)
  exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
  np.testing.assert_allclose(actual, exact, atol=2e-6)


def test_gradients_are_finite_and_zero_at_banned_ids(rng):
  logits = jnp.array(rng.normal(size=(2, 3, 10)), jnp.float32)
  allowed = jnp.arange(10) % 3 > 0
  tokens = jnp.array([[1, 2, 4], [5, 7, 8]])

  @jax.jit
  @jax.value_and_grad
  def objective(logits):
    logps = distributions.masked_log_softmax(logits, allowed, 0.7)
    return distributions.select_token(logps, tokens).sum() + distributions.entropy(logps).sum()

  _, gradient = objective(logits)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[..., ~allowed], 0.0)
  assert (np.abs(gradient[..., allowed]) > 0).all()
  direction = jnp.array(rng.normal(size=logits.shape), jnp.float32)
  difference = objective(logits + 1e-2 * direction)[0] - objective(logits - 1e-2 * direction)[0]
  np.testing.assert_allclose((gradient * direction).sum(), difference / 2e-2, rtol=2e-3)


# Shares 0.1 0.4 0 0.2 0.2 0.1, the third id banned; 0.2 and 0.1 are tied.
SHARES = np.float32([0.1, 0.4, 0.0, 0.2, 0.2, 0.1])
LOGPS = jnp.log(jnp.array(SHARES))


@jax.jit
def tops(logps):
  """The top ids for several k."""
  return {k: distributions.top_ids(logps, k) for k in (1, 2, 3, 5, 9, 40)}


def test_top_ids_equal_sorting(rng):
  # Rounded to tenths, so that ties are many; every fourth id is banned.
  logps = np.where(np.arange(12) % 4 > 0, np.round(rng.normal(size=(30, 12)), 1), -np.inf).astype(np.float32)
  for k, actual in tops(jnp.array(logps)).items():
    for row, chosen in zip(logps, np.array(actual), strict=True):
      threshold = sorted(row[np.isfinite(row)], reverse=True)[:k][-1]
      np.testing.assert_array_equal(chosen[np.isfinite(row)], row[np.isfinite(row)] >= threshold, err_msg=f"k={k}")
      assert k > 9 or not chosen[~np.isfinite(row)].any()


def test_bucket_worked_example():
  # The two ids of share 0.2 and the one of 0.4 stay; the bucket holds 0.1 + 0.1.
  kept, tail = distributions.with_tail(LOGPS, jnp.array(SHARES >= 0.2))
  np.testing.assert_allclose(np.exp(kept), [0, 0.4, 0, 0.2, 0.2, 0], rtol=1e-6)
  np.testing.assert_allclose(np.exp(tail), [0.2], rtol=1e-6)
  # All allowed ids stay: the bucket is impossible, and neither it nor the banned id makes a nan.
  kept, tail = distributions.with_tail(LOGPS, jnp.array(SHARES > 0))
  np.testing.assert_array_equal(kept, LOGPS)
  np.testing.assert_array_equal(tail, [-np.inf])


def test_gradient_of_the_bucket(rng):
  logits = rng.normal(size=6)
  p = np.exp(logits) * (SHARES > 0) / (np.exp(logits) * (SHARES > 0)).sum()

  @jax.jit
  @jax.grad
  def gradient(logits, top):
    kept, tail = distributions.with_tail(distributions.masked_log_softmax(logits, jnp.array(SHARES > 0)), top)
    return jnp.where(jnp.isneginf(tail), 0.0, tail).sum() + jnp.where(top, kept, 0.0).sum()

  # d log p_i = e_i - p for each kept id, and for the bucket p restricted to the rest and normalised, minus p.
  top = SHARES == 0.2
  rest = p * ~top / (p * ~top).sum()
  np.testing.assert_allclose(gradient(np.float32(logits), top), top - 2 * p + rest - p, rtol=1e-5, atol=1e-6)
  # log 0 has a gradient of nan, which a zero weight later would not remove.
  top = SHARES > 0
  np.testing.assert_allclose(gradient(np.float32(logits), top), top - 5 * p, rtol=1e-5, atol=1e-6)
