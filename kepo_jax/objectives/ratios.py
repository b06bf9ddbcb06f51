"""Importance ratios between two policies, per token."""

import jax
import jax.numpy as jnp


def clipped_surrogate(log_ratio: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float) -> jax.Array:
  """The clipped objective of PPO (arXiv:1707.06347, Eq. 7), to be maximised.

  Args:
    log_ratio: float32[...], log pi_theta - log pi_old of each token, nats.
    advantages: float32[...], broadcastable to log_ratio.
    clip_low: the ratio is not rewarded below 1 - clip_low.
    clip_high: the ratio is not rewarded above 1 + clip_high.

  Returns:
    float32[...], min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A).
  """
  ratio = jnp.exp(log_ratio)
  return jnp.minimum(ratio * advantages, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages)


def clip_active(log_ratio: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float) -> jax.Array:
  """bool[...]: tokens whose gradient `clipped_surrogate` cuts to zero; arguments as there."""
  ratio = jnp.exp(log_ratio)
  return ((ratio < 1.0 - clip_low) & (advantages < 0)) | ((ratio > 1.0 + clip_high) & (advantages > 0))


def k3_kl(logps: jax.Array, reference_logps: jax.Array) -> jax.Array:
  """The k3 estimate of KL(pi_theta || pi_ref) from a token sampled by pi_theta; unbiased and >= 0.

  Schulman, http://joschu.net/blog/kl-approx.html. No multiplication by the ratio (TRL does so by default).

  Args:
    logps: float32[...], log pi_theta of each token, nats.
    reference_logps: float32[...], log pi_ref of the same tokens.

  Returns:
    float32[...], exp(gap) - gap - 1 with gap = reference_logps - logps.
  """
  gap = reference_logps - logps
  return jnp.expm1(gap) - gap
