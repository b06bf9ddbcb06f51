import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.studies import plan, statistics, tables
from tests.experiments.studies import cases

PAIR, ITEMS = ("confused", "weak"), cases.kept_items()
# The tables of the first pair are the ones in full.
MAIN = sorted(cases.kept("main"), key=lambda entry: (entry["student"], entry["teacher"]) != PAIR)
MEAN = "out of domain, mean of 7"


@pytest.fixture(scope="module")
def made():
  """Name -> table of the kept main study, with intervals of few draws."""
  references = plan.STUDIES["main"].references
  summaries = {
    pair: statistics.summarised(group, ITEMS, references=references, resamples=60)
    for pair, group in statistics.pairs(MAIN).items()
  }
  grid = cases.kept("main", "grid.json")
  found = tables.study_tables("main", MAIN, ITEMS, summaries, references=references, grid=grid)
  return {table.name: table for table in found}


def by_name(table):
  return table.frame.set_index("method").to_dict("index")


def out_of_domain(entry):
  """The mean over modalities of the share of right answers, read bit by bit."""
  bits = [int(digit, 16) >> place & 1 for digit in entry["test"]["correct"] for place in (3, 2, 1, 0)]
  shares = {}
  for modality, right in zip(ITEMS["modality"], bits, strict=False):
    shares.setdefault(ITEMS["modalities"][modality], []).append(right)
  return np.mean([np.mean(answers) for name, answers in shares.items() if name != "MRI"])


def test_accuracies_and_differences_are_those_of_the_kept_answers(made):
  rows = by_name(made["main"])
  seeds = {}
  for entry in MAIN:
    if (entry["student"], entry["teacher"]) == PAIR and entry["seed"] is not None:
      seeds.setdefault(entry["label"], {})[entry["seed"]] = out_of_domain(entry)
      assert seeds[entry["label"]][entry["seed"]] == pytest.approx(entry["test"]["out_of_domain"], abs=2e-5)
  assert len(seeds) == 12
  for label, values in seeds.items():
    cell = rows[label][MEAN]
    assert cell.value == pytest.approx(np.mean([*values.values()]), abs=1e-6)
    assert cell.low < cell.value < cell.high and rows[label]["seeds"] == "5"
    if label != "GRPO":
      gaps = [values[seed] - seeds["GRPO"][seed] for seed in values]
      assert rows[label]["out of domain, less GRPO"].value == pytest.approx(np.mean(gaps), abs=1e-6)
  # The quoted test: one contrast of methods that learn survives Holm's correction for all thirty.
  tested = made["contrasts"].frame
  assert len(tested) == 30
  row = tested[(tested["method"] == "KEPO, τ = 0") & (tested["less"] == "GKD, on-policy")].iloc[0]
  p = stats.ttest_rel([*seeds["KEPO, τ = 0"].values()], [*seeds["GKD, on-policy"].values()]).pvalue
  assert float(row["p"]) == pytest.approx(p, rel=0.05) and row["p, Holm"] == "0.0059"


def test_learning_rates_are_those_of_the_kept_grid(made):
  rows = by_name(made["learning_rates"])
  for label, rate, mark in (("GRPO", 3e-4, " *"), ("KEPO, τ = 1", 2e-4, " *"), ("SFT, teacher's answers", 6e-4, " †")):
    runs = [e for e in cases.kept("main", "grid.json") if e["label"] == label and e["learning_rate"] == rate]
    mean = np.mean([entry["validation"][-1]["overall"] for entry in runs])
    assert len(runs) == 2 and rows[label][f"{rate:g}"] == f"{100 * mean:.1f}{mark}"


def test_costs_are_compared_in_tokens(made):
  kept = {label: [e for e in MAIN if e["label"] == label and (e["student"], e["teacher"]) == PAIR]
          for label in ("GRPO", "KEPO, τ = 1", "SFT, teacher's answers")}  # fmt: skip
  rows = by_name(made["cost"])
  for label, runs in kept.items():
    for key in ("student", "teacher"):
      mean = np.mean([run["cost"][f"{key}_tokens"] for run in runs]) / 1e3
      assert rows[label][f"{key} tokens, thousands"] == f"{mean:,.1f}"
  rows = by_name(made["equal_cost_out_of_domain"])
  budget = min(run["cost"]["student_tokens"] + run["cost"]["teacher_tokens"] for run in kept["GRPO"])
  column = f"after {budget:,} tokens of both models, GRPO's"
  start = next(e for e in MAIN if e["method"] == "start" and e["student"] == "confused")["validation"][0]
  read = []
  for run in kept["KEPO, τ = 1"]:
    spent = [0] + [v["cost"]["student_tokens"] + v["cost"]["teacher_tokens"] for v in run["validation"]]
    read.append(np.interp(budget, spent, [start["out_of_domain"], *(v["out_of_domain"] for v in run["validation"])]))
  cell = rows["KEPO, τ = 1"][column]
  assert (cell.value, cell.low, cell.high) == pytest.approx((np.mean(read), min(read), max(read)))
  assert rows["SFT, teacher's answers"][column] == "beyond its budget"
  ends = [run["validation"][-1]["out_of_domain"] for run in kept["GRPO"]]
  assert rows["GRPO"]["after 80 steps"].value == pytest.approx(np.mean(ends))


def test_hints_and_their_correlations():
  record = {"student": "a", "teacher": "b", "hint_prompt": "p", "questions": 9, "prompts": 1234, "candidates": 5,
            "leak_rate": 0.0, "accept_rate": [0.5, 0.75], "reliance": 0.2}  # fmt: skip
  gains, rates = [0.1, 0.3, 0.2, 0.5, 0.4], [0.9, 0.5, 0.8, 0.4, 0.1]
  records = [record | {"modality": f"m{i}", "gain": gain, "positive_rate": rate, "positive_rate_interval": [0.1, 0.95]}
             for i, (gain, rate) in enumerate(zip(gains, rates, strict=True))]  # fmt: skip
  quality, related = tables.hint_tables([*records, records[0] | {"modality": "all"}], ["hints of x"], ["m4"])
  assert quality.rows()[1][3:] == ("9", "1,234", "5", "+0.10", "+0.20", "0.0", "90.0 [10.0, 95.0]", "50.0", "75.0")
  found = stats.pearsonr(gains, rates)
  low, high = found.confidence_interval()
  assert related.rows()[1][2:4] == ("5, all", f"{found.statistic:+.2f} [{low:+.2f}, {high:+.2f}]")
  assert related.rows()[2][2] == "4, without m4" and "Missing: hints of x." in related.notes


def test_what_was_planned_and_has_not_run_is_missing():
  items = cases.items(8)
  entries = cases.entries(items)
  summary = statistics.summarised(entries, items, references=("grpo",), resamples=20)

  def line(method, seeds, pair=PAIR):
    return {"method": method, "label": method.upper(), "student": pair[0], "teacher": pair[1], "seeds": seeds}

  lines = [
    line("start", [None]), line("grpo", [0, 1, 2]), line("rloo", [0, 1]), line("start", [None], ("noisy", "weak")),
  ]  # fmt: skip
  rows = tables.main_frame(summary, references=("grpo",), plan=lines[:3]).set_index("method").to_dict("index")
  assert rows["GRPO"]["seeds"] == "2 of 3" and set(rows["RLOO"].values()) == {"0 of 2", "missing"}
  lost = "; ".join(tables.missing(lines, entries))
  for name in ("GRPO, confused taught by weak: seed 2", "weak: seeds 0, 1", "START, noisy taught by weak"):
    assert name in lost
  figures = cases.training("grpo", 0, [(80, 96_000, 0.7)])
  frame = tables.equal_cost_frame([figures], "in_domain", references=("grpo",), plan=lines[1:3])
  assert frame.loc["rloo"].tolist() == ["RLOO", *["missing"] * 3]


@pytest.mark.parametrize("study", ["tau", "budget", "gate"])
def test_what_was_varied_stands_beside_its_accuracy(study):
  entries = cases.kept(study)
  summary = statistics.summarised(entries, ITEMS, references=plan.STUDIES[study].references, resamples=20)
  frame = tables.varied_frame(summary, tables.varied(study, entries), {}).set_index("method")
  expected = {
    "tau": {"accuracy, τ = 1, rate of τ = 0": ["1", "accuracy, rates swapped"], "mean, τ = 0.5": ["0.5", "mean"]},
    "budget": {"B = 0": ["0"], "B = 10": ["10"]},
    "gate": {"right rollouts": ["positive", "5"], "all rollouts, no hints": ["all", "0"]},
  }[study]
  for label, values in expected.items():
    assert frame.loc[label].tolist()[: len(values)] == values


def test_formats(tmp_path):
  cells = [tables.Estimate(0.613, 0.557, 0.667), tables.Estimate(-0.0001, -0.1, 0.1, "+.1f"), "missing"]
  table = tables.Table("t", "Title", pd.DataFrame({"method": ["a_1", "b", "c"], "x": cells}), ("Note.",))
  tables.write(tmp_path, [table])
  text = (tmp_path / "t.md").read_text()
  assert "61.3 [55.7, 66.7]" in text and "+0.0 [-10.0, +10.0]" in text and text.endswith("\n\nNote.\n")
  read = pd.read_csv(tmp_path / "t.csv")
  assert list(read) == ["method", "x", "x low", "x high"] and read["x high"].tolist()[:2] == [66.7, 10.0]
  assert r"a\_1 & 61.3 [55.7, 66.7]" in (tmp_path / "t.tex").read_text()
