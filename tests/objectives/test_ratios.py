import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

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


class K3Test(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example(self):
    # pi = 1/2, reference = 1/4: gap = -log 2, exp(gap) - gap - 1 = log 2 - 1/2. Equal policies give 0.
    logps, reference = jnp.log(jnp.array([0.5, 0.3])), jnp.log(jnp.array([0.25, 0.3]))
    np.testing.assert_allclose(self.variant(ratios.k3_kl)(logps, reference), [np.log(2) - 0.5, 0.0], rtol=1e-6)


def test_k3_expectation_is_the_kl(rng):
  p, q = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
  estimate = (np.exp(p) * ratios.k3_kl(jnp.array(p), jnp.array(q))).sum()
  np.testing.assert_allclose(estimate, (np.exp(p) * (p - q)).sum(), rtol=1e-5)
  assert (ratios.k3_kl(jnp.array(p), jnp.array(q)) >= 0).all()


def test_k3_keeps_small_gaps():
  # 1 - exp would round to zero: k3 is gap^2 / 2 for small gaps.
  np.testing.assert_allclose(ratios.k3_kl(jnp.float32(0.0), jnp.float32(1e-3)), 5e-7, rtol=0.15)
