"""From per-token values to the loss of a batch: the only module of the objectives that masks and reduces.

The weights of all tokens are computed once over the global batch and handed to the loss as inputs. So the loss of
any part of the batch (a chunk of T, a micro-batch, a device) is a plain sum, and the parts add to the same value.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from kepo_jax.objectives import distributions, divergences, ratios

TokenLoss = Callable[[jax.Array, tuple[jax.Array, ...], Any], tuple[jax.Array, Any]]


@chex.dataclass(frozen=True)
class TokenInputs:
  """What the loss of a token needs besides logits; made from the global batch by `token_inputs`."""

  tokens: jax.Array  # int32[P, G, T]
  mask: jax.Array  # bool[P, G, T], true up to and including the end token
  advantages: jax.Array  # float32[P, G, T], one value per rollout
  policy_weight: jax.Array  # float32[P, G, T], weight of the policy term and of the reference KL; 0 off the mask
  distill_weight: jax.Array  # float32[P, G, T], weight of the divergence; 0 where the gate is closed
  old_logps: jax.Array | None = None  # float32[P, G, T], log pi_old; None: the policy's own, cut


def masked_sum(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(sum, count) as float32[] of values float32[...] where mask bool[...]; pairs add across micro-batches."""
  chex.assert_equal_shape((values, mask))
  # `where`, not a product: a nan in padding stays out.
  return jnp.where(mask, values, 0.0).sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32)


def sequence_mean_weights(mask: jax.Array) -> jax.Array:
  """Weights of (1/N) sum_i (1/|y_i|) sum_t: bool[P, G, T] -> float32[P, G, T]; N = P G of the global batch."""
  chex.assert_rank(mask, 3)
  lengths = mask.sum(axis=-1, keepdims=True, dtype=jnp.float32)
  # A rollout without a token has zero weight everywhere; the maximum keeps 0 / 0 out.
  return mask / (jnp.maximum(lengths, 1.0) * (mask.shape[0] * mask.shape[1]))


def gated_token_weights(mask: jax.Array, gate: jax.Array) -> jax.Array:
  """Weights of the mean over gated tokens, sum_i g_i sum_t / max(1, sum_i g_i |y_i|).

  Args:
    mask: bool[P, G, T] of the global batch.
    gate: bool[P, G], true where the rollout is distilled.

  Returns:
    float32[P, G, T]; all zero, never nan, when no rollout passes the gate.
  """
  chex.assert_shape(gate, mask.shape[:2])
  gated = mask & gate[..., None]
  return gated / jnp.maximum(gated.sum(dtype=jnp.float32), 1.0)


def token_inputs(
  tokens: jax.Array, mask: jax.Array, advantages: jax.Array, gate: jax.Array, old_logps: jax.Array | None = None
) -> TokenInputs:
  """Inputs of the loss for the global batch; cut micro-batches from the result, not from the arguments.

  Args:
    tokens: int32[P, G, T].
    mask: bool[P, G, T], true up to and including the end token.
    advantages: float32[P, G].
    gate: bool[P, G].
    old_logps: float32[P, G, T], log pi_old; None when the batch is used for one update, so that pi_old is the
      policy itself.
  """
  chex.assert_equal_shape((tokens, mask))
  chex.assert_shape((advantages, gate), mask.shape[:2])
  return TokenInputs(
    tokens=tokens,
    mask=mask,
    advantages=jnp.broadcast_to(advantages[..., None], mask.shape),
    policy_weight=sequence_mean_weights(mask),
    distill_weight=gated_token_weights(mask, gate),
    old_logps=old_logps,
  )


def kepo_token_loss(
  *,
  allowed: jax.Array,
  temperature: float = 1.0,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  distill_coefficient: float | jax.Array = 1.0,
  jsd_weight: float = 0.5,
  distill_temperature: float = 1.0,
  reference_coefficient: float = 0.0,
) -> TokenLoss:
  """The objective L_PG + lambda L_KD + beta L_ref of KEPO as a `token_loss` for `scoring.chunked_loss`.

  Args:
    allowed: bool[V], ids that may be sampled.
    temperature: of the policy and the reference, the one that sampled.
    clip_low: the ratio is not rewarded below 1 - clip_low.
    clip_high: the ratio is not rewarded above 1 + clip_high.
    distill_coefficient: lambda. A Python 0 leaves the teacher out of the program: what remains is GRPO.
    jsd_weight: b of `generalised_jsd`.
    distill_temperature: of teacher and student inside the divergence.
    reference_coefficient: beta. A Python 0 leaves the reference out of the program.

  Returns:
    token_loss(logits, other_logits, inputs: TokenInputs) -> (loss float32[], aux). `other_logits` holds the
    teacher's (unless lambda = 0), then the reference's (unless beta = 0). aux, float32[P, G, C] each and 0 off the
    mask: `logp`, `entropy` (nats), `ratio`, `clipped` (bool), and `divergence` and `kl` where computed.
  """
  distils = not (isinstance(distill_coefficient, int | float) and distill_coefficient == 0)
  anchored = reference_coefficient != 0
  clips = {"clip_low": clip_low, "clip_high": clip_high}

  def token_loss(logits, other_logits, inputs):
    if len(other_logits) != distils + anchored:
      raise ValueError(
        f"the loss needs {distils + anchored} other logits (teacher, reference), got {len(other_logits)}."
      )
    mask = inputs.mask
    distribution = distributions.masked_log_softmax(logits, allowed, temperature)
    # A pad token may be banned: its -inf must not reach a subtraction.
    logps = jnp.where(mask, distributions.select_token(distribution, inputs.tokens), 0.0)
    old_logps = jax.lax.stop_gradient(logps) if inputs.old_logps is None else jnp.where(mask, inputs.old_logps, 0.0)
    log_ratio = logps - old_logps
    surrogate = ratios.clipped_surrogate(log_ratio, inputs.advantages, **clips)
    loss = -(inputs.policy_weight * surrogate).sum()
    aux = {
      "logp": logps,
      "entropy": jnp.where(mask, distributions.entropy(distribution), 0.0),
      "ratio": jnp.where(mask, jnp.exp(log_ratio), 0.0),
      "clipped": mask & ratios.clip_active(log_ratio, inputs.advantages, **clips),
    }
    if distils:
      student = distribution
      if distill_temperature != temperature:
        student = distributions.masked_log_softmax(logits, allowed, distill_temperature)
      teacher = distributions.masked_log_softmax(other_logits[0], allowed, distill_temperature)
      aux["divergence"] = jnp.where(mask, divergences.generalised_jsd(teacher, student, weight=jsd_weight), 0.0)
      loss += distill_coefficient * (inputs.distill_weight * aux["divergence"]).sum()
    if anchored:
      reference = distributions.masked_log_softmax(other_logits[-1], allowed, temperature)
      reference_logps = jnp.where(mask, distributions.select_token(reference, inputs.tokens), 0.0)
      aux["kl"] = ratios.k3_kl(logps, reference_logps)
      loss += reference_coefficient * (inputs.policy_weight * aux["kl"]).sum()
    return loss, aux

  return token_loss
