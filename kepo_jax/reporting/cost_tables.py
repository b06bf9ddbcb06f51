"""What a study's methods cost, what they had reached at the same cost, and how their learning rates were chosen."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax.evaluation import equal_cost, studies
from kepo_jax.evaluation.studies import Entry
from kepo_jax.reporting.study_tables import MISSING, percent
from kepo_jax.reporting.tables import Row

BEYOND = "beyond its budget"
GRID = (
  "* chosen among those that have finished; † chosen at an end of the grid, so that a rate beyond it might be better. "
  "Last column: the rate that validation questions of the training modality alone would have chosen."
)
RANGES = (
  "Brackets: the lowest and the highest seed; of differences, which are paired by seed, 95 % intervals by a bootstrap "
  "over seeds alone, because validations are not kept question by question. Tokens of student and teacher count alike, "
  "whatever the sizes of the models. What costs more is read inside its schedule, at a rate still high."
)
SECONDS = (
  "Seconds and CPU seconds compare only what ran at one sitting: identical trainings took "
  f"{100 * equal_cost.SITTINGS[0]:.0f} to {100 * equal_cost.SITTINGS[1]:.0f} % more at another (phantom, study tau)."
)


def cost_rows(entries: Sequence[Entry], *, expected: Sequence[Mapping[str, Any]] = ()) -> list[Row]:
  """What a training cost, means over seeds: tokens in thousands, seconds, CPU seconds."""
  found = studies.methods(entries)
  rows: list[Row] = [("method", "student tokens, thousands", "teacher tokens, thousands", "seconds", "CPU seconds")]
  for name, label in _trained(found, expected).items():
    costs = [entry["cost"] for entry in found.get(name, [])]
    if not costs:
      rows.append((label, *[MISSING] * 4))
      continue
    tokens = [f"{np.mean([cost[key] for cost in costs]) / 1e3:,.1f}" for key in ("student_tokens", "teacher_tokens")]
    seconds = [_number([cost.get(key) for cost in costs]) for key in ("seconds", "cpu_seconds")]
    rows.append((label, *tokens, *seconds))
  return rows


def equal_cost_rows(
  entries: Sequence[Entry],
  figure: str = "out_of_domain",
  *,
  expected: Sequence[Mapping[str, Any]] = (),
  references: Sequence[str] = ("grpo",),
) -> list[Row]:
  """Validation accuracy after equal steps, at the end where some methods have more of them, and at equal cost.

  A method that costs more is read inside its schedule, before its learning rate has decayed.

  Args:
    entries: of one pair, "start" among them.
    figure: of `equal_cost.FIGURES`.
    expected: planned cells of this pair.
    references: methods that the others are compared with; the smallest final cost of the first one is the budget.
  """
  found = studies.methods(entries)
  trained = _trained(found, expected)
  steps = sorted({entry["steps"] for name in trained for entry in found.get(name, [])})
  columns = [
    (f"after {steps[0]} steps", {name: _after(found.get(name, []), figure, steps[0]) for name in trained})
  ] if steps else []  # fmt: skip
  if len(steps) != 1:
    columns.append(("at the end", {name: _after(found.get(name, []), figure) for name in trained}))
  gaps: list[tuple[str, str, Mapping[str, Any]]] = []
  own = [equal_cost.cost(entry["cost"], "tokens") for entry in found.get(references[0], [])]
  if budget := min(own, default=0):
    read = equal_cost.accuracy_at_cost(entries, "tokens", budget=budget)
    whose = f"after {_amount(budget)} tokens of both models, {found[references[0]][0]['label']}'s"
    columns.append((whose, {name: each[figure] for name, each in read.items()}))
    for other in [name for name in references if name in found]:
      differences = equal_cost.differences_at_cost(entries, other, figure, "tokens", budget=budget)
      gaps.append((f"there, less {found[other][0]['label']}", other, differences))
  rows: list[Row] = [("method", *(heading for heading, _ in columns), *(heading for heading, _, _ in gaps))]
  for name, label in trained.items():
    cells = [_read(values.get(name)) for _, values in columns]
    known = name in found
    less = [_gap(differences.get(name), name == other) if known else MISSING for _, other, differences in gaps]
    rows.append((label, *cells, *less))
  return rows


def grid_rows(
  entries: Sequence[Entry],
  *,
  train_modality: str,
  rates: Sequence[float] = (),
  labels: Mapping[str, str] | None = None,
) -> list[Row]:
  """Validation accuracy per learning rate in percent; the chosen one has an asterisk, or a dagger at an end.

  Args:
    entries: of the grid, one pair.
    train_modality: the last column is the rate that its validation questions alone would have chosen.
    rates: planned ones; those of the entries are added.
    labels: planned methods; those of the entries are added.
  """
  means, chosen = studies.rate_means(entries), studies.chosen_rates(entries)
  alone = studies.chosen_rates(entries, "in_domain")
  shown = {**(labels or {})} | {entry["method"]: entry["label"] for entry in entries if entry["seed"] is not None}
  columns = sorted({*rates, *(rate for found in means.values() for rate in found)})
  rows: list[Row] = [("method", *(f"{rate:g}" for rate in columns), f"by {train_modality} alone")]
  for name, label in shown.items():
    found, best = means.get(name, {}), chosen.get(name)
    mark = {rate: "" if rate != best else " †" if rate in (columns[0], columns[-1]) else " *" for rate in columns}
    cells = [f"{100 * found[rate]:.1f}{mark[rate]}" if rate in found else MISSING for rate in columns]
    rows.append((label, *cells, f"{alone[name]:g}" if name in alone else MISSING))
  return rows


def _trained(found: Mapping[str, Sequence[Entry]], expected: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  labels = {cell["method"]: cell["label"] for cell in expected} | {
    name: mine[0]["label"] for name, mine in found.items()
  }
  return {name: label for name, label in labels.items() if name not in studies.UNTRAINED}


def _number(values: Sequence[float | None]) -> str:
  known = [value for value in values if value is not None]
  return f"{np.mean(known):,.1f}" if known else MISSING


def _amount(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _after(entries: Sequence[Entry], figure: str, step: int | None = None) -> dict[str, Any] | None:
  """Of the validations after a step; None: of the last ones."""
  taken = [
    max(
      (each for each in entry["validation"] if step in (None, each["step"])),
      key=lambda each: each["step"],
      default=None,
    )
    for entry in entries
  ]
  values = [record[figure] for record in taken if record and record[figure] is not None]
  return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)} if values else None


def _gap(entry: Mapping[str, Any] | None, itself: bool) -> str:
  if itself or entry is None:
    return "-"
  return percent(entry, signed=True) if entry["low"] is not None else f"{100 * entry['mean']:+.1f}"


def _read(entry: Mapping[str, Any] | None) -> str:
  if entry is None:
    return MISSING
  if entry["mean"] is not None and math.isnan(entry["mean"]):
    return "-"  # no validation question of that kind
  return BEYOND if entry["mean"] is None else percent(entry)
