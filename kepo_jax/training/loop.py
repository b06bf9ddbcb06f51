"""The algorithm: sample, score, explore, distil, update; readable in one sitting.

`train` is the whole job as a function. What surrounds a step (models, programs, data, files) is made in `setup`;
how a run is shown and logged is up to the hooks.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from kepo_jax import exploration, sharding
from kepo_jax.data.prompts import gold_completion
from kepo_jax.objectives import advantages, gates
from kepo_jax.rewards import WeightedRewards
from kepo_jax.training import checks, figures, setup, step
from kepo_jax.training import groups as grouping
from kepo_jax.training.files import RunFiles
from kepo_jax.training.groups import Groups
from kepo_jax.training.interruption import Interrupted, Interruption
from kepo_jax.training.profiling import CompileCounter, Profiler
from kepo_jax.training.state import TrainState
from kepo_jax.training.watchdog import Watchdog
from kepo_jax.types import Example, Experience, Hook, Prompts, StepReport


@dataclasses.dataclass(frozen=True)
class Result:
  """What `train` returns."""

  state: TrainState
  evaluations: dict[str, Any]  # "before", "after", and "validation": a list with one entry per evaluated step
  workdir: str  # "" when nothing was written


def train(
  config: Any,
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

  Args:
    config: an `ml_collections.ConfigDict` with the fields of experiments/configs/grpo.py.
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
  """
  interruption = interruption or Interruption()
  files = RunFiles(workdir, config, resume=resume, auto_resume=auto_resume, allow_config_change=allow_config_change)
  watchdog = Watchdog(config.log.stall_seconds, files.workdir)
  hooks = [*hooks, watchdog, *([Profiler()] if config.profile.steps else [])]
  with files, watchdog, contextlib.closing(CompileCounter()) as compiled, stopping(hooks):
    run = setup.prepare(config, records=records, rewards=rewards or {}, hooks=hooks, interruption=interruption)
    with jax.set_mesh(run.mesh):
      return run_steps(run, files, compiled, given=records is not None)


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
  files.begin(run.questions, rule=setup.split_rule(config, given=given))
  files.record_summaries(run.summaries)
  state = files.restored(run.state)
  start, steps = int(state.step), config.train.steps
  for hook in run.hooks:
    hook.start(run.plan(files.workdir, start, files.positions))
  if start == 0:
    evaluate_test(run, files, state, "before", start)
  if files.owes_validation:
    files.record("validation", run.evaluate(state, "validation", "validation", start))
  for done in range(start, steps):
    try:
      state, report = train_step(run, state, done)
    except NotFinite as error:
      tell(run, error.report, compiled.figures())
      folder = files.dump(f"not_finite/step-{done + 1}", error.batch, error.samples)
      raise ValueError(f"{error}{f' The batch is in {folder}.' if folder else ''}") from None
    tell(run, report, compiled.figures() | files.timing())
    validate_and_save(run, files, state, report.step)
  evaluate_test(run, files, state, "after", steps)
  files.export(lambda folder: run.export(state, folder))
  for hook in run.hooks:
    hook.finish()
  return Result(state=state, evaluations=files.evaluations, workdir=files.workdir)


def tell(run: setup.Run, report: StepReport, timing: dict[str, float]) -> None:
  """Hands a step to the hooks, with what was measured around it."""
  for hook in run.hooks:
    hook.step(dataclasses.replace(report, timing=report.timing | timing))


def evaluate_test(run: setup.Run, files: RunFiles, state: TrainState, name: str, step: int) -> None:
  """The evaluation before or after training, if the config wants it.

  Raises:
    Interrupted: the run was asked to stop; it is made again on resume.
  """
  if run.config.eval.test:
    try:
      files.record(name, run.evaluate(state, "test", name, step))
    except Interrupted:
      raise Interrupted(step, files.saved) from None


def validate_and_save(run: setup.Run, files: RunFiles, state: TrainState, step: int) -> None:
  """What may follow a step: a validation, a checkpoint, and the end of a run that was asked to stop.

  Raises:
    Interrupted: it was, and the state is saved; a validation that was not finished is made on resume.
  """
  config = run.config
  owed = bool(config.eval.every) and step % config.eval.every == 0
  stop = run.interruption.requested()
  if owed and not stop:
    try:
      files.record("validation", run.evaluate(state, "validation", "validation", step))
      owed = False
    except Interrupted:
      stop = True
  files.save(step, state, now=stop or step == config.train.steps, positions=run.positions, validated=not owed)
  if stop:
    raise Interrupted(step, files.saved)


@dataclasses.dataclass
class Collected:
  """The groups of a step, ready for the update."""

  groups: Groups
  prompts: Prompts  # of the groups, on the mesh
  metrics: dict[str, float]
  records: tuple[dict[str, Any], ...] = ()  # hints and candidates of explored prompts, JSON-able


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


def train_step(run: setup.Run, state: TrainState, done: int) -> tuple[TrainState, StepReport]:
  """One step of the method after `done` steps: the new state, and what happened.

  Raises:
    NotFinite: `optimizer.skip_limit` updates in a row were skipped.
  """
  config, clock = run.config, PhaseClock()
  collected = collect(run, state, done, clock)
  groups, metrics = collected.groups, collected.metrics
  with clock("teacher"):
    kept = kept_rows(run, groups)
    gate = gated(run, groups) & kept
    experience = experience_of(run, groups, collected.prompts, gate, kept)
    targets = jax.block_until_ready(run.programs.targets(experience.prompts, experience.tokens))
  with clock("update"):
    compare = run.compares and (done + 1) % config.log.gradients_every == 0
    state, learned = run.programs.update(state, experience, targets, compare=compare)
    metrics |= step.means(jax.device_get(learned))
  metrics |= figures.mixed_metrics(groups, run.processor.end_ids) | {"lr": float(run.schedule(done))}
  if config.objective.distill_weight:
    metrics |= figures.gate_metrics(groups, gate) | {"lambda": run.distill_weight(done)}
  samples = figures.sample_records(groups, gate, step=done + 1, prompts=config.log.samples, problem=run.problem)
  timing = clock.timing(sampled=groups.mask[~groups.supervised].sum(), trained=groups.mask.sum())
  report = StepReport(step=done + 1, metrics=metrics, timing=timing, samples=samples + collected.records)
  if (skipped := int(state.skipped)) >= config.optimizer.skip_limit:
    batch = {jax.tree_util.keystr(path): sharding.to_host(x) for path, x in jax.tree.leaves_with_path(experience)}
    everything = figures.sample_records(groups, gate, step=done + 1, prompts=len(gate), problem=run.problem)
    raise NotFinite(report, skipped, batch, everything)
  return state, report


def collect(run: setup.Run, state: TrainState, done: int, clock: "PhaseClock") -> Collected:
  """The student's rollouts, explored, and supervised rows behind them, as the config mixes them."""
  with clock("prepare"):
    examples, host_prompts = run.batch(done)
    prompts = sharding.place(run.mesh, host_prompts)
  if not run.own_rollouts:
    with clock("supervision"):
      return Collected(supervised_rows(run, examples, prompts, done), prompts, {})
  collected = sample_and_explore(run, state, examples, prompts, done, clock)
  if run.own_rollouts < run.config.batch.rollouts:
    with clock("supervision"):
      given = supervised_rows(run, collected.groups.examples, collected.prompts, done)
      collected.groups = grouping.joined(collected.groups, given, axis=1)
  return collected


def sample_and_explore(
  run: setup.Run, state: TrainState, examples: Sequence[Example], prompts: Prompts, done: int, clock: "PhaseClock"
) -> Collected:
  """The student's groups after injection."""
  config = run.config
  with clock("sampling"):
    actor = run.programs.decode_weights(state.params)
    groups = own_groups(run, actor, examples, prompts, done)
  metrics = figures.reward_metrics(groups)
  if config.sampling.dynamic_rounds:
    with clock("prepare"):
      groups, asked = most_useful(run, groups)
      prompts = sharding.place(run.mesh, run.processor.prompts(groups.examples, config.data.prompt))
    metrics |= asked
  with clock("exploration"):
    outcome = explore(run, actor, groups, done)
    slots = exploration.injections(outcome, run.own_rollouts, seed=(config.seed, done))
    grouping.inject(groups, slots, run.scorer)
  # The decode copy ends with this function: its memory is free before the update needs it.
  explored = exploration.exploration_metrics(outcome, prompts=len(groups.examples), rounds=config.exploration.rounds)
  records = figures.hint_records(outcome, groups, step=done + 1, prompts=config.log.samples)
  return Collected(groups, prompts, metrics | explored, records)


def own_groups(run: setup.Run, actor: Any, examples: Sequence[Example], prompts: Prompts, done: int) -> Groups:
  """The student's rollouts; of further prompts as well, until P groups have a signal or the rounds are over (DAPO)."""

  def sampled(examples: Sequence[Example], prompts: Prompts) -> Groups:
    rollouts = run.programs.rollout(actor, prompts, run.key("rollout", done))
    return grouping.scored_groups(run.processor, examples, rollouts, run.scorer)

  groups = sampled(examples, prompts)
  for extra in range(1, run.config.sampling.dynamic_rounds + 1):
    further = run.further_questions(done, extra, asked=groups.examples)
    if useful(run, groups).sum() >= len(examples) or not further:
      break
    more = sharding.place(run.mesh, run.processor.prompts(further, run.config.data.prompt))
    groups = grouping.joined(groups, sampled(further, more), axis=0)
  return groups


def useful(run: setup.Run, groups: Groups) -> np.ndarray:
  """bool[P]: groups with a signal, and those that exploration may give one."""
  found = grouping.has_signal(groups)
  found[asking(run, groups)] = True
  return found


def most_useful(run: setup.Run, groups: Groups) -> tuple[Groups, dict[str, float]]:
  """The first P useful groups, filled up with others where there are too few; and how many there were."""
  usable, wanted = useful(run, groups), run.config.batch.prompts
  order = np.argsort(~usable, kind="stable")  # useful ones first, in the order in which they were asked
  asked = {"dynamic/asked": float(len(usable)), "dynamic/useful_frac": float(usable.mean())}
  return grouping.selected(groups, sorted(order[:wanted])), asked


def asking(run: setup.Run, groups: Groups) -> list[int]:
  """Rows of the batch that ask for hints."""
  if not checks.explores(run.config):
    return []
  return exploration.triggered(groups.scores["accuracy"], groups.scores["total"], run.config.exploration.trigger)


def explore(run: setup.Run, actor: Any, groups: Groups, done: int) -> exploration.Exploration:
  """Hinted sampling for the failed prompts of a step."""
  config = run.config.exploration

  def ask_hints(rows: Sequence[int], attempt: int) -> list[str]:
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, "hint_request")
    hints = run.programs.hint(prompts, run.key("hint", done, attempt))
    return [row[0] for row in grouping.decode(run.processor, hints)[-1][: len(rows)]]

  def sample_hinted(rows: Sequence[int], hints: Sequence[str], attempt: int) -> list[list[exploration.Candidate]]:
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, config.hint_prompt, hints=hints)
    rollouts = run.programs.candidate(actor, prompts, run.key("candidate", done, attempt))
    return grouping.candidates(run.processor, examples, hints, rollouts, run.scorer)

  return exploration.explore(
    asking(run, groups),
    ask_hints,
    sample_hinted,
    rounds=config.rounds,
    replacements=config.replacements,
    accept=exploration.Acceptance(config.acceptance, config.leak_filter, config.quoted_words),
    hints=config.hints,
  )


def supervised_rows(run: setup.Run, examples: Sequence[Example], prompts: Prompts, done: int) -> Groups:
  """What others wrote: gold answers, or those answers of the teacher that the reward accepts; the rest is empty."""
  config = run.config
  if config.supervised.source == "answer":
    texts = [gold_completion(example, run.processor.templates) for example in examples]
    rows = config.batch.rollouts - run.own_rollouts
    given = grouping.given_rollouts(run.processor, texts, rows, config.sampling.max_new_tokens)
    return grouping.supervised_groups(grouping.scored_groups(run.processor, examples, given, run.scorer))
  answers = run.programs.answer(prompts, run.key("answer", done))
  groups = grouping.scored_groups(run.processor, examples, answers, run.scorer)
  accepted = (groups.scores["accuracy"] == 1) & (groups.scores["format"] == 1)
  return grouping.supervised_groups(groups, accepted=accepted)


def gated(run: setup.Run, groups: Groups) -> np.ndarray:
  """bool[P, G]: rollouts that are distilled."""
  objective = run.config.objective
  if not objective.distill_weight:
    return np.zeros_like(groups.supervised)
  signal = grouping.gate_signal(groups.scores, objective.gate_signal)
  gate = np.asarray(gates.quality_gate(signal, threshold=objective.gate_threshold, mode=objective.gate_mode))
  return gate if objective.gate_injected else gate & ~groups.injected


def kept_rows(run: setup.Run, groups: Groups) -> np.ndarray:
  """bool[P, G]: rollouts that enter the loss."""
  if run.config.objective.mask_truncated:
    return ~grouping.truncated(groups, run.processor.end_ids)
  return np.ones_like(groups.supervised)


def experience_of(run: setup.Run, groups: Groups, prompts: Prompts, gate: np.ndarray, kept: np.ndarray) -> Experience:
  """The batch of the update on the mesh: advantages of the student's own groups, and everything else of their rows."""
  config = run.config
  advantage = np.zeros(groups.supervised.shape, np.float32)
  if own := run.own_rollouts:
    advantage[:, :own] = advantages.group_advantages(groups.scores["total"][:, :own], kind=config.objective.advantage)
  hinted = None
  if config.objective.off_context == "keep_hint":
    kind = config.exploration.hint_prompt
    hinted = grouping.hinted_rows(groups, lambda examples, hints: run.processor.prompts(examples, kind, hints=hints))
  batch = grouping.experience(groups, prompts, advantage, gate, kept=kept, hinted=hinted)
  return sharding.place(run.mesh, batch)


class PhaseClock:
  """Seconds spent in each phase of a step."""

  def __init__(self):
    self._start = time.perf_counter()
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    """Adds the seconds inside the block to `phase`."""
    start = time.perf_counter()
    yield
    self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

  def timing(self, *, sampled: int, trained: int) -> dict[str, float]:
    """`seconds/<phase>`, `seconds/step`, and `tokens_per_second/<phase>` of sampling, the update and the whole step.

    Args:
      sampled: completion tokens of the batch that the student sampled.
      trained: completion tokens of the batch.
    """
    seconds = self._seconds | {"step": time.perf_counter() - self._start}
    tokens = {"sampling": sampled, "update": trained, "step": trained}
    rates = {f"tokens_per_second/{phase}": float(n) / seconds[phase] for phase, n in tokens.items() if phase in seconds}
    return {f"seconds/{phase}": value for phase, value in seconds.items()} | rates
