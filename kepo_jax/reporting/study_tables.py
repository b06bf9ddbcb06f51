"""Tables of a study: rows of text, header first, for one pair of student and teacher.

Accuracies are in percent, differences in percentage points. What was planned and has not run is "missing" in its cell
and is named under the table.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kepo_jax.evaluation import studies
from kepo_jax.evaluation.studies import Entry
from kepo_jax.reporting.tables import Row

MISSING = "missing"
# Mean accuracy over the seven out-of-domain modalities of OmniMedVQA, Qwen3-VL-2B taught by 32B, in percent.
PAPER = {"KEPO": 78.00, "GRPO": 74.33, "MM-GKD": 73.67}
PAPER_SOURCE = "arXiv 2602.00400, Table 1; other data and models, one seed"
END = "† at an end of the grid of learning rates, so that a rate beyond it might be better."
INTERVALS = (
  "Brackets: 95 % intervals by a bootstrap over seeds and questions; of one seed or an untrained model over questions "
  "alone. They are not corrected for the number of comparisons."
)
_SUMMARIES = {"in_domain": "{train}", "out_of_domain": "out of domain, mean of {others}",
              "out_of_domain_seen": "out of domain without {unseen}", "unseen": "{unseen} (unseen)"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of a study with its name as a file, its title and what is to be said under it."""

  name: str
  title: str
  rows: list[Row]
  notes: tuple[str, ...] = ()


def headings(summary: Mapping[str, Any]) -> dict[str, str]:
  """Statistic -> its name in tables and figures, for those that the benchmark has."""
  first = next(iter(summary["methods"].values()))["statistics"]
  modalities = sum(name.startswith("modalities/") for name in first)
  words = {"train": summary["train_modality"], "others": str(modalities - 1), "unseen": ", ".join(summary["unseen"])}
  told = [key for key in _SUMMARIES if summary["unseen"] or key != "out_of_domain_seen"]  # else it is the mean of all
  return {key: _SUMMARIES[key].format(**words) for key in told if key in first}


def missing_cells(expected: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> list[str]:
  """What was planned and is not among the entries, by name: "GRPO, confused taught by weak: seeds 3, 4".

  Args:
    expected: `method`, `label`, `student`, `teacher` and `seeds` (numbers; None where nothing is trained) of each cell.
    entries: of any number of pairs.
  """
  present = {(entry["method"], pair, entry["seed"]) for pair, mine in studies.pairs(entries).items() for entry in mine}
  found = []
  for cell in expected:
    pair = (cell["student"], cell["teacher"])
    lost = [seed for seed in cell["seeds"] if (cell["method"], pair, seed) not in present]
    numbers = ", ".join(str(seed) for seed in lost if seed is not None)
    name = f"{cell['label']}, {pair[0]} taught by {pair[1]}"
    found += [f"{name}: seed{'s' if len(lost) > 1 else ''} {numbers}" if numbers else name] if lost else []
  return found


def planned(summary: Mapping[str, Any], expected: Sequence[Mapping[str, Any]] = ()) -> dict[str, tuple[str, int]]:
  """Method -> (label, planned seeds), in the order of the plan; methods that nobody planned come last."""
  labels = {cell["method"]: (cell["label"], len(cell["seeds"])) for cell in expected}
  return labels | {
    name: (entry["label"], len(entry["seeds"])) for name, entry in summary["methods"].items() if name not in labels
  }


def main_rows(
  summary: Mapping[str, Any],
  *,
  expected: Sequence[Mapping[str, Any]] = (),
  references: Sequence[str] = studies.REFERENCES,
  rates: Sequence[float] = (),
) -> list[Row]:
  """Accuracies, format, and the out-of-domain mean less that of each reference.

  Args:
    summary: of `studies.summarised`.
    expected: planned cells of this pair, see `missing_cells`.
    references: methods of `summary["differences"]`, each a column if it is present or planned.
    rates: of the grid; a learning rate at one of its ends has a dagger.
  """
  methods, named = planned(summary, expected), headings(summary)
  references = [name for name in references if name in methods]
  less = [f"out of domain, less {methods[name][0]}" for name in references]
  rows: list[Row] = [("method", "seeds", "learning rate", *named.values(), "format", *less)]
  for name, (label, seeds) in methods.items():
    entry = summary["methods"].get(name)
    if entry is None:
      rows.append((label, f"0 of {seeds}", *[MISSING] * (len(rows[0]) - 2)))
      continue
    cells = [percent(entry["statistics"][key]) for key in named]
    gaps = [_gap(summary, reference, name) for reference in references]
    rows.append(
      (label, _seeds(entry, seeds), _rate(entry["learning_rate"], rates), *cells, _share(entry["format"]), *gaps)
    )
  return rows


def section_rows(summary: Mapping[str, Any], section: str, *, expected: Sequence[Mapping[str, Any]] = ()) -> list[Row]:
  """Accuracy per modality or per question type: a row per method, the first for chance.

  Args:
    summary: of `studies.summarised`.
    section: "modalities" or "question_types".
    expected: planned cells of this pair.
  """
  keys = [key for key in summary["chance"] if key.startswith(f"{section}/")]
  rows: list[Row] = [("method", *(marked(summary, key) for key in keys))]
  rows.append(("chance", *(f"{100 * summary['chance'][key]:.1f}" for key in keys)))
  for name, (label, _) in planned(summary, expected).items():
    entry = summary["methods"].get(name)
    rows.append((label, *(percent(entry["statistics"][key]) if entry else MISSING for key in keys)))
  return rows


def marked(summary: Mapping[str, Any], key: str) -> str:
  """Name of a modality or question type; says which modality was trained on and which no model has seen."""
  section, name = key.split("/", 1)
  if section != "modalities":
    return name
  unseen = f"{name} (unseen)" if name in summary["unseen"] else name
  return f"{name} (trained on)" if name == summary["train_modality"] else unseen


def paper_rows() -> list[Row]:
  """What the paper reports, which is about other data and other models."""
  return [("method", "out of domain, mean of 7"), *[(name, f"{value:.2f}") for name, value in PAPER.items()]]


def percent(entry: Mapping[str, Any], *, signed: bool = False) -> str:
  """A figure with its interval: "61.3 [55.7, 66.7]", or "+1.2 [-0.3, +2.7]"."""
  sign = "+" if signed else ""
  # Adding 0 takes the sign from a negative zero.
  mean, low, high = (f"{round(100 * entry[key], 1) + 0.0:{sign}.1f}" for key in ("mean", "low", "high"))
  return f"{mean} [{low}, {high}]"


def _gap(summary: Mapping[str, Any], reference: str, name: str) -> str:
  if name == reference:
    return "-"
  entry = summary["differences"].get(reference, {}).get(name)
  if entry is None or "out_of_domain" not in entry["statistics"]:
    return MISSING
  return percent(entry["statistics"]["out_of_domain"], signed=True)


def _seeds(entry: Mapping[str, Any], planned_seeds: int) -> str:
  if entry["seeds"] == [None]:
    return "untrained"
  count = len(entry["seeds"])
  return f"{count} of {planned_seeds}" if count < planned_seeds else str(count)


def _rate(value: float | None, rates: Sequence[float]) -> str:
  if value is None:
    return "-"
  return f"{value:g} †" if value in (min(rates, default=None), max(rates, default=None)) else f"{value:g}"


def _share(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f}"
