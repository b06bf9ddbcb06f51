import pytest

from kepo_jax import evaluation
from kepo_jax.evaluation import accuracy
from tests.evaluation.scripted import output


def test_questions_that_share_an_image_form_a_cluster():
  shown = [["a"], ["b"], ["a", "c"], [], ["c"], ["b"], []]
  records = [[{"id": f"q{n}", "images": images}] for n, images in enumerate(shown)]
  assert accuracy.clusters(records).tolist() == [0, 1, 0, 2, 0, 1, 3]  # the fifth by way of the third
  assert accuracy.distinct_images(records) == 3
  assert accuracy.clusters([[{"id": "q0"}], [{"id": "q1"}]]).tolist() == [0, 1]  # records that do not tell


def test_intervals_of_several_completions_are_over_questions():
  # Eight equal answers to each of 60 questions are no more than 60 answers.
  records = [output(f"q{n}", correct=n < 30, images=[str(n)]) for n in range(60)]
  once, often = evaluation.summarised(records), evaluation.summarised([r for r in records for _ in range(8)])
  width = [result["overall"]["high"] - result["overall"]["low"] for result in (once, often)]
  assert width[0] == pytest.approx(width[1], rel=0.1)
  assert often["pass_at_k"]["8"]["overall"]["accuracy"] == 0.5
