"""The whole job as a function: preparations, steps, evaluations, checkpoints and the export.

How a run is shown and logged is up to the hooks.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from kepo_jax import multihost, sharding, storage
from kepo_jax.config import Config
from kepo_jax.rewards import WeightedRewards
from kepo_jax.training import compile_ahead as compile_ahead_lib
from kepo_jax.training import metrics as metrics_lib
from kepo_jax.training import setup
from kepo_jax.training.metrics import PhaseClock, StepResult, step_report
from kepo_jax.training.monitoring import CompileCounter, Profiler, Watchdog
from kepo_jax.training.optimizer import TrainState
from kepo_jax.training.prefetch import Prefetch
from kepo_jax.training.signals import Interrupted, Interruption
from kepo_jax.training.step import train_step
from kepo_jax.training.workdir import RunFiles
from kepo_jax.types import Example, Hook, StepReport


@dataclasses.dataclass(frozen=True)
class Result:
  """What `train` returns."""

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
  with files, watchdog, counter as compiled, stopping(hooks), telling_out_of_memory():
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
  """Whether an error, of whatever type, says that the memory of a device or of the host ran out."""
  said = str(error)
  signs = ("RESOURCE_EXHAUSTED", "ut of memory", "Failed to allocate", "ALLOC_FAILED")
  return isinstance(error, MemoryError) or any(sign in said for sign in signs)


@contextlib.contextmanager
def telling_out_of_memory() -> Iterator[None]:
  """Turns what jax raises where there is no room into OutOfMemory with the phase of the step."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError, ValueError) as error:
    if not is_out_of_memory(error):
      raise
    raise OutOfMemory(next(iter(getattr(error, "__notes__", [])), "the preparations or an evaluation")) from error


@contextlib.contextmanager
def stopping(hooks: Sequence[Hook]) -> Iterator[None]:
  """Tells the hooks of a run that ends early."""
  with contextlib.ExitStack() as early:
    for hook in hooks:
      early.callback(hook.stop)
    yield
    early.pop_all()


def run_steps(run: setup.Run, files: RunFiles, compiled: CompileCounter, *, given: bool) -> Result:
  """Everything after the preparations, from the first step, or the one after the checkpoint, to the export."""
  config = run.config
  rule = setup.split_rule(config, given=given)
  files.begin(run.questions, rule=rule, models=run.folders)
  multihost.together(lambda: files.record_summaries(run.summaries))
  state = files.restored(run.state)
  start, steps, prefetch = int(state.step), config.train.steps, Prefetch(run)
  multihost.together(lambda: announce(run, files, start, rule))
  if config.train.compile_ahead and start < steps:
    compile_ahead(run, files, state, start)
  if config.eval.test and config.eval.before and start == 0:
    evaluate(run, files, prefetch.weights(state), "before", start)
  if files.owes_validation:
    validate(run, files, prefetch.weights(state), start)
  for done in range(start, steps):
    clock = PhaseClock()
    with clock("prepare"):
      pending = prefetch.take(state, done)
    state, trained = train_step(run, state, done, pending, clock)
    with clock("prepare"):
      prefetch.begin(state, done + 1)  # the device samples while the host reports
    report = step_report(run, trained, clock)
    try:
      check_finite(run, state, trained, report)
    except NotFinite as error:
      tell(run, error.report, compiled.figures())
      dump = functools.partial(files.dump, f"not_finite/step-{done + 1}", error.batch, error.samples)
      folder = multihost.together(dump)
      raise ValueError(f"{error}{f' The batch is in {folder}.' if folder else ''}") from None
    tell(run, report, compiled.figures() | files.timing())
    validate_and_save(run, files, state, report.step, prefetch)
  if config.eval.test:
    evaluate(run, files, prefetch.weights(state), "after", steps)
  files.export(lambda folder: run.export(state, folder))
  multihost.together(lambda: finish(run))
  return Result(state=state, evaluations=files.evaluations, workdir=files.workdir)


def announce(run: setup.Run, files: RunFiles, start: int, rule: str) -> None:
  """Tells the hooks what the run is about to do; `rule` says in words how its questions were chosen."""
  for hook in run.hooks:
    hook.start(run.plan(files.workdir, start, files.positions, rule))


def finish(run: setup.Run) -> None:
  """Tells the hooks that all is done."""
  for hook in run.hooks:
    hook.finish()


def tell(run: setup.Run, report: StepReport, timing: dict[str, float]) -> None:
  """Hands a step to the hooks, with what was measured around it.

  Raises:
    OSError: a hook could not write, here or in another process.
  """

  def work() -> None:
    for hook in run.hooks:
      hook.step(dataclasses.replace(report, timing=report.timing | timing))

  multihost.together(work)


def compile_ahead(run: setup.Run, files: RunFiles, state: TrainState, start: int) -> None:
  """Compiles what the steps that are left, and the evaluations around them, are going to need.

  Raises:
    Interrupted: the run was asked to stop.
  """
  asked = run.config.eval
  validates = files.owes_validation or (asked.every and run.config.train.steps // asked.every > start // asked.every)
  splits = [*(["validation"] if validates else []), *(["test"] if asked.test else [])]
  try:
    compile_ahead_lib.compile_ahead(run, state, start, splits)
  except Interrupted:
    raise Interrupted(start, files.saved) from None


def evaluate(run: setup.Run, files: RunFiles, weights: Any, name: str, step: int) -> None:
  """The test "before" the first step or "after" the last one, with what was said to each question.

  Raises:
    OSError: what came out could not be written, here or in another process.
    Interrupted: the run was asked to stop; it is made on resume.
  """
  outputs: list[dict[str, Any]] = []
  try:
    result = run.evaluate(weights, "test", name, step, on_output=outputs.append)
  except Interrupted:
    raise Interrupted(step, files.saved) from None
  shown = {example.id: [storage.origin(image) for image in example.images] for example in run.questions["test"]}
  keep(run, files, name, result, [output | {"files": shown[output["id"]]} for output in outputs])


def keep(
  run: setup.Run,
  files: RunFiles,
  name: str,
  result: dict[str, Any],
  outputs: Sequence[Mapping[str, Any]] | None = None,
) -> None:
  """Hands an evaluation to the hooks and writes it down.

  Args:
    run: of the evaluation.
    files: of the run.
    name: "before", "validation" or "after".
    result: of `run.evaluate`.
    outputs: what was said to each question; None where that is not kept.

  Raises:
    OSError: it could not be written, here or in another process.
  """

  def work() -> None:
    for hook in run.hooks:
      hook.evaluation(result["step"], name, result)
    if outputs is not None:
      files.record_outputs(name, outputs)
    files.record(name, result)

  multihost.together(work)


def validate(run: setup.Run, files: RunFiles, weights: Any, step: int) -> None:
  """The validation of a step that a run before this one did not come to.

  Raises:
    OSError: what came out could not be written, here or in another process.
    Interrupted: the run was asked to stop; it is made on resume.
  """
  try:
    result = run.evaluate(weights, "validation", "validation", step)
  except Interrupted:
    raise Interrupted(step, files.saved) from None
  keep(run, files, "validation", result)


def validate_and_save(run: setup.Run, files: RunFiles, state: TrainState, step: int, prefetch: Prefetch) -> None:
  """What may follow a step: a validation, a checkpoint, and the end of a run that was asked to stop.

  Raises:
    Interrupted: it was, and the state is saved; a validation that was not finished is made on resume.
  """
  config = run.config
  owed = bool(config.eval.every) and step % config.eval.every == 0
  stop = run.interruption.requested()
  if owed and not stop:
    try:
      result = run.evaluate(prefetch.weights(state), "validation", "validation", step)
    except Interrupted:
      stop = True
    else:
      keep(run, files, "validation", result)
      owed = False
  files.save(step, state, now=stop or step == config.train.steps, positions=run.positions, validated=not owed)
  if stop:
    raise Interrupted(step, files.saved)


class NotFinite(Exception):
  """Loss or gradient were not finite in too many updates in a row."""

  def __init__(self, report: StepReport, updates: int, batch: Mapping[str, np.ndarray], samples: Any):
    """Keeps what shows it.

    Args:
      report: of the last step.
      updates: skipped in a row.
      batch: name -> array of its experience, on the host.
      samples: every rollout of it, JSON-able.
    """
    super().__init__(
      f"loss or gradient were not finite in {updates} updates in a row, the last one in step {report.step}; all of "
      f"them were skipped. Lower optimizer.learning_rate and go on with --resume --allow_config_change."
    )
    self.report, self.batch, self.samples = report, batch, samples


def check_finite(run: setup.Run, state: TrainState, trained: StepResult, report: StepReport) -> None:
  """Ends a run whose updates are skipped again and again.

  Raises:
    NotFinite: `optimizer.skip_limit` updates in a row were skipped.
  """
  if (skipped := int(state.skipped)) >= run.config.optimizer.skip_limit:
    leaves = jax.tree.leaves_with_path(trained.experience)
    batch = {jax.tree_util.keystr(path): sharding.to_host(x) for path, x in leaves}
    prompts = len(trained.gate)
    rows = metrics_lib.sample_records(
      trained.groups, trained.gate, step=trained.step, prompts=prompts, problem=run.problem
    )
    raise NotFinite(report, skipped, batch, rows)
