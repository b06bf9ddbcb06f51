"""Weights that turn sums over tokens into the means of a loss; computed once over the global batch.

A weight travels with its token, so the loss of any part of the batch (a chunk of T, a micro-batch, a device) is a plain
sum, and the parts add to the same value. Every function returns exact zeros off its mask and never 0 / 0.
"""

import chex
import jax
import jax.numpy as jnp


def sequence_mean_weights(mask: jax.Array) -> jax.Array:
  """Returns weights of (1/N) sum_i (1/|y_i|) sum_t: bool[P, G, T] -> float32[P, G, T]; N = P G of the global batch.

  GRPO, arXiv:2402.03300, Eq. 3. A rollout without a token has no weight and still counts in N.
  """
  chex.assert_rank(mask, 3)
  lengths = mask.sum(axis=-1, keepdims=True, dtype=jnp.float32)
  return mask / (jnp.maximum(lengths, 1.0) * (mask.shape[0] * mask.shape[1]))


def token_mean_weights(mask: jax.Array) -> jax.Array:
  """Returns weights of the mean over all tokens of the global batch: bool[P, G, T] -> float32[P, G, T].

  DAPO, arXiv:2503.14476: long rollouts count more than short ones.
  """
  chex.assert_rank(mask, 3)
  return mask / jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)


def constant_length_weights(mask: jax.Array, *, length: int) -> jax.Array:
  """Returns weights of (1/N) sum_i (1/length) sum_t: bool[P, G, T] -> float32[P, G, T]; N = P G of the global batch.

  Dr.GRPO, arXiv:2503.20783: a constant in place of |y_i|, so that length changes no token's weight.

  Args:
    mask: bool[P, G, T].
    length: most tokens that a rollout may have, which padding must not change: not T.
  """
  chex.assert_rank(mask, 3)
  return mask / jnp.float32(length * mask.shape[0] * mask.shape[1])


AGGREGATIONS = ("sequence_mean", "token_mean", "constant_length")


def aggregation_weights(mask: jax.Array, *, aggregation: str, length: int) -> jax.Array:
  """Returns the weights of one of `AGGREGATIONS`, by name.

  Args:
    mask: bool[P, G, T], tokens of the term.
    aggregation: `sequence_mean`, `token_mean` or `constant_length`.
    length: as for `constant_length_weights`.

  Raises:
    ValueError: an unknown name.
  """
  if aggregation == "sequence_mean":
    return sequence_mean_weights(mask)
  if aggregation == "token_mean":
    return token_mean_weights(mask)
  if aggregation == "constant_length":
    return constant_length_weights(mask, length=length)
  raise ValueError(f"aggregation {aggregation!r} is unknown; choose one of {AGGREGATIONS}.")


def gated_token_weights(mask: jax.Array, gate: jax.Array) -> jax.Array:
  """Returns weights of the mean over gated tokens, sum_i g_i sum_t / max(1, sum_i g_i |y_i|).

  Args:
    mask: bool[P, G, T] of the global batch.
    gate: bool[P, G], true where the rollout is distilled.

  Returns:
    float32[P, G, T]; all zero, never nan, when no rollout passes the gate.
  """
  chex.assert_shape(gate, mask.shape[:2])
  return token_mean_weights(mask & gate[..., None])


NORMALISERS = ("gated_tokens", "group_mean")


def distill_weights(mask: jax.Array, gate: jax.Array, *, normaliser: str) -> jax.Array:
  """Returns weights of the distillation term.

  Args:
    mask: bool[P, G, T] of the global batch.
    gate: bool[P, G], true where the rollout is distilled.
    normaliser: `gated_tokens`, see `gated_token_weights`; or `group_mean`, (1/N) sum_i g_i (1/|y_i|) sum_t, the mean
      over groups of the paper's (1/G) sum_i (arXiv:2602.00400, Eq. 7), in which few gated rollouts weigh little.

  Raises:
    ValueError: an unknown normaliser.
  """
  if normaliser == "gated_tokens":
    return gated_token_weights(mask, gate)
  if normaliser == "group_mean":
    chex.assert_shape(gate, mask.shape[:2])
    return jnp.where(gate[..., None], sequence_mean_weights(mask), 0.0)
  raise ValueError(f"normaliser {normaliser!r} is unknown; choose one of {NORMALISERS}.")
