"""A whole run as a function: preparations, steps, evaluations, checkpoints and the export.

Hooks decide how a run is shown and logged.
"""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from kepo_jax import evaluation, multihost, sharding, storage
from kepo_jax.config import Config
from kepo_jax.data import images, tokenization
from kepo_jax.data.processor import Processor
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.rewards import WeightedRewards
from kepo_jax.training import compile_ahead, setup
from kepo_jax.training.metrics import PhaseClock, StepResult, sample_records, step_report
from kepo_jax.training.monitoring import CompileCounter, Profiler, Watchdog
from kepo_jax.training.optimizer import TrainState
from kepo_jax.training.prefetch import Prefetch
from kepo_jax.training.signals import Interrupted, Interruption
from kepo_jax.training.step import train_step
from kepo_jax.training.workdir import RunFiles
from kepo_jax.types import Example, Hook, Prompts, Rollouts, RunPlan, StepReport


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of `train`."""

  state: TrainState
  evaluations: dict[str, Any]  # "before", "after", and "validation": a list with one entry per evaluated step
  workdir: str  # "" when nothing was written


def train(
  config: Config,
  *,
  workdir: epath.PathLike = "",
  records: Mapping[str, Sequence[Example]] | None = None,
  rewards: WeightedRewards | None = None,
  hooks: Sequence[Hook] = (),
  resume: bool = False,
  auto_resume: bool = False,
  allow_config_change: bool = False,
  interruption: Interruption | None = None,
) -> Result:
  """Trains a student as the config says, and evaluates it before, during and after.

  jax's settings stay the caller's: a second run compiles nothing again where `jax_compilation_cache_dir` names a
  folder, as the command line sees to.

  Args:
    config: see `kepo_jax.Config`.
    workdir: folder for the config, checkpoints, evaluations and the exported model, local or remote; "" writes nothing.
    records: split ("train", "validation", "test") -> questions; None reads `config.data`.
    rewards: name -> (function of (completion, example), weight), added to those of `config.reward`.
    hooks: follow the run; `kepo_jax.reporting.RunReporter` writes metrics, samples and plots.
    resume: continue from the newest intact checkpoint of `workdir`.
    auto_resume: do so if there is a run in `workdir`, else start one.
    allow_config_change: continue although config or questions are not those of the run.
    interruption: asks the run to stop; None listens to nothing.

  Returns:
    the final state and all evaluations.

  Raises:
    ValueError: config, models, data or workdir do not fit together; says which field or file, and the way out. Or
      loss or gradient were not finite in `optimizer.skip_limit` updates in a row.
    OSError: the workdir cannot be written.
    Interrupted: the run was asked to stop, and did after a step.
    OutOfMemory: the memory of a device ran out; names the phase.
  """
  interruption = interruption or Interruption()
  files = RunFiles(workdir, config, resume=resume, auto_resume=auto_resume, allow_config_change=allow_config_change)
  watchdog = Watchdog(config.log.stall_seconds, files.workdir)
  hooks = [*hooks, watchdog, *([Profiler()] if config.profile.steps else [])]
  counter = contextlib.closing(CompileCounter())
  with files, watchdog, counter as compiled, stopping(hooks), out_of_memory_errors():
    try:
      run = setup.prepare(config, records=records, rewards=rewards or {}, hooks=hooks, interruption=interruption)
    except Interrupted:
      raise Interrupted(*files.newest()) from None
    with jax.set_mesh(run.mesh):
      return run_steps(run, files, compiled, given=records is not None)


class OutOfMemory(Exception):
  """The memory of a device ran out."""

  def __init__(self, phase: str):
    super().__init__(f"out of memory in {phase}")
    self.phase = phase


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether an error, of whatever type, says that the memory of a device or of the host ran out."""
  signs = ("RESOURCE_EXHAUSTED", "ut of memory", "Failed to allocate", "ALLOC_FAILED")
  return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def out_of_memory_errors() -> Iterator[None]:
  """Turns what jax raises where there is no room into OutOfMemory with the phase of the step."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError, ValueError) as error:
    if not is_out_of_memory(error):
      raise
    raise OutOfMemory(next(iter(getattr(error, "__notes__", [])), "the preparations or an evaluation")) from error


@contextlib.contextmanager
def stopping(hooks: Sequence[Hook]) -> Iterator[None]:
  """Calls `stop` of every hook where the block is left by an error."""
  with contextlib.ExitStack() as early:
    for hook in hooks:
      early.callback(hook.stop)
    yield
    early.pop_all()


def run_steps(run: setup.Run, files: RunFiles, compiled: CompileCounter, *, given: bool) -> Result:
  """Trains and evaluates from the first step, or the one after the checkpoint, to the export."""
  config, hooks = run.config, run.hooks
  rule = split_rule(config, given=given)
  files.begin(run.questions, rule=rule, models=run.folders)
  multihost.run_on_all(lambda: files.record_summaries(run.summaries))
  state = files.restored(run.state)
  start, steps, prefetch = int(state.step), config.train.steps, Prefetch(run)

  def announce() -> None:
    plan = run_plan(run, files, start, rule)
    for hook in hooks:
      hook.start(plan)

  def tell(report: StepReport) -> None:
    for hook in hooks:
      hook.step(report)

  def finish() -> None:
    for hook in hooks:
      hook.finish()

  multihost.run_on_all(announce)
  if config.train.compile_ahead and start < steps:
    compile_remaining(run, files, state, start)
  if config.eval.test and config.eval.before and start == 0:
    evaluate(run, files, prefetch.weights(state), "before", start)
  if files.owes_validation:
    evaluate(run, files, prefetch.weights(state), "validation", start)
  for step in range(start, steps):
    clock = PhaseClock()
    with clock("prepare"):
      pending = prefetch.take(state, step)
    state, trained = train_step(run, state, pending, clock)
    with clock("prepare"):
      prefetch.start(state, step + 1)  # the device samples while the host reports
    report = step_report(run, trained, clock)
    report = dataclasses.replace(report, timing=report.timing | compiled.metrics() | files.timing())
    multihost.run_on_all(functools.partial(tell, report))
    check_finite(run, files, state, trained)
    validate_and_save(run, files, state, step + 1, prefetch)
  if config.eval.test:
    evaluate(run, files, prefetch.weights(state), "after", steps)
  files.export(functools.partial(export, run, state))
  multihost.run_on_all(finish)
  return Result(state=state, evaluations=files.evaluations, workdir=files.workdir)


def split_rule(config: Config, *, given: bool) -> str:
  """Describes in words how the questions of a run were chosen; `given` by the caller, or read as `config.data` says."""
  data = config.data
  if given:
    return "given by the caller"
  numbers = f"{data.train_items} of {data.train_modality}, {data.validation_items} and {data.test_items} per modality"
  if data.split_files:
    return f"published split {data.split_files}: {numbers}"
  return f"{data.directory or 'phantom benchmark'}, sorted by data set and id, ordered by a seeded hash: {numbers}"


def run_plan(run: setup.Run, files: RunFiles, start: int, rule: str) -> RunPlan:
  """Builds what the hooks are told before the first step; `rule` says in words how the questions were chosen."""
  config = run.config
  programs = ["evaluation", *(["rollout"] if config.own_rollouts else []), "inputs", "gradients", "update"]
  programs += ["hint", "hinted rollout"] if config.explores else []
  programs += ["teacher's answers"] if config.teacher_answers else []
  programs += [f"{role} scoring" for role in run.models if role != "student"]
  return RunPlan(
    config=config,
    workdir=files.workdir,
    models={role: loaded.config for role, loaded in run.models.items()},
    mesh=dict(run.mesh.shape),
    questions={split: len(examples) for split, examples in run.questions.items()},
    programs=tuple(programs),
    start_step=start,
    data=rule,
    images=image_tokens(run.processor, run.questions["train"], config.data.resize),
    positions=dict(files.positions),
  )


def image_tokens(processor: Processor, examples: Sequence[Example], resize: str) -> str:
  """Describes in words the prompt tokens of an image as the run resizes it, and as it would otherwise."""

  def described(counts: Sequence[int]) -> str:
    if len(set(counts)) == 1:
      return str(counts[0])
    return f"{min(counts)} to {max(counts)}, {round(statistics.median(counts))} in the middle"

  tokens = {way: processor.image_tokens(examples, resize=way) for way in sorted(images.RESIZES, key=resize.__ne__)}
  if not tokens[resize]:
    return "none"
  chosen, *others = (f"{way}: {described(counts)}" for way, counts in tokens.items())
  return f"{chosen} tokens each ({', '.join(others)})"


def compile_remaining(run: setup.Run, files: RunFiles, state: TrainState, start: int) -> None:
  """Compiles what the steps that are left, and the evaluations around them, are going to need.

  Raises:
    Interrupted: the run was asked to stop.
  """
  settings, steps = run.config.eval, run.config.train.steps
  validates = files.owes_validation or (settings.every and steps // settings.every > start // settings.every)
  splits = [*(["validation"] if validates else []), *(["test"] if settings.test else [])]
  try:
    compile_ahead.compile_ahead(run, state, start, splits)
  except Interrupted:
    raise Interrupted(start, files.saved) from None


def evaluate(run: setup.Run, files: RunFiles, weights: Any, name: str, step: int) -> None:
  """Evaluates the student greedily, tells the hooks the result and writes it down.

  Args:
    run: of the evaluation.
    files: of the run.
    weights: the student's, from `programs.decode_weights`.
    name: "before" or "after", on the test questions, whose outputs are kept; or "validation".
    step: updates done.

  Raises:
    OSError: the result could not be written, here or on another process.
    Interrupted: the run was asked to stop; the evaluation is made on resume.
  """
  config, split = run.config, "validation" if name == "validation" else "test"
  key = setup.random_key(config.seed, "evaluation", step)
  outputs: list[dict[str, Any]] = []

  def progress(count: int, total: int) -> None:
    setup.show_progress(run.hooks, f"evaluation {name}", count, total)
    run.interruption.check()

  def sample(host_prompts: Prompts) -> Rollouts:
    return run.programs.greedy(weights, sharding.place(run.mesh, host_prompts), key)

  try:
    accuracies = evaluation.evaluate(
      sample,
      run.processor,
      run.questions[split],
      batch_size=config.eval.prompts,
      train_modality=config.data.train_modality,
      kind=config.eval.prompt,
      progress=progress,
      on_output=outputs.append if split == "test" else None,
    )
  except Interrupted:
    raise Interrupted(step, files.saved) from None
  result = {"step": step, "split": split} | accuracies
  paths = {example.id: [storage.origin(image) for image in example.images] for example in run.questions[split]}

  def record() -> None:
    for hook in run.hooks:
      hook.evaluation(step, name, result)
    if split == "test":
      files.record_outputs(name, [output | {"files": paths[output["id"]]} for output in outputs])
    files.record(name, result)

  multihost.run_on_all(record)


def validate_and_save(run: setup.Run, files: RunFiles, state: TrainState, step: int, prefetch: Prefetch) -> None:
  """Validates and saves a state where it is time to, and ends a run that was asked to stop.

  Raises:
    Interrupted: it was, and the state is saved; a validation that was not finished is made on resume.
  """
  config = run.config
  owed = bool(config.eval.every) and step % config.eval.every == 0
  stop = run.interruption.requested()
  if owed and not stop:
    try:
      evaluate(run, files, prefetch.weights(state), "validation", step)
      owed = False
    except Interrupted:
      stop = True

  def positions() -> dict[str, int]:
    return {name: size for hook in run.hooks for name, size in hook.position().items()}

  files.save(step, state, now=stop or step == config.train.steps, positions=positions, validated=not owed)
  if stop:
    raise Interrupted(step, files.saved)


def check_finite(run: setup.Run, files: RunFiles, state: TrainState, trained: StepResult) -> None:
  """Ends a run whose updates are skipped again and again; keeps the batch of the last one.

  Raises:
    ValueError: loss or gradient were not finite in `optimizer.skip_limit` updates in a row.
  """
  if (skipped := int(state.skipped)) < run.config.optimizer.skip_limit:
    return
  step, leaves = trained.step, jax.tree.leaves_with_path(trained.experience)
  batch = {jax.tree_util.keystr(path): sharding.to_host(x) for path, x in leaves}
  prompts, templates = len(trained.gate), run.processor.templates
  rows = sample_records(trained.groups, trained.gate, step=step, prompts=prompts, templates=templates)
  folder = multihost.run_on_all(lambda: files.dump(f"not_finite/step-{step}", batch, rows))
  raise ValueError(
    f"loss or gradient were not finite in {skipped} updates in a row, the last one in step {step}; all of them were "
    f"skipped. Lower optimizer.learning_rate and go on with --resume --allow_config_change."
    f"{f' The batch is in {folder}.' if folder else ''}"
  )


def export(run: setup.Run, state: TrainState, folder: Any) -> None:
  """Writes the student as a Hugging Face folder, which names the wordings and the image size it was trained with.

  After training with LoRA its weights are merged ones, and the matrices lie in its folder adapter/.
  """
  declared = tokenization.declarations(dataclasses.asdict(run.config.data))
  source = run.config.model.student
  checkpoint.save_pretrained(folder, run.models["student"].config, state.params, source=source, declared=declared)
