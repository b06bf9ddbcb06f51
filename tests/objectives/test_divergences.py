import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from kepo_jax.objectives import distributions, divergences

WEIGHTS = (0.0, 0.1, 0.5, 0.9, 1.0)
BRANCHES = (0.0, 0.3, 1.0)


def logps_of(rng, shape=(5, 12), scale=2.0, allowed=None):
  logits = jnp.array(rng.normal(size=shape) * scale, jnp.float32)
  return distributions.masked_log_softmax(logits, jnp.ones(shape[-1], bool) if allowed is None else allowed)


def slow_jsd(teacher_logps, student_logps, weight):
  """Id by id in float64, from the definition."""
  out = []
  for teacher, student in zip(np.exp(np.float64(teacher_logps)), np.exp(np.float64(student_logps)), strict=True):

    def kl(p, q):
      return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    mixture = (1 - weight) * student + weight * teacher
    inner = weight * kl(teacher, mixture) + (1 - weight) * kl(student, mixture)
    out.append({0.0: kl(teacher, student), 1.0: kl(student, teacher)}.get(weight, inner))
  return np.array(out)


class GeneralisedJsdTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(*WEIGHTS)
  def test_worked_example(self, weight):
    # Teacher (1/2, 1/2), student (1/4, 3/4).
    t, s = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    m = (1 - weight) * s + weight * t
    expected = {
      0.0: 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75),
      1.0: 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5),
    }.get(weight, weight * (t * np.log(t / m)).sum() + (1 - weight) * (s * np.log(s / m)).sum())
    jsd = self.variant(functools.partial(divergences.generalised_jsd, weight=weight))
    np.testing.assert_allclose(jsd(jnp.log(jnp.array([t])), jnp.log(jnp.array([s]))), [expected], rtol=2e-6)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(*BRANCHES)
  def test_equal_inputs_give_zero(self, weight):
    logps = logps_of(np.random.default_rng(0), allowed=jnp.arange(12) > 2)
    jsd = self.variant(functools.partial(divergences.generalised_jsd, weight=weight))
    np.testing.assert_allclose(jsd(logps, logps), 0.0, atol=3e-7)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_equals_a_slow_loop(weight, rng):
  allowed = jnp.arange(12) != 4
  teacher, student = logps_of(rng, allowed=allowed), logps_of(rng, allowed=allowed)
  actual = divergences.generalised_jsd(teacher, student, weight=weight)
  np.testing.assert_allclose(actual, slow_jsd(teacher, student, weight), rtol=3e-6)


def test_symmetric_and_bounded_at_one_half(rng):
  for scale in (0.1, 2.0, 60.0):
    teacher, student = logps_of(rng, scale=scale), logps_of(rng, scale=scale)
    jsd = divergences.generalised_jsd(teacher, student, weight=0.5)
    np.testing.assert_allclose(jsd, divergences.generalised_jsd(student, teacher, weight=0.5), rtol=1e-5, atol=1e-7)
    assert (jsd >= -1e-7).all() and (jsd <= np.log(2) + 1e-6).all()
  # Distributions that share no id reach the bound, and stay finite.
  one_hot = distributions.masked_log_softmax(jnp.eye(2) * 1e4, jnp.ones(2, bool))
  np.testing.assert_allclose(divergences.generalised_jsd(one_hot, one_hot[::-1], weight=0.5), np.log(2), rtol=1e-6)


def test_limits_are_the_kls(rng):
  teacher, student = logps_of(rng, scale=1.0), logps_of(rng, scale=1.0)
  for weight, share, p, q in ((1e-3, 1e-3, teacher, student), (1 - 1e-3, 1e-3, student, teacher)):
    limit = divergences.generalised_jsd(teacher, student, weight=weight) / share
    np.testing.assert_allclose(limit, divergences.kl(p, q), rtol=1e-2)


@pytest.mark.parametrize("weight", BRANCHES)
def test_banned_ids_are_safe_in_value_and_gradient(weight, rng):
  allowed = jnp.arange(12) % 4 > 0
  teacher_logits, logits = (jnp.array(rng.normal(size=(3, 12)), jnp.float32) for _ in range(2))

  def divergence(logits, allowed, teacher_logits):
    teacher = distributions.masked_log_softmax(teacher_logits, allowed)
    student = distributions.masked_log_softmax(logits, allowed)
    return divergences.generalised_jsd(teacher, student, weight=weight).sum()

  value_and_grad = jax.jit(jax.value_and_grad(divergence))
  value, gradient = value_and_grad(logits, allowed, teacher_logits)
  # The same as if the banned ids did not exist.
  small = [x[:, np.array(allowed)] for x in (logits, teacher_logits)]
  every = jnp.ones(small[0].shape[1], bool)
  expected, small_gradient = value_and_grad(small[0], every, small[1])
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient[:, np.array(allowed)], small_gradient, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(gradient[:, ~np.array(allowed)], 0.0)


@pytest.mark.parametrize("weight", BRANCHES)
def test_gradient_against_finite_differences(weight, rng):
  teacher = logps_of(rng, (2, 5), 1.0)
  logits, direction = (jnp.array(rng.normal(size=(2, 5)), jnp.float32) for _ in range(2))

  @jax.jit
  def divergence(logits):
    student = distributions.masked_log_softmax(logits, jnp.ones(5, bool))
    return divergences.generalised_jsd(teacher, student, weight=weight).sum()

  slope = (jax.grad(divergence)(logits) * direction).sum()
  difference = divergence(logits + 1e-2 * direction) - divergence(logits - 1e-2 * direction)
  np.testing.assert_allclose(slope, difference / 2e-2, rtol=2e-3, atol=1e-4)


def test_weight_outside_the_unit_interval_is_refused(rng):
  with pytest.raises(ValueError, match="1.5"):
    divergences.generalised_jsd(logps_of(rng), logps_of(rng), weight=1.5)
