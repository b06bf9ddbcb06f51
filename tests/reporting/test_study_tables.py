"""Tables of studies: the numbers of a summary, what is said to be missing, and that nothing is left out."""

import collections
import functools

import numpy as np
import pytest
from matplotlib.figure import Figure

from kepo_jax.evaluation import equal_cost, studies
from kepo_jax.reporting import (
  check_tables,
  cost_tables,
  pages,
  study_bars,
  study_checks,
  study_files,
  study_page,
  study_tables,
)
from tests import studies_data

ITEMS = studies_data.items(8)
ENTRIES = studies_data.entries(ITEMS)
GRPO = [entry for entry in ENTRIES if entry["method"] == "grpo"]


def cell(method, label, seeds, pair=("confused", "weak")):
  return {"method": method, "label": label, "student": pair[0], "teacher": pair[1], "seeds": seeds}


EXPECTED = [cell("start", "untrained student", [None]), cell("grpo", "GRPO", [0, 1, 2]), cell("rloo", "RLOO", [0, 1])]


def by_name(rows):
  """Label -> heading -> cell."""
  header, *rest = rows
  return {row[0]: dict(zip(header, row, strict=True)) for row in rest}


def percent(entry, sign=""):
  mean, low, high = (f"{100 * entry[key]:{sign}.1f}" for key in ("mean", "low", "high"))
  return f"{mean} [{low}, {high}]"


@pytest.fixture(scope="module")
def summary():
  return studies.summarised(ENTRIES, ITEMS, resamples=60)


def test_the_main_figure_shows_means_intervals_and_seeds(summary):
  axis = study_bars.overview_figure(summary).axes[1]
  found = summary["methods"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert (found["low"], found["high"]) in [tuple(line.get_xdata()) for line in axis.lines]
  dots = [line.get_xdata() for line in axis.lines if line.get_marker() == "."]
  assert any(np.array_equal(each, found["values"]) for each in dots) and len(dots) == 4  # untrained models have none
  bars = study_bars.section_figure(summary, "modalities").axes
  keys = [key for key in summary["chance"] if key.startswith("modalities")]
  for axis, key in zip(bars, keys, strict=True):
    means = [method["statistics"][key]["mean"] for method in summary["methods"].values()]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], means, err_msg=key)


def test_accuracies_and_differences(summary):
  rows = by_name(study_tables.main_rows(summary, expected=EXPECTED))
  kepo, mean = rows["KEPO, tau = 1"], "out of domain, mean of 7"
  assert kepo[mean] == percent(summary["methods"]["kepo-tau1"]["statistics"]["out_of_domain"])
  gap = summary["differences"]["grpo"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert kepo["out of domain, less GRPO"] == percent(gap, "+") and rows["GRPO"]["learning rate"] == "0.0003"
  assert rows["GRPO"]["seeds"] == "2 of 3" and {*rows["RLOO"].values()} == {"RLOO", "0 of 2", "missing"}
  modalities = by_name(study_tables.section_rows(summary, "modalities", expected=EXPECTED))
  assert modalities["chance"]["CT"] == f"{100 * summary['chance']['modalities/CT']:.1f}"
  assert modalities["GRPO"]["MRI (trained on)"] == percent(summary["methods"]["grpo"]["statistics"]["modalities/MRI"])
  expected = [*EXPECTED, cell("start", "untrained student", [None], ("noisy", "weak"))]
  missing = " ".join(study_tables.missing_cells(expected, ENTRIES))
  for lost in ("GRPO, confused taught by weak: seed 2", "weak: seeds 0, 1", "untrained student, noisy taught by weak"):
    assert lost in missing


def test_costs_and_accuracies_at_the_same_cost():
  costs = by_name(cost_tables.cost_rows(ENTRIES, expected=EXPECTED))
  seconds = np.mean([entry["cost"]["seconds"] for entry in GRPO])
  assert list(costs["GRPO"].values())[1:4] == ["96.0", "0.0", f"{seconds:.1f}"]  # 80 steps of 1.2 thousand tokens
  rows = by_name(cost_tables.equal_cost_rows(ENTRIES, expected=EXPECTED))
  tokens, gap = "after 96,000 tokens of both models, GRPO's", "there, less GRPO"
  ends = [entry["validation"][-1]["out_of_domain"] for entry in GRPO]
  expected = percent({"mean": np.mean(ends), "low": min(ends), "high": max(ends)})
  assert rows["GRPO"]["after 80 steps"] == rows["GRPO"][tokens] == expected
  assert rows["SFT, gold answers"][tokens] == "beyond its budget" and rows["SFT, gold answers"][gap] == "-"
  less = equal_cost.differences_at_cost(ENTRIES, "grpo", "out_of_domain", "tokens", budget=96e3)["kepo-tau1"]
  assert rows["KEPO, tau = 1"][gap] == percent(less, "+")


def test_correlations_of_hints_over_modalities():
  records = studies_data.hint_records()
  _, *rows = check_tables.correlation_rows([*records, records[0] | {"modality": "all"}], ["Fundus Photography"])
  r = np.corrcoef([each["gain"] for each in records[:8]], [each["positive_rate"] for each in records[:8]])[0, 1]
  assert rows[0][2] == "8, all" and rows[0][3].startswith(f"{r:+.2f} [")
  assert rows[1][2] == "7, without Fundus Photography" and rows[1][3] != rows[0][3]
  assert study_checks.hints_figure(records, "MRI", ["Fundus Photography"]).axes


def made_of(study, entries, **more):
  """Tables and figures of a study."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(studies, "summarised", functools.partial(studies.summarised, resamples=50))
    found = study_files.summaries(study, entries, ITEMS)
  tables = study_files.study_tables_of(study, entries, ITEMS, found, **more)
  return tables, study_files.study_figures_of(study, entries, ITEMS, found)


def test_checks_have_a_table_and_a_figure_of_what_was_varied():
  varied = {
    "budget": {"rounds-5": {}, "rounds-0": {"exploration.rounds": 0}},
    "tau": {"accuracy-1": {}, "accuracy-0": {"objective.gate_threshold": 0.0}},
  }
  for study, overrides in varied.items():
    methods = dict.fromkeys(overrides, studies_data.METHODS["kepo-tau1"])
    made = studies_data.entries(ITEMS, methods=methods, overrides=overrides, free=False)
    tables, figures = made_of(study, [entry | {"config": "kepo"} for entry in made])
    assert study in [table.name for table in tables] and study in figures, study


def test_every_table_and_figure_of_the_main_study_is_shown_once_and_written(tmp_path, monkeypatch):
  def undrawn(figure, **fields):
    return pages.FigureBlock(image=b"", alt=fields["alt"], caption=fields["caption"])

  monkeypatch.setattr(pages, "figure_block", undrawn)  # drawing takes most of the time
  other = studies_data.entries(ITEMS, methods={"grpo": studies_data.METHODS["grpo"]}, pair=("noisy", "weak"))
  grid = [entry | {"stage": "grid"} for entry in GRPO]
  tables, figures = made_of("main", [*ENTRIES, *other], grid=grid, rates=(1e-4, 3e-4), expected=EXPECTED)
  assert {"main", "cost", "main-noisy-weak", "learning_rates"} <= {table.name for table in tables}
  assert any("Missing: GRPO, confused taught by weak: seed 2" in note for note in tables[0].notes)
  page = study_page.study_page(
    "T", subtitle="S", asks="Which?", facts=[], tables=tables, figures=figures, missing=["RLOO: seeds 3, 4"]
  )
  blocks = [block for section in page.sections for block in section.blocks]
  assert any(isinstance(block, pages.TextBlock) and "RLOO: seeds 3, 4" in block.text for block in blocks)
  for kind, made in ((pages.TableBlock, tables), (pages.FigureBlock, figures)):
    shown = collections.Counter(block.caption for block in blocks if isinstance(block, kind))
    assert len(shown) == len(made) and set(shown.values()) == {1}, kind
  names = study_files.write_tables(tmp_path, tables) + study_files.write_figures(
    tmp_path, {"a": Figure(figsize=(1, 1))}
  )
  assert len(names) == 3 * len(tables) + 2 and sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
  assert "\n| GRPO |" in (tmp_path / "main.md").read_text()
