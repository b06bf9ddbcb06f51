"""One step of KEPO, top to bottom: sample, explore, gate, update; and what it reports.

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
from kepo_jax.objectives import advantages
from kepo_jax.objectives import weights as weights_lib
from kepo_jax.training import metrics as metrics_lib
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.training import setup, update
from kepo_jax.training.optimizer import TrainState
from kepo_jax.training.prefetch import Pending
from kepo_jax.training.rollouts import Groups
from kepo_jax.types import Example, Experience, Prompts, StepReport


@dataclasses.dataclass
class Trained:
  """What a step leaves for its report."""

  step: int  # updates done, this one included
  groups: Groups
  gate: np.ndarray  # bool[P, G], rollouts that were distilled
  kept: np.ndarray  # bool[P, G], rollouts that entered the loss
  experience: Experience
  metrics: dict[str, float]
  hint_records: tuple[dict[str, Any], ...]  # hints and candidates of explored prompts, JSON-able
  sampled: int  # tokens of the student, those of candidates and of replaced rollouts included
  written: int  # tokens of the teacher: hints, and answers whether accepted or not


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


def train_step(
  run: setup.Run, state: TrainState, done: int, pending: Pending, clock: "PhaseClock"
) -> tuple[TrainState, Trained]:
  """One step of KEPO (Algorithm 1 of arXiv:2602.00400) after `done` steps.

  Args:
    run: the models, data and programs.
    state: before the update; consumed.
    done: steps before this one.
    pending: the prompts of the step, and the rollouts that the device samples.
    clock: of the step.
  """
  config, objective, own = run.config, run.config.objective, run.config.own_rollouts
  prompts, sampled, written = pending.prompts, 0, 0
  metrics: dict[str, float] = {}
  hint_records: tuple[dict[str, Any], ...] = ()
  parts: list[Groups] = []

  if own:
    # 1. Sample G completions of each prompt and reward them; dynamic sampling asks further prompts.
    with clock("sampling"):
      groups = sampled_groups(run, pending)
    sampled = int(groups.mask.sum())
    metrics |= metrics_lib.reward_metrics(groups)
    if config.sampling.dynamic_rounds:
      with clock("prepare"):
        groups, asked = most_useful(run, groups)
        prompts = sharding.place(run.mesh, run.host_prompts(groups.examples, config.data.prompt))
      metrics |= asked
    # 2. Explore: prompts on which every rollout fails get hints, and accepted candidates replace rollouts.
    with clock("exploration"):
      outcome, written = explore(run, pending.weights, groups, done)
      sampled += sum(int(tried.mask.sum()) for row in outcome.candidates.values() for tried in row)
      rollouts_lib.inject(groups, exploration.injections(outcome, own, seed=(config.seed, done)))
    metrics |= exploration.exploration_metrics(
      outcome, prompts=len(groups.examples), rounds=config.exploration.rounds, examples=groups.examples
    )
    hint_records = metrics_lib.hint_records(outcome, groups, step=done + 1, prompts=config.log.samples)
    parts.append(groups)
  pending.release()  # the update needs the memory of the decode weights
  if own < config.batch.rollouts:
    with clock("supervision"):
      examples = parts[0].examples if parts else pending.examples
      given, tokens = supervised_rows(run, examples, prompts, done)
      written += tokens
      parts.append(given)
  groups = parts[0] if len(parts) == 1 else rollouts_lib.joined(*parts, axis=1)

  # 3. Gate the distillation by quality, and compare rewards inside each group.
  kept = np.ones_like(groups.supervised)
  if objective.mask_truncated:
    kept = ~rollouts_lib.truncated(groups, run.processor.end_ids)
  gate = np.zeros_like(groups.supervised)
  if objective.distill_weight:
    signal = rollouts_lib.gate_signal(groups.scores, objective.gate_signal)
    gate = np.asarray(weights_lib.quality_gate(signal, threshold=objective.gate_threshold, mode=objective.gate_mode))
    gate = gate & kept & (objective.gate_injected | ~groups.injected)
  advantage = np.zeros(groups.supervised.shape, np.float32)
  if own:
    advantage[:, :own] = advantages.group_advantages(groups.scores["total"][:, :own], kind=objective.advantage)

  # 4. Ask teacher and reference about the tokens, and update the student.
  with clock("teacher"):
    batch = rollouts_lib.experience(groups, prompts, advantage, gate, kept=kept)
    experience = sharding.place(run.mesh, batch)
    targets = run.programs.targets(experience.prompts, experience.tokens)
    jax.block_until_ready(targets)
  with clock("update"):
    compare = config.compares_gradients and (done + 1) % config.log.gradients_every == 0
    state, learned = run.programs.update(state, experience, targets, compare=compare)
    metrics |= update.means(jax.device_get(learned))
  return state, Trained(done + 1, groups, gate, kept, experience, metrics, hint_records, sampled, written)


def sampled_groups(run: setup.Run, pending: Pending) -> Groups:
  """The student's rollouts; of further prompts as well, until P groups have a signal or the rounds are over (DAPO)."""
  groups = rollouts_lib.scored_groups(run.processor, pending.examples, pending.rollouts, run.scorer)
  for extra in range(1, run.config.sampling.dynamic_rounds + 1):
    further = run.further_questions(pending.done, extra, asked=groups.examples)
    if useful(run, groups).sum() >= len(pending.examples) or not further:
      break
    more = sharding.place(run.mesh, run.host_prompts(further, run.config.data.prompt))
    rollouts = run.programs.rollout(pending.weights, more, run.key("rollout", pending.done))
    groups = rollouts_lib.joined(
      groups, rollouts_lib.scored_groups(run.processor, further, rollouts, run.scorer), axis=0
    )
  return groups


def useful(run: setup.Run, groups: Groups) -> np.ndarray:
  """bool[P]: groups with a signal, and those that exploration may give one."""
  found = rollouts_lib.has_signal(groups)
  found[failed_prompts(run, groups)] = True
  return found


def most_useful(run: setup.Run, groups: Groups) -> tuple[Groups, dict[str, float]]:
  """The first P useful groups, filled up with others where there are too few; and how many there were."""
  usable, wanted = useful(run, groups), run.config.batch.prompts
  order = np.argsort(~usable, kind="stable")  # useful ones first, in the order in which they were asked
  asked = {"dynamic/asked": float(len(usable)), "dynamic/useful_frac": float(usable.mean())}
  return rollouts_lib.selected(groups, sorted(order[:wanted])), asked


def failed_prompts(run: setup.Run, groups: Groups) -> list[int]:
  """Rows of the batch that ask for hints."""
  if not run.config.explores:
    return []
  return exploration.triggered(groups.scores["accuracy"], groups.scores["total"], run.config.exploration.trigger)


def explore(run: setup.Run, weights: Any, groups: Groups, done: int) -> tuple[exploration.Exploration, int]:
  """Hinted sampling for the failed prompts of a step, and how many tokens of hints the teacher wrote for it."""
  config, written = run.config.exploration, 0

  def ask_hints(rows: Sequence[int], attempt: int) -> list[str]:
    nonlocal written
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, "hint_request")
    hints = rollouts_lib.on_host(run.programs.hint(prompts, run.key("hint", done, attempt)))
    written += int(hints.mask[: len(rows)].sum())
    return rollouts_lib.texts_of(run.processor, hints, prompts=len(rows))[:, 0].tolist()

  def sample_hinted(rows: Sequence[int], hints: Sequence[str], attempt: int) -> list[list[exploration.Candidate]]:
    examples = [groups.examples[row] for row in rows]
    prompts = run.prompts(examples, config.hint_prompt, hints=hints)
    rollouts = run.programs.candidate(weights, prompts, run.key("candidate", done, attempt))
    return rollouts_lib.candidates(run.processor, examples, hints, rollouts, run.scorer)

  rows = failed_prompts(run, groups)
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
    rows = config.batch.rollouts - config.own_rollouts
    given = rollouts_lib.given_rollouts(run.processor, texts, rows, config.sampling.max_new_tokens)
    return rollouts_lib.supervised_groups(rollouts_lib.scored_groups(run.processor, examples, given, run.scorer)), 0
  answers = run.programs.answer(prompts, run.key("answer", done))
  groups = rollouts_lib.scored_groups(run.processor, examples, answers, run.scorer)
  accepted = rollouts_lib.accepted_answers(groups)
  return rollouts_lib.supervised_groups(groups, accepted=accepted), int(groups.mask.sum())


def report_of(run: setup.Run, trained: Trained, clock: "PhaseClock") -> StepReport:
  """What the hooks are told about a step."""
  config, groups, gate = run.config, trained.groups, trained.gate
  metrics = trained.metrics | metrics_lib.mixed_metrics(groups, run.processor.end_ids)
  metrics |= {"lr": float(run.schedule(trained.step - 1))} | token_metrics(config, trained)
  if config.objective.distill_weight:
    metrics |= metrics_lib.gate_metrics(groups, gate) | {"lambda": run.distill_weight(trained.step - 1)}
  samples = metrics_lib.sample_records(groups, gate, step=trained.step, prompts=config.log.samples, problem=run.problem)
  timing = clock.timing(tokens=groups.mask.sum())
  return StepReport(step=trained.step, metrics=metrics, timing=timing, samples=samples + trained.hint_records)


def token_metrics(config: Any, trained: Trained) -> dict[str, float]:
  """Completion tokens of a step by what was done with them, which is what a method costs on any device."""
  mask = trained.groups.mask
  counts = {"trained": config.batch.updates * int(mask[trained.kept].sum())}
  if config.own_rollouts:
    counts["sampled"] = trained.sampled
  if config.explores or config.teacher_answers:
    counts["written"] = trained.written
  if config.objective.distill_weight:
    counts["scored"] = int(mask.sum())
  return {f"tokens/{name}": float(count) for name, count in counts.items()}


def check_finite(run: setup.Run, state: TrainState, trained: Trained, report: StepReport) -> None:
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
    except (MemoryError, ValueError, jax.errors.JaxRuntimeError) as error:
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
