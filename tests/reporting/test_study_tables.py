"""Tables of a study: what stands in them, and what is said to be missing."""

import pytest

from kepo_jax.evaluation import studies
from kepo_jax.reporting import study_tables
from tests import studies_data

ITEMS = studies_data.items(16)
SOME = {name: studies_data.METHODS[name] for name in ("grpo", "gkd-1", "kepo-tau1")}
ENTRIES = [e for e in studies_data.entries(ITEMS, methods=SOME, seeds=3) if (e["method"], e["seed"]) != ("grpo", 1)]
SUMMARY = studies.summarised(ENTRIES, ITEMS, resamples=100)


def cell(method, label, seeds, pair=("confused", "weak")):
  return {"method": method, "label": label, "student": pair[0], "teacher": pair[1], "seeds": seeds}


EXPECTED = [cell("start", "untrained student", [None]), cell("grpo", "GRPO", [0, 1, 2]), cell("rloo", "RLOO", [0, 1])]


def test_main_rows():
  header, *rows = study_tables.main_rows(SUMMARY)
  assert header == (
    "method", "seeds", "learning rate", "MRI", "out of domain, mean of 7", "out of domain without Fundus Photography",
    "Fundus Photography (unseen)", "format", "out of domain, less GRPO", "out of domain, less GKD, own rows",
  )  # fmt: skip
  rows = {row[0]: row for row in rows}
  assert rows["untrained student"][1:3] == ("untrained", "-") and rows["GRPO"][1:3] == ("2", "0.0003")
  entry = SUMMARY["methods"]["kepo-tau1"]["statistics"]["out_of_domain"]
  shown = rows["KEPO, tau = 1"]
  assert shown[4] == f"{100 * entry['mean']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
  gap = SUMMARY["differences"]["gkd-1"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert shown[9].startswith(f"{100 * gap['mean']:+.1f} [")
  assert rows["GRPO"][8] == rows["GKD, own rows"][9] == "-" and rows["GRPO"][9] != "-"


def test_planned_methods_without_entries_are_missing():
  rows = {row[0]: row for row in study_tables.main_rows(SUMMARY, expected=EXPECTED)}
  assert list(rows)[1:] == ["untrained student", "GRPO", "RLOO", "teacher", "GKD, own rows", "KEPO, tau = 1"]
  assert rows["GRPO"][1] == "2 of 3" and rows["RLOO"] == ("RLOO", "0 of 2", *["missing"] * 8)
  rows = study_tables.section_rows(SUMMARY, "modalities", expected=EXPECTED)
  assert ("RLOO", *["missing"] * 8) in rows


def test_a_reference_without_entries_is_missing():
  header, first, *_ = study_tables.main_rows(SUMMARY, references=("rloo", "unknown"), expected=EXPECTED)
  assert header[-1] == "out of domain, less RLOO" and first[-1] == "missing"


def test_missing_cells_have_names():
  expected = [*EXPECTED, cell("start", "untrained student", [None], ("noisy", "weak"))]
  assert study_tables.missing_cells(expected, ENTRIES) == [
    "GRPO, confused taught by weak: seed 1",
    "RLOO, confused taught by weak: seeds 0, 1",
    "untrained student, noisy taught by weak",
  ]
  assert study_tables.missing_cells([cell("gkd-1", "GKD", [0, 1, 2])], ENTRIES) == []


def test_section_rows():
  header, chance, *rows = study_tables.section_rows(SUMMARY, "modalities")
  assert header[:5] == ("method", "CT", "Dermoscopy", "Fundus Photography (unseen)", "MRI (trained on)")
  assert header[5:] == studies_data.MODALITIES[4:]
  assert chance[0] == "chance" and chance[1] == f"{100 * SUMMARY['chance']['modalities/CT']:.1f}"
  assert [row[0] for row in rows] == [entry["label"] for entry in SUMMARY["methods"].values()]
  kinds = study_tables.section_rows(SUMMARY, "question_types")
  assert kinds[0][1:] == studies_data.KINDS and {len(row) for row in kinds} == {6}


@pytest.mark.parametrize(
  ("entry", "signed", "text"),
  [
    ((0.6134, 0.557, 0.6666), False, "61.3 [55.7, 66.7]"),
    ((-0.0004, -0.012, 0.0004), True, "+0.0 [-1.2, +0.0]"),
    ((0.01, -0.002, 0.03), True, "+1.0 [-0.2, +3.0]"),
  ],
)
def test_percent(entry, signed, text):
  assert study_tables.percent(dict(zip(("mean", "low", "high"), entry, strict=True)), signed=signed) == text


def test_the_paper_stands_alone():
  assert study_tables.paper_rows()[1:] == [("KEPO", "78.00"), ("GRPO", "74.33"), ("MM-GKD", "73.67")]
  assert "other data and models, one seed" in study_tables.PAPER_SOURCE
  ours = [text for row in study_tables.main_rows(SUMMARY) for text in row]
  assert not {"78.00", "74.33", "73.67"} & {*ours}


def test_where_nothing_is_unseen_there_is_one_mean():
  items = ITEMS | {"unseen": []}
  assert list(study_tables.headings(studies.summarised(ENTRIES[:2], items, resamples=20))) == [
    "in_domain", "out_of_domain",
  ]  # fmt: skip
