"""Divergences between two distributions over the vocabulary, per token."""

import math

import chex
import jax
import jax.numpy as jnp


def kl(p_logps: jax.Array, q_logps: jax.Array) -> jax.Array:
  """KL(p || q) in nats, float32[..., V] twice -> float32[...]; an id with p = 0 contributes nothing."""
  chex.assert_equal_shape((p_logps, q_logps))
  # A banned id is -inf on both sides; make the gap finite before weighting it, or 0 * nan appears.
  seen = jnp.logical_not(jnp.isneginf(p_logps))
  gap = jnp.where(seen, p_logps, 0.0) - jnp.where(seen, q_logps, 0.0)
  return (jnp.exp(p_logps) * gap).sum(-1)


def generalised_jsd(teacher_logps: jax.Array, student_logps: jax.Array, *, weight: float) -> jax.Array:
  """Generalised Jensen-Shannon divergence (arXiv:2306.13649, Eq. 1).

  With m = (1 - b) pi_theta + b pi_T it is b KL(pi_T || m) + (1 - b) KL(pi_theta || m). This goes to 0 at both
  ends, so the ends are the KLs themselves: b = 0 is KL(pi_T || pi_theta), b = 1 is KL(pi_theta || pi_T).

  Args:
    teacher_logps: float32[..., V], log pi_T, normalised; -inf at banned ids.
    student_logps: float32[..., V], log pi_theta, banned at the same ids.
    weight: b in [0, 1], a Python number because the ends are separate programs.

  Returns:
    float32[...], nats; at most -b log b - (1 - b) log(1 - b) inside (0, 1).

  Raises:
    ValueError: weight outside [0, 1].
  """
  chex.assert_equal_shape((teacher_logps, student_logps))
  if not 0 <= weight <= 1:
    raise ValueError(f"the weight of the Jensen-Shannon divergence is {weight}; it must lie in [0, 1].")
  if weight == 0:
    return kl(teacher_logps, student_logps)
  if weight == 1:
    return kl(student_logps, teacher_logps)
  banned = jnp.isneginf(teacher_logps) & jnp.isneginf(student_logps)
  # logaddexp(-inf, -inf) is -inf with a nan gradient, which a later zero weight cannot remove.
  student = jnp.where(banned, 0.0, student_logps) + math.log1p(-weight)
  teacher = jnp.where(banned, 0.0, teacher_logps) + math.log(weight)
  mixture = jnp.where(banned, -jnp.inf, jnp.logaddexp(student, teacher))
  return weight * kl(teacher_logps, mixture) + (1 - weight) * kl(student_logps, mixture)
