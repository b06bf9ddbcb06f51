"""From the config to what it names: rewards, loss, settings of the update, and the programs of a run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kepo_jax import rewards, sharding
from kepo_jax.config import Config, ModelConfig
from kepo_jax.data import pipeline
from kepo_jax.models.qwen3_vl import lora, model
from kepo_jax.models.qwen3_vl.config import LoraConfig
from kepo_jax.objectives import losses
from kepo_jax.training import compiling, inputs, programs, state, step
from kepo_jax.types import Prompts, Rollouts


def scorer(config: Config, more: rewards.WeightedRewards) -> rewards.Scorer:
  """The rewards of a run: accuracy and format of its convention, those of `reward.more`, and `more`.

  Raises:
    ValueError: a reward cannot be found, or two have one name.
  """
  reward = config.reward
  convention = rewards.CONVENTIONS[reward.convention]
  named = {"accuracy": (convention.accuracy, reward.accuracy), "format": (convention.format, reward.format)}
  for others in (rewards.parsed_rewards(reward.more), more):
    if twice := sorted(named.keys() & others.keys()):
      raise ValueError(f"the rewards {twice} are there twice; give one of them another name.")
    named |= others
  return rewards.Scorer(named, reward.combination)


def lora_config(fields: ModelConfig) -> LoraConfig | None:
  """The matrices that `config.model` asks for; None where all weights are trained."""
  if not fields.lora_rank:
    return None
  return LoraConfig(rank=fields.lora_rank, alpha=fields.lora_alpha, targets=tuple(fields.lora_targets))


def student_dtype(fields: ModelConfig) -> Any:
  """Dtype of the student's weights: float32 where they are trained, that of its activations where LoRA is."""
  return jnp.dtype(fields.compute_dtype if fields.lora_rank else "float32")


def with_lora(config: Config, loaded: programs.Model, key: jax.Array) -> programs.Model:
  """The student with the matrices that are trained in the place of its weights; itself where `config` has none.

  Args:
    config: of the run.
    loaded: the student on a mesh, or its shapes with shardings; the matrices are shapes then as well.
    key: of the matrices.
  """
  described = dataclasses.replace(loaded.config, lora=lora_config(config.model))
  if described.lora is None:
    return loaded
  mesh = jax.tree.leaves(loaded.params)[0].sharding.mesh
  shapes, axes = (tree(described)[lora.PART] for tree in (model.abstract_params, model.logical_axes))
  places = sharding.weight_shardings(mesh, shapes, axes)
  if compiling.is_abstract(loaded.params):
    matrices = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), shapes, places)
  else:
    matrices = jax.jit(functools.partial(lora.initial, described), out_shardings=places)(key)
  return programs.Model(described, {**loaded.params, lora.PART: matrices})


def token_loss(config: Config, processor: pipeline.Processor) -> losses.KepoTokenLoss:
  """The objective of a run."""
  objective = config.objective
  return losses.KepoTokenLoss(
    allowed=jnp.asarray(processor.allowed),
    temperature=config.sampling.temperature,
    policy_coefficient=objective.policy_weight,
    clip_low=objective.clip_low,
    clip_high=objective.clip_high,
    importance_cap=objective.importance_cap,
    distill_coefficient=objective.distill_weight,
    divergence=objective.divergence,
    jsd_weight=objective.divergence_weight,
    top_k=objective.divergence_top_k,
    distill_temperature=objective.distill_temperature,
    reference_coefficient=objective.reference_weight,
    reference_estimator=objective.reference_estimator,
    supervised_coefficient=objective.supervised_weight,
  )


def distill_factor(config: Config) -> optax.Schedule:
  """Factor of lambda at a step, between 1 and 0."""
  if config.objective.distill_schedule == "linear":
    return optax.linear_schedule(1.0, 0.0, config.train.steps)
  return optax.constant_schedule(1.0)


def update_settings(config: Config) -> inputs.UpdateSettings:
  """How a batch of this run becomes updates."""
  objective = config.objective
  return inputs.UpdateSettings(
    compute_dtype=jnp.dtype(config.model.compute_dtype),
    chunk=objective.chunk,
    parts=config.batch.micro_batches,
    updates=config.batch.updates,
    frozen=config.frozen_parts,
    remat=config.model.remat,
    aggregation=objective.aggregation,
    normaliser=objective.distill_normaliser,
    max_tokens=config.sampling.max_new_tokens,
    sequence_ratio=objective.ratio == "sequence",
    off_context=objective.off_context,
    distill_factor=distill_factor(config),
  )


def schedule(config: Config) -> optax.Schedule:
  """Learning rate at a step."""
  optimizer = config.optimizer
  return state.learning_rate_schedule(
    learning_rate=optimizer.learning_rate, warmup_steps=optimizer.warmup_steps, steps=config.train.steps
  )


def build_programs(
  config: Config, processor: pipeline.Processor, models: Mapping[str, programs.Model]
) -> tuple[state.TrainState, programs.Programs]:
  """The state before the first update, and the jitted programs around it."""
  student, settings = models["student"], update_settings(config)
  fields = ("b1", "b2", "eps", "weight_decay", "clip_norm")
  optimizer = state.make_optimizer(
    schedule(config),
    **{name: getattr(config.optimizer, name) for name in fields},
    moments_dtype=config.optimizer.moments,
  )
  first = state.initial_state(student.params, optimizer, settings.frozen)
  scoring = ["teacher"] if config.objective.distill_weight else []
  scoring += ["reference"] if config.objective.reference_weight else []
  exploration, sampled, asked = config.exploration, config.sampling, config.eval

  def sampler(samples: int, tokens: int, temperature: float, top_p: float = 1.0, top_k: int = 0):
    arguments = programs.SamplingSettings(samples, tokens, temperature, top_p, top_k)
    return programs.sampling_program(student.config, processor, arguments, name="the student's sampler")

  def teacher(used: bool, samples: int, tokens: int, temperature: float) -> Callable[[Prompts, jax.Array], Rollouts]:
    if not used:
      return programs.no_teacher
    arguments = programs.SamplingSettings(samples, tokens, temperature)
    return programs.teacher_program(models["teacher"], processor, arguments)

  policy = (sampled.max_new_tokens, sampled.temperature, sampled.top_p, sampled.top_k)
  own = config.own_rollouts
  return first, programs.Programs(
    decode_weights=programs.decode_weights_program(student.config, student.params, settings.compute_dtype),
    rollout=sampler(max(1, own), *policy),
    candidate=sampler(config.candidates, *policy),
    greedy=sampler(1, asked.max_new_tokens, 0.0),
    hint=teacher(config.explores, 1, exploration.hint_tokens, exploration.hint_temperature),
    answer=teacher(
      config.teacher_answers,
      *(config.batch.rollouts - own, sampled.max_new_tokens, config.supervised.temperature),
    ),
    targets=programs.targets_program([models[role] for role in scoring], settings.parts),
    update=step.Update(student.config, optimizer, token_loss(config, processor), settings, first),
  )
