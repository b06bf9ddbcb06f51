"""The algorithm of a step: sample, score, explore, distil, update; readable in one sitting.

What surrounds the steps of a run is in `job`, and what they are made of (models, programs, data) is made in `setup`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kepo_jax import exploration, sharding
from kepo_jax.data.prompts import gold_completion
from kepo_jax.objectives import advantages, gates
from kepo_jax.training import figures, setup, step
from kepo_jax.training import groups as grouping
from kepo_jax.training.forward import Target
from kepo_jax.training.groups import Groups
from kepo_jax.training.starting import Ahead, Started
from kepo_jax.training.state import TrainState
from kepo_jax.types import Example, Experience, Prompts, StepReport


@dataclasses.dataclass
class Collected:
  """The groups of a step, ready for the update."""

  groups: Groups
  prompts: Prompts  # of the groups, on the mesh
  metrics: dict[str, float]
  sampled: int = 0  # tokens of the student, those of candidates and of rollouts that were replaced included
  written: int = 0  # tokens of the teacher: hints, and answers whether accepted or not
  records: tuple[dict[str, Any], ...] = ()  # hints and candidates of explored prompts, JSON-able
  targets: tuple[Target, ...] | None = None  # what teacher and reference say about the tokens, where they were asked


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


def train_step(run: setup.Run, state: TrainState, done: int, ahead: Ahead) -> tuple[TrainState, StepReport]:
  """One step of the method after `done` steps: the new state, and what happened.

  At its end the device begins the next one, while the host says what happened in this.

  Raises:
    NotFinite: `optimizer.skip_limit` updates in a row were skipped.
  """
  config, clock = run.config, PhaseClock()
  with clock("prepare"):
    begun = ahead.take(state, done)
  collected = collect(run, begun, clock)
  groups, metrics = collected.groups, collected.metrics
  with clock("teacher"):
    kept = kept_rows(run, groups)
    gate = gated(run, groups) & kept
    experience = experience_of(run, groups, collected.prompts, gate, kept)
    if collected.targets is None:
      collected.targets = run.programs.targets(experience.prompts, experience.tokens)
    jax.block_until_ready(collected.targets)
  with clock("update"):
    compare = run.compares and (done + 1) % config.log.gradients_every == 0
    state, learned = run.programs.update(state, experience, collected.targets, compare=compare)
    metrics |= step.means(jax.device_get(learned))
  collected.targets = None  # gigabytes of hidden states, which the next rollouts may need the room of
  with clock("prepare"):
    ahead.begin(state, done + 1)
  metrics |= figures.mixed_metrics(groups, run.processor.end_ids) | {"lr": float(run.schedule(done))}
  metrics |= token_metrics(run, collected, kept)
  if config.objective.distill_weight:
    metrics |= figures.gate_metrics(groups, gate) | {"lambda": run.distill_weight(done)}
  samples = figures.sample_records(groups, gate, step=done + 1, prompts=config.log.samples, problem=run.problem)
  timing = clock.timing(tokens=groups.mask.sum())
  report = StepReport(step=done + 1, metrics=metrics, timing=timing, samples=samples + collected.records)
  if (skipped := int(state.skipped)) >= config.optimizer.skip_limit:
    batch = {jax.tree_util.keystr(path): sharding.to_host(x) for path, x in jax.tree.leaves_with_path(experience)}
    everything = figures.sample_records(groups, gate, step=done + 1, prompts=len(gate), problem=run.problem)
    raise NotFinite(report, skipped, batch, everything)
  return state, report


def token_metrics(run: setup.Run, collected: Collected, kept: np.ndarray) -> dict[str, float]:
  """Completion tokens of a step by what was done with them, which is what a method costs on any device.

  Args:
    run: of the step.
    collected: its groups.
    kept: bool[P, G], rollouts that enter the loss.
  """
  mask = collected.groups.mask
  counts = {"trained": run.config.batch.updates * int(mask[kept].sum())}
  if run.own_rollouts:
    counts["sampled"] = collected.sampled
  if run.config.explores or run.config.teacher_answers:
    counts["written"] = collected.written
  if run.config.objective.distill_weight:
    counts["scored"] = int(mask.sum())
  return {f"tokens/{name}": float(count) for name, count in counts.items()}


def collect(run: setup.Run, begun: Started, clock: "PhaseClock") -> Collected:
  """The student's rollouts, explored, and supervised rows behind them, as the config mixes them."""
  if begun.rollouts is None:
    with clock("supervision"):
      given, written = supervised_rows(run, begun.examples, begun.prompts, begun.done)
      return Collected(given, begun.prompts, {}, written=written)
  collected = sample_and_explore(run, begun, clock)
  if run.own_rollouts < run.config.batch.rollouts:
    with clock("supervision"):
      given, written = supervised_rows(run, collected.groups.examples, collected.prompts, begun.done)
      collected.written += written
      collected.groups = grouping.joined(collected.groups, given, axis=1)
  return collected


def sample_and_explore(run: setup.Run, begun: Started, clock: "PhaseClock") -> Collected:
  """The student's groups after injection."""
  config, done, prompts = run.config, begun.done, begun.prompts
  targets = scored_at_once(run, begun, clock) if run.samples_all else None
  with clock("sampling"):
    groups = own_groups(run, begun)
  sampled = int(groups.mask.sum())
  metrics = figures.reward_metrics(groups)
  if config.sampling.dynamic_rounds:
    with clock("prepare"):
      groups, asked = most_useful(run, groups)
      prompts = sharding.place(run.mesh, run.host_prompts(groups.examples, config.data.prompt))
    metrics |= asked
  with clock("exploration"):
    outcome, written = explore(run, begun.actor, groups, done)
    sampled += sum(int(each.mask.sum()) for tried in outcome.candidates.values() for each in tried)
    slots = exploration.injections(outcome, run.own_rollouts, seed=(config.seed, done))
    grouping.inject(groups, slots, run.scorer)
  begun.release()  # the memory of the decode copy is free before the update needs it
  explored = exploration.exploration_metrics(
    outcome, prompts=len(groups.examples), rounds=config.exploration.rounds, examples=groups.examples
  )
  records = figures.hint_records(outcome, groups, step=done + 1, prompts=config.log.samples)
  return Collected(groups, prompts, metrics | explored, sampled, written, records, targets)


def scored_at_once(run: setup.Run, begun: Started, clock: "PhaseClock") -> tuple[Target, ...]:
  """What teacher and reference say about rollouts that stay as they are, asked before the host reads their texts."""
  with clock("sampling"):
    begun.rollouts = grouping.on_host(begun.rollouts)
    begun.release()
  with clock("teacher"):
    return run.programs.targets(begun.prompts, sharding.place(run.mesh, begun.rollouts.tokens))


def own_groups(run: setup.Run, begun: Started) -> Groups:
  """The student's rollouts; of further prompts as well, until P groups have a signal or the rounds are over (DAPO)."""
  groups = grouping.scored_groups(run.processor, begun.examples, begun.rollouts, run.scorer)
  for extra in range(1, run.config.sampling.dynamic_rounds + 1):
    further = run.further_questions(begun.done, extra, asked=groups.examples)
    if useful(run, groups).sum() >= len(begun.examples) or not further:
      break
    more = sharding.place(run.mesh, run.host_prompts(further, run.config.data.prompt))
    rollouts = run.programs.rollout(begun.actor, more, run.key("rollout", begun.done))
    groups = grouping.joined(groups, grouping.scored_groups(run.processor, further, rollouts, run.scorer), axis=0)
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
  if not run.config.explores:
    return []
  return exploration.triggered(groups.scores["accuracy"], groups.scores["total"], run.config.exploration.trigger)


def explore(run: setup.Run, actor: Any, groups: Groups, done: int) -> tuple[exploration.Exploration, int]:
  """Hinted sampling for the failed prompts of a step, and how many tokens of hints the teacher wrote for it."""
  config, written = run.config.exploration, 0

  def ask_hints(rows: Sequence[int], attempt: int) -> list[str]:
    nonlocal written
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, "hint_request")
    hints = grouping.on_host(run.programs.hint(prompts, run.key("hint", done, attempt)))
    written += int(hints.mask[: len(rows)].sum())
    return grouping.texts_of(run.processor, hints, prompts=len(rows))[:, 0].tolist()

  def sample_hinted(rows: Sequence[int], hints: Sequence[str], attempt: int) -> list[list[exploration.Candidate]]:
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, config.hint_prompt, hints=hints)
    rollouts = run.programs.candidate(actor, prompts, run.key("candidate", done, attempt))
    return grouping.candidates(run.processor, examples, hints, rollouts, run.scorer)

  rows = asking(run, groups)
  with contextlib.ExitStack() as phase:
    if rows:  # a teacher in host memory comes once for all rounds
      phase.enter_context(run.models["teacher"].resident.on_device())
    outcome = exploration.explore(
      rows,
      ask_hints,
      sample_hinted,
      rounds=config.rounds,
      replacements=config.replacements,
      accept=exploration.Acceptance(config.acceptance, config.leak_filter),
      hints=config.hints,
    )
  return outcome, written


def supervised_rows(run: setup.Run, examples: Sequence[Example], prompts: Prompts, done: int) -> tuple[Groups, int]:
  """What others wrote: gold answers, or those answers of the teacher that the reward accepts; the rest is empty.

  Returns:
    the groups, and how many tokens the teacher wrote.
  """
  config = run.config
  if config.supervised.source == "answer":
    texts = [gold_completion(example, run.processor.templates) for example in examples]
    rows = config.batch.rollouts - run.own_rollouts
    given = grouping.given_rollouts(run.processor, texts, rows, config.sampling.max_new_tokens)
    return grouping.supervised_groups(grouping.scored_groups(run.processor, examples, given, run.scorer)), 0
  answers = run.programs.answer(prompts, run.key("answer", done))
  groups = grouping.scored_groups(run.processor, examples, answers, run.scorer)
  accepted = grouping.accepted_answers(groups)
  return grouping.supervised_groups(groups, accepted=accepted), int(groups.mask.sum())


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
  return sharding.place(run.mesh, grouping.experience(groups, prompts, advantage, gate, kept=kept))


class PhaseClock:
  """Seconds that the host spends in each phase of a step, waiting for the device included."""

  def __init__(self):
    self._start, self._processor = time.perf_counter(), time.process_time()
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    """Adds the seconds inside the block to `phase`."""
    start = time.perf_counter()
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      error.add_note(phase)  # for who tells that memory ran out
      raise
    self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

  def timing(self, *, tokens: int) -> dict[str, float]:
    """`seconds/<phase>`, `seconds/step`, and `tokens_per_second/<phase>` of the update and the whole step.

    `seconds/processor` are those that this process computed, on all of its cores: what a step costs on a CPU that other
    work shares.

    Args:
      tokens: completion tokens of the batch.
    """
    processor = time.process_time() - self._processor
    seconds = self._seconds | {"step": time.perf_counter() - self._start, "processor": processor}
    # None of sampling: it begins before the step, and what the host still waits for tells nothing of its speed.
    rates = {f"tokens_per_second/{phase}": float(tokens) / seconds[phase] for phase in ("update", "step")}
    return {f"seconds/{phase}": value for phase, value in seconds.items()} | rates
