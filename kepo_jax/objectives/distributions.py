"""The one definition of a log-probability, shared by sampling, scoring and every loss."""

import chex
import jax
import jax.numpy as jnp


def masked_log_softmax(logits: jax.Array, allowed: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Log-probabilities over the allowed ids, before any top-k or top-p.

  Args:
    logits: float[..., V], of any float dtype.
    allowed: bool[V], false for ids that are never sampled (vision specials, rows beyond the tokenizer).
    temperature: divides the logits; > 0.

  Returns:
    float32[..., V] in nats, -inf at banned ids. The gradient is zero at banned ids, provided that the
    cotangent is finite there.
  """
  chex.assert_shape(allowed, logits.shape[-1:])
  allowed = allowed.reshape((1,) * (logits.ndim - 1) + allowed.shape)
  # float32 before the softmax: in bfloat16 the on-policy ratio drifts from 1.
  return jax.nn.log_softmax(jnp.where(allowed, logits.astype(jnp.float32) / temperature, -jnp.inf))


def select_token(values: jax.Array, tokens: jax.Array) -> jax.Array:
  """The entry of each token: values float[..., V] at tokens int32[...] -> float[...].

  A masked sum: unlike a gather it fuses with the softmax before it, its gradient needs no scatter, and a
  vocabulary sharded over devices stays where it is.
  """
  chex.assert_shape(tokens, values.shape[:-1])
  ids = jax.lax.broadcasted_iota(tokens.dtype, values.shape, values.ndim - 1)
  return jnp.where(ids == tokens[..., None], values, 0.0).sum(-1)


def entropy(logps: jax.Array) -> jax.Array:
  """Shannon entropy in nats: log-probabilities float32[..., V] -> float32[...]; -inf counts as zero."""
  # 0 * -inf is nan: a banned id contributes nothing, in value and in gradient.
  finite = jnp.where(jnp.isneginf(logps), 0.0, logps)
  return -(jnp.exp(logps) * finite).sum(-1)
