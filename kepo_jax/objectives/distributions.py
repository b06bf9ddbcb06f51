"""The one definition of a log-probability, shared by sampling, scoring and every loss."""

import chex
import jax
import jax.numpy as jnp


def masked_log_softmax(logits: jax.Array, allowed: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Returns log-probabilities over the allowed ids, before any top-k or top-p.

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
  """Returns the entry of each token: values float[..., V] at tokens int32[...] -> float[...].

  A masked sum: unlike a gather it fuses with the softmax before it, its gradient needs no scatter, and a
  vocabulary sharded over devices stays where it is.
  """
  chex.assert_shape(tokens, values.shape[:-1])
  ids = jax.lax.broadcasted_iota(tokens.dtype, values.shape, values.ndim - 1)
  return jnp.where(ids == tokens[..., None], values, 0.0).sum(-1)


def entropy(logps: jax.Array) -> jax.Array:
  """Returns Shannon entropy in nats: log-probabilities float32[..., V] -> float32[...]; -inf counts as zero."""
  # 0 * -inf is nan: a banned id contributes nothing, in value and in gradient.
  finite = jnp.where(jnp.isneginf(logps), 0.0, logps)
  return -(jnp.exp(logps) * finite).sum(-1)


def top_ids(logps: jax.Array, k: int) -> jax.Array:
  """Returns the k most likely ids, with those tied with the k-th: float32[..., V] -> bool[..., V]."""
  return ~tail_ids(logps, jnp.ones_like(logps), float(k))


def tail_ids(logps: jax.Array, weights: jax.Array, wanted: float) -> jax.Array:
  """Returns ids below the highest threshold above which the weights still add to `wanted`.

  The threshold is found by halving the range of positive floats, whose bits are ordered like their values: 31 sums
  over the vocabulary instead of sorting it, and a vocabulary sharded over devices stays where it is.

  Args:
    logps: float32[..., V], -inf at banned ids.
    weights: float32[..., V], >= 0.
    wanted: sum of the weights to keep.

  Returns:
    bool[..., V].
  """
  # Distance from the most likely id, negated: >= 0 everywhere, 0 at the maximum; inf for what is banned.
  gaps = logps.max(-1, keepdims=True) - logps
  floats = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)  # noqa: E731

  def halve(_, bounds):
    low, high = bounds  # enough lies within `high` of the maximum, and not within anything below `low`
    middle = low + (high - low) // 2
    enough = jnp.where(gaps <= floats(middle), weights, 0.0).sum(-1, keepdims=True) >= wanted
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
  zeros = jnp.zeros((*logps.shape[:-1], 1), jnp.int32)
  _, high = jax.lax.fori_loop(0, 31, halve, (zeros, zeros + infinity))
  return gaps > floats(high)


def with_tail(logps: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns a distribution over some ids and one bucket for all others.

  Args:
    logps: float32[..., V], normalised; -inf at banned ids.
    top: bool[..., V], ids that stay.

  Returns:
    (float32[..., V], -inf outside `top`; float32[..., 1], log of the mass outside, -inf where nothing is left).
  """
  rest = ~top & ~jnp.isneginf(logps)
  # A sum over nothing is -inf; the inner `where` keeps its nan out of the gradient.
  tail = jax.nn.logsumexp(jnp.where(rest, logps, -jnp.inf), axis=-1, keepdims=True)
  return jnp.where(top, logps, -jnp.inf), tail
