"""Paired comparison against slow ones, and what cannot be compared."""

import json

import numpy as np
import pytest

from kepo_jax.evaluation import comparison, statistics


def outputs_of(answers, **more):
  """Records of one completion per entry, or of several where an entry is a list."""
  return [
    {"id": f"q{n}", "sample": g, "modality": ("MRI", "CT", "OCT")[n % 3], "correct": bool(value)} | more
    for n, group in enumerate(answers)
    for g, value in enumerate(np.atleast_1d(group))
  ]


def test_the_p_values_are_those_of_a_permutation_test(rng):
  first, second = rng.random(90) < 0.5, rng.random(90) < 0.65
  found = comparison.compared(outputs_of(first), outputs_of(second))
  for place, name in enumerate(("MRI", "CT", "OCT")):
    d = second[place::3].astype(int) - first[place::3].astype(int)
    flips = np.where(rng.random((20_000, len(d))) < 0.5, -1, 1)
    p = (abs((flips * d[None]).sum(1)) >= abs(d.sum())).mean()
    assert found["modalities"][name]["p_value"] == pytest.approx(p, abs=0.015)
  p_values = {name: entry["p_value"] for name, entry in found["modalities"].items()}
  assert {name: entry["p_holm"] for name, entry in found["modalities"].items()} == statistics.holm(p_values)
  assert "p_holm" not in found["overall"]


def test_means_of_several_completions(rng):
  first = rng.random((150, 4)) < 0.4
  second = rng.random((150, 2)) < 0.6
  found = comparison.compared(outputs_of(first), outputs_of(second)[::-1])
  assert found["samples"] == [4, 2]
  d = second.mean(1) - first.mean(1)
  entry = found["modalities"]["OCT"]
  assert entry["difference"] == pytest.approx(d[2::3].mean())
  assert (entry["first"], entry["second"]) == (pytest.approx(first[2::3].mean()), pytest.approx(second[2::3].mean()))
  assert (entry["gained"], entry["lost"]) == ((d[2::3] > 0).sum(), (d[2::3] < 0).sum())
  slow = [d[2::3][rng.integers(0, 50, 50)].mean() for _ in range(5000)]
  np.testing.assert_allclose([entry["low"], entry["high"]], np.percentile(slow, [2.5, 97.5]), atol=0.015)
  # Neither is one right or wrong answer a question: no test of that.
  assert entry["p_value"] is None and "p_holm" not in entry and found["overall"]["p_value"] is None
  assert json.loads(json.dumps(found)) == found


def test_the_mean_out_of_domain_draws_inside_each_modality(rng):
  first, second = rng.random(300) < 0.5, rng.random(300) < 0.6
  found = comparison.compared(outputs_of(first), outputs_of(second))["out_of_domain"]
  d = second.astype(float) - first
  groups = [d[1::3], d[2::3]]
  slow = [np.mean([g[rng.integers(0, 100, 100)].mean() for g in groups]) for _ in range(5000)]
  np.testing.assert_allclose([found["low"], found["high"]], np.percentile(slow, [2.5, 97.5]), atol=0.012)
  assert found["difference"] == pytest.approx(found["second"] - found["first"])
  assert found["modalities"] == ["CT", "OCT"] and found["count"] == 200
  assert comparison.compared(outputs_of([1]), outputs_of([0]))["out_of_domain"] is None


def test_pairs_about_one_image_are_drawn_together(rng):
  first, second = rng.random(240) < 0.5, rng.random(240) < 0.6
  images = [f"{n % 3}-{n // 12}" for n in range(240)]  # four questions about each of 20 images of a modality
  records = [
    [record | {"images": [image]} for record, image in zip(outputs_of(answers), images, strict=True)]
    for answers in (first, second)
  ]
  found = comparison.compared(*records)
  assert found["other_images"] == 0
  assert (found["overall"]["images"], found["modalities"]["CT"]["images"], found["out_of_domain"]["images"]) == (
    60,
    20,
    40,
  )
  d = second.astype(float) - first
  groups = [d[1::3].reshape(20, 4), d[2::3].reshape(20, 4)]
  slow = [np.mean([group[rng.integers(0, 20, 20)].mean() for group in groups]) for _ in range(5000)]
  entry = found["out_of_domain"]
  np.testing.assert_allclose([entry["low"], entry["high"]], np.percentile(slow, [2.5, 97.5]), atol=0.01)
  slow = [groups[0][rng.integers(0, 20, 20)].mean() for _ in range(5000)]
  entry = found["modalities"]["CT"]
  np.testing.assert_allclose([entry["low"], entry["high"]], np.percentile(slow, [2.5, 97.5]), atol=0.012)
  slow = [d.reshape(20, 4, 3).transpose(0, 2, 1).reshape(60, 4)[rng.integers(0, 60, 60)].mean() for _ in range(5000)]
  entry = found["overall"]
  np.testing.assert_allclose([entry["low"], entry["high"]], np.percentile(slow, [2.5, 97.5]), atol=0.01)
  # The images of one of the two are enough.
  assert comparison.compared(outputs_of(first), records[1])["overall"]["images"] == 60


def test_other_image_files_are_counted():
  first, second = (outputs_of([1, 0, 1], images=["a"]) for _ in range(2))
  second[2]["images"] = ["b"]
  assert comparison.compared(first, second)["other_images"] == 1
  del second[2]["images"]  # an older record
  assert comparison.compared(first, second)["other_images"] == 0


def test_the_forgiving_parser_can_be_compared():
  first, second = outputs_of([0], lenient_correct=True), outputs_of([1], lenient_correct=False)
  assert comparison.compared(first, second)["overall"]["difference"] == 1
  assert comparison.compared(first, second, field="lenient_correct")["overall"]["difference"] == -1


def test_different_questions_are_named():
  with pytest.raises(ValueError, match=r"1 only in the second \(q2\); ask both"):
    comparison.compared(outputs_of([1, 0]), outputs_of([1, 0, 1]))
  more, fewer = outputs_of([1] * 9), outputs_of([1] * 3)
  fewer[0]["id"] = "other"
  with pytest.raises(
    ValueError, match=r"7 only in the first \(q0, q3, q4 and 4 more\), 1 only in the second \(other\)"
  ):
    comparison.compared(more, fewer)


@pytest.mark.parametrize(
  ("field", "value"), [("answer", "B"), ("options", ["y", "x"]), ("question", "!"), ("modality", "US")]
)
def test_a_changed_question_is_another_question(field, value):
  first = outputs_of([1, 0], answer="A", options=["x", "y"], question="?")
  second = outputs_of([1, 0], answer="A", options=["x", "y"], question="?")
  second[1][field] = value
  with pytest.raises(ValueError, match=rf"1 questions have another {field} in the second evaluation \(q1\)"):
    comparison.compared(first, second)


def test_a_question_with_fewer_completions_is_refused():
  with pytest.raises(ValueError, match="question q1 has 1 completions and q0 2"):
    comparison.compared(outputs_of([[1, 0], [1]]), outputs_of([[1, 0], [1]]))


def test_nothing_to_compare():
  with pytest.raises(ValueError, match="no question in either"):
    comparison.compared([], [])
