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


def check_interval(entry, draw, *, atol):
  """The bounds are the percentiles of a bootstrap whose draws are taken one by one."""
  slow = [draw() for _ in range(4000)]
  np.testing.assert_allclose([entry["low"], entry["high"]], np.percentile(slow, [2.5, 97.5]), atol=atol)


def test_one_answer_to_each_question(rng):
  first = rng.random(600) < 0.5
  second = np.where(rng.random(600) < 0.2, rng.random(600) < 0.9, first)
  found = comparison.compared(outputs_of(first), outputs_of(second)[::-1])
  a, b = first.astype(float), second.astype(float)
  for place, name in enumerate(("MRI", "CT", "OCT")):
    entry, d = found["modalities"][name], (b - a)[place::3]
    assert (entry["count"], entry["difference"]) == (200, pytest.approx(d.mean()))
    assert (entry["gained"], entry["lost"]) == ((d == 1).sum(), (d == -1).sum())
    assert entry["p_value"] == statistics.mcnemar(entry["gained"], entry["lost"])
  ct, oct_ = (b - a)[1::3], (b - a)[2::3]
  check_interval(found["overall"], lambda: (b - a)[rng.integers(0, 600, 600)].mean(), atol=0.008)
  outside = found["out_of_domain"]
  check_interval(outside, lambda: np.mean([g[rng.integers(0, 200, 200)].mean() for g in (ct, oct_)]), atol=0.01)
  assert outside["difference"] == pytest.approx(np.mean([ct.mean(), oct_.mean()]))
  assert outside["modalities"] == ["CT", "OCT"] and outside["count"] == 400
  assert found["in_domain"] == found["modalities"]["MRI"]
  assert found["overall"]["difference"] == pytest.approx(b.mean() - a.mean())
  p_values = {name: entry["p_value"] for name, entry in found["modalities"].items()}
  assert {name: entry["p_holm"] for name, entry in found["modalities"].items()} == statistics.holm(p_values)
  assert "p_holm" not in found["overall"]


def test_means_of_several_completions(rng):
  first = rng.random((150, 4)) < 0.4
  second = rng.random((150, 2)) < 0.6
  found = comparison.compared(outputs_of(first), outputs_of(second)[::-1])
  assert found["samples"] == [4, 2]
  d = (second.mean(1) - first.mean(1))[2::3]
  entry = found["modalities"]["OCT"]
  assert entry["difference"] == pytest.approx(d.mean())
  assert (entry["first"], entry["second"]) == (pytest.approx(first[2::3].mean()), pytest.approx(second[2::3].mean()))
  assert (entry["gained"], entry["lost"]) == ((d > 0).sum(), (d < 0).sum())
  check_interval(entry, lambda: d[rng.integers(0, 50, 50)].mean(), atol=0.015)
  # Neither is one right or wrong answer a question: no test of that.
  assert entry["p_value"] is None and "p_holm" not in entry and found["overall"]["p_value"] is None


def test_pairs_about_one_image_are_drawn_together(rng):
  first, second = rng.random(240) < 0.5, rng.random(240) < 0.6
  images = [f"{n % 3}-{n // 12}" for n in range(240)]  # four questions about each of 20 images of a modality
  records = [
    [record | {"images": [image]} for record, image in zip(outputs_of(answers), images, strict=True)]
    for answers in (first, second)
  ]
  found = comparison.compared(*records)
  counts = [found["overall"]["images"], found["modalities"]["CT"]["images"], found["out_of_domain"]["images"]]
  assert counts == [60, 20, 40] and found["other_images"] == 0
  d = second.astype(float) - first
  mri, ct, oct_ = (d[place::3].reshape(20, 4) for place in range(3))
  outside = found["out_of_domain"]
  check_interval(outside, lambda: np.mean([g[rng.integers(0, 20, 20)].mean() for g in (ct, oct_)]), atol=0.01)
  whole = np.concatenate([mri, ct, oct_])
  check_interval(found["overall"], lambda: whole[rng.integers(0, 60, 60)].mean(), atol=0.01)
  # The images of one of the two are enough.
  assert comparison.compared(outputs_of(first), records[1])["overall"]["images"] == 60


def test_another_field_an_older_record_and_one_modality_alone():
  first, second = outputs_of([0], images=["a"], lenient_correct=True), outputs_of([1], lenient_correct=False)
  found = comparison.compared(first, second)
  assert found["overall"]["difference"] == 1 and found["other_images"] == 0 and found["out_of_domain"] is None
  assert comparison.compared(first, second, field="lenient_correct")["overall"]["difference"] == -1


def test_different_questions_are_named():
  more, fewer = outputs_of([1] * 9), outputs_of([1] * 3)
  fewer[0]["id"] = "other"
  with pytest.raises(ValueError, match=r"7 only in the first \(q0, q3, q4 and 4 more\), 1 only in the .* \(other\)"):
    comparison.compared(more, fewer)
  asked = {"answer": "A", "options": ["x", "y"], "question": "?"}
  for field, value in {"answer": "B", "options": ["y", "x"], "question": "!", "modality": "US"}.items():
    first, second = outputs_of([1, 0], **asked), outputs_of([1, 0], **asked)
    second[1][field] = value
    with pytest.raises(ValueError, match=rf"1 questions have another {field} in the second evaluation \(q1\)"):
      comparison.compared(first, second)
  with pytest.raises(ValueError, match="question q1 has 1 completions and q0 2"):
    comparison.compared(outputs_of([[1, 0], [1]]), outputs_of([[1, 0], [1]]))
  with pytest.raises(ValueError, match="no question in either"):
    comparison.compared([], [])
