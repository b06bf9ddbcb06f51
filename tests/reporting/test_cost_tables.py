"""Tables of cost, of accuracy at equal cost, and of the grid of learning rates."""

import numpy as np

from kepo_jax.evaluation import studies
from kepo_jax.reporting import cost_tables
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
  grpo = min(e["cost"]["seconds"] for e in ENTRIES if e["method"] == "grpo")
  assert header == ("method", "after 80 steps", f"after {grpo:.3g} s, GRPO's", "after 96,000 tokens, GRPO's")
  ends = [e["validation"][-1]["out_of_domain"] for e in ENTRIES if e["method"] == "grpo"]
  expected = f"{100 * np.mean(ends):.1f} [{100 * min(ends):.1f}, {100 * max(ends):.1f}]"
  assert rows["GRPO"]["after 80 steps"] == rows["GRPO"]["after 96,000 tokens, GRPO's"] == expected
  assert rows["SFT, gold answers"]["after 96,000 tokens, GRPO's"] == "beyond its budget"
  assert rows["SFT, the teacher's answers"]["after 96,000 tokens, GRPO's"] == "beyond its budget"
  assert set(rows["RLOO"].values()) == {"RLOO", "missing"}


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
