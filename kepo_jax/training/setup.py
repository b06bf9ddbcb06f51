"""What a run is made of: models on the mesh, data and programs, checked against each other before the first step."""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kepo_jax import evaluation, processes, sharding
from kepo_jax.config import Config
from kepo_jax.data import images, limits, pipeline, prompts, splits, tokenization
from kepo_jax.data.rules import Rejected, Summary
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.rewards import Scorer, WeightedRewards
from kepo_jax.training import agreement, assembly, checks, compiling, programs, question_checks, residence
from kepo_jax.training.interruption import Interruption
from kepo_jax.training.state import TrainState
from kepo_jax.types import Example, Hook, Prompts, Rollouts, RunPlan

# One random stream per purpose; the order is part of what makes a run repeatable.
STREAMS = ("rollout", "hint", "candidate", "evaluation", "answer", "lora")


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that `job.train` needs, fixed for the whole run."""

  config: Config
  mesh: jax.sharding.Mesh
  processor: pipeline.Processor
  questions: Mapping[str, Sequence[Example]]  # split -> questions
  summaries: Mapping[str, Sequence[Summary]]  # "reading" and "checking" -> what was kept, repaired and dropped in it
  scorer: Scorer
  hooks: Sequence[Hook]
  interruption: Interruption
  folders: Mapping[str, pathlib.Path]  # role -> checkpoint
  models: Mapping[str, programs.Model]  # role ("student", "teacher", "reference") -> model
  schedule: optax.Schedule
  state: TrainState  # before the first update
  programs: programs.Programs
  batch: Callable[[int], tuple[Sequence[Example], Prompts]]  # steps done -> questions and host prompts of the next step

  @property
  def row_sizes(self) -> tuple[int, ...]:
    """Numbers of prompts to which those of exploration are padded, rising."""
    rows = self.config.batch.prompts
    return tuple(sorted({max(1, rows // 4), rows}))

  def distill_weight(self, done: int) -> float:
    """lambda in the step after `done` steps."""
    return float(self.config.objective.distill_weight * assembly.distill_factor(self.config)(done))

  def further_questions(self, done: int, extra: int, *, asked: Sequence[Example]) -> list[Example]:
    """P more training questions for a step, none of them asked before in it; empty where too few are left."""
    seen, wanted = {example.id for example in asked}, self.config.batch.prompts
    order = pipeline.shuffled(self.questions["train"], self.config.seed, "further", done, extra)
    fresh = [example for example in order if example.id not in seen]
    return fresh[:wanted] if len(fresh) >= wanted else []

  def key(self, purpose: str, *counters: int) -> jax.Array:
    """The random key of a purpose at a step (and a round)."""
    return random_key(self.config.seed, purpose, *counters)

  def problem(self, example: Example) -> str:
    """The question as a sampled record shows it: stem and options."""
    return prompts.problem(example, self.processor.templates)

  def prompts(self, examples: Sequence[Example], kind: str, *, hints: Sequence[str] | None = None) -> Prompts:
    """Prompts on the mesh, their number padded to one of `row_sizes` so that exploration compiles few programs."""
    size = next(size for size in self.row_sizes if size >= len(examples))
    filler = size - len(examples)
    examples = [*examples, *list(examples[:1]) * filler]
    hints = None if hints is None else [*hints, *list(hints[:1]) * filler]
    return sharding.place(self.mesh, self.host_prompts(examples, kind, hints=hints))

  def host_prompts(self, examples: Sequence[Example], kind: str, *, hints: Sequence[str] | None = None) -> Prompts:
    """Prompts on this host, whose images it decodes.

    Raises:
      ValueError: an image or a prompt cannot be used.
      OSError: so it is on another process, whose images are others: none goes on without the others.
    """
    return processes.together(lambda: self.processor.prompts(examples, kind, hints=hints))

  def evaluate(
    self, weights: Any, split: str, name: str, done: int, *, on_output: Callable[[dict[str, Any]], None] | None = None
  ) -> dict[str, Any]:
    """Greedy accuracy of the student on a split.

    Hooks are told how far it is, not what came out.

    Args:
      weights: the student's, as `programs.decode_weights` makes them.
      split: of `questions`.
      name: of the evaluation, as hooks are told.
      done: steps before it.
      on_output: receives what was said to each question, as from `evaluation.evaluate`.

    Raises:
      Interrupted: the run was asked to stop.
    """
    key = self.key("evaluation", done)

    def progress(questions: int, total: int) -> None:
      show_progress(self.hooks, f"evaluation {name}", questions, total)
      self.interruption.check()

    def sample(host_prompts: Prompts) -> Rollouts:
      return self.programs.greedy(weights, sharding.place(self.mesh, host_prompts), key)

    result = evaluation.evaluate(
      sample,
      self.processor,
      self.questions[split],
      batch_size=self.config.eval.prompts,
      train_modality=self.config.data.train_modality,
      kind=self.config.eval.prompt,
      progress=progress,
      on_output=on_output,
    )
    return {"step": done, "split": split} | result

  def positions(self) -> dict[str, int]:
    """Sizes of the files that the hooks write, which are on the disk by then."""
    return {name: size for hook in self.hooks for name, size in hook.position().items()}

  def plan(self, workdir: str, start: int, positions: Mapping[str, int], data: str) -> RunPlan:
    """What the run is about to do; `data` says in words which questions it has."""
    names = ["evaluation", *(["rollout"] if self.config.own_rollouts else []), "inputs", "gradients", "update"]
    names += ["hint", "hinted rollout"] if self.config.explores else []
    names += ["teacher's answers"] if self.config.teacher_answers else []
    names += [f"{role} scoring" for role in self.models if role != "student"]
    return RunPlan(
      config=self.config,
      workdir=workdir,
      models={role: each.config for role, each in self.models.items()},
      mesh=dict(self.mesh.shape),
      questions={split: len(examples) for split, examples in self.questions.items()},
      programs=tuple(names),
      start_step=start,
      data=data,
      images=self.image_cost(),
      positions=dict(positions),
    )

  def image_cost(self) -> str:
    """In words how images are brought to size, and the prompt tokens of a training question's image in each way."""
    asked, own = self.questions["train"], self.config.data.resize
    tokens = {way: self.processor.image_tokens(asked, resize=way) for way in sorted(images.RESIZES, key=own.__ne__)}
    if not tokens[own]:
      return "none"
    mine, *others = (f"{way}: {token_range(counts)}" for way, counts in tokens.items())
    return f"{mine} tokens each ({', '.join(others)})"

  def export(self, state: TrainState, directory: Any) -> None:
    """Writes the student as a Hugging Face folder, which names the wordings and the image size it was trained with.

    After training with LoRA its weights are merged ones, and the matrices lie in its folder adapter/.
    """
    student = self.models["student"]
    conversion.save_pretrained(
      directory,
      student.config,
      state.params,
      source=self.config.model.student,
      declared=tokenization.declarations(dataclasses.asdict(self.config.data)),
    )


def stream(seed: int, purpose: str) -> jax.Array:
  """The random key from which all keys of a purpose are made."""
  return jax.random.fold_in(jax.random.key(seed), STREAMS.index(purpose))


def random_key(seed: int, purpose: str, *counters: int) -> jax.Array:
  """The random key of a purpose at a step (and a round)."""
  return functools.reduce(jax.random.fold_in, counters, stream(seed, purpose))


def token_range(counts: Sequence[int]) -> str:
  """How many tokens, in words: one number, or the range and its middle."""
  if len(set(counts)) == 1:
    return str(counts[0])
  return f"{min(counts)} to {max(counts)}, {round(statistics.median(counts))} in the middle"


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

  What cannot be used on one of several processes ends all of them, and so does what is not the same on all.

  Raises:
    ValueError: a field, file or model that does not fit, and the way out.
    OSError: a file cannot be read, or another process has failed.
    Interrupted: the run was asked to stop meanwhile.
  """
  if records is None:
    splits.check_named(config.data)  # before a model is fetched
  scorer, mesh, student, processor = processes.together(lambda: checked_parts(config, rewards, hooks))
  questions, summaries = usable_questions(config, processor, records, hooks)
  folders = processes.together(lambda: model_folders(config, student, processor, hooks))
  agreement.check(config, questions=questions, models=folders)
  models = load_models(config, mesh, folders, hooks, interruption)
  with jax.set_mesh(mesh):
    state, compiled = assembly.build_programs(config, processor, models)
  interruption.check()
  return Run(
    config=config,
    mesh=mesh,
    processor=processor,
    questions=questions,
    summaries=summaries,
    scorer=scorer,
    hooks=hooks,
    interruption=interruption,
    folders=folders,
    models=models,
    schedule=assembly.schedule(config),
    state=state,
    programs=compiled,
    batch=batches(config, processor, questions["train"]),
  )


def checked_parts(
  config: Config, rewards: WeightedRewards, hooks: Sequence[Hook]
) -> tuple[Scorer, jax.sharding.Mesh, pathlib.Path, pipeline.Processor]:
  """Scorer, mesh, folder of the student and its processor: what every process makes for itself, of a config that fits.

  Raises:
    ValueError: a field, file or model that does not fit, and the way out.
    OSError: a remote folder cannot be read.
  """
  config.validate()
  checks.warn_of_prompts(config)
  scorer = assembly.scorer(config, rewards)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  checks.warn_of_replication(config, dict(mesh.shape))
  check_memories(config, mesh)
  student = model_folder(config, "student", hooks)
  checks.warn_of_templates(config, student)
  processor = pipeline.Processor.from_directory(
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


def check_memories(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Refuses to keep something in host memory where there is none.

  Raises:
    ValueError: the backend has no such memory.
  """
  if config.model.teacher_memory == "host":
    residence.check_host_memory(mesh, "model.teacher_memory=host", "device")


def usable_questions(
  config: Config,
  processor: pipeline.Processor,
  records: Mapping[str, Sequence[Example]] | None,
  hooks: Sequence[Hook],
) -> tuple[dict[str, list[Example]], dict[str, list[Summary]]]:
  """The questions of a run by split, each of which it can ask; and what was repaired and dropped on the way.

  Args:
    config: of the run.
    processor: of the student.
    records: split -> questions; None reads `config.data`.
    hooks: are told how far the check of the images has come.

  Raises:
    ValueError: the data cannot be read or used, or, unless `data.lenient`, a question cannot be asked. Or another
      process has read other questions, or has another config.
    OSError: a remote folder cannot be read, or another process has failed.
  """
  summaries: dict[str, list[Summary]] = {"reading": [], "checking": []}

  def refusals(split: str, examples: Sequence[Example]) -> Mapping[str, Rejected]:
    return limits.refusals(examples, processor, question_checks.prompt_kinds(config, split))

  def read() -> Mapping[str, Sequence[Example]]:
    found = records
    if found is None:
      found = splits.load(
        config.data,
        report=summaries["reading"].append,
        progress=functools.partial(show_progress, hooks, "copying data, bytes"),
      )
    question_checks.check_questions(found, config)
    return found

  found = processes.together(read)
  agreement.check(config, questions=found)  # before they are shared out by their numbers
  questions = question_checks.with_readable_images(
    found,
    lenient=config.data.lenient,
    progress=functools.partial(show_progress, hooks, "checking images"),
    refusals=refusals,
    report=summaries["checking"].append,
  )
  question_checks.check_questions(questions, config)
  return questions, summaries


def batches(
  config: Config, processor: pipeline.Processor, examples: Sequence[Example]
) -> Callable[[int], tuple[Sequence[Example], Prompts]]:
  """Batches of training prompts by number of updates done; a thread prepares the next one."""

  def batch(done: int) -> tuple[Sequence[Example], Prompts]:
    chosen = pipeline.batch_at(examples, config.batch.prompts, seed=config.seed, step=done)
    return chosen, processor.prompts(chosen, config.data.prompt)

  return pipeline.Lookahead(batch, stop=config.train.steps)


def model_folder(config: Config, role: str, hooks: Sequence[Hook]) -> pathlib.Path:
  """The local folder of `model.student` or `model.teacher`; a remote one is copied into the cache.

  Raises:
    ValueError: neither a folder nor a Hub id, or it cannot be copied.
    OSError: a remote folder cannot be read.
  """
  progress = functools.partial(show_progress, hooks, f"copying {role}, bytes")
  return conversion.resolved_folder(
    config.model.student if role == "student" else config.model.teacher, progress=progress
  )


def model_folders(
  config: Config, student: pathlib.Path, processor: pipeline.Processor, hooks: Sequence[Hook]
) -> dict[str, pathlib.Path]:
  """Local folders of the checkpoints that this config uses, by role, with that of the student and its processor given.

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
) -> dict[str, programs.Model]:
  """The models of a run by role; of the student float32 what is trained, the others frozen.

  Raises:
    ValueError: a folder does not hold the weights that its config describes.
    OSError: so it is on another process.
    Interrupted: the run was asked to stop; looked at after each model.
  """
  models = {}
  for role, folder in folders.items():
    progress = functools.partial(show_progress, hooks, f"loading {role}")
    load = functools.partial(conversion.load_pretrained, folder, model_dtype(config, role), mesh, progress=progress)
    models[role] = model_of(config, role, *processes.together(load))
    interruption.check()
  return models


def model_dtype(config: Config, role: str) -> Any:
  """The dtype in which the weights of a role are loaded."""
  return assembly.student_dtype(config.model) if role == "student" else jnp.dtype(config.model.teacher_dtype)


def model_of(config: Config, role: str, loaded: Qwen3VLConfig, params: Any) -> programs.Model:
  """A model as the run uses it: its form of attention, where its weights live, and its matrices of LoRA.

  Args:
    config: of the run.
    role: "student", or a frozen model's.
    loaded: sizes of the model.
    params: its weights in `model_dtype`, given up where they move to host memory; or their shapes with shardings.
  """
  made = dataclasses.replace(loaded, attention=config.model.attention)
  if role == "student":
    return assembly.with_lora(config, programs.Model(made, params), stream(config.seed, "lora"))
  to_host = config.model.teacher_memory == "host" and not compiling.is_abstract(params)
  return programs.Model(made, residence.on_host(params) if to_host else params)


def split_rule(config: Config, *, given: bool) -> str:
  """In words how the questions of a run were chosen.

  Args:
    config: of the run.
    given: whether the caller passed them.
  """
  data = config.data
  if given:
    return "given by the caller"
  numbers = f"{data.train_items} of {data.train_modality}, {data.validation_items} and {data.test_items} per modality"
  if data.split_files:
    return f"published split {data.split_files}: {numbers}"
  return f"{data.directory or 'phantom benchmark'}, sorted by data set and id, ordered by a seeded hash: {numbers}"
