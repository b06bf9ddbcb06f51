"""Tables of the checks of a study: what was varied beside what came of it, and the quality of hints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kepo_jax.evaluation import statistics
from kepo_jax.reporting.study_tables import MISSING, headings, percent, planned
from kepo_jax.reporting.tables import Row

STABILITY = (
  "Deviations are sample standard deviations, in percentage points, of the out-of-domain mean: of the test figure over "
  "seeds (95 % intervals by chi-square, for seeds that are normally distributed), and over the last three validations "
  "of a training, mean over seeds."
)
HINTS = "Brackets: 95 % intervals by a bootstrap over prompts."
CORRELATIONS = (
  "Pearson's r with the share of reward-positive candidates over the modalities, each of which counts the same; "
  "brackets: 95 % intervals by Fisher's z. Points of a few prompts move by chance, and no r says what causes what."
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
    records: `student`, `teacher`, `hint_prompt`, `modality`, `questions`, `prompts` and `candidates` (numbers), `gain`
      and `reliance` (nats per token), `leak_rate`, `positive_rate` and `accept_rate` (by round, cumulative), and
      `gain_interval` and `positive_rate_interval`, None where there is none.
  """
  header = (
    "student, teacher", "hint prompt", "modality", "questions", "prompts", "candidates", "gain, nats per token",
    "reliance, nats per token", "leak rate", "reward-positive", "accepted after 1 round", "after all",
  )  # fmt: skip
  rows: list[Row] = [header]
  for record in records:
    rounds = record["accept_rate"] or []
    rows.append(
      (f"{record['student']}, {record['teacher']}", record["hint_prompt"], record["modality"],
       *(f"{record[key]:,}" for key in ("questions", "prompts", "candidates")),
       _nats(record["gain"]) + _bounds(record.get("gain_interval"), _nats), _nats(record["reliance"]),
       _percentage(record["leak_rate"]),
       _percentage(record["positive_rate"]) + _bounds(record.get("positive_rate_interval"), _percentage),
       *(_percentage(value) for value in (rounds[:1] or [None]) + (rounds[-1:] or [None])))
    )  # fmt: skip
  return rows


def correlation_rows(records: Sequence[Mapping[str, Any]], unseen: Sequence[str] = ()) -> list[Row]:
  """Over the modalities, how gain and reliance go with the share of reward-positive candidates.

  Args:
    records: as `hint_rows` takes them; those of all modalities together do not count.
    unseen: modalities without which there is a second row for each student, teacher and hint prompt.
  """
  rows: list[Row] = [("student, teacher", "hint prompt", "modalities", "r of gain", "r of reliance")]
  told = [each for each in records if each["modality"] != "all" and each["positive_rate"] is not None]
  for who in dict.fromkeys((each["student"], each["teacher"], each["hint_prompt"]) for each in told):
    mine = [each for each in told if (each["student"], each["teacher"], each["hint_prompt"]) == who]
    seen = [each for each in mine if each["modality"] not in unseen]
    for name, chosen in {"all": mine, f"without {', '.join(unseen)}": seen}.items():
      if name == "all" or len(seen) < len(mine):
        cells = [_correlation(chosen, key) for key in ("gain", "reliance")]
        rows.append((f"{who[0]}, {who[1]}", who[2], f"{len(chosen)}, {name}", *cells))
  return rows


def _correlation(records: Sequence[Mapping[str, Any]], key: str) -> str:
  pairs = [(each[key], each["positive_rate"]) for each in records if each[key] is not None]
  found = statistics.correlation([value for value, _ in pairs], [rate for _, rate in pairs])
  if found["r"] is None:
    return "-"
  return _nats(found["r"]) + _bounds(None if found["low"] is None else (found["low"], found["high"]), _nats)


def _bounds(interval: Sequence[float] | None, shown: Callable[[float], str]) -> str:
  return f" [{', '.join(map(shown, interval))}]" if interval else ""


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
  return "-" if value is None else f"{round(value, 2) + 0.0:+.2f}"  # adding 0 takes the sign from a negative zero


def _percentage(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f}"
