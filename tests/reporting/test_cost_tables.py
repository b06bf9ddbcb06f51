"""Tables of cost, of accuracy at equal cost, and of the grid of learning rates."""

import numpy as np

from kepo_jax.evaluation import equal_cost, studies
from kepo_jax.reporting import cost_tables, study_tables
from tests import studies_data

ITEMS = studies_data.items(4)
SOME = {name: studies_data.METHODS[name] for name in ("sft", "sft_teacher", "grpo", "kepo-tau1")}
ENTRIES = studies_data.entries(ITEMS, methods=SOME, seeds=2)
EXPECTED = [{"method": "rloo", "label": "RLOO", "student": "confused", "teacher": "weak", "seeds": [0]}]


def test_costs_are_means_over_seeds():
  rows = {row[0]: row for row in cost_tables.cost_rows(ENTRIES, expected=EXPECTED)}
  seconds = np.mean([e["cost"]["seconds"] for e in ENTRIES if e["method"] == "grpo"])
  # 80 steps of 1.2 thousand tokens.
  assert rows["GRPO"][1:4] == ("96.0", "0.0", f"{seconds:.1f}")
  assert rows["RLOO"] == ("RLOO", *["missing"] * 4) and "teacher" not in rows


def test_a_cost_that_was_not_measured_is_missing():
  entries = [entry | {"cost": entry["cost"] | {"cpu_seconds": None}} for entry in ENTRIES if entry["method"] == "grpo"]
  assert cost_tables.cost_rows(entries)[1][4] == "missing"


def test_equal_steps_and_equal_cost():
  header, *rows = cost_tables.equal_cost_rows(ENTRIES, expected=EXPECTED)
  rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
  tokens = "after 96,000 tokens of both models, GRPO's"
  assert header == ("method", "after 80 steps", tokens, "there, less GRPO")
  ends = [e["validation"][-1]["out_of_domain"] for e in ENTRIES if e["method"] == "grpo"]
  expected = f"{100 * np.mean(ends):.1f} [{100 * min(ends):.1f}, {100 * max(ends):.1f}]"
  assert rows["GRPO"]["after 80 steps"] == rows["GRPO"][tokens] == expected
  assert rows["SFT, gold answers"][tokens] == "beyond its budget"
  assert rows["SFT, the teacher's answers"][tokens] == "beyond its budget"
  assert (rows["SFT, gold answers"]["there, less GRPO"], rows["GRPO"]["there, less GRPO"]) == ("-", "-")
  gap = equal_cost.differences_at_cost(ENTRIES, "grpo", "out_of_domain", "tokens", budget=96e3)["kepo-tau1"]
  assert rows["KEPO, tau = 1"]["there, less GRPO"] == study_tables.percent(gap, signed=True)
  assert set(rows["RLOO"].values()) == {"RLOO", "missing"}


def test_methods_with_more_steps_are_read_at_equal_steps_as_well():
  def longer(entry):
    validation = [{**each, "step": 2 * each["step"]} for each in entry["validation"]]
    return entry | {"method": "long", "label": "long", "steps": 160, "validation": validation}

  entries = [*ENTRIES, *(longer(entry) for entry in ENTRIES if entry["method"] == "grpo")]
  header, *rows = cost_tables.equal_cost_rows(entries, references=("grpo", "kepo-tau1", "absent"))
  assert header[1:3] == ("after 80 steps", "at the end")
  assert header[-2:] == ("there, less GRPO", "there, less KEPO, tau = 1")
  rows = {row[0]: row for row in rows}
  assert rows["long"][2] == rows["GRPO"][2] == rows["GRPO"][1] != rows["long"][1]


def test_one_seed_has_no_interval():
  alone = [entry for entry in ENTRIES if entry["seed"] in (None, 0)]
  rows = {row[0]: row for row in cost_tables.equal_cost_rows(alone)}
  assert rows["KEPO, tau = 1"][-1][0] in "+-" and "[" not in rows["KEPO, tau = 1"][-1]


def test_the_chosen_rate_is_marked():
  grid = [
    {"method": method, "label": method.upper(), "student": "s", "teacher": "t", "learning_rate": rate, "seed": 0,
     "validation": [{"step": 80, "overall": value, "in_domain": 1 - value}]}
    for method, values in {"grpo": {1e-4: 0.7, 3e-4: 0.8}, "gkd": {1e-4: 0.6, 2e-4: 0.9, 3e-4: 0.8}}.items()
    for rate, value in values.items()
  ]  # fmt: skip
  assert studies.chosen_rates(grid) == {"grpo": 3e-4, "gkd": 2e-4}
  assert cost_tables.grid_rows(grid, train_modality="MRI", rates=[1e-4, 2e-4], labels={"rloo": "RLOO"}) == [
    ("method", "0.0001", "0.0002", "0.0003", "by MRI alone"),
    ("RLOO", "missing", "missing", "missing", "missing"),
    ("GRPO", "70.0", "missing", "80.0 †", "0.0001"),  # at an end of the grid
    ("GKD", "60.0", "90.0 *", "80.0", "0.0001"),
  ]
