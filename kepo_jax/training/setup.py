"""Builds a run: models on the mesh, data, rewards, loss and programs, checked against each other."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kepo_jax import multihost, rewards, sharding
from kepo_jax.config import Config, ModelConfig
from kepo_jax.data import batching, prompts, splits, usable
from kepo_jax.data import processor as processor_lib
from kepo_jax.data.cleaning import Rejected, Summary
from kepo_jax.models.qwen3_vl import checkpoint, lora, model
from kepo_jax.models.qwen3_vl.config import LoraConfig, Qwen3VLConfig
from kepo_jax.objectives import losses
from kepo_jax.rewards import Scorer, WeightedRewards
from kepo_jax.training import checks, compiling, update
from kepo_jax.training import optimizer as optimizer_lib
from kepo_jax.training import programs as programs_lib
from kepo_jax.training.optimizer import TrainState
from kepo_jax.training.rollouts import Groups, scored_groups
from kepo_jax.training.signals import Interruption
from kepo_jax.types import Example, Hook, Prompts, Rollouts


def make_scorer(config: Config, more: rewards.WeightedRewards) -> rewards.Scorer:
  """Returns the rewards of a run: accuracy and format of its convention, those of `reward.more`, and `more`.

  Raises:
    ValueError: a reward cannot be found, or two have one name.
  """
  reward = config.reward
  convention = rewards.CONVENTIONS[reward.convention]
  named = {"accuracy": (convention.accuracy, reward.accuracy), "format": (convention.format, reward.format)}
  for extra in (rewards.parsed_rewards(reward.more), more):
    if twice := sorted(named.keys() & extra.keys()):
      raise ValueError(f"the rewards {twice} are there twice; give one of them another name.")
    named |= extra
  return rewards.Scorer(named, reward.combination)


def lora_config(fields: ModelConfig) -> LoraConfig | None:
  """Returns the matrices of LoRA that the config asks for; None where all weights are trained."""
  if not fields.lora_rank:
    return None
  return LoraConfig(rank=fields.lora_rank, alpha=fields.lora_alpha, targets=tuple(fields.lora_targets))


def student_dtype(fields: ModelConfig) -> Any:
  """Returns the dtype of the student's weights: float32 where they are trained, that of activations under LoRA."""
  return jnp.dtype(fields.compute_dtype if fields.lora_rank else "float32")


def with_lora(config: Config, loaded: programs_lib.Model, key: jax.Array) -> programs_lib.Model:
  """Adds the matrices of LoRA to the student, if the config has any.

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
  return programs_lib.Model(described, {**loaded.params, lora.PART: matrices})


def token_loss(config: Config, processor: processor_lib.Processor) -> losses.KepoTokenLoss:
  """Returns the objective of a run."""
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
  """Returns the factor of lambda by step, between 1 and 0."""
  if config.objective.distill_schedule == "linear":
    return optax.linear_schedule(1.0, 0.0, config.train.steps)
  return optax.constant_schedule(1.0)


def update_settings(config: Config) -> update.UpdateSettings:
  """Returns how a batch of the run becomes updates."""
  objective = config.objective
  return update.UpdateSettings(
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


def make_schedule(config: Config) -> optax.Schedule:
  """Returns the learning rate by step."""
  optimizer = config.optimizer
  return optimizer_lib.learning_rate_schedule(
    learning_rate=optimizer.learning_rate, warmup_steps=optimizer.warmup_steps, steps=config.train.steps
  )


def build_programs(
  config: Config, processor: processor_lib.Processor, models: Mapping[str, programs_lib.Model]
) -> tuple[optimizer_lib.TrainState, programs_lib.Programs]:
  """Returns the state before the first update, and the jitted programs of a run."""
  student, settings = models["student"], update_settings(config)
  fields = ("b1", "b2", "eps", "weight_decay", "clip_norm")
  optimizer = optimizer_lib.make_optimizer(
    make_schedule(config),
    **{name: getattr(config.optimizer, name) for name in fields},
    moments_dtype=config.optimizer.moments,
  )
  first = optimizer_lib.initial_state(student.params, optimizer, settings.frozen)
  scoring = ["teacher"] if config.objective.distill_weight else []
  scoring += ["reference"] if config.objective.reference_weight else []
  exploration, sampling, own = config.exploration, config.sampling, config.own_rollouts

  def sampler(samples: int, tokens: int, temperature: float, top_p: float = 1.0, top_k: int = 0):
    arguments = programs_lib.SamplingSettings(samples, tokens, temperature, top_p, top_k)
    return programs_lib.sampling_program(student.config, processor, arguments, name="the student's sampler")

  def teacher(used: bool, samples: int, tokens: int, temperature: float) -> Callable[[Prompts, jax.Array], Rollouts]:
    if not used:
      return programs_lib.no_teacher
    arguments = programs_lib.SamplingSettings(samples, tokens, temperature)
    return programs_lib.teacher_program(models["teacher"], processor, arguments)

  policy = (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k)
  return first, programs_lib.Programs(
    decode_weights=programs_lib.decode_weights_program(student.config, student.params, settings.compute_dtype),
    rollout=sampler(max(1, own), *policy),
    candidate=sampler(config.candidates, *policy),
    greedy=sampler(1, config.eval.max_new_tokens, 0.0),
    hint=teacher(config.explores, config.rounds_at_once, exploration.hint_tokens, exploration.hint_temperature),
    answer=teacher(
      config.teacher_answers,
      *(config.batch.rollouts - own, sampling.max_new_tokens, config.supervised.temperature),
    ),
    targets=programs_lib.targets_program([models[role] for role in scoring], settings.parts),
    update=update.Update(student.config, optimizer, token_loss(config, processor), settings, first),
  )


# One random stream per purpose; the order is part of what makes a run repeatable.
STREAMS = ("rollout", "hint", "candidate", "evaluation", "answer", "lora")


def random_key(seed: int, purpose: str, *counters: int) -> jax.Array:
  """Returns the random key of a purpose at a step (and a round)."""
  stream = jax.random.fold_in(jax.random.key(seed), STREAMS.index(purpose))
  return functools.reduce(jax.random.fold_in, counters, stream)


def round_keys(config: Config, purpose: str, step: int, attempts: Sequence[int]) -> np.ndarray:
  """Returns the data uint32[n, 2] of the keys of some rounds of a step."""
  keys = {attempt: random_key(config.seed, purpose, step, attempt) for attempt in dict.fromkeys(attempts)}
  data = {attempt: np.asarray(jax.random.key_data(key)) for attempt, key in keys.items()}
  return np.stack([data[attempt] for attempt in attempts])


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that `train` needs, fixed for the whole run."""

  config: Config
  mesh: jax.sharding.Mesh
  processor: processor_lib.Processor
  questions: Mapping[str, Sequence[Example]]  # split -> questions
  summaries: Mapping[str, Sequence[Summary]]  # "reading" and "checking" -> what was kept, repaired and dropped in it
  hooks: Sequence[Hook]
  interruption: Interruption
  folders: Mapping[str, pathlib.Path]  # role -> checkpoint
  models: Mapping[str, programs_lib.Model]  # role ("student", "teacher", "reference") -> model
  schedule: optax.Schedule
  state: TrainState  # before the first update
  programs: programs_lib.Programs
  batch: Callable[[int], tuple[Sequence[Example], Prompts]]  # `batches`: step, from 0 -> its questions and host prompts
  prompts: Callable[..., Prompts]  # `place_prompts`: (examples, wording, hints=None, sizes=None) -> prompts on the mesh
  score: Callable[[Sequence[Example], Rollouts], Groups]  # `rollouts.scored_groups`: decodes and scores rollouts


def row_sizes(config: Config) -> tuple[int, ...]:
  """Returns the numbers of failed prompts to which exploration pads, so that few programs are compiled.

  A batch of candidates has `config.rounds_at_once` times as many prompts.
  """
  rows = config.batch.prompts
  return tuple(sorted({max(1, rows // 4), rows}))


def place_prompts(
  processor: processor_lib.Processor,
  mesh: jax.sharding.Mesh,
  examples: Sequence[Example],
  wording: str,
  *,
  hints: Sequence[str] | None = None,
  sizes: Sequence[int] | None = None,
) -> Prompts:
  """Makes prompts on the mesh; every host decodes the images of its own rows.

  Args:
    processor: of the student.
    mesh: of the run.
    examples: the questions.
    wording: as in `data.prompts.prompt_text`.
    hints: one per question, for the hinted wordings.
    sizes: rising batch sizes; pads to the first that is large enough. None does not pad.

  Raises:
    ValueError: an image or a prompt cannot be used.
    OSError: another process could not read its images.
  """
  if sizes:
    padding = next(size for size in sizes if size >= len(examples)) - len(examples)
    examples = [*examples, *list(examples[:1]) * padding]
    hints = None if hints is None else [*hints, *list(hints[:1]) * padding]
  return sharding.place(mesh, multihost.run_on_all(lambda: processor.prompts(examples, wording, hints=hints)))


def show_progress(hooks: Sequence[Hook], what: str, done: int, total: int) -> None:
  """Tells every hook how far some work has come."""
  for hook in hooks:
    hook.progress(what, done, total)


def prepare(
  config: Config,
  *,
  records: Mapping[str, Sequence[Example]] | None,
  rewards: WeightedRewards,
  hooks: Sequence[Hook],
  interruption: Interruption,
) -> Run:
  """Loads and checks everything that a run needs.

  An unusable input on one process ends all processes. So does any difference between them.

  Raises:
    ValueError: a field, file or model that does not fit, and the way out.
    OSError: a file cannot be read, or another process has failed.
    Interrupted: the run was asked to stop meanwhile.
  """
  if records is None:
    splits.check_named(config.data)  # before a model is fetched
  scorer, mesh, student, processor = multihost.run_on_all(lambda: checked_parts(config, rewards, hooks))
  questions, summaries = usable_questions(config, processor, records, hooks)
  folders = multihost.run_on_all(lambda: model_folders(config, student, processor, hooks))
  checks.check_hosts_agree(config, questions=questions, models=folders)
  models = load_models(config, mesh, folders, hooks, interruption)
  with jax.set_mesh(mesh):
    state, compiled = build_programs(config, processor, models)
  interruption.check()
  return Run(
    config=config,
    mesh=mesh,
    processor=processor,
    questions=questions,
    summaries=summaries,
    hooks=hooks,
    interruption=interruption,
    folders=folders,
    models=models,
    schedule=make_schedule(config),
    state=state,
    programs=compiled,
    batch=batches(config, processor, questions["train"]),
    prompts=functools.partial(place_prompts, processor, mesh),
    score=functools.partial(scored_groups, processor, scorer),
  )


def checked_parts(
  config: Config, rewards: WeightedRewards, hooks: Sequence[Hook]
) -> tuple[Scorer, jax.sharding.Mesh, pathlib.Path, processor_lib.Processor]:
  """Checks the config and returns the scorer, the mesh, the student's folder and its processor.

  Raises:
    ValueError: a field, file or model that does not fit, and the way out.
    OSError: a remote folder cannot be read.
  """
  config.validate()
  checks.warn_of_prompts(config)
  scorer = make_scorer(config, rewards)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  checks.warn_of_replication(config, dict(mesh.shape))
  if config.model.teacher_memory == "host":
    programs_lib.check_host_memory(mesh)
  student = model_folder(config, "student", hooks)
  checks.warn_of_templates(config, student)
  processor = processor_lib.Processor.from_directory(
    student,
    templates=prompts.TEMPLATES[config.data.templates],
    resize=config.data.resize,
    prompt_buckets=tuple(config.data.prompt_buckets),
    patch_buckets=tuple(config.data.patch_buckets),
    held_rows=functools.partial(sharding.held_rows, mesh),
  )
  with jax.set_mesh(mesh):
    checks.check_attention(config, processor.config)
  checks.check_rank(config, processor.config)
  return scorer, mesh, student, processor


def usable_questions(
  config: Config,
  processor: processor_lib.Processor,
  records: Mapping[str, Sequence[Example]] | None,
  hooks: Sequence[Hook],
) -> tuple[dict[str, list[Example]], dict[str, list[Summary]]]:
  """Reads the questions of a run by split and leaves out what it cannot ask.

  Args:
    config: of the run.
    processor: of the student.
    records: split -> questions; None reads `config.data`.
    hooks: are told how far the check of the images has come.

  Returns:
    split -> questions, and summaries of what was repaired and dropped in "reading" and "checking".

  Raises:
    ValueError: the data cannot be read or used, or, unless `data.lenient`, a question cannot be asked. Or another
      process has read other questions, or has another config.
    OSError: a remote folder cannot be read, or another process has failed.
  """
  summaries: dict[str, list[Summary]] = {"reading": [], "checking": []}

  def refusals(split: str, examples: Sequence[Example]) -> Mapping[str, Rejected]:
    return usable.refusals(examples, processor, checks.prompt_wordings(config, split))

  def read() -> Mapping[str, Sequence[Example]]:
    questions = records
    if questions is None:
      progress = functools.partial(show_progress, hooks, "copying data, bytes")
      questions = splits.load(config.data, report=summaries["reading"].append, progress=progress)
    checks.check_questions(questions, config)
    return questions

  all_questions = multihost.run_on_all(read)
  checks.check_hosts_agree(config, questions=all_questions)  # before they are sharded across hosts by their numbers
  questions = checks.with_readable_images(
    all_questions,
    lenient=config.data.lenient,
    progress=functools.partial(show_progress, hooks, "checking images"),
    refusals=refusals,
    report=summaries["checking"].append,
  )
  checks.check_questions(questions, config)
  return questions, summaries


def batches(
  config: Config, processor: processor_lib.Processor, examples: Sequence[Example]
) -> Callable[[int], tuple[Sequence[Example], Prompts]]:
  """Returns step -> questions and host prompts of its batch; a thread prepares the next one."""

  def batch(step: int) -> tuple[Sequence[Example], Prompts]:
    chosen = batching.batch_at(examples, config.batch.prompts, seed=config.seed, step=step)
    return chosen, processor.prompts(chosen, config.data.prompt)

  return batching.Lookahead(batch, stop=config.train.steps)


def model_folder(config: Config, role: str, hooks: Sequence[Hook]) -> pathlib.Path:
  """Returns the local folder of `model.student` or `model.teacher`; a remote one is copied into the cache.

  Raises:
    ValueError: neither a folder nor a Hub id, or it cannot be copied.
    OSError: a remote folder cannot be read.
  """
  progress = functools.partial(show_progress, hooks, f"copying {role}, bytes")
  return checkpoint.resolved_folder(getattr(config.model, role), progress=progress)


def model_folders(
  config: Config, student: pathlib.Path, processor: processor_lib.Processor, hooks: Sequence[Hook]
) -> dict[str, pathlib.Path]:
  """Returns the local folders of the checkpoints of a run by role, given that of the student and its processor.

  Raises:
    ValueError: there is none, or a teacher with another vocabulary, image geometry or token ids than the student.
  """
  folders = {"student": student}
  if config.needs_teacher:
    folders["teacher"] = model_folder(config, "teacher", hooks)
    checks.check_teacher(config, processor, folders["teacher"])
  if config.objective.reference_weight:
    folders["reference"] = student
  return folders


def load_models(
  config: Config,
  mesh: jax.sharding.Mesh,
  folders: Mapping[str, pathlib.Path],
  hooks: Sequence[Hook],
  interruption: Interruption,
) -> dict[str, programs_lib.Model]:
  """Loads the models of a run by role: float32 weights where they are trained, the others frozen.

  Raises:
    ValueError: a folder does not hold the weights that its config describes.
    OSError: loading failed on another process.
    Interrupted: the run was asked to stop; checked after each model.
  """
  models = {}
  for role, folder in folders.items():
    progress = functools.partial(show_progress, hooks, f"loading {role}")
    load = functools.partial(checkpoint.load_pretrained, folder, model_dtype(config, role), mesh, progress=progress)
    models[role] = model_of(config, role, *multihost.run_on_all(load))
    interruption.check()
  return models


def model_dtype(config: Config, role: str) -> Any:
  """Returns the dtype in which the weights of a role are loaded."""
  return student_dtype(config.model) if role == "student" else jnp.dtype(config.model.teacher_dtype)


def model_of(config: Config, role: str, loaded: Qwen3VLConfig, params: Any) -> programs_lib.Model:
  """Builds a model with the run's attention. Offloads it or adds LoRA matrices if the config says so.

  Args:
    config: of the run.
    role: "student", or a frozen model's.
    loaded: sizes of the model.
    params: its weights in `model_dtype`, given up where they move to host memory; or their shapes with shardings.
  """
  described = dataclasses.replace(loaded, attention=config.model.attention)
  if role == "student":
    return with_lora(config, programs_lib.Model(described, params), random_key(config.seed, "lora"))
  to_host = config.model.teacher_memory == "host" and not compiling.is_abstract(params)
  return programs_lib.Model(described, programs_lib.offloaded(params) if to_host else params)
