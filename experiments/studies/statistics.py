"""What the entries of a study say about its methods: accuracies, differences, cost, stability, learning rates.

An entry is a record of runs.json or grid.json, one per finished training: `method` and `label`, `student` and
`teacher`, `learning_rate`, `seed` (None where nothing was trained), `steps`, `config` and `overrides`, `test`
(`correct` as `packed` writes it, `format`, `tokens`, ..), and of a training `validation`, `curves` and `cost`.
items.json describes the test questions, as `bootstrap.design` takes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from experiments.studies import bootstrap
from experiments.studies.plan import UNTRAINED
from kepo_jax.evaluation.statistics import RESAMPLES

Entry = Mapping[str, Any]
METRICS = ("in_domain", "out_of_domain", "overall")  # of a validation
SLACK = 0.05  # share by which the costs of equal trainings may differ


def packed(correct: Iterable[bool]) -> str:
  """Packs right and wrong, a bit per question, into hexadecimal digits; fills the last byte with zeros."""
  return np.packbits(np.fromiter(correct, bool)).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
  """Reads bool[count] from what `packed` wrote.

  Raises:
    ValueError: the text does not hold that many questions.
  """
  data = np.frombuffer(bytes.fromhex(text), np.uint8)
  if len(data) != -(-count // 8):
    raise ValueError(f"{8 * len(data)} answers are packed where {count} questions are expected; is items.json theirs?")
  return np.unpackbits(data, count=count).astype(bool)


def pairs(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
  """Groups entries by (student, teacher), in order of appearance.

  The untrained student joins every pair with this student, the teacher every pair with this teacher. Where nothing was
  trained, all entries form one pair.
  """
  trained = [entry for entry in entries if entry["method"] not in UNTRAINED]
  names = dict.fromkeys((entry["student"], entry["teacher"]) for entry in trained or entries)

  def belongs(entry: Entry, student: str, teacher: str) -> bool:
    if entry["method"] == "start":
      return entry["student"] == student
    if entry["method"] == "teacher":
      return entry["teacher"] == teacher
    return (entry["student"], entry["teacher"]) == (student, teacher)

  return {pair: [entry for entry in entries if belongs(entry, *pair)] for pair in names}


def methods(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
  """Groups entries by method, sorted by seed; methods in order of appearance.

  Raises:
    ValueError: a method has two entries with one seed, that is several learning rates or pairs.
  """
  groups: dict[str, dict[int | None, Entry]] = {}
  for entry in entries:
    by_seed = groups.setdefault(entry["method"], {})
    same = by_seed.get(entry["seed"])
    if same is not None and entry["seed"] is not None:
      raise ValueError(
        f"{entry['method']} has two entries of seed {entry['seed']} (learning rates {same['learning_rate']:g} and "
        f"{entry['learning_rate']:g}); pass one pair, at the chosen rate."
      )
    by_seed[entry["seed"]] = entry
  return {
    name: [by_seed[seed] for seed in sorted(by_seed, key=lambda seed: -1 if seed is None else seed)]
    for name, by_seed in groups.items()
  }


def trained_methods(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
  """Groups entries of trainings by method, see `methods`."""
  return methods([entry for entry in entries if entry["method"] not in UNTRAINED])


def summarised(
  entries: Sequence[Entry], items: Mapping[str, Any], *, references: Sequence[str], resamples: int = RESAMPLES
) -> dict[str, Any]:
  """Computes what tables and figures say about the test set, for one pair of student and teacher.

  Args:
    entries: of each method one per seed, at its chosen learning rate.
    items: the record of items.json.
    references: methods that the others are compared with.
    resamples: of the bootstrap.

  Returns:
    JSON-able `methods` and `differences` of `bootstrap.bootstrap`; a method also has `label`, `config`,
    `learning_rate`, and the means over its seeds of `format`, `unparsed`, `truncated` and `tokens`, None where unknown.
    `chance`: statistic -> what guessing scores. `items`: number of questions, `images`: number of images.
    `train_modality` and `unseen`.

  Raises:
    ValueError: two entries have one method and seed, or answers are to other questions.
  """
  groups, plan = methods(entries), bootstrap.design(items)
  count = len(items["modality"])
  answers = {
    name: {entry["seed"]: unpacked(entry["test"]["correct"], count) for entry in group}
    for name, group in groups.items()
  }
  summary = bootstrap.bootstrap(answers, plan, references=references, resamples=resamples)
  for name, group in groups.items():
    summary["methods"][name] |= {
      "label": group[0]["label"],
      "config": group[0].get("config", ""),
      "learning_rate": group[0].get("learning_rate"),
    }
    for key in ("format", "unparsed", "truncated", "tokens"):
      summary["methods"][name][key] = _mean(entry["test"].get(key) for entry in group)
  guesses = bootstrap.points(np.asarray(items["chance"])[None], plan)[0]
  return summary | {
    "chance": dict(zip(plan.names, guesses.tolist(), strict=True)),
    "items": count,
    "images": sum(plan.strata),
    "train_modality": items["train_modality"],
    "unseen": list(items["unseen"]),
  }


def contrasts(summary: Mapping[str, Any], statistic: str = "out_of_domain") -> list[dict[str, Any]]:
  """Tests each trained method against each reference, and corrects for the number of tests.

  Args:
    summary: of `summarised`.
    statistic: which accuracy is compared.

  Returns:
    One record per distinct pair of methods that share at least two seeds: `method`, `reference`, `mean` (of the
    differences), `seeds` (how many), `p` (of a paired t-test over seeds) and `p_holm` (corrected after Holm for the
    number of records).
  """
  records: dict[frozenset[str], dict[str, Any]] = {}
  for reference, differences in summary["differences"].items():
    for method, entry in differences.items():
      gaps = entry["statistics"].get(statistic, {}).get("values", [])
      pair = frozenset((method, reference))
      if {method, reference} & set(UNTRAINED) or not entry["paired"] or len(gaps) < 2 or pair in records:
        continue
      p = 1.0 if not np.any(gaps) else float(stats.ttest_1samp(gaps, 0.0).pvalue)
      records[pair] = {"method": method, "reference": reference, "mean": float(np.mean(gaps)), "seeds": len(gaps),
                       "p": p}  # fmt: skip
  found = list(records.values())
  corrected = multipletests([record["p"] for record in found], method="holm")[1] if found else []
  return [record | {"p_holm": float(p)} for record, p in zip(found, corrected, strict=True)]


def correlation(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
  """Computes Pearson's r with a 95 % interval by Fisher's z, which assumes normally distributed pairs.

  Returns:
    `r`, `low`, `high` and `count`; r is None for fewer than two pairs or where one side does not vary, the bounds are
    None below four pairs.
  """
  count = len(first)
  if count < 2 or not (np.ptp(first) and np.ptp(second)):
    return {"r": None, "low": None, "high": None, "count": count}
  result = stats.pearsonr(first, second)
  low, high = result.confidence_interval(0.95) if count > 3 else (None, None)
  return {"r": float(result.statistic), "low": low, "high": high, "count": count}


def rate_means(entries: Sequence[Entry], metric: str = "overall") -> dict[str, dict[float, float]]:
  """Averages the last validation over seeds: method -> learning rate -> accuracy.

  Only seeds that a method has at all of its rates count, so that no rate profits from an easy seed; a method without
  such a seed is left out.

  Args:
    entries: of the grid, one pair of student and teacher.
    metric: "overall" for all validation questions, or "in_domain".

  Raises:
    ValueError: trainings of a method do not end at the same step.
  """
  rows: list[dict[str, Any]] = []
  for entry in entries:
    if entry["method"] not in UNTRAINED and entry["validation"]:
      last = max(entry["validation"], key=lambda record: record["step"])
      rows.append(
        {key: entry[key] for key in ("method", "learning_rate", "seed")}
        | {"step": last["step"], "accuracy": last[metric]}
      )
  means = {}
  for name, runs in pd.DataFrame(rows, columns=["method", "learning_rate", "seed", "step", "accuracy"]).groupby(
    "method", sort=False
  ):
    if len(ends := runs["step"].unique()) > 1:
      raise ValueError(f"{name} was validated last at steps {' and '.join(map(str, ends))}.")
    table = runs.pivot(index="seed", columns="learning_rate", values="accuracy").dropna()
    if len(table):
      means[str(name)] = {float(rate): float(np.mean(table[rate].to_numpy())) for rate in table}
  return means


def chosen_rates(entries: Sequence[Entry], metric: str = "overall") -> dict[str, float]:
  """Picks the best learning rate of each method by `rate_means`, the smaller of two equal ones."""
  # Means of shares can differ in their last bit where they are equal.
  return {
    name: min(rates, key=lambda rate: (-round(rates[rate], 9), rate))
    for name, rates in rate_means(entries, metric).items()
  }


def settings(entries: Sequence[Entry], field: str, default: Any) -> dict[str, Any]:
  """Returns for each method the value of a config field by its overrides, or the default of its config."""
  return {entry["method"]: entry.get("overrides", {}).get(field, default) for entry in entries}


def stability(entries: Sequence[Entry], items: Mapping[str, Any], *, last: int = 3) -> dict[str, dict[str, Any]]:
  """Measures how far out-of-domain accuracy moves between seeds, and late in a training.

  Args:
    entries: of one pair, one per method and seed.
    items: the record of items.json.
    last: validations that count as late.

  Returns:
    method -> `seeds`: sample standard deviation of test accuracy over seeds, None with one seed; `seeds_interval`: its
    95 % interval, which is wide for few seeds; `validations`: mean over seeds of the sample standard deviation over the
    last validations, None with one validation.
  """
  plan, result = bootstrap.design(items), {}
  if "out_of_domain" not in plan.names:
    return {}
  column = plan.names.index("out_of_domain")
  for name, group in trained_methods(entries).items():
    answers = np.stack([unpacked(entry["test"]["correct"], len(items["modality"])) for entry in group])
    late = [[record["out_of_domain"] for record in entry["validation"][-last:] if record["out_of_domain"] is not None]
            for entry in group]  # fmt: skip
    deviation = _deviation(bootstrap.points(answers, plan)[:, column])
    result[name] = {
      "seeds": deviation,
      "seeds_interval": None if deviation is None else deviation_interval(deviation, len(group)),
      "validations": _mean(_deviation(values) for values in late),
    }
  return result


def deviation_interval(deviation: float, seeds: int) -> tuple[float, float]:
  """Computes the 95 % interval of the standard deviation of a normal population by chi-square.

  Args:
    deviation: of the sample, with S - 1 in its denominator.
    seeds: S, at least 2.
  """
  low, high = (deviation * ((seeds - 1) / stats.chi2.isf(tail, seeds - 1)) ** 0.5 for tail in (0.025, 0.975))
  return float(low), float(high)


def tokens(cost: Mapping[str, Any]) -> float:
  """Adds the tokens of student and teacher of a cost record, which count alike."""
  return float(cost["student_tokens"] + cost["teacher_tokens"])


def start_of(entry: Entry, groups: Mapping[str, Sequence[Entry]]) -> Entry | None:
  """Returns the untrained student under the prompt that a training is validated with; `groups` is of `methods`."""
  return groups.get(entry.get("start", "start"), [None])[0]


def validation_curve(entry: Entry, start: Entry | None, metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (tokens of student and teacher, accuracy) at each validation of a training, each float64[k].

  Args:
    entry: of a training.
    start: the untrained student, whose validation is the point at 0; None leaves this point out.
    metric: of `METRICS`.
  """
  records = sorted(entry["validation"], key=lambda record: record["step"])
  if start and not (records and records[0]["step"] == 0):
    records = [start["validation"][0] | {"cost": {"student_tokens": 0, "teacher_tokens": 0}}, *records]
  across = [tokens(record["cost"]) for record in records]
  return np.array(across), np.array([record[metric] for record in records], float)  # None becomes nan


def accuracy_at_cost(entries: Sequence[Entry], metric: str, *, budget: float) -> dict[str, dict[str, Any]]:
  """Reads what each method had reached when it had spent the budget.

  The validation curve of each seed, from the untrained student on, is interpolated linearly.

  Args:
    entries: of one pair, "start" among them if the curves are to begin at 0.
    metric: of `METRICS`.
    budget: tokens of student and teacher.

  Returns:
    method -> `mean`, `low` and `high` (the lowest and the highest seed). All three are None where a training ends more
    than `SLACK` below the budget; what ends less below it is read at its end.
  """
  result: dict[str, dict[str, Any]] = {}
  for name, values in _reached(entries, metric, budget).items():
    known = [value for value in values.values() if value is not None]
    if len(known) < len(values):
      result[name] = dict.fromkeys(("mean", "low", "high"))
    else:
      result[name] = {"mean": float(np.mean(known)), "low": min(known), "high": max(known)}
  return result


def differences_at_cost(
  entries: Sequence[Entry], reference: str, metric: str, *, budget: float, resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]]:
  """Subtracts a reference from each method at the same cost, paired by seed.

  Args:
    entries: of one pair, "start" among them if the curves are to begin at 0.
    reference: method.
    metric: of `METRICS`.
    budget: tokens of student and teacher.
    resamples: of the bootstrap.

  Returns:
    method -> `bootstrap.seeds_alone` of the differences. Left out: methods that end before the budget, as the reference
    may, and those without a seed or a validation question in common with it.
  """
  finite: dict[str, dict[int, float]] = {}
  for name, values in _reached(entries, metric, budget).items():
    if None not in values.values():
      finite[name] = {seed: value for seed, value in values.items() if value is not None and np.isfinite(value)}
  subtracted = finite.pop(reference, {})
  shared = {name: [seed for seed in values if seed in subtracted] for name, values in finite.items()}
  return {
    name: bootstrap.seeds_alone({s: finite[name][s] - subtracted[s] for s in seeds}, resamples=resamples)
    for name, seeds in shared.items()
    if seeds
  }


def _reached(entries: Sequence[Entry], metric: str, budget: float) -> dict[str, dict[int, float | None]]:
  """Returns method -> seed -> accuracy at the budget; None where a training ends below it."""
  groups = methods(entries)

  def at_budget(entry: Entry) -> float | None:
    across, values = validation_curve(entry, start_of(entry, groups), metric)
    enough = len(across) and float(across[-1]) >= budget * (1 - SLACK)
    return float(np.interp(budget, across, values)) if enough else None

  trained = trained_methods(entries)
  return {name: {entry["seed"]: at_budget(entry) for entry in group} for name, group in trained.items()}


def banded(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
  """Computes mean, lowest and highest of several curves at each of their points, float64[k].

  Args:
    curves: (across, values) of each seed, with the same number of points; missing values are nan.

  Returns:
    `across` (the mean: seeds cost different amounts at a step), `mean`, `min`, `max`; nan where no seed has a value.
  """
  points = min(len(across) for across, _ in curves)
  values = pd.DataFrame([curve[1][:points] for curve in curves], dtype=float)
  across = np.mean([curve[0][:points] for curve in curves], axis=0, dtype=float)
  return {"across": across} | {name: values.agg(name).to_numpy() for name in ("mean", "min", "max")}


def _mean(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None


def _deviation(values: Sequence[float] | np.ndarray) -> float | None:
  return float(np.std(values, ddof=1)) if len(values) > 1 else None
