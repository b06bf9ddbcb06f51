"""Validation accuracy of a study's methods at the same cost: tokens of student and teacher together, or seconds.

Tokens are the same wherever and whenever a training runs. Seconds are not: see `SITTINGS`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax.evaluation import seeds, statistics, studies
from kepo_jax.evaluation.studies import Entry

# Quantity -> parts of a cost record that are added up.
QUANTITIES = {"seconds": ("seconds",), "tokens": ("student_tokens", "teacher_tokens")}
SLACK = 0.05  # share by which the costs of equal trainings differ without meaning anything
# By how much the seconds of identical trainings of the phantom differed between two sittings, as shares of the smaller:
# accuracy-0 and mean-0 of the study tau.
SITTINGS = (0.23, 0.32)
FIGURES = ("in_domain", "out_of_domain", "overall")


def cost(record: Mapping[str, Any], quantity: str) -> float:
  """What a cost record says of a quantity of `QUANTITIES`."""
  return float(sum(record[name] for name in QUANTITIES[quantity]))


def start_of(entry: Entry, found: Mapping[str, Sequence[Entry]]) -> Entry | None:
  """The untrained student as a training begins with it: under the prompt that it is validated with, `start` by default.

  Args:
    entry: of a training.
    found: of `studies.methods`.
  """
  return found.get(entry.get("start", "start"), [None])[0]


def validation_curve(
  entry: Entry, start: Entry | None, figure: str, quantity: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """(steps or cost, accuracy) at each validation of a training, each float64[k], from the model it started from.

  Args:
    entry: of a training.
    start: of the untrained student, whose validation is the point at 0; None leaves that point out.
    figure: of `FIGURES`, or the name of a modality.
    quantity: of `QUANTITIES`; None for steps.
  """
  records = sorted(entry["validation"], key=lambda record: record["step"])
  across = [float(record["step"]) if quantity is None else cost(record["cost"], quantity) for record in records]
  values = [_figure(record, figure) for record in records]
  if start and not (records and records[0]["step"] == 0):
    across, values = [0.0, *across], [_figure(start["validation"][0], figure), *values]
  return np.array(across), np.array(values, float)


def _figure(record: Mapping[str, Any], figure: str) -> float:
  value = record[figure] if figure in FIGURES else record["modalities"].get(figure)
  return np.nan if value is None else value


def smallest_budget(entries: Sequence[Entry], quantity: str) -> float | None:
  """The smallest final cost of a training: what all of them reach. Methods that are free of charge do not count."""
  costs = [cost(entry["cost"], quantity) for entry in entries if entry["method"] not in studies.UNTRAINED]
  return min([each for each in costs if each > 0], default=None)


def accuracy_at_cost(
  entries: Sequence[Entry], quantity: str, *, budget: float | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
  """What each method had reached by the time it had cost as much as the budget.

  The curve of each seed, from the untrained student on, is read between two validations by linear interpolation.

  Args:
    entries: of one pair of student and teacher, "start" among them if the curves are to begin at 0.
    quantity: of `QUANTITIES`.
    budget: in its unit; None: `smallest_budget`, which every training reaches.

  Returns:
    method -> figure of `FIGURES` -> `mean`, `low` and `high` (the lowest and the highest seed), `seeds` (how many) and
    `budget`. A method of which a training ends more than `SLACK` below the budget has `mean` None and `final`, its
    largest final cost; what ends less below it is read at its end.
  """
  budget = smallest_budget(entries, quantity) if budget is None else budget
  found = studies.methods(entries)
  trained = {name: mine for name, mine in found.items() if name not in studies.UNTRAINED}
  if budget is None:
    return {}
  return {
    name: {figure: _read([validation_curve(entry, start_of(entry, found), figure, quantity) for entry in mine], budget)
           for figure in FIGURES}
    for name, mine in trained.items()
  }  # fmt: skip


def differences_at_cost(
  entries: Sequence[Entry],
  reference: str,
  figure: str,
  quantity: str,
  *,
  budget: float,
  resamples: int = statistics.RESAMPLES,
) -> dict[str, dict[str, Any]]:
  """Methods less a reference at the same cost, paired by seed.

  Args:
    entries: of one pair of student and teacher, "start" among them if the curves are to begin at 0.
    reference: method.
    figure: of `FIGURES`.
    quantity: of `QUANTITIES`.
    budget: in its unit.
    resamples: of the bootstrap.

  Returns:
    method -> `seeds.seeds_alone` of the differences. Methods that end before the budget, as the reference may, and
    those without a seed or a validation question in common with it, are left out.
  """
  found = studies.methods(entries)

  def read(name: str) -> dict[int, float]:
    curves = {each["seed"]: validation_curve(each, start_of(each, found), figure, quantity) for each in found[name]}
    if not all(_reaches(curve, budget) for curve in curves.values()):
      return {}
    values = {number: float(np.interp(budget, *curve)) for number, curve in curves.items()}
    return {number: value for number, value in values.items() if np.isfinite(value)}

  trained = [name for name in found if name not in studies.UNTRAINED]
  theirs = read(reference) if reference in trained else {}
  gaps = {}
  for name in trained:
    mine = read(name) if name != reference else {}
    if shared := [number for number in mine if number in theirs]:
      gaps[name] = seeds.seeds_alone({number: mine[number] - theirs[number] for number in shared}, resamples=resamples)
  return gaps


def _reaches(curve: tuple[np.ndarray, np.ndarray], budget: float) -> bool:
  return bool(len(curve[0])) and float(curve[0][-1]) >= budget * (1 - SLACK)


def _read(curves: Sequence[tuple[np.ndarray, np.ndarray]], budget: float) -> dict[str, Any]:
  ends = [float(across[-1]) if len(across) else 0.0 for across, _ in curves]
  if not all(_reaches(curve, budget) for curve in curves):
    return {"mean": None, "final": max(ends), "seeds": len(curves), "budget": budget}
  values = [float(np.interp(budget, *curve)) for curve in curves]
  return {"mean": float(np.mean(values)), "low": min(values), "high": max(values), "seeds": len(values),
          "budget": budget}  # fmt: skip


def banded(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
  """Mean, lowest and highest of several curves at each of their points, float64[k].

  Args:
    curves: (across, values) of each seed, with the same number of points; missing values are nan.

  Returns:
    `across` (the mean: seeds cost different amounts at a step), `mean`, `low`, `high`; nan where no seed has a value.
  """
  points = min(len(across) for across, _ in curves)
  across = np.array([each[:points] for each, _ in curves], float)
  values = np.array([each[:points] for _, each in curves], float)
  known = np.isfinite(values)
  count = known.sum(axis=0)
  with np.errstate(invalid="ignore"):
    mean = np.where(count > 0, np.where(known, values, 0).sum(axis=0) / count, np.nan)
  low = np.where(count > 0, np.where(known, values, np.inf).min(axis=0), np.nan)
  high = np.where(count > 0, np.where(known, values, -np.inf).max(axis=0), np.nan)
  return {"across": across.mean(axis=0), "mean": mean, "low": low, "high": high}
