"""The files of a study."""

import pytest
from matplotlib.figure import Figure

from kepo_jax.reporting import cost_tables, study_files, study_style, study_tables
from kepo_jax.reporting.study_tables import Table
from tests import studies_data

ITEMS = studies_data.items(6)
SOME = {name: studies_data.METHODS[name] for name in ("grpo", "gkd-1", "kepo-tau1")}
ENTRIES = studies_data.entries(ITEMS, methods=SOME, seeds=2)
OTHER = studies_data.entries(ITEMS, methods={"grpo": SOME["grpo"]}, seeds=1, pair=("noisy", "weak"), free=False)
EXPECTED = [
  {"method": "rloo", "label": "RLOO", "student": "confused", "teacher": "weak", "seeds": [0, 1], "note": "Half."}
]


@pytest.fixture(scope="module")
def found():
  return study_files.summaries("main", [*ENTRIES, *OTHER], ITEMS)


def test_tables_of_the_main_study(found):
  grid = [entry | {"stage": "grid"} for entry in ENTRIES if entry["method"] == "grpo"]
  tables = study_files.study_tables_of("main", [*ENTRIES, *OTHER], ITEMS, found, grid=grid, rates=(1e-4, 3e-4),
                                       expected=EXPECTED)  # fmt: skip
  assert [table.name for table in tables] == [
    "main", "modalities", "question_types", "cost", "equal_cost_out_of_domain", "equal_cost_in_domain",
    "main-noisy-weak", "modalities-noisy-weak", "learning_rates", "paper",
  ]  # fmt: skip
  assert "Missing: RLOO, confused taught by weak: seeds 0, 1." in tables[0].notes
  assert "Half." in tables[0].notes and tables[0].rows[-1][2] == "0.0003 †" and study_tables.END in tables[0].notes
  assert cost_tables.SECONDS in tables[3].notes
  assert tables[-1].notes == ("arXiv 2602.00400, Table 1; other data and models, one seed",)
  assert not any("Missing" in note for note in tables[6].notes)


def test_figures_of_the_main_study(found):
  figures = study_files.study_figures_of("main", [*ENTRIES, *OTHER], ITEMS, found)
  assert list(figures) == [
    "accuracy", "differences", "modalities", "question_types", "validation_steps", "validation_seconds",
    "validation_tokens", "validation_modalities", "training", "exploration", "accuracy-noisy-weak",
    "differences-noisy-weak",
  ]  # fmt: skip
  assert any("Not ours" in axis.get_title(loc="left") for axis in figures["accuracy"].axes)
  colours = [
    {line.get_color() for axis in figures[name].axes for line in axis.lines}
    for name in ("accuracy", "accuracy-noisy-weak")
  ]
  assert study_style.full_colour("grpo") in colours[0] & colours[1]


@pytest.mark.parametrize(
  ("study", "overrides", "values"),
  [
    ("tau", {"accuracy-1": {}, "accuracy-1-swapped": {},
             "mean-0.5": {"objective.gate_signal": "mean", "objective.gate_threshold": 0.5}},
     {"tau": {"accuracy-1": 1.0, "accuracy-1-swapped": 1.0, "mean-0.5": 0.5},
      "gate signal": {"accuracy-1": "accuracy", "accuracy-1-swapped": "accuracy, rates swapped", "mean-0.5": "mean"}}),
    ("budget", {"rounds-5": {}, "rounds-0": {"exploration.rounds": 0}}, {"B": {"rounds-5": 5, "rounds-0": 0}}),
    ("gate", {"positive": {}, "negative": {"objective.gate_mode": "negative"}, "all": {"objective.gate_threshold": 0.0},
              "none": {"objective.gate_mode": "none"}},
     {"gate": {"positive": "positive", "negative": "negative", "all": "all", "none": "all"}}),
  ],
)  # fmt: skip
def test_checks_have_a_table_and_a_figure(study, overrides, values):
  settings = studies_data.METHODS["kepo-tau1"]
  entries = studies_data.entries(ITEMS, methods=dict.fromkeys(overrides, settings), seeds=2, overrides=overrides)
  entries = [entry | ({"config": "kepo"} if entry["config"] else {}) for entry in entries]
  found = study_files.varied(study, entries)
  assert {heading: found[heading] for heading in values} == values
  summaries = study_files.summaries(study, entries, ITEMS)
  assert list(summaries["confused", "weak"]["differences"]) == [list(overrides)[0]]  # its own reference
  tables = study_files.study_tables_of(study, entries, ITEMS, summaries)
  assert study in [table.name for table in tables] and "paper" not in [table.name for table in tables]
  assert "less" in tables[0].rows[0][-1] and "less" not in tables[0].rows[0][-2]
  assert study in study_files.study_figures_of(study, entries, ITEMS, summaries)


def test_without_exploration_the_budget_is_nothing():
  entries = [
    {"method": "x", "config": "kepo_ke"},
    {"method": "y", "config": "kepo.py"},
    {"method": "z", "config": "grpo"},
  ]
  assert study_files.varied("budget", entries) == {"B": {"x": 0, "y": 5}}
  assert study_files.varied("main", entries) == {}


def test_a_study_without_validation_has_its_files(tmp_path):
  entries = [entry | {"validation": []} for entry in ENTRIES if entry["method"] != "start"]
  found = study_files.summaries("main", entries, ITEMS)
  tables = study_files.study_tables_of("main", entries, ITEMS, found, grid=entries[1:])
  assert study_files.write_tables(tmp_path, tables)
  assert "validation_steps" in study_files.study_figures_of("main", entries, ITEMS, found)


def test_models_alone_have_no_curves():
  free = ENTRIES[:2]
  figures = study_files.study_figures_of("main", free, ITEMS, study_files.summaries("main", free, ITEMS))
  assert list(figures) == ["accuracy", "modalities", "question_types"]


def test_written_tables(tmp_path):
  (tmp_path / "runs.json").write_text("{}")
  table = Table("main", "Accuracy", [("method", "MRI"), ("A", "61.3 [55.7, 66.7]")], ("Missing: B.",))
  names = study_files.write_tables(tmp_path, [table, *study_files.hint_tables(studies_data.hint_records())])
  made = ("main", "hints", "hint_correlations")
  assert names == [f"{name}.{ending}" for name in made for ending in ("md", "csv", "tex")]
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "runs.json"])
  text = (tmp_path / "main.md").read_text()
  assert text == "# Accuracy\n\n| method | MRI |\n|---|---:|\n| A | 61.3 [55.7, 66.7] |\n\nMissing: B.\n"
  assert (tmp_path / "main.csv").read_text() == "method,MRI,MRI low,MRI high\nA,61.3,55.7,66.7\n"
  assert r"\label{tab:main}" in (tmp_path / "main.tex").read_text() and (tmp_path / "runs.json").read_text() == "{}"


def test_written_figures(tmp_path):
  figure = Figure(figsize=(1, 1))
  assert study_files.write_figures(tmp_path, {"a": figure}) == ["a.png", "a.svg"]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]
