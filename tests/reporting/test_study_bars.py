"""Figures of test accuracies: values, intervals, marks."""

import numpy as np
import pytest

from kepo_jax.evaluation import studies
from kepo_jax.reporting import study_bars, study_style
from tests import studies_data
from tests.reporting import readable

ITEMS = studies_data.items(12)
ENTRIES = studies_data.entries(ITEMS, seeds=2)
SUMMARY = studies.summarised(ENTRIES, ITEMS, resamples=60)


def spans(axis):
  """(low, high, place) of horizontal intervals."""
  lines = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
  return [(*line.get_xdata(), line.get_ydata()[0]) for line in lines]


def test_overview_has_a_row_per_method():
  figure = study_bars.overview_figure(SUMMARY)
  assert [axis.get_title(loc="left") for axis in figure.axes] == [
    "MRI",
    "Out of domain, mean of 7",
    "Fundus Photography (unseen)",
  ]
  labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert labels == [entry["label"] for entry in SUMMARY["methods"].values()]
  found = SUMMARY["methods"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert (found["low"], found["high"], 0) in spans(figure.axes[1])
  dots = [line.get_xdata() for line in figure.axes[1].lines if line.get_marker() == "."]
  assert any(np.array_equal(each, found["values"]) for each in dots) and len(dots) == 11  # untrained models have none


def test_the_paper_is_marked_and_apart():
  figure = study_bars.overview_figure(SUMMARY, paper=True)
  title = figure.axes[-1].get_title(loc="left")
  assert "Not ours" in title and "arXiv 2602.00400, Table 1; other data and models, one seed" in title
  assert [text.get_text() for text in figure.axes[-1].get_yticklabels()] == ["MM-GKD", "GRPO", "KEPO"]
  assert len(study_bars.overview_figure(SUMMARY).axes) == 3


@pytest.mark.parametrize("section", ["modalities", "question_types"])
def test_bars_carry_values_and_intervals(section):
  figure = study_bars.section_figure(SUMMARY, section)
  keys = [key for key in SUMMARY["chance"] if key.startswith(section)]
  for axis, key in zip(figure.axes, keys, strict=False):
    expected = [entry["statistics"][key]["mean"] for entry in SUMMARY["methods"].values()]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], expected)
    ends = [
      (entry["statistics"][key]["low"], entry["statistics"][key]["high"]) for entry in SUMMARY["methods"].values()
    ]
    np.testing.assert_allclose([span[:2] for span in spans(axis)], ends)
  if section == "modalities":
    white = [axis.get_facecolor()[:3] == (1, 1, 1) for axis in figure.axes]
    assert white == [True, True, False] + [True] * 5  # the unseen one is shaded
    assert figure.axes[2].get_title(loc="left").replace("\n", " ") == "Fundus Photography (unseen)"


def test_differences():
  figure = study_bars.forest_figure(SUMMARY)
  left, right = figure.axes
  assert left.get_title(loc="left") == "Difference to GRPO" and right.get_title(loc="left").endswith("GKD, own rows")
  entry = SUMMARY["differences"]["grpo"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert any(np.allclose(span[:2], (entry["low"], entry["high"])) for span in spans(left))
  text = f"{100 * entry['mean']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
  assert text in [each.get_text() for each in left.texts]
  assert left.get_xlim()[0] == -left.get_xlim()[1] and len(left.texts) == 12  # all methods but the reference


def test_what_fails_does_not_set_the_scale():
  figure = study_bars.forest_figure(SUMMARY)
  limit = figure.axes[0].get_xlim()[1]
  far = SUMMARY["differences"]["grpo"]["sft"]["statistics"]["out_of_domain"]["mean"]
  assert far < -0.2 and limit < 0.3
  colour = study_style.styles(SUMMARY["methods"])["sft"].colour
  (arrow, *_) = [line for line in figure.axes[0].lines if line.get_color() == colour and line.get_marker() == "<"]
  assert -limit < arrow.get_xdata()[0] < -0.9 * limit


def test_nothing_is_cut_or_covered():
  for figure in (
    study_bars.overview_figure(SUMMARY, paper=True),
    study_bars.section_figure(SUMMARY),
    study_bars.section_figure(SUMMARY, "question_types"),
    study_bars.forest_figure(SUMMARY),
  ):
    assert (readable.cut_texts(figure), readable.overlapping_titles(figure)) == ([], [])
