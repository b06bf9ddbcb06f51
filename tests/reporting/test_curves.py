import numpy as np

from kepo_jax.reporting import curves, tables


def entry(value, count=300):
  return {"accuracy": value, "low": value - 0.05, "high": value + 0.05, "count": count}


def evaluation(value):
  return {
    "overall": entry(value, 600), "in_domain": entry(value),
    "out_of_domain": {"mean": value - 0.1, "low": value - 0.12, "high": value - 0.08},
    "modalities": {"MRI": entry(value), "CT": entry(value - 0.1)},
    "question_types": {"Modality Recognition": entry(value, 600)}, "unparsed": 0.012, "truncated": 0.0,
  }  # fmt: skip


BOTH = {"before": evaluation(0.4), "after": evaluation(0.7)}


def test_smoothing_is_an_average_that_skips_nan():
  values = np.array([1.0, np.nan, 3.0, 8.0])
  # Around 1: itself. Around nan: 1 and 3. Around 3: 3 and 8. Around 8: 3 and 8.
  np.testing.assert_allclose(curves.smoothed(values, 3), [1.0, 2.0, 5.5, 5.5])


def test_curves_show_what_was_logged_and_nothing_else():
  records = [{"step": s, "reward/accuracy": s / 40, "grad_norm": 1.0, "hint/accept_rate@1": 0.1,
              "hint/accept_rate@2": 0.2, "hint/accept_rate@10": 0.3} for s in range(1, 31)]  # fmt: skip
  records[2] = {"step": 3, "grad_norm": None}  # of a step without rollouts, whose norm was not finite
  figure = curves.curves_figure(records, title="run")
  shown = [axis for axis in figure.axes if axis.get_visible()]
  assert [axis.get_title(loc="left") for axis in shown] == [
    "Student's reward, before injection", "Failed prompts helped by hints", "Gradient norm",
  ]  # fmt: skip
  labels = [text.get_text() for text in shown[1].get_legend().get_texts()]
  assert labels == ["within 1 hint", "within 10 hints"]
  steps = np.delete(np.arange(1, 31), 2)
  np.testing.assert_allclose(shown[0].lines[0].get_xydata(), np.stack([steps, steps / 40], axis=1))
  np.testing.assert_array_equal(np.isnan(shown[2].lines[0].get_ydata()), np.arange(1, 31) == 3)


def test_bars_carry_values_and_intervals():
  figure = curves.bars_figure(BOTH)
  axis = figure.axes[0]
  heights = sorted(bar.get_height() for bar in axis.patches)
  np.testing.assert_allclose(heights, sorted([0.4, 0.3, 0.3, 0.7, 0.6, 0.6]))
  segments = np.concatenate([line.get_segments() for line in axis.collections])
  assert any(np.allclose(segment[:, 1], [0.65, 0.75]) for segment in segments)


def test_rows_of_accuracies():
  rows = tables.accuracy_rows(BOTH)
  assert rows[0] == ("", "n", "before", "after") and ("CT", "300", "30.0 [25.0, 35.0]", "60.0 [55.0, 65.0]") in rows
  assert ("out of domain, mean", "", "30.0 [28.0, 32.0]", "60.0 [58.0, 62.0]") in rows
  assert ("unparsed", "", "1.2 %", "1.2 %") in rows
  partial = BOTH["after"] | {"modalities": {"MRI": entry(0.7)}}
  assert ("CT", "300", "30.0 [25.0, 35.0]", "-") in tables.accuracy_rows(BOTH | {"after": partial})


def test_validations_are_curves_and_both_tests_stand_at_their_ends():
  validations = [evaluation(0.5) | {"step": 2}, evaluation(0.6) | {"step": 4, "out_of_domain": None}]
  axis = curves.validation_figure(validations, ends={0: evaluation(0.4), 4: evaluation(0.7)}).axes[0]
  drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
  assert drawn["in domain"] == ([2, 4], [0.5, 0.6]) and drawn["out of domain"] == ([2], [0.4])
  tested = {each.get_label(): each.lines[0].get_xydata() for each in axis.containers}
  np.testing.assert_allclose(tested["in domain, test"], [[0, 0.4], [4, 0.7]])
  np.testing.assert_allclose(tested["out of domain, test"], [[0, 0.3], [4, 0.6]])
  assert curves.validation_figure([]).axes[0].get_legend() is None
