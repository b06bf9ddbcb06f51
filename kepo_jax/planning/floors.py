"""The two floors of every phase of a step: arithmetic over peak, bytes over bandwidth."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kepo_jax.models.qwen3_vl import lora, model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import losses
from kepo_jax.planning import flops
from kepo_jax.planning.chips import Chip
from kepo_jax.training import forward, inputs, state, step
from kepo_jax.types import Experience, Prompts


@dataclasses.dataclass(frozen=True)
class Work:
  """What a phase has to do at least, over all devices."""

  flops: float  # products, without any that rematerialisation repeats
  moved: float  # bytes that no implementation can leave in memory: weights, caches and optimizer state, once per use
  floor: float = 0.0  # seconds on `devices` of a chip, set by `on`

  def on(self, chip: Chip, devices: int) -> "Work":
    """With its floor: the larger of arithmetic and traffic."""
    return dataclasses.replace(self, floor=self.seconds(chip, devices))

  def seconds(self, chip: Chip, devices: int) -> float:
    """Seconds of the larger of the two floors."""
    return max(self.flops / chip.flops, self.moved / chip.bandwidth) / devices


def total(parts: list[Work]) -> Work:
  """Phases one after the other; their floors add up."""
  sums = (sum(getattr(part, field.name) for part in parts) for field in dataclasses.fields(Work))
  return Work(*sums)


def _bytes(tree: Any) -> float:
  return float(sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))


def copying(config: Qwen3VLConfig, params: Any, dtype: Any) -> Work:
  """The decode copy: the weights as the run keeps them read, merged ones of `dtype` written."""
  return Work(0.0, _bytes(params) + _bytes(model.abstract_params(lora.base(config), dtype)))


def sampling(
  config: Qwen3VLConfig, dtype: Any, prompts: Prompts, *, samples: int, new_tokens: int, chip: Chip, devices: int
) -> Work:
  """Prompts once, then a token at a time, which reads the decoder, the prompts' cache and what is sampled so far.

  Args:
    config: of the model.
    dtype: of its decode weights.
    prompts: P, arrays or shapes.
    samples: G.
    new_tokens: T, all of which are sampled.
    chip: whose floors these are.
    devices: of it.
  """
  # Side by side, as a token finds them: it then sees its own key in the cache, and no slot that is not written.
  params = jax.eval_shape(model.separated, model.abstract_params(config, dtype))
  prefix = jax.eval_shape(functools.partial(model.prefill, config), params, prompts)
  rows = prompts.tokens.shape[0] * samples
  cache = jax.eval_shape(lambda prefix: model.empty_cache(prefix, samples, new_tokens), prefix)
  token = jax.ShapeDtypeStruct((prompts.tokens.shape[0], samples), jnp.int32)
  head = model.head_weight(config, params)
  logits = 2.0 * head.shape[0] * head.shape[1]  # of one row
  first = flops.count(functools.partial(model.prefill, config), params, prompts) + prompts.tokens.shape[0] * logits
  read = _bytes({"layers": params["language_model"]["layers"], "head": head})
  # One token, for which the cache has one slot here: the attention to those sampled before is added below.
  single = jax.eval_shape(lambda prefix: model.empty_cache(prefix, samples, 1), prefix)
  each = flops.count(functools.partial(model.decode_step, config), params, prefix, single, token)
  each += rows * logits
  seen = 4.0 * rows * config.text.num_attention_heads * config.text.head_dim * config.text.num_hidden_layers
  each += seen * new_tokens / 2
  prefixes = _bytes((prefix.keys, prefix.values))
  written = _bytes((cache.keys, cache.values))
  start = Work(first, read + prefixes).on(chip, devices)
  later = Work(each * (new_tokens - 1), (read + prefixes + written / 2) * (new_tokens - 1)).on(chip, devices)
  return total([start, later])


def scoring(config: Qwen3VLConfig, dtype: Any, prompts: Prompts, tokens: Any) -> Work:
  """A frozen model over prompts and completions, once."""
  params = model.abstract_params(config, dtype)
  score = functools.partial(forward.target, config, parts=1)
  return Work(flops.count(score, params, prompts, tokens), _bytes(params))


def update(
  config: Qwen3VLConfig,
  token_loss: losses.KepoTokenLoss,
  settings: inputs.UpdateSettings,
  now: state.TrainState,
  experience: Experience,
  targets: tuple[forward.Target, ...],
  *,
  chip: Chip,
  devices: int,
) -> Work:
  """pi_old where it is scored, and for each update of the batch its gradients and the optimizer.

  The optimizer reads and writes weights and moments.

  Args:
    config: of the student.
    token_loss: the objective.
    settings: of the update; that it rematerialises and cuts micro-batches does not count.
    now: the state, arrays or shapes.
    experience: the batch.
    targets: what frozen models say about it.
    chip: whose floors these are.
    devices: of it.
  """
  plain = dataclasses.replace(settings, remat="none", parts=1)
  make = inputs.make_inputs(config, token_loss, plain)
  made = jax.eval_shape(make, now.params, now.step, experience)
  gradients = step.make_gradients(config, token_loss, plain)
  products = flops.count(gradients, now.params, experience, made, targets)
  scored = flops.count(make, now.params, now.step, experience)  # pi_old
  scoring = Work(scored, _bytes(now.params) if scored else 0.0).on(chip, devices)
  trained = _bytes(state.trained(now.params, settings.frozen))
  computing = Work(products, _bytes(now.params)).on(chip, devices)
  # A gradient is written and read; weights and moments are read and written.
  storing = Work(0.0, 2 * trained + 2 * (trained + _bytes(now.opt_state))).on(chip, devices)
  return total([scoring, *[computing, storing] * settings.updates])
