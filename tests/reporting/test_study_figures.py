"""Figures of studies: the values, intervals and bands that they show."""

import numpy as np

from kepo_jax.evaluation import studies
from kepo_jax.reporting import study_bars, study_checks, study_curves, study_style
from tests import studies_data

ITEMS = studies_data.items(8)
ENTRIES = studies_data.entries(ITEMS)
GRPO = [entry for entry in ENTRIES if entry["method"] == "grpo"]


def spans(axis):
  """(low, high) of horizontal intervals."""
  lines = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
  return [tuple(line.get_xdata()) for line in lines]


def line(axis, colour):
  """The widest line of a colour."""
  (found,) = [each for each in axis.lines if each.get_color() == colour and each.get_linewidth() > 1.5]
  return found


def test_the_overview_and_the_sections_show_means_intervals_and_seeds():
  summary = studies.summarised(ENTRIES, ITEMS, resamples=60)
  figure = study_bars.overview_figure(summary)
  found = summary["methods"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert (found["low"], found["high"]) in spans(figure.axes[1])
  dots = [line.get_xdata() for line in figure.axes[1].lines if line.get_marker() == "."]
  assert any(np.array_equal(each, found["values"]) for each in dots) and len(dots) == 4  # untrained models have none
  bars = study_bars.section_figure(summary, "modalities").axes
  keys = [key for key in summary["chance"] if key.startswith("modalities")]
  for axis, key in zip(bars, keys, strict=True):
    entries = [method["statistics"][key] for method in summary["methods"].values()]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], [entry["mean"] for entry in entries])
    np.testing.assert_allclose(spans(axis), [(entry["low"], entry["high"]) for entry in entries], err_msg=key)


def test_learning_curves_are_means_from_the_untrained_model_on():
  out, inside = study_curves.learning_figure(ENTRIES, "MRI").axes
  start, colour = ENTRIES[0]["validation"][0], study_style.full_colour("grpo")
  for axis, name in ((out, "out_of_domain"), (inside, "in_domain")):
    expected = np.mean([[record[name] for record in entry["validation"]] for entry in GRPO], axis=0)
    np.testing.assert_allclose(line(axis, colour).get_xdata(), [0, *studies_data.STEPS])
    np.testing.assert_allclose(line(axis, colour).get_ydata(), [start[name], *expected])
  tokens = line(study_curves.learning_figure(ENTRIES, "MRI", quantity="tokens").axes[0], colour)
  np.testing.assert_allclose(tokens.get_xdata(), np.array([0, *studies_data.STEPS]) * 1200)


def test_what_was_varied_is_joined_to_lines():
  points = {"kepo-b10": 10, "kepo-b0": 0, "kepo-b5": 5}
  methods = dict.fromkeys(points, studies_data.METHODS["kepo-tau1"])
  entries = studies_data.entries(ITEMS, methods=methods, free=False)
  found, spread = studies.summarised(entries, ITEMS, resamples=40), studies.stability(entries, ITEMS)
  first, second = study_checks.budget_figure(found, points, spread).axes
  means = [found["methods"][f"kepo-b{b}"]["statistics"]["out_of_domain"]["mean"] for b in (0, 5, 10)]
  np.testing.assert_allclose(first.lines[0].get_ydata(), means)
  np.testing.assert_allclose(second.lines[0].get_ydata(), [100 * spread[f"kepo-b{b}"]["seeds"] for b in (0, 5, 10)])
  figure = study_checks.tau_figure(found, {name: (value / 10, "accuracy") for name, value in points.items()})
  assert any(np.array_equal(line.get_ydata(), means) for line in figure.axes[1].lines)
