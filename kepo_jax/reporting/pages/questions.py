"""From what a run stored of its questions to the samples of a page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kepo_jax import exploration
from kepo_jax.reporting.pages.blocks import Answer, AnswerGroup, Sample

Record = Mapping[str, Any]

# Outcomes of a group of rollouts, and what else the same filter finds.
ALL_WRONG, MIXED, ALL_RIGHT = "all wrong (cliff)", "mixed", "all right"
INJECTED, GATED = "with injected rollouts", "with distilled rollouts"

_RANGES = 4  # parts of the training by which its questions are filtered


def training_samples(records: Sequence[Record], *, prefix: str = "") -> tuple[Sample, ...]:
  """The questions of samples.jsonl, each with the rollouts of its group, the hints that were asked for and candidates.

  Args:
    records: of samples.jsonl, in order.
    prefix: tells several runs of one page apart: "kepo, seed 0".
  """
  found: dict[tuple[int, str], list[Record]] = {}
  for record in records:
    found.setdefault((record["step"], record["id"]), []).append(record)
  last = max((step for step, _ in found), default=0)
  samples = []
  for (step, name), group in found.items():
    rollouts = [record for record in group if record["kind"] == "rollout"]
    if rollouts:  # hints are stored for more questions than rollouts are
      source = f"training, {_range(step, last)}"
      samples.append(_training_sample(step, name, rollouts, group, source, prefix))
  return tuple(samples)


def evaluated_samples(
  evaluations: Mapping[str, Sequence[Record]], *, source: str = "test", prefix: str = ""
) -> tuple[Sample, ...]:
  """Evaluated questions, with one answer for each evaluation and the outcome "wrong → right" or the like.

  Args:
    evaluations: name ("before", "after", or that of a model) -> records as kepo_jax.evaluation writes them, with
      `files`, the paths of the images. Of several completions of a question the first one counts.
    source: a value of the filter.
    prefix: tells several runs of one page apart.
  """
  first = {name: _first(records) for name, records in evaluations.items()}
  names = dict.fromkeys(name for records in first.values() for name in records)
  return tuple(
    _evaluated_sample(name, {which: records.get(name) for which, records in first.items()}, source, prefix)
    for name in names
  )


def _training_sample(
  step: int, name: str, rollouts: Sequence[Record], group: Sequence[Record], source: str, prefix: str
) -> Sample:
  first = rollouts[0]
  groups = [AnswerGroup(heading="Rollouts", answers=tuple(_rollout(record) for record in rollouts))]
  tags = [tag for key, tag in (("injected", INJECTED), ("gate", GATED)) if any(r[key] for r in rollouts)]
  return Sample(
    key="/".join(filter(None, (prefix, "train", str(step), name))),
    source=_labelled(source, prefix),
    outcome=_group_outcome(rollouts),
    tags=tuple(tags),
    details=(("step", str(step)),),
    groups=(*groups, *_hinted(group)),
    **_identity(first, first.get("images", ())),
  )


def _group_outcome(rollouts: Sequence[Record]) -> str:
  """What the student itself did: neither what hints replaced nor what another model wrote counts."""
  own = [
    record["rewards"].get("accuracy", 0) > 0 for record in rollouts if not (record["injected"] or record["supervised"])
  ]
  if not own:
    return "no own rollout"
  return ALL_RIGHT if all(own) else MIXED if any(own) else ALL_WRONG


def _rollout(record: Record) -> Answer:
  marks = [
    word for key, word in (("gate", "distilled"), ("injected", "injected"), ("supervised", "supervised")) if record[key]
  ]
  values = [*record["rewards"].items(), ("total", record.get("reward"))]
  return Answer(
    label=f"rollout {record.get('rollout', 0) + 1}",
    text=record["completion"],
    right=record["rewards"].get("accuracy", 0) > 0,
    values=tuple((name, f"{value:g}") for name, value in values if value is not None),
    marks=tuple(marks),
    hint=record.get("hint", ""),
  )


def _hinted(group: Iterable[Record]) -> list[AnswerGroup]:
  """One group of candidates for each round, and the hints of which no candidate came."""
  rounds: dict[tuple[int, str], list[Answer]] = {}
  unused: list[str] = []
  for record in group:
    if record["kind"] == "candidate":
      answers = rounds.setdefault((record["round"], record["hint"]), [])
      answers.append(_candidate(record, len(answers) + 1))
    elif record["kind"] == "hint":
      unused.append(record["text"])
  used = {hint for _, hint in rounds}
  groups = [
    AnswerGroup(heading=f"Candidates of round {number}", hint=hint, answers=tuple(candidates))
    for (number, hint), candidates in rounds.items()
  ]
  lost = [text for text in unused if exploration.parse_hint(text) not in used]
  return groups + [AnswerGroup(heading="Hint that was not used", hint=text, answers=()) for text in lost]


def _candidate(record: Record, number: int) -> Answer:
  marks = ["accepted" if record["accepted"] else "not accepted"]
  marks.append("well formed" if record["well_formed"] else "not well formed")
  return Answer(
    label=f"candidate {number}",
    text=record["completion"],
    right=bool(record["accurate"]),
    marks=(*marks, *(["talks about the hint"] if record["leaks"] else [])),
  )


def _evaluated_sample(name: str, records: Mapping[str, Record | None], source: str, prefix: str) -> Sample:
  known = next(record for record in records.values() if record)
  return Sample(
    key="/".join(filter(None, (prefix, source, name))),
    source=_labelled(source, prefix),
    outcome=" → ".join(
      "not asked" if not record else "right" if record["correct"] else "wrong" for record in records.values()
    ),
    groups=(
      AnswerGroup(
        heading="Answers", answers=tuple(_asked(which, record) for which, record in records.items() if record)
      ),
    ),
    **_identity(known, known.get("files", ())),
  )


def _asked(which: str, record: Record) -> Answer:
  marks = [] if record.get("format", True) else ["not well formed"]
  return Answer(
    label=which,
    text=record["completion"],
    right=bool(record["correct"]),
    values=(("letter", record["parsed"] or "none"),),
    marks=(*marks, *(["truncated"] if record.get("truncated") else [])),
  )


def _identity(record: Record, images: Iterable[str]) -> dict[str, Any]:
  return {
    "id": record["id"],
    "modality": record.get("modality", ""),
    "question_type": record.get("question_type", ""),
    "question": record["question"],
    "options": tuple(record["options"]),
    "answer": record["answer"],
    "images": tuple(images),
  }


def _first(records: Iterable[Record]) -> dict[str, Record]:
  found: dict[str, Record] = {}
  for record in records:
    found.setdefault(record["id"], record)
  return found


def _range(step: int, last: int) -> str:
  """The quarter of the training in which a step lies, "steps 21-40"."""
  length = max(1, math.ceil(last / _RANGES))
  start = (step - 1) // length * length + 1
  end = min(start + length - 1, last)
  return f"steps {start}-{end}" if end > start else f"step {start}"


def _labelled(source: str, prefix: str) -> str:
  return f"{prefix}: {source}" if prefix else source
