"""Tables of studies: the numbers of a summary, and what is said to be missing."""

import numpy as np
import pytest

from kepo_jax.evaluation import equal_cost, studies
from kepo_jax.reporting import check_tables, cost_tables, study_tables
from tests import studies_data

ITEMS = studies_data.items(16)
SOME = {name: studies_data.METHODS[name] for name in ("sft", "grpo", "gkd-1", "kepo-tau1")}
ENTRIES = [e for e in studies_data.entries(ITEMS, methods=SOME, seeds=3) if (e["method"], e["seed"]) != ("grpo", 1)]


@pytest.fixture(scope="module")
def summary():
  return studies.summarised(ENTRIES, ITEMS, resamples=100)


def cell(method, label, seeds, pair=("confused", "weak")):
  return {"method": method, "label": label, "student": pair[0], "teacher": pair[1], "seeds": seeds}


EXPECTED = [cell("start", "untrained student", [None]), cell("grpo", "GRPO", [0, 1, 2]), cell("rloo", "RLOO", [0, 1])]


def by_name(rows):
  """Label -> heading -> cell."""
  header, *rest = rows
  return {row[0]: dict(zip(header, row, strict=True)) for row in rest}


def percent(entry, sign=""):
  return " ".join(
    [f"{100 * entry['mean']:{sign}.1f}", f"[{100 * entry['low']:{sign}.1f}, {100 * entry['high']:{sign}.1f}]"]
  )


def test_accuracies_and_differences(summary):
  rows = by_name(study_tables.main_rows(summary, expected=EXPECTED))
  kepo, mean = rows["KEPO, tau = 1"], "out of domain, mean of 7"
  assert kepo[mean] == percent(summary["methods"]["kepo-tau1"]["statistics"]["out_of_domain"])
  gap = summary["differences"]["grpo"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert kepo["out of domain, less GRPO"] == percent(gap, "+")
  assert rows["GRPO"]["out of domain, less GRPO"] == "-" and rows["GRPO"]["learning rate"] == "0.0003"
  assert rows["GRPO"]["seeds"] == "2 of 3" and rows["untrained student"]["seeds"] == "untrained"
  assert rows["RLOO"]["seeds"] == "0 of 2" and {*rows["RLOO"].values()} == {"RLOO", "0 of 2", "missing"}
  modalities = by_name(study_tables.section_rows(summary, "modalities", expected=EXPECTED))
  assert modalities["chance"]["CT"] == f"{100 * summary['chance']['modalities/CT']:.1f}"
  assert modalities["GRPO"]["MRI (trained on)"] == percent(summary["methods"]["grpo"]["statistics"]["modalities/MRI"])
  expected = [*EXPECTED, cell("start", "untrained student", [None], ("noisy", "weak"))]
  assert study_tables.missing_cells(expected, ENTRIES) == [
    "GRPO, confused taught by weak: seed 1",
    "RLOO, confused taught by weak: seeds 0, 1",
    "untrained student, noisy taught by weak",
  ]
  assert study_tables.percent({"mean": -0.0004, "low": -0.012, "high": 0.0004}, signed=True) == "+0.0 [-1.2, +0.0]"


def test_costs_are_means_over_seeds():
  rows = by_name(cost_tables.cost_rows(ENTRIES, expected=EXPECTED))
  seconds = np.mean([e["cost"]["seconds"] for e in ENTRIES if e["method"] == "grpo"])
  # 80 steps of 1.2 thousand tokens.
  assert list(rows["GRPO"].values())[1:4] == ["96.0", "0.0", f"{seconds:.1f}"]
  assert [*rows["RLOO"].values()] == ["RLOO", *["missing"] * 4] and "teacher" not in rows


def test_equal_steps_and_equal_cost():
  rows = by_name(cost_tables.equal_cost_rows(ENTRIES, expected=EXPECTED))
  tokens, gap = "after 96,000 tokens of both models, GRPO's", "there, less GRPO"
  ends = [e["validation"][-1]["out_of_domain"] for e in ENTRIES if e["method"] == "grpo"]
  expected = percent({"mean": np.mean(ends), "low": min(ends), "high": max(ends)})
  assert rows["GRPO"]["after 80 steps"] == rows["GRPO"][tokens] == expected and rows["GRPO"][gap] == "-"
  assert rows["SFT, gold answers"][tokens] == "beyond its budget" and rows["SFT, gold answers"][gap] == "-"
  less = equal_cost.differences_at_cost(ENTRIES, "grpo", "out_of_domain", "tokens", budget=96e3)["kepo-tau1"]
  assert rows["KEPO, tau = 1"][gap] == percent(less, "+")
  longer = [  # twice the steps at the same cost: read at equal steps as well
    entry | {"method": "long", "label": "long", "steps": 160,
             "validation": [{**each, "step": 2 * each["step"]} for each in entry["validation"]]}
    for entry in ENTRIES if entry["method"] == "grpo"
  ]  # fmt: skip
  rows = by_name(cost_tables.equal_cost_rows([*ENTRIES, *longer]))
  assert rows["long"]["at the end"] == rows["GRPO"]["after 80 steps"] != rows["long"]["after 80 steps"]


def test_correlations_of_hints_over_modalities():
  records = [each for each in studies_data.hint_records() if each["student"] == "confused"]
  _, *rows = check_tables.correlation_rows([*records, records[0] | {"modality": "all"}], ["Fundus Photography"])
  r = np.corrcoef([each["gain"] for each in records[:8]], [each["positive_rate"] for each in records[:8]])[0, 1]
  assert rows[0][:3] == ("confused, weak", "hint_and_answer", "8, all") and rows[0][3].startswith(f"{r:+.2f} [")
  assert rows[1][2] == "7, without Fundus Photography" and rows[1][3] != rows[0][3]
