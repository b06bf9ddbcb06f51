"""Divergences between two distributions over the vocabulary, per token."""

import math

import chex
import jax
import jax.numpy as jnp

from kepo_jax.objectives import distributions, ratios

KINDS = ("jsd", "forward_kl", "reverse_kl", "sampled_k2")


def kl(p_logps: jax.Array, q_logps: jax.Array) -> jax.Array:
  """Returns KL(p || q) in nats, float32[..., V] twice -> float32[...]; an id with p = 0 contributes nothing."""
  chex.assert_equal_shape((p_logps, q_logps))
  # A banned id is -inf on both sides; make the gap finite before weighting it, or 0 * nan appears.
  seen = jnp.logical_not(jnp.isneginf(p_logps))
  gap = jnp.where(seen, p_logps, 0.0) - jnp.where(seen, q_logps, 0.0)
  return (jnp.exp(p_logps) * gap).sum(-1)


def generalised_jsd(teacher_logps: jax.Array, student_logps: jax.Array, *, weight: float) -> jax.Array:
  """Returns the generalised Jensen-Shannon divergence (arXiv:2306.13649, Eq. 1).

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


def top_k_jsd(teacher_logps: jax.Array, student_logps: jax.Array, *, weight: float, top_k: int) -> jax.Array:
  """Returns `generalised_jsd` over the teacher's k most likely ids, with all other ids as one bucket.

  Never above the full divergence, and equal to it once k reaches all allowed ids but one. Without the bucket the two
  sides would not be distributions, and mass that the student moves to the tail would cost nothing.

  Args:
    teacher_logps: float32[..., V].
    student_logps: float32[..., V].
    weight: b in [0, 1].
    top_k: k >= 1; ids tied with the k-th are kept as well.

  Returns:
    float32[...], nats.
  """
  top = distributions.top_ids(teacher_logps, top_k)
  (teacher, teacher_tail), (student, student_tail) = (
    distributions.with_tail(logps, top) for logps in (teacher_logps, student_logps)
  )
  # Every term of the divergence belongs to one id, so the bucket is one more term; the vocabulary keeps its length
  # and, over devices, its shards.
  return generalised_jsd(teacher, student, weight=weight) + generalised_jsd(teacher_tail, student_tail, weight=weight)


def token_divergence(
  teacher_logps: jax.Array, student_logps: jax.Array, tokens: jax.Array, *, kind: str, weight: float, top_k: int = 0
) -> jax.Array:
  """Returns the distillation loss of each token, by name.

  Args:
    teacher_logps: float32[..., V], log pi_T, normalised; -inf at banned ids.
    student_logps: float32[..., V], log pi_theta, banned at the same ids.
    tokens: int32[...], the tokens of the rollout.
    kind: `jsd`; `forward_kl`, KL(pi_T || pi_theta); `reverse_kl`, KL(pi_theta || pi_T); or `sampled_k2`, the estimate
      (log pi_theta(y) - log pi_T(y))^2 / 2 from the rollout's token y alone, whose gradient has the mean of that of
      the reverse KL on the student's own tokens (KDRL, arXiv:2506.02208).
    weight: b of `jsd`.
    top_k: 0 for the whole vocabulary, else k of `top_k_jsd`; no meaning for `sampled_k2`.

  Returns:
    float32[...], nats. What stands off a mask need not be finite.

  Raises:
    ValueError: an unknown kind.
  """
  if kind not in KINDS:
    raise ValueError(f"divergence kind {kind!r} is unknown; choose one of {KINDS}.")
  if kind == "sampled_k2":
    student, teacher = (distributions.select_token(logps, tokens) for logps in (student_logps, teacher_logps))
    return ratios.k2_kl(student, teacher)
  weight = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(kind, weight)
  if top_k:
    return top_k_jsd(teacher_logps, student_logps, weight=weight, top_k=top_k)
  return generalised_jsd(teacher_logps, student_logps, weight=weight)
