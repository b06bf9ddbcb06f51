import chex
import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax.objectives import distributions


class MaskedLogSoftmaxTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example(self):
    # Without the banned 9 the masses at temperature 2 are e^0 and e^(log 9 / 2) = 3: shares 1/4 and 3/4.
    logits = jnp.array([[0.0, 9.0, np.log(9.0)]])
    actual = self.variant(distributions.masked_log_softmax, static_argnums=2)(
      logits, jnp.array([True, False, True]), 2.0
    )
    np.testing.assert_allclose(jnp.exp(actual), [[0.25, 0.0, 0.75]], rtol=1e-6)
    self.assertEqual(actual[0, 1], -jnp.inf)

  @chex.variants(with_jit=True, without_jit=True)
  def test_entropy_ignores_banned_ids(self):
    logits = jnp.zeros((3, 8))
    logps = distributions.masked_log_softmax(logits, jnp.arange(8) < 4)
    np.testing.assert_allclose(self.variant(distributions.entropy)(logps), np.log(4.0), rtol=1e-6)


def test_float32_inside(rng):
  logits = jnp.array(rng.normal(size=(4, 50)) * 8, jnp.bfloat16)
  allowed = jnp.ones(50, bool)
  actual = distributions.masked_log_softmax(logits, allowed)
  assert actual.dtype == jnp.float32
  exact = np.asarray(logits, np.float64)
  exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
  np.testing.assert_allclose(actual, exact, atol=2e-6)


def test_gradients_are_finite_and_zero_at_banned_ids(rng):
  logits = jnp.array(rng.normal(size=(2, 3, 10)), jnp.float32)
  allowed = jnp.arange(10) % 3 > 0
  tokens = jnp.array([[1, 2, 4], [5, 7, 8]])

  @jax.jit
  def objective(logits):
    logps = distributions.masked_log_softmax(logits, allowed, 0.7)
    return distributions.select_token(logps, tokens).sum() + distributions.entropy(logps).sum()

  gradient = jax.grad(objective)(logits)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[..., ~allowed], 0.0)
  assert (np.abs(gradient[..., allowed]) > 0).all()
  direction = jnp.array(rng.normal(size=logits.shape), jnp.float32)
  difference = objective(logits + 1e-2 * direction) - objective(logits - 1e-2 * direction)
  np.testing.assert_allclose((gradient * direction).sum(), difference / 2e-2, rtol=2e-3)


def test_select_token_is_a_gather(rng):
  values = jnp.array(rng.normal(size=(3, 2, 7)), jnp.float32)
  tokens = jnp.array(rng.integers(0, 7, (3, 2)))
  expected = jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_array_equal(distributions.select_token(values, tokens), expected)
