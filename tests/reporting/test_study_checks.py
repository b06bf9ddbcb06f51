"""Figures of the checks."""

import numpy as np

from kepo_jax.evaluation import studies
from kepo_jax.reporting import study_checks
from tests import studies_data
from tests.reporting import readable

ITEMS = studies_data.items(8)


def study(names):
  settings = studies_data.METHODS["kepo-tau1"]
  entries = studies_data.entries(ITEMS, methods={name: settings for name in names}, seeds=2, free=False)
  return entries, studies.summarised(entries, ITEMS, resamples=40)


def test_tau():
  points = {"kepo-a0": (0.0, "accuracy"), "kepo-a1": (1.0, "accuracy"), "kepo-m5": (0.5, "mean")}
  points |= {"kepo-m0": (0.0, "mean"), "kepo-absent": (1.0, "mean")}
  _, summary = study(list(points)[:4])
  figure = study_checks.tau_figure(summary, points)
  lines = {line.get_label(): line for line in figure.axes[1].lines if line.get_label() in ("accuracy", "mean")}
  statistics = {name: entry["statistics"]["out_of_domain"]["mean"] for name, entry in summary["methods"].items()}
  np.testing.assert_allclose(lines["accuracy"].get_ydata(), [statistics["kepo-a0"], statistics["kepo-a1"]])
  np.testing.assert_allclose(lines["mean"].get_ydata(), [statistics["kepo-m0"], statistics["kepo-m5"]])
  np.testing.assert_allclose(lines["mean"].get_xdata(), [0, 0.5], atol=0.03)
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gate signal: accuracy", "gate signal: mean"]
  assert readable.cut_texts(figure) == readable.overlapping_titles(figure) == []


def test_lines_of_several_rates_fit():
  points = {
    f"kepo-{i}": (tau, f"{signal}, rate {rate}")
    for i, (tau, signal, rate) in enumerate(
      (tau, signal, rate) for signal in ("accuracy", "mean") for rate in ("0.0002", "0.0003") for tau in (0.0, 1.0)
    )
  }
  _, summary = study(list(points))
  figure = study_checks.tau_figure(summary, points)
  assert len(figure.legends[0].get_texts()) == 4 and readable.cut_texts(figure) == []


def test_budget():
  entries, summary = study(["kepo-b5", "kepo-b0", "kepo-b10"])
  spread = studies.stability(entries, ITEMS) | {"kepo-b10": {"seeds": None, "validations": 0.01}}
  figure = study_checks.budget_figure(summary, {"kepo-b5": 5, "kepo-b0": 0, "kepo-b10": 10, "kepo-b1": 1}, spread)
  first, second = figure.axes
  assert [text.get_text() for text in first.get_xticklabels()] == ["0", "5", "10"]
  means = [summary["methods"][f"kepo-b{b}"]["statistics"]["out_of_domain"]["mean"] for b in (0, 5, 10)]
  np.testing.assert_allclose(first.lines[0].get_ydata(), means)
  expected = [100 * spread["kepo-b0"]["seeds"], 100 * spread["kepo-b5"]["seeds"], np.nan]
  np.testing.assert_allclose(second.lines[0].get_ydata(), expected)
  assert second.lines[1].get_ydata()[2] == 1.0
  assert readable.cut_texts(figure) == readable.overlapping_titles(figure) == []


def test_gate():
  _, summary = study(["kepo-positive", "kepo-negative"])
  figure = study_checks.gate_figure(summary)
  assert "Direction of the gate" in figure.get_suptitle() and len(figure.axes) == 3


def test_hints():
  records = studies_data.hint_records()
  figure = study_checks.hints_figure(records, "MRI", ["Fundus Photography"])
  first = figure.axes[0]
  places = np.concatenate([dots.get_offsets() for dots in first.collections])
  assert len(places) == 64 + 16  # a ring for each of the two marked modalities
  assert any(np.allclose(place, (records[5]["gain"], records[5]["positive_rate"])) for place in places)
  lines = figure.axes[3].lines
  mine = [
    r for r in records if (r["student"], r["teacher"], r["hint_prompt"]) == ("confused", "weak", "hint_and_answer")
  ]
  weights = [record["prompts"] for record in mine]
  expected = np.average([record["accept_rate"] for record in mine], axis=0, weights=weights)
  np.testing.assert_allclose(lines[0].get_ydata(), expected)
  assert readable.cut_texts(figure) == readable.overlapping_titles(figure) == []


def test_hints_that_were_not_measured_have_no_dot():
  record = studies_data.hint_records()[0] | {"gain": None, "accept_rate": []}
  figure = study_checks.hints_figure([record], "MRI")
  assert [len(axis.collections) for axis in figure.axes[:2]] == [0, 1] and not figure.axes[3].lines
