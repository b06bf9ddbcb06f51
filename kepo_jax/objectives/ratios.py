"""Importance ratios between two policies, and estimates of their divergence from sampled tokens; per token."""

import chex
import jax
import jax.numpy as jnp


def clipped_surrogate(log_ratio: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float) -> jax.Array:
  """Returns the clipped objective of PPO (arXiv:1707.06347, Eq. 7), to be maximised.

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
  """Returns bool[...]: tokens whose gradient `clipped_surrogate` cuts to zero; arguments as there."""
  ratio = jnp.exp(log_ratio)
  return ((ratio < 1.0 - clip_low) & (advantages < 0)) | ((ratio > 1.0 + clip_high) & (advantages > 0))


def shaped_surrogate(log_ratio: jax.Array, advantages: jax.Array, *, log_gamma: jax.Array | float) -> jax.Array:
  """Returns A rho / (rho + gamma) with rho = pi_theta / mu, the surrogate of tokens from a policy mu, to be maximised.

  Bounded, and its slope in log rho never vanishes below the bound, unlike that of a clip (LUFFY, arXiv:2504.14945,
  with mu = 1 and gamma = 0.1; Guide, arXiv:2506.13923, with mu the policy that saw the hint).

  Args:
    log_ratio: float32[...], log pi_theta - log mu of each token, nats.
    advantages: float32[...], broadcastable to log_ratio.
    log_gamma: log of gamma, broadcastable to log_ratio.

  Returns:
    float32[...].
  """
  # rho / (rho + gamma) without exp(log_ratio), which overflows where mu is far below pi_theta.
  return jax.nn.sigmoid(log_ratio - log_gamma) * advantages


def sequence_log_ratio(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the log of the length-normalised sequence ratio of GSPO (arXiv:2507.18071, section 4.1).

  Args:
    log_ratio: float32[..., T], log pi_theta - log pi_old of each token; anything off the mask.
    mask: bool[..., T].

  Returns:
    float32[...], the mean over the tokens of a row; 0 for a row without tokens.
  """
  chex.assert_equal_shape((log_ratio, mask))
  return jnp.where(mask, log_ratio, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def importance_weight(logps: jax.Array, sampler_logps: jax.Array, *, cap: float) -> jax.Array:
  """Returns min(pi / pi_sampler, cap): corrects for a sampler whose log-probabilities are not quite the trainer's.

  Truncated importance sampling (Ionides 2008). The weight is data, so the caller cuts the gradient of `logps`.

  Args:
    logps: float32[...], the trainer's log-probability of each token, nats.
    sampler_logps: float32[...], the sampler's.
    cap: largest weight.
  """
  return jnp.minimum(jnp.exp(logps - sampler_logps), cap)


def k1_kl(logps: jax.Array, reference_logps: jax.Array) -> jax.Array:
  """Returns the k1 estimate of KL(pi_theta || pi_ref) from a token sampled by pi_theta: log pi_theta - log pi_ref.

  Unbiased in value; as a term of a loss its gradient is grad log pi_theta, whose mean is zero: to log, not to train.
  Schulman, http://joschu.net/blog/kl-approx.html.

  Args:
    logps: float32[...], log pi_theta of each token, nats.
    reference_logps: float32[...], log pi_ref of the same tokens.
  """
  return logps - reference_logps


def k2_kl(logps: jax.Array, reference_logps: jax.Array) -> jax.Array:
  """Returns the k2 estimate float32[...], (log pi_theta - log pi_ref)^2 / 2; arguments as for `k1_kl`.

  Biased in value, but the mean of its gradient over tokens of pi_theta is the gradient of KL(pi_theta || pi_ref).
  """
  return jnp.square(logps - reference_logps) / 2


def k3_kl(logps: jax.Array, reference_logps: jax.Array) -> jax.Array:
  """Returns the k3 estimate float32[...], exp(gap) - gap - 1, gap = reference_logps - logps; arguments as `k1_kl`.

  Unbiased in value and >= 0; the mean of its gradient is that of KL(pi_ref || pi_theta). No multiplication by the
  ratio (TRL does so by default).
  """
  gap = reference_logps - logps
  return jnp.expm1(gap) - gap


KL_ESTIMATORS = {"k1": k1_kl, "k2": k2_kl, "k3": k3_kl}
