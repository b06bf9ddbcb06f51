"""Figures over the time of a training: which lines, bands and legends they have."""

import numpy as np
import pytest

from kepo_jax.reporting import study_curves, study_style
from tests import studies_data
from tests.reporting import readable

ITEMS = studies_data.items(2)
ENTRIES = studies_data.entries(ITEMS, seeds=2)
FEW = [entry for entry in ENTRIES if entry["method"] in ("start", "grpo", "kepo-tau1")]


def line(axis, colour):
  """The widest line of a colour."""
  (found,) = [each for each in axis.lines if each.get_color() == colour and each.get_linewidth() > 1.5]
  return found


def trained(method, entries=ENTRIES):
  return [entry for entry in entries if entry["method"] == method]


def test_learning_curves_are_means_from_the_untrained_model_on():
  figure = study_curves.learning_figure(FEW, "MRI")
  out, inside = figure.axes
  start = FEW[0]["validation"][0]
  for axis, name in ((out, "out_of_domain"), (inside, "in_domain")):
    drawn = line(axis, study_style.full_colour("grpo"))
    expected = np.mean([[record[name] for record in entry["validation"]] for entry in trained("grpo")], axis=0)
    np.testing.assert_allclose(drawn.get_xdata(), [0, 20, 40, 60, 80])
    np.testing.assert_allclose(drawn.get_ydata(), [start[name], *expected])
  band = out.collections[0].get_paths()[0].vertices
  ends = [entry["validation"][-1]["out_of_domain"] for entry in trained("grpo")]
  at_the_end = band[band[:, 0] == 80][:, 1]
  np.testing.assert_allclose([at_the_end.min(), at_the_end.max()], [min(ends), max(ends)])


def test_against_cost():
  figure = study_curves.learning_figure(FEW, "MRI", quantity="tokens")
  drawn = line(figure.axes[0], study_style.full_colour("kepo"))
  np.testing.assert_allclose(drawn.get_xdata(), np.array([0, 20, 40, 60, 80]) * 2600)
  assert figure.axes[1].get_xlabel() == "thousand tokens"
  seconds = line(study_curves.learning_figure(FEW, "MRI", quantity="seconds").axes[0], study_style.full_colour("kepo"))
  mean = np.mean([entry["cost"]["seconds"] for entry in trained("kepo-tau1")])
  assert seconds.get_xdata()[-1] == pytest.approx(mean)


def test_many_methods_have_a_panel_per_family():
  figure = study_curves.learning_figure(ENTRIES, "MRI", quantity="tokens")
  assert [axis.get_title(loc="left") for axis in figure.axes[:5]] == list(study_style.FAMILIES)
  labels = [text.get_text() for text in figure.legends[0].get_texts()]
  # Gold answers cost no tokens, so they have no place on that axis.
  assert len(labels) == 10 and "SFT, gold answers" not in labels
  grey = [each for each in figure.axes[1].lines if each.get_color() == study_style.GREY]
  assert len(grey) == 8 and "Grey" in figure.get_suptitle()


def test_a_panel_per_modality():
  figure = study_curves.modality_figure(ENTRIES, ITEMS)
  titles = [axis.get_title(loc="left") for axis in figure.axes]
  assert titles[2:4] == ["Fundus Photography (unseen)", "MRI (trained on)"] and len(titles) == 8
  drawn = line(figure.axes[0], study_style.full_colour("gkd"))
  expected = np.mean([[r["modalities"]["CT"] for r in entry["validation"]] for entry in trained("gkd-1")], axis=0)
  np.testing.assert_allclose(drawn.get_ydata()[1:], expected)
  assert "Grey" not in study_curves.modality_figure(FEW, ITEMS).get_suptitle()


def test_dynamics_show_who_logs_what():
  figure = study_curves.dynamics_figure(ENTRIES)
  shown = {axis.get_title(loc="left"): {each.get_label() for each in axis.lines} for axis in figure.axes}
  assert "GRPO" in shown["Reward"] and "GRPO" not in shown["Divergence of gated tokens, nats"]
  assert "GKD, own rows" in shown["Divergence of gated tokens, nats"]
  assert shown["Divergence of other tokens, nats"] == {
    "KEPO without hints, tau = 0", "KEPO without hints, tau = 1", "KEPO, tau = 0", "KEPO, tau = 1",
  }  # fmt: skip
  assert figure.axes[4].get_ylim() == figure.axes[5].get_ylim()
  assert "SFT, gold answers" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_what_nobody_logs_has_no_panel():
  figure = study_curves.dynamics_figure(trained("grpo"))
  titles = [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]
  assert titles == ["Accuracy of rollouts", "Reward", "Completion length, tokens", "Entropy, nats per token"]
  assert len(study_curves.dynamics_figure(trained("sft")).axes) == 3  # none of them shown


def test_acceptance_leaves_out_windows_without_a_failed_prompt():
  entries = trained("kepo-tau1", FEW)
  for entry in entries:
    entry = entry["curves"]
    entry["hint/accept_rate@1"] = [0.5, None] + [0.7] * 18
  entries[1]["curves"]["hint/accept_rate@1"][0] = None
  band = study_curves.curve_band(entries, "hint/accept_rate@1")
  np.testing.assert_allclose(band["mean"][:3], [0.5, np.nan, 0.7])
  figure = study_curves.exploration_figure(FEW)
  panel = figure.axes[2]
  assert [text.get_text() for text in panel.get_legend().get_texts()] == [
    "after 1 attempt", "after 2", "after 3", "after 4", "after 5",
  ]  # fmt: skip
  assert 8 not in panel.lines[0].get_xdata() and {4, 12} <= {*panel.lines[0].get_xdata()}
  assert not figure.axes[3].get_visible()


def test_without_hints_there_is_no_acceptance():
  figure = study_curves.exploration_figure(trained("grpo"))
  assert [axis.get_visible() for axis in figure.axes] == [True, True, False, False]
  assert study_curves.curve_band(trained("grpo"), "hint/trigger_rate") is None


@pytest.mark.parametrize("entries", [ENTRIES, FEW], ids=["many", "few"])
def test_nothing_is_cut_or_covered(entries):
  for figure in (
    study_curves.learning_figure(entries, "MRI", quantity="tokens"),
    study_curves.modality_figure(entries, ITEMS),
    study_curves.dynamics_figure(entries),
    study_curves.exploration_figure(entries),
  ):
    assert (readable.cut_texts(figure), readable.overlapping_titles(figure)) == ([], [])
