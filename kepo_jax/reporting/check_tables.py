"""Tables of the checks of a study: what was varied beside what came of it, and the quality of hints."""

from collections.abc import Mapping, Sequence
from typing import Any

from kepo_jax.reporting.study_tables import MISSING, headings, percent, planned
from kepo_jax.reporting.tables import Row

STABILITY = (
  "Deviations are sample standard deviations, in percentage points, of the out-of-domain mean: of the test figure over "
  "seeds (95 % intervals by chi-square, for seeds that are normally distributed), and over the last three validations "
  "of a training, mean over seeds."
)


def check_rows(
  summary: Mapping[str, Any],
  varied: Mapping[str, Mapping[str, Any]],
  *,
  stability: Mapping[str, Mapping[str, Any]] | None = None,
  expected: Sequence[Mapping[str, Any]] = (),
) -> list[Row]:
  """Accuracies against what was varied.

  Args:
    summary: of `studies.summarised`.
    varied: heading -> method -> value, for example of `studies.settings`.
    stability: of `studies.stability`, two more columns.
    expected: planned cells of this pair.
  """
  named = headings(summary)
  spread = ["deviation over seeds", "deviation over the last validations"] if stability is not None else []
  rows: list[Row] = [("method", *varied, "seeds", *named.values(), *spread)]
  for name, (label, seeds) in planned(summary, expected).items():
    if expected and name not in {cell["method"] for cell in expected}:
      continue
    values = [_value(found.get(name, "-")) for found in varied.values()]
    entry = summary["methods"].get(name)
    if entry is None:
      rows.append((label, *values, f"0 of {seeds}", *[MISSING] * (len(named) + len(spread))))
      continue
    count = "untrained" if entry["seeds"] == [None] else str(len(entry["seeds"]))
    count += f" of {seeds}" if count != "untrained" and len(entry["seeds"]) < seeds else ""
    moved = (stability or {}).get(name, {})
    deviations = [_deviation(moved), _points(moved.get("validations"))] if spread else []
    rows.append((label, *values, count, *(percent(entry["statistics"][key]) for key in named), *deviations))
  return rows


def hint_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Quality of hints per student, teacher, hint prompt and modality.

  Args:
    records: `student`, `teacher`, `hint_prompt`, `modality`, `prompts` and `candidates` (numbers), `gain` and
      `reliance` (nats per token), `leak_rate`, `positive_rate` and `accept_rate` (by round, cumulative).
  """
  header = (
    "student, teacher", "hint prompt", "modality", "prompts", "candidates", "gain, nats per token",
    "reliance, nats per token", "leak rate", "reward-positive", "accepted after 1 round", "after all",
  )  # fmt: skip
  rows: list[Row] = [header]
  for record in records:
    rounds = record["accept_rate"] or []
    rows.append(
      (f"{record['student']}, {record['teacher']}", record["hint_prompt"], record["modality"], f"{record['prompts']:,}",
       f"{record['candidates']:,}", _nats(record["gain"]), _nats(record["reliance"]),
       *(_percentage(record[key]) for key in ("leak_rate", "positive_rate")),
       *(_percentage(value) for value in (rounds[:1] or [None]) + (rounds[-1:] or [None])))
    )  # fmt: skip
  return rows


def _value(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def _deviation(moved: Mapping[str, Any]) -> str:
  shown = _points(moved.get("seeds"))
  if interval := moved.get("seeds_interval"):
    shown += f" [{', '.join(map(_points, interval))}]"
  return shown


def _points(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f}"


def _nats(value: float | None) -> str:
  return "-" if value is None else f"{value:+.2f}"


def _percentage(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f}"
