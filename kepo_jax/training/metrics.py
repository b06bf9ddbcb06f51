"""The metrics of a step by name, its decoded samples, and its seconds by phase."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kepo_jax import exploration, storage
from kepo_jax.config import Config
from kepo_jax.data.prompts import Templates, problem
from kepo_jax.training import setup
from kepo_jax.training.rollouts import Groups, has_signal, truncated
from kepo_jax.types import Experience, StepReport


@dataclasses.dataclass
class StepResult:
  """The outcome of a step, for its report."""

  step: int  # updates done, this one included
  groups: Groups
  gate: np.ndarray  # bool[P, G], rollouts that were distilled
  kept: np.ndarray  # bool[P, G], rollouts that entered the loss
  experience: Experience
  metrics: dict[str, float]
  hint_records: tuple[dict[str, Any], ...]  # hints and candidates of explored prompts, JSON-able
  sampled: int  # tokens of the student, those of candidates and of replaced rollouts included
  written: int  # tokens of the teacher: hints, and answers whether accepted or not


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
      error.add_note(phase)  # for `train.out_of_memory_errors`
      raise
    self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

  def timing(self, *, tokens: int) -> dict[str, float]:
    """Returns `seconds/<phase>`, `seconds/step`, and `tokens_per_second/` of the update and the whole step.

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


def reward_metrics(groups: Groups) -> dict[str, float]:
  """Computes the metrics of the student's own rollouts before injection: rewards, cliffs, groups without a signal."""
  scores = groups.scores
  dead = ~has_signal(groups)
  right = dead & (scores["accuracy"] > 0).all(axis=1)
  wrong = dead & (scores["accuracy"] == 0).all(axis=1)
  named = {f"reward/{name}": float(values.mean()) for name, values in scores.items() if name != "total"}
  return named | {
    "reward/mean": float(scores["total"].mean()),
    "cliff_rate": float((scores["accuracy"] == 0).all(axis=1).mean()),
    "dead_group_rate": float(dead.mean()),
    "dead_group_rate/right": float(right.mean()),
    "dead_group_rate/wrong": float(wrong.mean()),
  }


def mixed_metrics(groups: Groups, end_ids: Sequence[int]) -> dict[str, float]:
  """Computes the metrics of the rows of the update, after injection and with supervised rows."""
  lengths, own = groups.mask.sum(axis=2), ~groups.supervised
  metrics: dict[str, float] = {}
  if own.any():
    metrics["injected_frac"] = float(groups.injected[own].mean())
    metrics["completion/length"] = float(lengths[own].mean())
    metrics["completion/truncated_frac"] = float(truncated(groups, end_ids)[own].mean())
  if groups.injected.any():
    metrics["injected/reward_mean"] = float(groups.scores["total"][own].mean())
  if groups.supervised.any():
    metrics["supervised/row_frac"] = float((groups.supervised & (lengths > 0)).mean())
    metrics["supervised/accept_rate"] = float((lengths > 0)[groups.supervised].mean())
  return metrics


def gate_metrics(groups: Groups, gate: np.ndarray) -> dict[str, float]:
  """Computes the metrics of the gate bool[P, G]; empty rows count among rollouts, not among tokens."""
  lengths = groups.mask.sum(axis=2)
  metrics = {
    "gate/frac": float(gate.mean()),
    "gate/token_frac": float((gate * lengths).sum() / max(1, lengths.sum())),
  }
  if gate.any():
    metrics["gate/wrong_share"] = float((groups.scores["accuracy"] == 0)[gate].mean())
  return metrics


def sample_records(
  groups: Groups, gate: np.ndarray, *, step: int, prompts: int, templates: Templates
) -> tuple[dict[str, Any], ...]:
  """Returns the rollouts of the first prompts of the batch as JSON-able records."""
  return tuple(
    {
      "step": step,
      "kind": "rollout",
      "id": example.id,
      "modality": example.modality,
      "question_type": example.question_type,
      "images": [storage.origin(image) for image in example.images],  # the copy differs from host to host
      "prompt": problem(example, templates),
      "question": example.question,
      "options": list(example.options),
      "answer": example.answer,
      "rollout": g,
      "completion": groups.texts[p, g],
      "rewards": {name: float(values[p, g]) for name, values in groups.scores.items() if name != "total"},
      "reward": float(groups.scores["total"][p, g]),
      "gate": bool(gate[p, g]),
      "injected": bool(groups.injected[p, g]),
      "supervised": bool(groups.supervised[p, g]),
      "hint": groups.hints[p, g],
    }
    for p, example in enumerate(groups.examples[:prompts])
    for g in range(groups.tokens.shape[1])
  )


def hint_records(
  outcome: exploration.Exploration, groups: Groups, *, step: int, prompts: int
) -> tuple[dict[str, Any], ...]:
  """Returns what was tried for the first prompts that asked for hints: the hints, and every candidate."""
  records = []
  for p in list(outcome.accepted)[:prompts]:
    shared = {"step": step, "id": groups.examples[p].id}
    records += [shared | {"kind": "hint", "text": hint} for hint in outcome.hints[p]]
    records += [
      shared
      | {"kind": "candidate", "round": candidate.attempt, "hint": candidate.hint, "completion": candidate.text}
      | {"accurate": candidate.accurate, "well_formed": candidate.well_formed, "leaks": candidate.leaks}
      | {"accepted": any(candidate is accepted for accepted in outcome.accepted[p])}
      for candidate in outcome.candidates[p]
    ]
  return tuple(records)


def step_report(run: setup.Run, trained: StepResult, clock: PhaseClock) -> StepReport:
  """Builds what the hooks are told about a step."""
  config, groups, step = run.config, trained.groups, trained.step
  metrics = trained.metrics | mixed_metrics(groups, run.processor.end_ids)
  metrics |= {"lr": float(run.schedule(step - 1))} | token_metrics(config, trained)
  if weight := config.objective.distill_weight:
    metrics |= gate_metrics(groups, trained.gate)
    metrics["lambda"] = float(weight * setup.distill_factor(config)(step - 1))
  samples = sample_records(
    groups, trained.gate, step=step, prompts=config.log.samples, templates=run.processor.templates
  )
  timing = clock.timing(tokens=groups.mask.sum())
  return StepReport(step=step, metrics=metrics, timing=timing, samples=samples + trained.hint_records)


def token_metrics(config: Config, trained: StepResult) -> dict[str, float]:
  """Counts the completion tokens of a step by what was done with them: the cost of a method on any device."""
  mask = trained.groups.mask
  counts = {"trained": config.batch.updates * int(mask[trained.kept].sum())}
  if config.own_rollouts:
    counts["sampled"] = trained.sampled
  if config.explores or config.teacher_answers:
    counts["written"] = trained.written
  if config.objective.distill_weight:
    counts["scored"] = int(mask.sum())
  return {f"tokens/{name}": float(count) for name, count in counts.items()}
