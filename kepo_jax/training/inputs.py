"""From experience to the inputs of the loss: weights over the global batch, pi_old, and the ratios of injected rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kepo_jax.models import scoring
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import losses
from kepo_jax.training import forward
from kepo_jax.types import Experience, Prompts

# What the importance ratio of an injected rollout, sampled under a hint, is taken between; see `UpdateSettings`.
OFF_CONTEXT = ("drop_on_policy", "drop_behaviour_shaped", "drop_unit_shaped")
UNIT_GAMMA = 0.1  # LUFFY
BEHAVIOUR_QUANTILE = 0.9  # Guide


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
  """How a batch becomes updates.

  `off_context` says what becomes of rollouts that were sampled under a hint:
    `drop_on_policy`: the hint is dropped from both policies of the ratio, which is 1 in the first update.
    `drop_behaviour_shaped`: pi_theta without the hint against the sampler with it, rho / (rho + gamma) without a clip;
      gamma is the 0.9-quantile of rho over the injected tokens of the batch, before its first update (Guide,
      arXiv:2506.13923).
    `drop_unit_shaped`: p / (p + 0.1) with p = pi_theta without the hint (LUFFY, arXiv:2504.14945).
  """

  compute_dtype: Any  # of the student's activations and products; gradients and master weights are float32
  chunk: int  # completion tokens of a device whose logits exist at one time
  parts: int = 1  # micro-batches
  updates: int = 1  # per batch; with more than one, pi_old comes from a scoring pass before the first
  frozen: tuple[str, ...] = ()  # top-level parts of the parameters that stay
  remat: str = "none"  # of layers.REMAT: what the backward pass computes again
  aggregation: str = "sequence_mean"  # of weights.AGGREGATIONS
  normaliser: str = "gated_tokens"  # of weights.NORMALISERS
  max_tokens: int | None = None  # length of the aggregation "constant_length"
  sequence_ratio: bool = False  # one ratio per rollout (GSPO) instead of one per token
  off_context: str = "drop_on_policy"
  distill_factor: optax.Schedule = lambda step: 1.0  # factor of lambda at a step

  def chunk_of(self, tokens: jax.Array) -> int:
    """`chunk` as tokens of each row of int32[P, G, T]."""
    return scoring.chunk_of(self.chunk, *tokens.shape[:2])


def keep_one_term(inputs: Any, weight: str) -> Any:
  """Zeroes every loss term except the one with this weight; the same program then gives that term's gradient."""
  others = [name for name in losses.WEIGHTS if name != weight]
  return inputs.replace(**{name: _zeros_like(getattr(inputs, name)) for name in others})


def _zeros_like(x: Any) -> Any:
  """Zeros where an array is, on its devices; a shape stays. `jnp.zeros_like` would compile a program of its own."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  zeros = np.zeros(x.shape, x.dtype)
  return jax.make_array_from_callback(x.shape, x.sharding, lambda index: zeros[index])


def make_inputs(
  config: Qwen3VLConfig, token_loss: losses.KepoTokenLoss, settings: UpdateSettings
) -> Callable[[Any, jax.Array, Experience], losses.TokenInputs]:
  """Returns (params, step, experience) -> inputs weighted over the batch, with pi_old scored where the loss needs it.

  Args:
    config: of the student.
    token_loss: the objective.
    settings: of the update.
  """
  behaviour = settings.off_context == "drop_behaviour_shaped"

  def scored(params: Any, prompts: Prompts, tokens: jax.Array) -> jax.Array:
    """log pi_old of tokens int32[P, G, T]."""
    params = model.cast(params, settings.compute_dtype)
    allowed, temperature = token_loss.allowed, token_loss.temperature

    def part(prompts, tokens):
      return forward.logps_of(config, params, prompts, tokens, allowed, temperature=temperature, chunk=settings.chunk)

    return forward.in_parts(part, prompts, tokens, settings.parts)

  def inputs(params: Any, step: jax.Array, experience: Experience) -> losses.TokenInputs:
    old_logps: Any = None
    if settings.updates > 1 or behaviour:
      old_logps = scored(params, experience.prompts, experience.tokens)
    rows: Any = losses.token_inputs(
      experience.tokens,
      experience.mask,
      experience.advantages,
      experience.gate,
      old_logps if settings.updates > 1 else None,
      kept=experience.kept,
      injected=experience.injected,
      supervised=experience.supervised,
      aggregation=settings.aggregation,
      normaliser=settings.normaliser,
      max_tokens=settings.max_tokens,
    )
    rows = rows.replace(distill_weight=rows.distill_weight * settings.distill_factor(step))
    if token_loss.importance_cap:
      rows = rows.replace(sampler_logps=experience.logps)
    if behaviour:
      rows = rows.replace(shaping_logps=experience.logps + _log_gamma(old_logps - experience.logps, rows))
    elif settings.off_context == "drop_unit_shaped":
      rows = rows.replace(shaping_logps=jnp.full(rows.mask.shape, jnp.log(UNIT_GAMMA)))
    return rows

  return inputs


def _log_gamma(log_ratio: jax.Array, rows: losses.TokenInputs) -> jax.Array:
  """float32[], log of the 0.9-quantile of rho over injected tokens; 0 without any."""
  injected = rows.mask & rows.injected
  top = jnp.where(injected, log_ratio, -jnp.inf).max()  # taken out, so that no rho overflows
  rho = jnp.exp(jnp.where(injected, log_ratio - top, jnp.nan))
  return jnp.where(injected.any(), top + jnp.log(jnp.nanquantile(rho, BEHAVIOUR_QUANTILE)), 0.0)
