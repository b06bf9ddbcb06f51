"""What a run is made of: models on the mesh, data and programs, checked against each other before the first step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kepo_jax import evaluation, sharding
from kepo_jax import rewards as reward_functions
from kepo_jax.data import pipeline, prompts, splits
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.objectives import losses
from kepo_jax.training import checks, programs, step
from kepo_jax.training.groups import WeightedRewards
from kepo_jax.types import Example, Hook, Prompts, Rollouts, RunPlan

# One random stream per purpose; the order is part of what makes a run repeatable.
STREAMS = ("rollout", "hint", "candidate", "evaluation")


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that `loop.train` needs, fixed for the whole run."""

  config: Any
  mesh: jax.sharding.Mesh
  processor: pipeline.Processor
  questions: Mapping[str, Sequence[Example]]  # split -> questions
  rewards: WeightedRewards
  hooks: Sequence[Hook]
  models: Mapping[str, programs.Model]  # role ("student", "teacher", "reference") -> model
  schedule: optax.Schedule
  state: step.TrainState  # before the first update
  programs: programs.Programs
  batch: Callable[[int], tuple[Sequence[Example], Prompts]]  # updates done -> questions and host prompts of the step

  def key(self, purpose: str, *counters: int) -> jax.Array:
    """The random key of a purpose at a step (and a round)."""
    key = jax.random.fold_in(jax.random.key(self.config.seed), STREAMS.index(purpose))
    return functools.reduce(jax.random.fold_in, counters, key)

  def problem(self, example: Example) -> str:
    """The question as a sampled record shows it: stem and options."""
    return prompts.problem(example, self.processor.templates)

  def prompts(self, examples: Sequence[Example], kind: str, *, hints: Sequence[str] | None = None) -> Prompts:
    """Prompts on the mesh, their number padded to one of two sizes so that exploration compiles few programs."""
    rows = self.config.batch.prompts
    size = next(size for size in (max(1, rows // 4), rows) if size >= len(examples))
    filler = size - len(examples)
    examples = [*examples, *examples[:1] * filler]
    hints = None if hints is None else [*hints, *hints[:1] * filler]
    return sharding.place(self.mesh, self.processor.prompts(examples, kind, hints=hints))

  def evaluate(self, state: step.TrainState, split: str, name: str, done: int) -> dict[str, Any]:
    """Greedy accuracy of the student on a split."""
    weights = self.programs.decode_weights(state.params)
    key = self.key("evaluation", done)

    def sample(host_prompts: Prompts) -> Rollouts:
      return self.programs.greedy(weights, sharding.place(self.mesh, host_prompts), key)

    def progress(asked: int, total: int) -> None:
      for hook in self.hooks:
        hook.progress(f"evaluation {name}", asked, total)

    result = evaluation.evaluate(
      sample,
      self.processor,
      self.questions[split],
      batch_size=self.config.eval.prompts,
      train_modality=self.config.data.train_modality,
      progress=progress,
    )
    result = {"step": done, "split": split} | result
    for hook in self.hooks:
      hook.evaluation(done, name, result)
    return result

  def plan(self, workdir: str, start: int) -> RunPlan:
    """What the run is about to do."""
    names = ["evaluation", "rollout", "update"]
    names += ["hint", "hinted rollout"] if checks.explores(self.config) else []
    names += [f"{role} scoring" for role in self.models if role != "student"]
    return RunPlan(
      config=self.config,
      workdir=workdir,
      models={role: each.config for role, each in self.models.items()},
      mesh=dict(self.mesh.shape),
      questions={split: len(examples) for split, examples in self.questions.items()},
      programs=tuple(names),
      start_step=start,
    )

  def export(self, state: step.TrainState, directory: Any) -> None:
    """Writes the student as a Hugging Face folder."""
    student = self.models["student"]
    conversion.save_pretrained(directory, student.config, state.params, source=self.config.model.student)


def prepare(
  config: Any,
  *,
  records: Mapping[str, Sequence[Example]] | None,
  rewards: WeightedRewards,
  hooks: Sequence[Hook],
) -> Run:
  """Loads and checks everything that a run needs.

  Raises:
    ValueError: a field, file or model that does not fit, and the way out.
  """
  checks.check_config(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  checks.warn_of_replication(config, dict(mesh.shape))
  student = conversion.resolved_folder(config.model.student)
  checks.warn_of_templates(config, student)
  processor = pipeline.Processor.from_directory(
    student,
    templates=prompts.TEMPLATES[config.data.templates],
    resize=config.data.resize,
    prompt_buckets=tuple(config.data.prompt_buckets),
    patch_buckets=tuple(config.data.patch_buckets),
  )
  questions = dict(records) if records is not None else splits.load(config.data)
  checks.check_questions(questions, config)
  models = load_models(config, mesh, processor, hooks)
  schedule = step.learning_rate_schedule(
    learning_rate=config.optimizer.learning_rate,
    warmup_steps=config.optimizer.warmup_steps,
    steps=config.train.steps,
  )
  base = {
    "accuracy": (reward_functions.accuracy, config.reward.accuracy),
    "format": (reward_functions.strict_format, config.reward.format),
  }
  with jax.set_mesh(mesh):
    state, compiled = build_programs(config, processor, models, schedule)
  return Run(
    config=config,
    mesh=mesh,
    processor=processor,
    questions=questions,
    rewards=base | dict(rewards),
    hooks=hooks,
    models=models,
    schedule=schedule,
    state=state,
    programs=compiled,
    batch=batches(config, processor, questions["train"]),
  )


def batches(
  config: Any, processor: pipeline.Processor, examples: Sequence[Example]
) -> Callable[[int], tuple[Sequence[Example], Prompts]]:
  """Batches of training prompts by number of updates done; a thread prepares the next one."""

  def batch(done: int) -> tuple[Sequence[Example], Prompts]:
    chosen = pipeline.batch_at(examples, config.batch.prompts, seed=config.seed, step=done)
    return chosen, processor.prompts(chosen, "think")

  return pipeline.Lookahead(batch, stop=config.train.steps)


def load_models(
  config: Any, mesh: jax.sharding.Mesh, processor: pipeline.Processor, hooks: Sequence[Hook]
) -> dict[str, programs.Model]:
  """The checkpoints that this config uses, by role; student in float32, the others frozen.

  Raises:
    ValueError: a teacher with another vocabulary, image geometry or token ids than the student.
  """
  folders = {"student": config.model.student}
  if config.objective.distill_weight or checks.explores(config):
    folders["teacher"] = config.model.teacher
  if config.objective.reference_weight:
    folders["reference"] = config.model.student
  resolved = {role: conversion.resolved_folder(folder) for role, folder in folders.items()}
  if "teacher" in resolved:
    checks.check_teacher(config, processor, resolved["teacher"])
  models = {}
  for role, folder in resolved.items():
    dtype = jnp.float32 if role == "student" else jnp.dtype(config.model.teacher_dtype)

    def progress(done: int, total: int, role: str = role) -> None:
      for hook in hooks:
        hook.progress(f"loading {role}", done, total)

    models[role] = programs.Model(*conversion.load_pretrained(folder, dtype, mesh, progress=progress))
  return models


def build_programs(
  config: Any, processor: pipeline.Processor, models: Mapping[str, programs.Model], schedule: optax.Schedule
) -> tuple[step.TrainState, programs.Programs]:
  """The state before the first update, and the jitted programs around it."""
  student, compute_dtype = models["student"], jnp.dtype(config.model.compute_dtype)
  trainable = {name: not (config.model.freeze_vision and name == "visual") for name in student.params}
  fields = ("b1", "b2", "eps", "weight_decay", "clip_norm")
  optimizer = step.make_optimizer(schedule, trainable=trainable, **{name: config.optimizer[name] for name in fields})
  state = step.initial_state(student.params, optimizer)
  objective, sampled = config.objective, config.sampling
  token_loss = losses.kepo_token_loss(
    allowed=jnp.asarray(processor.allowed),
    temperature=sampled.temperature,
    clip_low=objective.clip_low,
    clip_high=objective.clip_high,
    distill_coefficient=objective.distill_weight,
    jsd_weight=objective.divergence_weight,
    reference_coefficient=objective.reference_weight,
  )
  update = step.make_update(
    student.config,
    optimizer,
    token_loss,
    compute_dtype=compute_dtype,
    freeze_vision=config.model.freeze_vision,
    remat=config.model.remat,
    chunk=objective.chunk,
    parts=config.batch.micro_batches,
  )
  scoring = ["teacher"] if objective.distill_weight else []
  scoring += ["reference"] if objective.reference_weight else []

  def sampler(samples, tokens, temperature, top_p=sampled.top_p, top_k=sampled.top_k):
    settings = programs.SamplingSettings(samples, tokens, temperature, top_p, top_k)
    return programs.sampling_program(student.config, processor, settings)

  hint: Callable[[Prompts, jax.Array], Rollouts] = programs.no_hints
  if "teacher" in models and checks.explores(config):
    settings = programs.SamplingSettings(1, config.exploration.hint_tokens, config.exploration.hint_temperature)
    hint = programs.hint_program(models["teacher"], processor, settings, jnp.dtype(config.model.teacher_dtype))
  return state, programs.Programs(
    decode_weights=programs.decode_weights_program(student.config, student.params, compute_dtype),
    rollout=sampler(config.batch.rollouts, sampled.max_new_tokens, sampled.temperature),
    candidate=sampler(max(1, config.exploration.replacements), sampled.max_new_tokens, sampled.temperature),
    greedy=sampler(1, config.eval.max_new_tokens, 0.0, 1.0, 0),
    hint=hint,
    targets=programs.targets_program([models[role] for role in scoring], config.batch.micro_batches),
    update=step.jit_update(update, state),
  )
