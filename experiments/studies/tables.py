"""Tables of a study, as pandas frames: accuracies, differences, costs, learning rates, what was varied, hints.

Accuracies are in percent, differences in percentage points. A planned run that has not finished is "missing" in its
cell and is named under the table.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from experiments.studies import statistics
from experiments.studies.plan import UNTRAINED
from experiments.studies.statistics import Entry
from kepo_jax.reporting.tables import Row

MISSING, BEYOND = "missing", "beyond its budget"
# Mean accuracy over the seven out-of-domain modalities of OmniMedVQA, Qwen3-VL-2B taught by 32B, in percent.
PAPER = {"KEPO": 78.00, "GRPO": 74.33, "MM-GKD": 73.67}
PAPER_SOURCE = "arXiv 2602.00400, Table 1; other data and models, one seed"
END = "† at an end of the grid of learning rates, so that a rate beyond it might be better."
INTERVALS = (
  "Brackets: 95 % intervals by a bootstrap over seeds and questions; of one seed or an untrained model over questions "
  "alone. They are not corrected for the number of comparisons."
)
CONTRASTS = (
  "Out of domain, percentage points. p: paired t-test over seeds, for these questions; corrected after Holm for the "
  "number of rows."
)
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
  "Compare seconds and CPU seconds only of runs made at one sitting: identical trainings took 23 to 32 % more at "
  "another (phantom, study tau)."
)
STABILITY = (
  "Deviations are sample standard deviations, in percentage points, of the out-of-domain mean: of test accuracy over "
  "seeds (95 % intervals by chi-square, for seeds that are normally distributed), and over the last three validations "
  "of a training, mean over seeds."
)
HINTS = "Brackets: 95 % intervals by a bootstrap over prompts."
CORRELATIONS = (
  "Pearson's r with the share of reward-positive candidates over the modalities, each of which counts the same; "
  "brackets: 95 % intervals by Fisher's z. Points of a few prompts move by chance, and no r says what causes what."
)
_SUMMARIES = {"in_domain": "{train}", "out_of_domain": "out of domain, mean of {others}",
              "out_of_domain_seen": "out of domain without {unseen}", "unseen": "{unseen} (unseen)"}  # fmt: skip
Plan = Sequence[Mapping[str, Any]]  # records with method, label, student, teacher and seeds (None: nothing is trained)
Summaries = Mapping[tuple[str, str], Mapping[str, Any]]  # pair of student and teacher -> of `statistics.summarised`


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number with an interval: "61.3 [55.7, 66.7]"."""

  value: float | None
  low: float | None = None
  high: float | None = None
  form: str = ".1f"
  scale: float = 100.0

  def parts(self) -> tuple[str, str, str]:
    """Returns value and bounds as text; "" for a bound that is not known."""
    shown = [
      # Adding 0 removes the sign of a negative zero.
      "" if number is None else f"{round(self.scale * number, int(self.form[-2])) + 0.0:{self.form}}"
      for number in (self.value, self.low, self.high)
    ]
    return shown[0] or "-", shown[1], shown[2]

  def __str__(self) -> str:
    value, low, high = self.parts()
    return f"{value} [{low}, {high}]" if low else value


@dataclasses.dataclass(frozen=True)
class Table:
  """A table: its name as a file, its title, cells (text or `Estimate`), and what is said under it."""

  name: str
  title: str
  frame: pd.DataFrame
  notes: tuple[str, ...] = ()

  def rows(self) -> list[Row]:
    """Returns the cells as text, header first."""
    return [tuple(self.frame.columns), *self.frame.map(str).itertuples(index=False, name=None)]

  def markdown(self, *, level: int = 1) -> str:
    """Returns title, table and notes in Markdown."""
    align = ["left"] + ["right"] * (self.frame.shape[1] - 1)
    table = self.frame.map(str).to_markdown(index=False, disable_numparse=True, colalign=align)
    return "\n\n".join([f"{'#' * level} {self.title}", table, *self.notes]) + "\n"

  def numbers(self) -> pd.DataFrame:
    """Returns the frame with three columns for a column of numbers with intervals: the number, `low` and `high`."""
    columns: dict[str, Any] = {}
    for name in self.frame:
      parts = [cell.parts() if isinstance(cell, Estimate) else (str(cell), "", "") for cell in self.frame[name]]
      bounded = any(low for _, low, _ in parts)
      columns |= {
        title: [part[i] for part in parts]
        for i, title in enumerate((name, f"{name} low", f"{name} high")[: 1 + 2 * bounded])
      }
    return pd.DataFrame(columns)


def write(folder: epath.PathLike, tables: Sequence[Table]) -> None:
  """Writes each table as NAME.md, NAME.csv and NAME.tex."""
  epath.Path(folder).mkdir(parents=True, exist_ok=True)
  for table in tables:
    latex = table.frame.map(str).to_latex(index=False, escape=True, caption=table.title, label=f"tab:{table.name}")
    texts = {"md": table.markdown(), "csv": table.numbers().to_csv(index=False), "tex": latex}
    for ending, text in texts.items():
      (epath.Path(folder) / f"{table.name}.{ending}").write_text(text)


def study_tables(
  study: str,
  entries: Sequence[Entry],
  items: Mapping[str, Any],
  summaries: Summaries,
  *,
  references: Sequence[str],
  grid: Sequence[Entry] = (),
  rates: Sequence[float] = (),
  tuned: Mapping[str, str] | None = None,
  plan: Plan = (),
) -> list[Table]:
  """Returns the tables of a study; the first pair has all of them, the other pairs have two each.

  Args:
    study: name of it.
    entries: those that count, of all pairs.
    items: the record of items.json.
    summaries: of `statistics.summarised`, by pair.
    references: methods that the others are compared with.
    grid: entries of the learning-rate grid.
    rates: planned learning rates of the grid.
    tuned: method -> label, of those with a grid of their own.
    plan: the runs that there should be, of all pairs.
  """
  tables: list[Table] = []
  for number, (pair, group) in enumerate(statistics.pairs(entries).items()):
    planned_here = [line for line in plan if (line["student"], line["teacher"]) == pair]
    tables += _pair_tables(pair, group, summaries[pair], planned_here, references, rates, full=number == 0)
    values = varied(study, group) if number == 0 else {}
    if values:
      frame = varied_frame(summaries[pair], values, statistics.stability(group, items), plan=planned_here)
      title = f"What was varied, and what came of it, test accuracy in percent, {' taught by '.join(pair)}"
      tables.append(Table(study, title, frame, (INTERVALS, STABILITY)))
  if grid:
    title = f"Validation accuracy per learning rate, percent, mean over the seeds of the grid, {_who(grid[0])}"
    frame = grid_frame(grid, train_modality=items["train_modality"], rates=rates, labels=tuned)
    tables.append(Table("learning_rates", title, frame, (GRID,)))
  if study == "main":
    paper = pd.DataFrame({"method": PAPER.keys(), "out of domain, mean of 7": [f"{x:.2f}" for x in PAPER.values()]})
    tables.append(Table("paper", "What the paper reports", paper, (PAPER_SOURCE,)))
  return tables


def _who(entry: Entry) -> str:
  return f"{entry['student']} taught by {entry['teacher']}"


def _pair_tables(
  pair: tuple[str, str], entries: Sequence[Entry], summary: Mapping[str, Any], plan: Plan, references: Sequence[str],
  rates: Sequence[float], *, full: bool,
) -> list[Table]:  # fmt: skip
  suffix, who = ("" if full else "-" + "-".join(pair)), " taught by ".join(pair)
  lost = missing(plan, entries)
  told = dict.fromkeys(line["note"] for line in plan if line.get("note"))
  notes = (*told, *([f"Missing: {'; '.join(lost)}."] if lost else []))
  main = main_frame(summary, plan=plan, references=references, rates=rates)
  ended = [END] if main["learning rate"].str.contains("†").any() else []
  per_modality = section_frame(summary, "modalities", plan=plan)
  tables = [
    Table(f"main{suffix}", f"Test accuracy, percent, {who}", main, (INTERVALS, *notes, *ended)),
    Table(f"modalities{suffix}", f"Test accuracy per modality, percent, {who}", per_modality, (INTERVALS, *notes)),
  ]
  if not full:
    return tables
  if records := statistics.contrasts(summary):
    tables.append(Table("contrasts", f"Tests over seeds, {who}", contrast_frame(records, summary), (CONTRASTS,)))
  per_type = section_frame(summary, "question_types", plan=plan)
  tables += [
    Table("question_types", f"Test accuracy per question type, percent, {who}", per_type, (INTERVALS, *notes)),
    Table("cost", f"Cost of a training, mean over seeds, {who}", cost_frame(entries, plan=plan), (SECONDS, *notes)),
  ]
  for metric, name in (("out_of_domain", "out of domain"), ("in_domain", summary["train_modality"])):
    frame = equal_cost_frame(entries, metric, plan=plan, references=references)
    title = f"Validation accuracy, {name}, at equal steps and at equal cost, percent, {who}"
    tables.append(Table(f"equal_cost_{metric}", title, frame, (RANGES, *notes)))
  return tables


def headings(summary: Mapping[str, Any]) -> dict[str, str]:
  """Returns the name of each statistic in tables and figures, for those that the benchmark has."""
  first = next(iter(summary["methods"].values()))["statistics"]
  modalities = sum(name.startswith("modalities/") for name in first)
  words = {"train": summary["train_modality"], "others": str(modalities - 1), "unseen": ", ".join(summary["unseen"])}
  told = [key for key in _SUMMARIES if summary["unseen"] or key != "out_of_domain_seen"]  # else it is the mean of all
  return {key: _SUMMARIES[key].format(**words) for key in told if key in first}


def missing(plan: Plan, entries: Sequence[Entry]) -> list[str]:
  """Names what was planned and is not among the entries: "GRPO, confused taught by weak: seeds 3, 4"."""
  present = {
    (entry["method"], pair, entry["seed"]) for pair, group in statistics.pairs(entries).items() for entry in group
  }
  names = []
  for line in plan:
    pair = (line["student"], line["teacher"])
    lost = [seed for seed in line["seeds"] if (line["method"], pair, seed) not in present]
    numbers = ", ".join(str(seed) for seed in lost if seed is not None)
    name = f"{line['label']}, {_who(line)}"
    names += [f"{name}: seed{'s' if len(lost) > 1 else ''} {numbers}" if numbers else name] if lost else []
  return names


def planned(summary: Mapping[str, Any], plan: Plan = ()) -> dict[str, tuple[str, int]]:
  """Returns method -> (label, planned seeds), in the order of the plan; methods that nobody planned come last."""
  known = {name: (entry["label"], len(entry["seeds"])) for name, entry in summary["methods"].items()}
  return {line["method"]: (line["label"], len(line["seeds"])) for line in plan} | {
    name: entry for name, entry in known.items() if name not in {line["method"] for line in plan}
  }


def percent(entry: Mapping[str, Any], *, signed: bool = False) -> Estimate:
  """Returns an accuracy with its interval in percent, or, signed, a difference in percentage points."""
  return Estimate(entry["mean"], entry["low"], entry["high"], "+.1f" if signed else ".1f")


def main_frame(
  summary: Mapping[str, Any], *, references: Sequence[str], plan: Plan = (), rates: Sequence[float] = ()
) -> pd.DataFrame:
  """Returns accuracies, format, and the out-of-domain mean less that of each reference.

  Args:
    summary: of `statistics.summarised`.
    references: methods of `summary["differences"]`, each a column if it is present or planned.
    plan: of this pair.
    rates: of the grid; a learning rate at one of its ends has a dagger.
  """
  lines, named = planned(summary, plan), headings(summary)
  less = {name: f"out of domain, less {lines[name][0]}" for name in references if name in lines}
  rows: list[dict[str, Any]] = []
  for name, (label, seeds) in lines.items():
    row: dict[str, Any] = {"method": label}
    entry = summary["methods"].get(name)
    if entry is None:
      columns = ("learning rate", *named.values(), "format", *less.values())
      rows.append(row | {"seeds": f"0 of {seeds}"} | dict.fromkeys(columns, MISSING))
      continue
    row |= {"seeds": _seeds(entry, seeds), "learning rate": _rate(entry["learning_rate"], rates)}
    row |= {title: percent(entry["statistics"][key]) for key, title in named.items()}
    row["format"] = Estimate(entry["format"])
    row |= {title: _difference(summary, reference, name) for reference, title in less.items()}
    rows.append(row)
  return pd.DataFrame(rows)


def contrast_frame(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> pd.DataFrame:
  """Returns the records of `statistics.contrasts`, the smallest p first."""
  labels = {name: entry["label"] for name, entry in summary["methods"].items()}
  rows = [
    {"method": labels[record["method"]], "less": labels[record["reference"]],
     "difference": Estimate(record["mean"], form="+.1f"), "seeds": str(record["seeds"]),
     "p": f"{record['p']:.2g}", "p, Holm": f"{record['p_holm']:.2g}"}
    for record in sorted(records, key=lambda record: record["p"])
  ]  # fmt: skip
  return pd.DataFrame(rows)


def section_frame(summary: Mapping[str, Any], section: str, *, plan: Plan = ()) -> pd.DataFrame:
  """Returns the accuracy per modality or per question type: a row per method, the first for chance.

  Args:
    summary: of `statistics.summarised`.
    section: "modalities" or "question_types".
    plan: of this pair.
  """
  keys = {key: marked(summary, key) for key in summary["chance"] if key.startswith(f"{section}/")}
  rows: list[dict[str, Any]] = [
    {"method": "chance"} | {title: Estimate(summary["chance"][key]) for key, title in keys.items()}
  ]
  for name, (label, _) in planned(summary, plan).items():
    entry = summary["methods"].get(name)
    cells = {title: percent(entry["statistics"][key]) if entry else MISSING for key, title in keys.items()}
    rows.append({"method": label} | cells)
  return pd.DataFrame(rows)


def marked(summary: Mapping[str, Any], key: str) -> str:
  """Names a modality or question type; says which modality was trained on and which no model has seen."""
  section, name = key.split("/", 1)
  if section != "modalities":
    return name
  unseen = f"{name} (unseen)" if name in summary["unseen"] else name
  return f"{name} (trained on)" if name == summary["train_modality"] else unseen


def cost_frame(entries: Sequence[Entry], *, plan: Plan = ()) -> pd.DataFrame:
  """Returns what a training cost, means over seeds: tokens in thousands, seconds, CPU seconds."""
  columns = {"student_tokens": "student tokens, thousands", "teacher_tokens": "teacher tokens, thousands",
             "seconds": "seconds", "cpu_seconds": "CPU seconds"}  # fmt: skip
  groups, rows = statistics.methods(entries), []
  for name, label in _trained(groups, plan).items():
    costs = [entry["cost"] for entry in groups.get(name, [])]
    row = {"method": label}
    for key, title in columns.items():
      known = [cost[key] / (1e3 if "tokens" in key else 1) for cost in costs if cost.get(key) is not None]
      row[title] = f"{np.mean(known):,.1f}" if known else MISSING
    rows.append(row)
  return pd.DataFrame(rows)


def equal_cost_frame(
  entries: Sequence[Entry], metric: str, *, references: Sequence[str], plan: Plan = ()
) -> pd.DataFrame:
  """Returns validation accuracy after equal steps, at the end where some methods have more of them, and at equal cost.

  A method that costs more is read inside its schedule, before its learning rate has decayed.

  Args:
    entries: of one pair, "start" among them.
    metric: of `statistics.METRICS`.
    references: methods that the others are compared with; the smallest final cost of the first one is the budget.
    plan: of this pair.
  """
  groups = statistics.methods(entries)
  trained = _trained(groups, plan)
  steps = sorted({entry["steps"] for name in trained for entry in groups.get(name, [])})
  columns: dict[str, dict[str, Any]] = {"method": dict(trained)}
  if steps:
    columns[f"after {steps[0]} steps"] = {n: _reached(_after(groups.get(n, []), metric, steps[0])) for n in trained}
  if len(steps) != 1:
    columns["at the end"] = {name: _reached(_after(groups.get(name, []), metric)) for name in trained}
  budget = min([statistics.tokens(entry["cost"]) for entry in groups.get(references[0], [])], default=0)
  if budget:
    at_cost = statistics.accuracy_at_cost(entries, metric, budget=budget)
    title = f"after {_amount(budget)} tokens of both models, {groups[references[0]][0]['label']}'s"
    columns[title] = {name: _reached(at_cost.get(name)) for name in trained}
    for reference in [name for name in references if name in groups]:
      gaps = statistics.differences_at_cost(entries, reference, metric, budget=budget)
      columns[f"there, less {groups[reference][0]['label']}"] = {
        name: MISSING if name not in groups else percent(gaps[name], signed=True) if name in gaps else "-"
        for name in trained
      }
  return pd.DataFrame(columns).loc[list(trained)]


def grid_frame(
  entries: Sequence[Entry], *, train_modality: str, rates: Sequence[float] = (), labels: Mapping[str, str] | None = None
) -> pd.DataFrame:
  """Returns validation accuracy per learning rate in percent; the chosen one has an asterisk, or a dagger at an end.

  Args:
    entries: of the grid, one pair.
    train_modality: the last column is the rate that its validation questions alone would have chosen.
    rates: planned ones; those of the entries are added.
    labels: planned methods; those of the entries are added.
  """
  means, chosen = statistics.rate_means(entries), statistics.chosen_rates(entries)
  alone = statistics.chosen_rates(entries, "in_domain")
  shown = {**(labels or {})} | {entry["method"]: entry["label"] for entry in entries if entry["seed"] is not None}
  columns = sorted({*rates, *(rate for by_rate in means.values() for rate in by_rate)})
  rows = []
  for name, label in shown.items():
    by_rate, best = means.get(name, {}), chosen.get(name)
    mark = {rate: "" if rate != best else " †" if rate in (columns[0], columns[-1]) else " *" for rate in columns}
    cells = {f"{r:g}": f"{100 * by_rate[r]:.1f}{mark[r]}" if r in by_rate else MISSING for r in columns}
    by_one = f"{alone[name]:g}" if name in alone else MISSING
    rows.append({"method": label} | cells | {f"by {train_modality} alone": by_one})
  return pd.DataFrame(rows)


def varied(study: str, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
  """Returns heading -> method -> value of what a study varies, for the methods of KEPO."""
  config = {entry["method"]: config_of(entry) for entry in entries}
  kepo = [entry for entry in entries if config[entry["method"]] in ("kepo", "kepo_ke")]
  tau = statistics.settings(kepo, "objective.gate_threshold", 1.0)
  rounds = statistics.settings(kepo, "exploration.rounds", 5)
  rounds |= {name: 0 for name in rounds if config[name] == "kepo_ke"}
  if study == "tau":
    signal = statistics.settings(kepo, "objective.gate_signal", "accuracy")
    signal |= {name: f"{signal[name]}, rates swapped" for name in signal if name.endswith("-swapped")}
    return {"tau": tau, "gate signal": signal}
  if study == "budget":
    return {"B": rounds}
  if study != "gate":
    return {}
  mode = statistics.settings(kepo, "objective.gate_mode", "positive")
  # A threshold that everything reaches opens the gate for all, in whichever direction it is written.
  opened = {name for name, value in mode.items() if value == "none" or (value == "positive" and tau[name] <= 0)}
  return {"gate": {name: "all" if name in opened else value for name, value in mode.items()}, "B": rounds}


def config_of(entry: Mapping[str, Any]) -> str:
  """Names the config that an entry was trained with, "kepo" for "kepo.py"; for an untrained model its method."""
  return (entry.get("config") or entry["method"]).removesuffix(".py")


def varied_frame(
  summary: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]], stability: Mapping[str, Mapping[str, Any]], *,
  plan: Plan = (),
) -> pd.DataFrame:  # fmt: skip
  """Returns accuracies against what was varied.

  Args:
    summary: of `statistics.summarised`.
    values: of `varied`.
    stability: of `statistics.stability`.
    plan: of this pair.
  """
  named, rows = headings(summary), []
  for name, (label, seeds) in planned(summary, plan).items():
    if plan and name not in {line["method"] for line in plan}:
      continue
    row: dict[str, Any] = {"method": label} | {title: _value(by.get(name, "-")) for title, by in values.items()}
    entry, moved = summary["methods"].get(name), stability.get(name, {})
    row["seeds"] = _seeds(entry, seeds) if entry else f"0 of {seeds}"
    row |= {title: percent(entry["statistics"][key]) if entry else MISSING for key, title in named.items()}
    spread = {
      "deviation over seeds": Estimate(moved.get("seeds"), *(moved.get("seeds_interval") or ())),
      "deviation over the last validations": Estimate(moved.get("validations")),
    }
    rows.append(row | {title: cell if entry else MISSING for title, cell in spread.items()})
  return pd.DataFrame(rows)


def hint_tables(
  records: Sequence[Mapping[str, Any]], unmeasured: Sequence[str] = (), unseen: Sequence[str] = ()
) -> list[Table]:
  """Returns the quality of hints per modality, and how it correlates with success.

  Args:
    records: `student`, `teacher`, `hint_prompt`, `modality`, `questions`, `prompts` and `candidates` (numbers), `gain`
      and `reliance` (nats per token), `leak_rate`, `positive_rate` and `accept_rate` (by round, cumulative), and
      `gain_interval` and `positive_rate_interval`, None where there is none.
    unmeasured: names of measurements that have not been made.
    unseen: modalities that no model has seen; correlations are also computed without them.
  """
  notes = (f"Missing: {'; '.join(unmeasured)}.",) if unmeasured else ()
  quality = [
    {
      "student, teacher": f"{record['student']}, {record['teacher']}",
      "hint prompt": record["hint_prompt"],
      "modality": record["modality"],
      **{key: f"{record[key]:,}" for key in ("questions", "prompts", "candidates")},
      "gain, nats per token": _nats(record["gain"], record.get("gain_interval")),
      "reliance, nats per token": _nats(record["reliance"]),
      "leak rate": Estimate(record["leak_rate"]),
      "reward-positive": Estimate(record["positive_rate"], *(record.get("positive_rate_interval") or ())),
      "accepted after 1 round": Estimate((record["accept_rate"] or [None])[0]),
      "after all": Estimate((record["accept_rate"] or [None])[-1]),
    }
    for record in records
  ]
  related = pd.DataFrame(correlation_rows(records, unseen))
  return [
    Table("hints", "Quality of hints per modality; rates in percent", pd.DataFrame(quality), (HINTS, *notes)),
    Table("hint_correlations", "What goes with reward-positive candidates, over modalities", related,
          (CORRELATIONS, *notes)),
  ]  # fmt: skip


def correlation_rows(records: Sequence[Mapping[str, Any]], unseen: Sequence[str] = ()) -> list[dict[str, Any]]:
  """Returns how gain and reliance go with the share of reward-positive candidates, over the modalities."""
  rows = []
  measured = [record for record in records if record["modality"] != "all" and record["positive_rate"] is not None]
  for student, teacher, prompt in dict.fromkeys((r["student"], r["teacher"], r["hint_prompt"]) for r in measured):
    group = [r for r in measured if (r["student"], r["teacher"], r["hint_prompt"]) == (student, teacher, prompt)]
    seen = [record for record in group if record["modality"] not in unseen]
    for name, chosen in {"all": group, f"without {', '.join(unseen)}": seen}.items():
      if name == "all" or len(seen) < len(group):
        row: dict[str, Any] = {"student, teacher": f"{student}, {teacher}", "hint prompt": prompt}
        row["modalities"] = f"{len(chosen)}, {name}"
        for key in ("gain", "reliance"):
          known = [record for record in chosen if record[key] is not None]
          r = statistics.correlation([x[key] for x in known], [x["positive_rate"] for x in known])
          row[f"r of {key}"] = _nats(r["r"], None if r["low"] is None else (r["low"], r["high"]))
        rows.append(row)
  return rows


def _nats(value: float | None, interval: Sequence[float] | None = None) -> Estimate:
  low, high = interval or (None, None)
  return Estimate(value, low, high, "+.2f", scale=1.0)


def _difference(summary: Mapping[str, Any], reference: str, name: str) -> Estimate | str:
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


def _value(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def _amount(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _trained(groups: Mapping[str, Sequence[Entry]], plan: Plan) -> dict[str, str]:
  labels = {line["method"]: line["label"] for line in plan} | {name: g[0]["label"] for name, g in groups.items()}
  return {name: label for name, label in labels.items() if name not in UNTRAINED}


def _after(entries: Sequence[Entry], metric: str, step: int | None = None) -> dict[str, Any] | None:
  """Returns mean, lowest and highest of the validations after a step; None: of the last ones."""
  values = []
  for entry in entries:
    taken = [record for record in entry["validation"] if step in (None, record["step"])]
    last = max(taken, key=lambda record: record["step"], default=None)
    if last and last[metric] is not None:
      values.append(last[metric])
  return {"mean": float(np.mean(values)), "low": min(values), "high": max(values)} if values else None


def _reached(entry: Mapping[str, Any] | None) -> Estimate | str:
  if entry is None:
    return MISSING
  if entry["mean"] is not None and math.isnan(entry["mean"]):
    return "-"  # no validation question of that kind
  return BEYOND if entry["mean"] is None else percent(entry)
