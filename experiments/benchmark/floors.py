"""Counts what every phase of a step has to do at least: products over peak, bytes over bandwidth.

Products are counted from the jaxpr, so that nothing of a large model has to be compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from kepo_jax.models.qwen3_vl import lora, model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import losses
from kepo_jax.planning.chips import Chip
from kepo_jax.training import optimizer
from kepo_jax.training import update as update_lib
from kepo_jax.types import Experience, Prompts


@dataclasses.dataclass(frozen=True)
class Work:
  """What a phase has to do at least, over all devices."""

  flops: float  # products, without any that rematerialisation repeats
  moved: float  # bytes that no implementation can leave in memory: weights, caches and optimizer state, once per use
  floor: float = 0.0  # seconds on `devices` of a chip, set by `on`

  def on(self, chip: Chip, devices: int) -> "Work":
    """Sets its floor: the larger of arithmetic and traffic."""
    return dataclasses.replace(self, floor=self.seconds(chip, devices))

  def seconds(self, chip: Chip, devices: int) -> float:
    """Seconds of the larger of the two floors."""
    return max(self.flops / chip.flops, self.moved / chip.bandwidth) / devices


def total(parts: list[Work]) -> Work:
  """Adds up phases that run one after the other, and their floors."""
  sums = (sum(getattr(part, field.name) for part in parts) for field in dataclasses.fields(Work))
  return Work(*sums)


def _bytes(tree: Any) -> float:
  return float(sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))


def copying(config: Qwen3VLConfig, params: Any, dtype: Any) -> Work:
  """Counts the decode copy: weights as the run keeps them are read, merged ones of `dtype` written."""
  return Work(0.0, _bytes(params) + _bytes(model.abstract_params(lora.base(config), dtype)))


def sampling(
  config: Qwen3VLConfig, dtype: Any, prompts: Prompts, *, samples: int, new_tokens: int, chip: Chip, devices: int
) -> Work:
  """Counts prompts once, then a token at a time, which reads the decoder, the cache of prompts and what is sampled.

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
  params = jax.eval_shape(model.unstack_layers, model.abstract_params(config, dtype))
  prefix = jax.eval_shape(functools.partial(model.prefill, config), params, prompts)
  rows = prompts.tokens.shape[0] * samples
  cache = jax.eval_shape(lambda prefix: model.empty_cache(prefix, samples, new_tokens), prefix)
  token = jax.ShapeDtypeStruct((prompts.tokens.shape[0], samples), jnp.int32)
  head = model.head_weight(config, params)
  logits = 2.0 * head.shape[0] * head.shape[1]  # of one row
  first = count_flops(functools.partial(model.prefill, config), params, prompts) + prompts.tokens.shape[0] * logits
  read = _bytes({"layers": params["language_model"]["layers"], "head": head})
  # One token, for which the cache has one slot here: the attention to those sampled before is added below.
  single = jax.eval_shape(lambda prefix: model.empty_cache(prefix, samples, 1), prefix)
  each = count_flops(functools.partial(model.decode_step, config), params, prefix, single, token)
  each += rows * logits
  seen = 4.0 * rows * config.text.num_attention_heads * config.text.head_dim * config.text.num_hidden_layers
  each += seen * new_tokens / 2
  prefixes = _bytes((prefix.keys, prefix.values))
  written = _bytes((cache.keys, cache.values))
  start = Work(first, read + prefixes).on(chip, devices)
  later = Work(each * (new_tokens - 1), (read + prefixes + written / 2) * (new_tokens - 1)).on(chip, devices)
  return total([start, later])


def scoring(config: Qwen3VLConfig, dtype: Any, prompts: Prompts, tokens: Any) -> Work:
  """Counts a frozen model over prompts and completions, once."""
  params = model.abstract_params(config, dtype)
  score = functools.partial(update_lib.target, config, parts=1)
  return Work(count_flops(score, params, prompts, tokens), _bytes(params))


def update(
  config: Qwen3VLConfig,
  token_loss: losses.KepoTokenLoss,
  settings: update_lib.UpdateSettings,
  now: optimizer.TrainState,
  experience: Experience,
  targets: tuple[update_lib.Target, ...],
  *,
  chip: Chip,
  devices: int,
) -> Work:
  """Counts pi_old where it is scored, and for each update of the batch its gradients and the optimizer.

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
  make = update_lib.make_inputs(config, token_loss, plain)
  made = jax.eval_shape(make, now.params, now.step, experience)
  gradients = update_lib.make_gradients(config, token_loss, plain)
  products = count_flops(gradients, now.params, experience, made, targets)
  scored = count_flops(make, now.params, now.step, experience)  # pi_old
  scoring = Work(scored, _bytes(now.params) if scored else 0.0).on(chip, devices)
  trained = _bytes(optimizer.trained(now.params, settings.frozen))
  computing = Work(products, _bytes(now.params)).on(chip, devices)
  # A gradient is written and read; weights and moments are read and written.
  storing = Work(0.0, 2 * trained + 2 * (trained + _bytes(now.opt_state))).on(chip, devices)
  return total([scoring, *[computing, storing] * settings.updates])


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
  """Counts the FLOP of the matrix products of a function: 2 per multiplication and addition.

  What XLA's own cost analysis cannot say, since it counts the body of a loop once. Elementwise work is left out, and
  so is what a fused kernel does inside: count the plain form of an attention. What no result depends on does not count,
  as the compiler leaves it out: the gradient of a frozen head, which the loss adds up in its loop.

  Args:
    function: traced, not run.
    arguments: arrays or jax.ShapeDtypeStruct.

  Raises:
    ValueError: there is a loop whose number of turns depends on data, such as that of a sampler.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _jaxpr_flops(used)


def _jaxpr_flops(jaxpr: Any) -> float:
  return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _product_flops(equation)
  if name == "while":
    raise ValueError("a while loop runs as often as its data say; count what is inside it.")
  inner = [_jaxpr_flops(body) for body in _bodies(params)]
  if name == "cond":
    return max(inner)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def _product_flops(equation: Any) -> float:
  (contracting, _), _ = equation.params["dimension_numbers"]
  left, out = equation.invars[0].aval, equation.outvars[0].aval
  return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracting)


def _bodies(value: Any) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation, however deep."""
  if hasattr(value, "eqns"):
    yield value
  elif hasattr(value, "jaxpr"):  # closed over its constants
    yield from _bodies(value.jaxpr)
  elif isinstance(value, dict):
    for each in value.values():
      yield from _bodies(each)
  elif isinstance(value, tuple | list):
    for each in value:
      yield from _bodies(each)
