"""The entries of a study, one per finished training, and what they say about its methods.

An entry is a record of runs.json or grid.json: `method` and `label`, `student` and `teacher`, `learning_rate`, `seed`
(None where nothing was trained: methods "start" and "teacher"), `steps`, `config` and `overrides`, `test` (`correct` as
`packed` writes it, `format`, `tokens`, ..), and of a training `validation`, `curves` and `cost`. items.json describes
the questions of the test set, as `seeds.design` takes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax.evaluation import seeds, statistics

Entry = Mapping[str, Any]
UNTRAINED = ("start", "start-no_think", "teacher")  # methods that are models as they came
REFERENCES = ("grpo", "gkd-1")  # what methods are compared with: no teacher, and uniform distillation


def packed(correct: Iterable[bool]) -> str:
  """Right and wrong, a bit per question in hexadecimal digits; the last byte is filled up with zeros."""
  return np.packbits(np.fromiter(correct, bool)).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
  """bool[count], the inverse of `packed`.

  Raises:
    ValueError: the text does not hold that many questions.
  """
  found = np.frombuffer(bytes.fromhex(text), np.uint8)
  if len(found) != -(-count // 8):
    raise ValueError(f"{8 * len(found)} answers are packed where {count} questions are expected; is items.json theirs?")
  return np.unpackbits(found, count=count).astype(bool)


def pairs(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
  """(student, teacher) -> entries, in order of appearance; `start` joins every pair of its student, `teacher` of its.

  Where nothing was trained, what "start" and "teacher" name is the one pair.
  """
  trained = [entry for entry in entries if entry["method"] not in UNTRAINED]
  named = dict.fromkeys((entry["student"], entry["teacher"]) for entry in trained or entries)
  found: dict[tuple[str, str], list[Entry]] = {}
  for student, teacher in named:
    mine = {"start": ("student", student), "teacher": ("teacher", teacher)}
    found[student, teacher] = [
      entry
      for entry in entries
      if (
        entry[mine[entry["method"]][0]] == mine[entry["method"]][1]
        if entry["method"] in mine
        else (entry["student"], entry["teacher"]) == (student, teacher)
      )
    ]
  return found


def methods(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
  """Method -> its entries by seed, in order of appearance.

  Raises:
    ValueError: a seed occurs twice in a method, that is with several learning rates or pairs.
  """
  found: dict[str, dict[int | None, Entry]] = {}
  for entry in entries:
    mine = found.setdefault(entry["method"], {})
    same = mine.get(entry["seed"])
    if same is not None and entry["seed"] is not None:
      raise ValueError(
        f"{entry['method']} has two entries of seed {entry['seed']} (learning rates {same['learning_rate']:g} and "
        f"{entry['learning_rate']:g}); hand over one pair, at the chosen rate."
      )
    mine[entry["seed"]] = entry
  return {name: [mine[number] for number in sorted(mine, key=lambda x: -1 if x is None else x)]
          for name, mine in found.items()}  # fmt: skip


def summarised(
  entries: Sequence[Entry],
  items: Mapping[str, Any],
  *,
  references: Sequence[str] = REFERENCES,
  resamples: int = statistics.RESAMPLES,
) -> dict[str, Any]:
  """Everything that tables and figures say about the test set, for one pair of student and teacher.

  Args:
    entries: those that count: of each method one per seed, at its chosen learning rate.
    items: the record of items.json.
    references: methods that the others are compared with.
    resamples: of the bootstrap.

  Returns:
    JSON-able `methods` and `differences` of `seeds.bootstrap`; a method has also `label`, `config`, `learning_rate` and
    the means over its seeds of `format`, `unparsed`, `truncated`, `tokens` where they are known. `chance`: statistic ->
    what guessing scores. `items`: how many questions, `images`: how many images. `train_modality` and `unseen`.

  Raises:
    ValueError: two entries for one method and seed, or answers to other questions.
  """
  found, plan = methods(entries), seeds.design(items)
  count = len(items["modality"])
  answers = {
    name: {entry["seed"]: unpacked(entry["test"]["correct"], count) for entry in mine} for name, mine in found.items()
  }
  summary = seeds.bootstrap(answers, plan, references=references, resamples=resamples)
  for name, mine in found.items():
    summary["methods"][name] |= {
      "label": mine[0]["label"],
      "config": mine[0].get("config", ""),
      "learning_rate": mine[0].get("learning_rate"),
    }
    summary["methods"][name] |= {key: _mean(entry["test"].get(key) for entry in mine) for key in
                                 ("format", "unparsed", "truncated", "tokens")}  # fmt: skip
  guesses = seeds.points(np.asarray(items["chance"])[None], plan)[0]
  return summary | {
    "chance": dict(zip(plan.names, guesses.tolist(), strict=True)),
    "items": count,
    "images": sum(plan.strata),
    "train_modality": items["train_modality"],
    "unseen": list(items["unseen"]),
  }


def _mean(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None


def rate_means(entries: Sequence[Entry], figure: str = "overall") -> dict[str, dict[float, float]]:
  """Method -> learning rate -> validation accuracy at the last step, mean over the same seeds.

  Only seeds that a method has at all of its rates count, so that no rate profits from an easy seed; a method without
  such a seed is left out.

  Args:
    entries: of the grid, one pair of student and teacher.
    figure: "overall" for all validation questions, or "in_domain".

  Raises:
    ValueError: trainings of a method do not end at the same step.
  """
  table: dict[str, dict[float, dict[int, float]]] = {}
  ends: dict[str, int] = {}
  for entry in entries:
    if entry["method"] in UNTRAINED:
      continue
    last = max(entry["validation"], key=lambda record: record["step"], default=None)
    if last is None:
      continue
    if ends.setdefault(entry["method"], last["step"]) != last["step"]:
      raise ValueError(f"{entry['method']} was validated last at steps {ends[entry['method']]} and {last['step']}.")
    table.setdefault(entry["method"], {}).setdefault(entry["learning_rate"], {})[entry["seed"]] = last[figure]
  shared = {name: set.intersection(*map(set, rates.values())) for name, rates in table.items()}
  return {
    name: {
      rate: float(np.mean([found[seed] for seed in sorted(shared[name])])) for rate, found in sorted(rates.items())
    }
    for name, rates in table.items()
    if shared[name]
  }


def chosen_rates(entries: Sequence[Entry], figure: str = "overall") -> dict[str, float]:
  """Method -> its best learning rate by `rate_means`; the smaller of two that are equal. Test figures are not read."""
  # Means of shares can differ in their last bit where they are equal.
  return {
    name: min(rates, key=lambda rate: (-round(rates[rate], 9), rate))
    for name, rates in rate_means(entries, figure).items()
  }


def settings(entries: Sequence[Entry], field: str, default: Any) -> dict[str, Any]:
  """Method -> the value of a config field by its overrides, or the default of its config."""
  return {entry["method"]: entry.get("overrides", {}).get(field, default) for entry in entries}


def stability(entries: Sequence[Entry], items: Mapping[str, Any], *, last: int = 3) -> dict[str, dict[str, Any]]:
  """How far the out-of-domain accuracy of a method moves between its seeds, and late in its trainings.

  Args:
    entries: of one pair, one per method and seed.
    items: the record of items.json.
    last: validations that count as late.

  Returns:
    method -> `seeds`: sample standard deviation over seeds of the test figure, None with one seed; `seeds_interval`:
    its `seeds.deviation_interval`, which is wide for the seeds that anyone runs; `validations`: mean over seeds of the
    sample standard deviation over the last validations, None with one validation.
  """
  plan, found = seeds.design(items), {}
  if "out_of_domain" not in plan.names:
    return {}
  column = plan.names.index("out_of_domain")
  for name, mine in methods(entries).items():
    if name in UNTRAINED:
      continue
    answers = np.stack([unpacked(entry["test"]["correct"], len(items["modality"])) for entry in mine])
    late = [[record["out_of_domain"] for record in entry["validation"][-last:] if record["out_of_domain"] is not None]
            for entry in mine]  # fmt: skip
    deviation = _deviation(seeds.points(answers, plan)[:, column])
    found[name] = {
      "seeds": deviation,
      "seeds_interval": None if deviation is None else seeds.deviation_interval(deviation, len(mine)),
      "validations": _mean(_deviation(each) for each in late),
    }
  return found


def _deviation(values: Sequence[float] | np.ndarray) -> float | None:
  return float(np.std(values, ddof=1)) if len(values) > 1 else None
