"""The files and the page of a study: nothing that was made is left out, and what is missing is named."""

import collections
import functools

import pytest
from matplotlib.figure import Figure

from kepo_jax.evaluation import studies
from kepo_jax.reporting import pages, study_files, study_page, study_tables
from tests import studies_data

ITEMS = studies_data.items(6)
SOME = {name: studies_data.METHODS[name] for name in ("grpo", "gkd-1", "kepo-tau1")}
ENTRIES = studies_data.entries(ITEMS, methods=SOME, seeds=2)
OTHER = studies_data.entries(ITEMS, methods={"grpo": SOME["grpo"]}, seeds=1, pair=("noisy", "weak"), free=False)
EXPECTED = [
  {"method": "rloo", "label": "RLOO", "student": "confused", "teacher": "weak", "seeds": [0, 1], "note": "Half."}
]


def made_of(study, entries, **more):
  """Tables and figures of a study."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(studies, "summarised", functools.partial(studies.summarised, resamples=50))
    found = study_files.summaries(study, entries, ITEMS)
  tables = study_files.study_tables_of(study, entries, ITEMS, found, **more)
  return tables, study_files.study_figures_of(study, entries, ITEMS, found)


@pytest.fixture(scope="module")
def made():
  """Those of a main study with a second pair."""
  grid = [entry | {"stage": "grid"} for entry in ENTRIES if entry["method"] == "grpo"]
  return made_of("main", [*ENTRIES, *OTHER], grid=grid, rates=(1e-4, 3e-4), expected=EXPECTED)


def test_tables_and_figures_of_the_main_study(made):
  tables, figures = made
  assert [table.name for table in tables] == [
    "main", "modalities", "question_types", "cost", "equal_cost_out_of_domain", "equal_cost_in_domain",
    "main-noisy-weak", "modalities-noisy-weak", "learning_rates", "paper",
  ]  # fmt: skip
  assert "Missing: RLOO, confused taught by weak: seeds 0, 1." in tables[0].notes and "Half." in tables[0].notes
  assert not any("Missing" in note for note in tables[6].notes)
  assert list(figures) == [
    "accuracy", "differences", "modalities", "question_types", "validation_steps", "validation_seconds",
    "validation_tokens", "validation_modalities", "training", "exploration", "accuracy-noisy-weak",
    "differences-noisy-weak",
  ]  # fmt: skip


def test_checks_have_a_table_and_a_figure_of_what_was_varied():
  threshold, mode = "objective.gate_threshold", "objective.gate_mode"
  for study, overrides, values in (
    ("budget", {"rounds-5": {}, "rounds-0": {"exploration.rounds": 0}}, {"B": [5, 0]}),
    ("gate", {"positive": {}, "negative": {mode: "negative"}, "all": {threshold: 0.0}, "none": {mode: "none"}},
     {"gate": ["positive", "negative", "all", "all"], "B": [5, 5, 5, 5]}),
    ("tau", {"accuracy-1": {}, "accuracy-1-swapped": {}, "mean-0.5": {"objective.gate_signal": "mean", threshold: 0.5}},
     {"tau": [1.0, 1.0, 0.5], "gate signal": ["accuracy", "accuracy, rates swapped", "mean"]}),
  ):  # fmt: skip
    methods = dict.fromkeys(overrides, studies_data.METHODS["kepo-tau1"])
    made = studies_data.entries(ITEMS, methods=methods, seeds=2, overrides=overrides, free=False)
    entries = [entry | {"config": "kepo"} for entry in made]
    found = study_files.varied(study, entries)
    assert {heading: list(each.values()) for heading, each in found.items()} == values, study
  tables, figures = made_of("tau", entries)
  assert "tau" in [table.name for table in tables] and "tau" in figures
  assert tables[0].rows[0][-1].startswith("out of domain, less ")  # its own reference


def test_written_files(tmp_path):
  table = study_tables.Table("main", "Accuracy", [("method", "MRI"), ("A", "61.3 [55.7, 66.7]")], ("Missing: B.",))
  names = study_files.write_tables(tmp_path, [table, *study_files.hint_tables(studies_data.hint_records())])
  names += study_files.write_figures(tmp_path, {"a": Figure(figsize=(1, 1))})
  tables = [f"{name}.{ending}" for name in ("main", "hints", "hint_correlations") for ending in ("md", "csv", "tex")]
  assert names == [*tables, "a.png", "a.svg"]
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
  text = (tmp_path / "main.md").read_text()
  assert text == "# Accuracy\n\n| method | MRI |\n|---|---:|\n| A | 61.3 [55.7, 66.7] |\n\nMissing: B.\n"


def page_of(tables, figures, **more):
  return study_page.study_page("T", subtitle="S", asks="Which?", facts=[], tables=tables, figures=figures, **more)


def blocks_of(page, kind):
  return [block for section in page.sections for block in section.blocks if isinstance(block, kind)]


def test_every_figure_and_every_table_is_shown_once(made, monkeypatch):
  def undrawn(figure, **fields):
    return pages.FigureBlock(image=b"", **{name: fields[name] for name in ("alt", "caption")})

  monkeypatch.setattr(pages, "figure_block", undrawn)  # drawing takes most of the time
  tables, figures = made
  checks = dict.fromkeys(("tau", "budget", "gate", "hints"))
  page = page_of(tables, figures | checks, missing=["RLOO: seeds 3, 4"])
  warned = page.sections[0].blocks[-1]
  assert warned.warning and "RLOO: seeds 3, 4" in warned.text
  shown = collections.Counter(block.caption for block in blocks_of(page, pages.TableBlock))
  assert len(shown) == len(tables) and set(shown.values()) == {1}
  captions = [block.caption for block in blocks_of(page, pages.FigureBlock)]
  assert len(captions) == len(set(captions)) == len(figures) + len(checks)
  assert any("(noisy taught by weak)" in caption for caption in captions)
