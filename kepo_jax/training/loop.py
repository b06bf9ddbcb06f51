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
from kepo_jax.objectives import advantages, gates
from kepo_jax.training import checks, setup, step
from kepo_jax.training import groups as grouping
from kepo_jax.training.files import RunFiles
from kepo_jax.training.profiling import CompileCounter, Profiler
from kepo_jax.training.step import TrainState
from kepo_jax.types import Example, Hook, StepReport


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
  rewards: grouping.WeightedRewards | None = None,
  hooks: Sequence[Hook] = (),
  resume: bool = False,
) -> Result:
  """Trains a student as the config says, and evaluates it before, during and after.

  Args:
    config: an `ml_collections.ConfigDict` with the fields of experiments/configs/grpo.py.
    workdir: folder for the config, checkpoints, evaluations and the exported model; "" writes nothing.
    records: split ("train", "validation", "test") -> questions; None reads `config.data`.
    rewards: name -> (function of (completion, example), weight), added to accuracy and format.
    hooks: follow the run; `kepo_jax.reporting.RunReporter` writes metrics, samples and plots.
    resume: continue from the newest checkpoint of `workdir`.

  Returns:
    the final state and all evaluations.

  Raises:
    ValueError: config, models, data or workdir do not fit together; says which field or file, and the way out.
  """
  files = RunFiles(workdir, config, resume=resume)
  hooks = [*hooks, Profiler()] if config.profile.steps else hooks
  run = setup.prepare(config, records=records, rewards=rewards or {}, hooks=hooks)
  with jax.set_mesh(run.mesh), files, contextlib.closing(CompileCounter()) as compiled:
    state = files.restore(run.state) if resume else run.state
    start = int(state.step)
    for hook in hooks:
      hook.start(run.plan(files.workdir, start))
    if config.eval.test and start == 0:
      files.record("before", run.evaluate(state, "test", "before", 0))
    for done in range(start, config.train.steps):
      state, report = train_step(run, state, done)
      report = dataclasses.replace(report, timing=report.timing | compiled.figures())
      for hook in hooks:
        hook.step(report)
      if config.eval.every and report.step % config.eval.every == 0:
        files.record("validation", run.evaluate(state, "validation", "validation", report.step))
      files.save(report.step, state, last=report.step == config.train.steps)
    if config.eval.test:
      files.record("after", run.evaluate(state, "test", "after", config.train.steps))
    files.export(lambda folder: run.export(state, folder))
    for hook in hooks:
      hook.finish()
  return Result(state=state, evaluations=files.evaluations, workdir=files.workdir)


def train_step(run: setup.Run, state: TrainState, done: int) -> tuple[TrainState, StepReport]:
  """One step of the method after `done` updates: the new state, and what happened."""
  config, programs = run.config, run.programs
  clock = PhaseClock()
  with clock("prepare"):
    examples, prompts = run.batch(done)
    placed = sharding.place(run.mesh, prompts)
  with clock("sampling"):
    actor = programs.decode_weights(state.params)
    rollouts = programs.rollout(actor, placed, run.key("rollout", done))
    groups = grouping.scored_groups(run.processor, examples, prompts, rollouts, run.rewards)
  metrics = grouping.reward_metrics(groups.scores)
  with clock("exploration"):
    outcome = explore(run, actor, groups, done)
    del actor  # the decode copy is freed before the update needs its memory
    slots = exploration.injections(outcome, config.batch.rollouts, seed=(config.seed, done))
    grouping.inject(groups, slots, run.rewards)
  with clock("teacher"):
    signal = grouping.gate_signal(groups.scores, config.objective.gate_signal)
    gate = np.asarray(
      gates.quality_gate(signal, threshold=config.objective.gate_threshold, mode=config.objective.gate_mode)
    )
    advantage = advantages.group_advantages(groups.scores["total"], kind=config.objective.advantage)
    experience = sharding.place(run.mesh, grouping.experience(groups, advantage, gate))
    targets = jax.block_until_ready(programs.targets(experience))
  with clock("update"):
    state, learned = programs.update(state, experience, targets)
    learned = step.means(jax.device_get(learned))
  metrics |= exploration.exploration_metrics(outcome, prompts=len(examples), rounds=config.exploration.rounds)
  metrics |= grouping.mixed_metrics(groups, gate, run.processor.end_ids)
  metrics |= learned | {"lr": float(run.schedule(done))}
  samples = grouping.sample_records(groups, gate, step=done + 1, prompts=config.log.samples, problem=run.problem)
  report = StepReport(step=done + 1, metrics=metrics, timing=clock.timing(groups.mask), samples=samples)
  return state, report


def explore(run: setup.Run, actor: Any, groups: grouping.Groups, done: int) -> exploration.Exploration:
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
    return grouping.candidates(run.processor, examples, hints, rollouts, run.rewards)

  failed = exploration.triggered(groups.scores["accuracy"], config.trigger) if checks.explores(run.config) else []
  return exploration.explore(failed, ask_hints, sample_hinted, rounds=config.rounds, replacements=config.replacements)


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

  def timing(self, mask: np.ndarray) -> dict[str, float]:
    """`seconds/<phase>`, `seconds/step` and `tokens_per_second/<phase>` of the completion tokens bool[P, G, T]."""
    tokens = float(mask.sum())
    seconds = self._seconds | {"step": time.perf_counter() - self._start}
    rates = {f"tokens_per_second/{phase}": tokens / seconds[phase] for phase in ("sampling", "update", "step")}
    return {f"seconds/{phase}": value for phase, value in seconds.items()} | rates
