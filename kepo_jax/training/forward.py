"""What models say about rollouts: hidden states, on the whole batch or in micro-batches."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from kepo_jax import sharding
from kepo_jax.models import scoring
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.types import Prompts

ROWS = ("prompt", "rollout")


@chex.dataclass(frozen=True)
class Target:
  """What a frozen model says about the rollouts of a batch."""

  hidden: jax.Array  # [P, G, T, D], predicts the token at its own index
  head: jax.Array  # [V, D]


def hidden_of(config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, *, remat: str) -> jax.Array:
  """Hidden states [P, G, T, D] that predict tokens int32[P, G, T]; image and prompt are run once per group."""
  prefix = model.prefill(config, params, prompts, remat=remat)
  return model.completion_hidden(config, params, prefix, tokens, remat=remat)


def logps_of(
  config: Qwen3VLConfig,
  params: Any,
  prompts: Prompts,
  tokens: jax.Array,
  allowed: jax.Array,
  *,
  temperature: float,
  chunk: int,
) -> jax.Array:
  """Log-probabilities float32[P, G, T], nats, of given completions, without gradient; those of padding mean nothing.

  Args:
    config: of the model.
    params: its weights; their dtype is that of the computation.
    prompts: [P, S].
    tokens: int32[P, G, T].
    allowed: bool[V], ids that may be sampled.
    temperature: divides the logits.
    chunk: completion tokens of a device whose logits exist at one time.
  """
  hidden = hidden_of(config, params, prompts, tokens, remat="none")
  most = scoring.chunk_of(chunk, *tokens.shape[:2])
  head = model.head_weight(config, params)
  return scoring.token_logps(hidden, head, tokens, allowed, temperature=temperature, chunk=most)[0]


def micro_batches(batch: Any, count: int, axes: tuple[str, ...] = ("prompt",)) -> Any:
  """[P, ...] leaves cut to [count, P / count, ...], every device giving each part the same number of rows.

  Args:
    batch: tree of arrays that lead with `axes`.
    count: parts.
    axes: ("prompt",) or ("prompt", "rollout").
  """

  def cut(x):
    rows = x.reshape((x.shape[0] // count, count) + x.shape[1:])
    return sharding.constrain(jnp.moveaxis(rows, 1, 0), None, *axes, *[None] * (x.ndim - len(axes)))

  return jax.tree.map(cut, batch)


def in_parts(function: Callable[..., jax.Array], prompts: Prompts, tokens: jax.Array, parts: int) -> jax.Array:
  """function(prompts, tokens) -> [P, G, T, ...] on micro-batches, one after the other, joined in the order of rows."""
  values = jax.lax.map(
    lambda part: function(*part), (micro_batches(prompts, parts), micro_batches(tokens, parts, ROWS))
  )
  values = jnp.moveaxis(values, 0, 1).reshape(*tokens.shape, *values.shape[4:])
  return sharding.constrain(values, *ROWS, *[None] * (values.ndim - 2))


def target(config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, *, parts: int) -> Target:
  """Hidden states [P, G, T, D] and head [V, D] of a frozen model on the rollouts, without gradient.

  Args:
    config: of the frozen model.
    params: its weights.
    prompts: of the global batch.
    tokens: int32[P, G, T], its rollouts.
    parts: micro-batches, one after the other: the attention scores of a large teacher on a whole batch are tens of GB.
  """

  def hidden(prompts, tokens):
    return hidden_of(config, params, prompts, tokens, remat="none")

  states = in_parts(hidden, prompts, tokens, parts)
  return jax.lax.stop_gradient(Target(hidden=states, head=model.head_weight(config, params)))
