"""Figures of studies: the values, intervals and bands that they show, and what has no place in them."""

import numpy as np
import pytest

from kepo_jax.evaluation import studies
from kepo_jax.reporting import study_bars, study_checks, study_curves, study_style
from tests import studies_data

ITEMS = studies_data.items(8)
ENTRIES = studies_data.entries(ITEMS, seeds=2)
FEW = [entry for entry in ENTRIES if entry["method"] in ("start", "grpo", "kepo-tau1")]


@pytest.fixture(scope="module")
def summary():
  return studies.summarised(ENTRIES, ITEMS, resamples=60)


def statistic(summary, name, key="out_of_domain"):
  return summary["methods"][name]["statistics"][key]


def trained(method, entries=ENTRIES):
  return [entry for entry in entries if entry["method"] == method]


def spans(axis):
  """(low, high, place) of horizontal intervals."""
  lines = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]]
  return [(*line.get_xdata(), line.get_ydata()[0]) for line in lines]


def line(axis, colour):
  """The widest line of a colour."""
  (found,) = [each for each in axis.lines if each.get_color() == colour and each.get_linewidth() > 1.5]
  return found


def test_the_overview_shows_means_intervals_and_seeds(summary):
  figure = study_bars.overview_figure(summary, paper=True)
  titles = [axis.get_title(loc="left") for axis in figure.axes]
  assert titles[:3] == ["MRI", "Out of domain, mean of 7", "Fundus Photography (unseen)"]
  assert "Not ours" in titles[3] and len(study_bars.overview_figure(summary).axes) == 3
  labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
  assert labels == [entry["label"] for entry in summary["methods"].values()]
  found = statistic(summary, "kepo-tau1")
  assert (found["low"], found["high"], 0) in spans(figure.axes[1])
  dots = [line.get_xdata() for line in figure.axes[1].lines if line.get_marker() == "."]
  assert any(np.array_equal(each, found["values"]) for each in dots) and len(dots) == 11  # untrained models have none


def test_bars_carry_values_and_intervals(summary):
  figure = study_bars.section_figure(summary, "modalities")
  keys = [key for key in summary["chance"] if key.startswith("modalities")]
  assert len(keys) == len(figure.axes) == 8
  for axis, key in zip(figure.axes, keys, strict=True):
    entries = [statistic(summary, name, key) for name in summary["methods"]]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], [entry["mean"] for entry in entries])
    np.testing.assert_allclose(
      [span[:2] for span in spans(axis)], [(entry["low"], entry["high"]) for entry in entries], err_msg=key
    )


def test_differences_are_paired_and_what_fails_does_not_set_the_scale(summary):
  left, right = study_bars.forest_figure(summary).axes
  assert left.get_title(loc="left") == "Difference to GRPO" and right.get_title(loc="left").endswith("GKD, own rows")
  gaps = summary["differences"]["grpo"]
  entry = gaps["kepo-tau1"]["statistics"]["out_of_domain"]
  assert any(np.allclose(span[:2], (entry["low"], entry["high"])) for span in spans(left))
  text = f"{100 * entry['mean']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
  assert text in [each.get_text() for each in left.texts] and len(left.texts) == 12  # all methods but the reference
  low, high = left.get_xlim()
  assert low == -high and gaps["sft"]["statistics"]["out_of_domain"]["mean"] < -0.2 and high < 0.3


def test_learning_curves_are_means_from_the_untrained_model_on():
  out, inside = study_curves.learning_figure(FEW, "MRI").axes
  start = FEW[0]["validation"][0]
  for axis, name in ((out, "out_of_domain"), (inside, "in_domain")):
    drawn = line(axis, study_style.full_colour("grpo"))
    expected = np.mean([[record[name] for record in entry["validation"]] for entry in trained("grpo")], axis=0)
    np.testing.assert_allclose(drawn.get_xdata(), [0, 20, 40, 60, 80])
    np.testing.assert_allclose(drawn.get_ydata(), [start[name], *expected])
  tokens = line(study_curves.learning_figure(FEW, "MRI", quantity="tokens").axes[0], study_style.full_colour("kepo"))
  np.testing.assert_allclose(tokens.get_xdata(), np.array([0, 20, 40, 60, 80]) * 2600)
  band = out.collections[0].get_paths()[0].vertices
  ends = [entry["validation"][-1]["out_of_domain"] for entry in trained("grpo")]
  at_the_end = band[band[:, 0] == 80][:, 1]
  np.testing.assert_allclose([at_the_end.min(), at_the_end.max()], [min(ends), max(ends)])


def test_a_panel_per_modality_and_per_metric():
  drawn = line(study_curves.modality_figure(FEW, ITEMS).axes[0], study_style.full_colour("grpo"))
  expected = np.mean([[r["modalities"]["CT"] for r in entry["validation"]] for entry in trained("grpo")], axis=0)
  np.testing.assert_allclose(drawn.get_ydata()[1:], expected)
  panels = {axis.get_title(loc="left"): axis for axis in study_curves.dynamics_figure(ENTRIES).axes}
  shown = {name: {each.get_label() for each in axis.lines} for name, axis in panels.items()}
  assert "GRPO" in shown["Reward"] and "GRPO" not in shown["Divergence of gated tokens, nats"]
  expected = study_curves.curve_band(trained("grpo"), "reward/mean")["mean"]
  (reward,) = [each for each in panels["Reward"].lines if each.get_label() == "GRPO"]
  np.testing.assert_allclose(reward.get_ydata(), expected)


def test_what_was_varied_is_joined_to_lines():
  points = {"kepo-b10": 10, "kepo-b0": 0, "kepo-b5": 5, "kepo-absent": 1}
  entries = studies_data.entries(
    ITEMS, methods=dict.fromkeys([*points][:3], studies_data.METHODS["kepo-tau1"]), seeds=2, free=False
  )
  found, spread = studies.summarised(entries, ITEMS, resamples=40), studies.stability(entries, ITEMS)
  first, second = study_checks.budget_figure(found, points, spread).axes
  means = [statistic(found, f"kepo-b{b}")["mean"] for b in (0, 5, 10)]
  assert [text.get_text() for text in first.get_xticklabels()] == ["0", "5", "10"]
  np.testing.assert_allclose(first.lines[0].get_ydata(), means)
  np.testing.assert_allclose(second.lines[0].get_ydata(), [100 * spread[f"kepo-b{b}"]["seeds"] for b in (0, 5, 10)])
  figure = study_checks.tau_figure(found, {name: (value / 10, "accuracy") for name, value in points.items()})
  (line,) = [each for each in figure.axes[1].lines if each.get_label() == "accuracy"]
  np.testing.assert_allclose(line.get_ydata(), means)


def test_hints_have_a_dot_per_modality_and_a_line_per_pair():
  records = studies_data.hint_records()
  figure = study_checks.hints_figure(records, "MRI", ["Fundus Photography"])
  places = np.concatenate([dots.get_offsets() for dots in figure.axes[0].collections])
  assert len(places) == 64 + 16  # a ring for each of the two marked modalities
  assert any(np.allclose(place, (records[5]["gain"], records[5]["positive_rate"])) for place in places)
  mine = records[:8]  # of the first pair and prompt
  expected = np.average([r["accept_rate"] for r in mine], axis=0, weights=[r["prompts"] for r in mine])
  np.testing.assert_allclose(figure.axes[3].lines[0].get_ydata(), expected)
