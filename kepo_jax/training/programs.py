"""The jitted programs of one run."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kepo_jax import sampling, sharding
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import compiling, forward, step
from kepo_jax.types import Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded checkpoint."""

  config: Qwen3VLConfig
  params: Any  # in the train layout


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """What one sampling program is compiled for."""

  samples: int  # completions per prompt
  max_new_tokens: int
  temperature: float  # 0: greedy
  top_p: float = 1.0
  top_k: int = 0


def sampling_program(
  config: Qwen3VLConfig, processor: Any, settings: SamplingSettings, *, name: str = "a sampler"
) -> Callable[[Any, Prompts, jax.Array], Rollouts]:
  """`sampling.sample` compiled for one model and one setting: (params, prompts, key) -> Rollouts [P, G, T].

  Args:
    config: of the model.
    processor: of the model.
    settings: of the sampling.
    name: what errors call it.
  """
  allowed = jnp.asarray(processor.allowed)

  def program(params, prompts, key):
    return sampling.sample(
      config,
      params,
      prompts,
      key,
      end_ids=processor.end_ids,
      pad_id=processor.pad_id,
      allowed=allowed,
      **dataclasses.asdict(settings),
    )

  return compiling.Program(name, program)


def decode_weights_program(config: Qwen3VLConfig, params: Any, dtype: Any) -> Callable[[Any], Any]:
  """Weights in the layout and dtype of the token loop; the weights themselves where nothing would change.

  Decoding from weights sharded over fsdp would gather every layer for every token; one reshard per step does not.
  """
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  shardings = sharding.weight_shardings(mesh, params, model.logical_axes(config), layout="decode")
  same = jax.tree.map(lambda x, s: x.dtype == dtype and s.is_equivalent_to(x.sharding, x.ndim), params, shardings)
  if all(jax.tree.leaves(same)):
    return lambda params: params
  return compiling.Program("the decode weights", lambda params: model.cast(params, dtype), out_shardings=shardings)


@dataclasses.dataclass(frozen=True)
class Programs:
  """Everything that runs on the device during training."""

  decode_weights: Callable[[Any], Any]  # student's master weights -> weights of its token loop
  rollout: Callable[[Any, Prompts, jax.Array], Rollouts]
  candidate: Callable[[Any, Prompts, jax.Array], Rollouts]  # hinted sampling, from the same weights
  greedy: Callable[[Any, Prompts, jax.Array], Rollouts]  # evaluation
  hint: Callable[[Prompts, jax.Array], Rollouts]  # by the teacher; an error where the config has no use for it
  answer: Callable[[Prompts, jax.Array], Rollouts]  # by the teacher as well, for supervised rows
  targets: Callable[
    [Prompts, jax.Array], tuple[forward.Target, ...]
  ]  # teacher, then reference, where the loss uses them
  update: step.Update


def teacher_program(
  teacher: Model, processor: Any, settings: SamplingSettings, dtype: Any
) -> Callable[[Prompts, jax.Array], Rollouts]:
  """The teacher's sampler with its own decode weights, made for each call and freed after it: (prompts, key)."""
  decode_weights = decode_weights_program(teacher.config, teacher.params, dtype)
  sample = sampling_program(teacher.config, processor, settings, name="the teacher's sampler")
  return lambda prompts, key: sample(decode_weights(compiling.beside(prompts, teacher.params)), prompts, key)


def no_teacher(prompts: Prompts, key: jax.Array) -> Rollouts:
  """Stands where no teacher is loaded."""
  del prompts, key
  raise ValueError("this run has no teacher to ask; see exploration.*, supervised.source and model.teacher.")


def targets_program(models: Sequence[Model], parts: int) -> Callable[[Prompts, jax.Array], tuple[forward.Target, ...]]:
  """What each frozen model says about the rollouts of a batch, scored in `parts` micro-batches: (prompts, tokens)."""

  def scoring(config: Qwen3VLConfig) -> Callable[[Any, Prompts, jax.Array], forward.Target]:
    def target(params, prompts, tokens):
      return forward.target(config, params, prompts, tokens, parts=parts)

    return compiling.Program("scoring by a frozen model", target)

  score = [scoring(each.config) for each in models]
  return lambda prompts, tokens: tuple(
    program(compiling.beside(tokens, each.params), prompts, tokens) for program, each in zip(score, models, strict=True)
  )
