"""Figures of hints, on candidates and log-probabilities made by hand."""

import dataclasses

import numpy as np
import pytest

from experiments import hints
from kepo_jax import exploration
from tests.training import cases

GOOD, LEAKY = "<think> a</think><answer>B</answer>", "<think> as the hint says</think><answer>B</answer>"
ACCEPT = exploration.Acceptance()
MRI, CT, OCT = (dataclasses.replace(cases.example("q"), modality=modality) for modality in ("MRI", "CT", "OCT"))


def candidate(attempt, text=GOOD, *, accurate=True, well_formed=True, hint="look left"):
  drawn = {"tokens": np.zeros(2, np.int32), "logps": np.zeros(2, np.float32), "mask": np.ones(2, bool)}
  judged = {"accurate": accurate, "well_formed": well_formed}
  return exploration.Candidate(**drawn, **judged, text=text, hint=hint, attempt=attempt)


def outcome_of(candidates, written):
  """An outcome whose candidates [row] were judged round by round."""
  accepted = {row: [each for each in tried if ACCEPT([each])] for row, tried in enumerate(candidates)}
  return exploration.Exploration(accepted, dict(enumerate(candidates)), dict(enumerate(written)))


def effect(reliance=(), gain=(), letters=(), answers=0):
  return hints.HintEffect(*(np.array(values, np.float32) for values in (reliance, gain, letters)), answers)


@pytest.fixture
def worked():
  """Three cliffs, three rounds of two candidates: accepted at once, in the third round, and never."""
  wrong, bare = {"accurate": False}, {"well_formed": False}
  candidates = [
    [candidate(1), candidate(1, **wrong), candidate(2), candidate(2), candidate(3), candidate(3, LEAKY)],
    [candidate(1, **bare), candidate(1, **wrong), candidate(3), candidate(3, **wrong)],  # no hint in round 2
    [candidate(1, **wrong), candidate(1, LEAKY)],  # no hint after round 1
  ]
  block = "<hint> look left</hint>"
  return outcome_of(candidates, [[block] * 3, [block, "none", block], [block, "<hint></hint>", ""]])


def test_worked_example(worked):
  effects = {
    0: effect(reliance=[0.5] * 4, gain=[1.0, 3.0], letters=[3.0], answers=1),
    1: effect(reliance=[1.5] * 2),  # the teacher was never right, too
    2: effect(gain=[-1.0, 0.0, 0.5, 0.5], letters=[0.5, 0.0], answers=2),
  }
  found = hints.hint_record(worked, effects, [CT] * 3, [0, 1, 2], questions=10, rounds=3)
  assert (found["questions"], found["prompts"], found["hints"], found["candidates"]) == (10, 3, 9, 12)
  # Rounds 1 and 2: row 0 alone; round 3: row 1 as well; row 2 has a candidate that the leak filter refuses.
  np.testing.assert_allclose(found["accept_rate"], [1 / 3, 1 / 3, 2 / 3])
  assert found["accepted"] == 4 + 1
  # Positive are 5 of row 0 (the leaking one among them), 1 of row 1 and 1 of row 2; the bare one is accurate as well.
  assert (found["positive_rate"], found["accurate_rate"]) == (7 / 12, 8 / 12)
  assert (found["format_rate"], found["leak_rate"], found["quote_rate"]) == (11 / 12, 2 / 12, 0)
  assert found["parse_failure_rate"] == 3 / 9
  np.testing.assert_allclose(found["reliance"], (4 * 0.5 + 2 * 1.5) / 6)
  np.testing.assert_allclose(found["gain"], (1 + 3 - 1 + 0 + 0.5 + 0.5) / 6)
  np.testing.assert_allclose(found["letter_gain"], (3 + 0.5 + 0) / 3)
  assert found["gain_answers"] == 3


def test_candidates_of_a_prompt_are_drawn_together():
  # Half of the prompts always succeed: with prompts drawn, the deviation of the mean is that of 20 coins, not of 200.
  candidates = [[candidate(1, accurate=row % 2 == 0) for _ in range(10)] for row in range(20)]
  outcome = outcome_of(candidates, [["<hint>h</hint>"]] * 20)
  gains = {row: effect(gain=[float(row % 2)] * 5, answers=1) for row in range(20)}
  found = hints.hint_record(outcome, gains, [CT] * 20, range(20), questions=20, rounds=1)
  for name in ("positive_rate", "gain"):
    low, high = found[f"{name}_interval"]
    assert found[name] == 0.5
    half = 1.96 * 0.5 / 20**0.5  # 0.22; of 200 coins 0.07
    np.testing.assert_allclose([low, high], [0.5 - half, 0.5 + half], atol=0.06)
  assert found == hints.hint_record(outcome, gains, [CT] * 20, range(20), questions=20, rounds=1)


def test_modalities_and_all_of_them(worked):
  effects = {row: effect(gain=[float(row)], answers=1) for row in range(3)}
  found = hints.hint_records(worked, effects, [MRI, CT, MRI], [MRI, CT, MRI, OCT, MRI], rounds=3)
  assert [each["modality"] for each in found] == ["CT", "MRI", "OCT", "all"]
  assert [(each["prompts"], each["questions"]) for each in found] == [(1, 1), (2, 3), (0, 1), (3, 5)]
  assert [each["gain"] for each in found] == [1.0, 1.0, None, 1.0]
  # One prompt has no interval.
  assert found[0]["positive_rate_interval"] is None and len(found[1]["positive_rate_interval"]) == 2
  assert found[1]["accept_rate"] == [0.5, 0.5, 0.5] and found[0]["accept_rate"] == [0, 0, 1]
  nothing = found[2]
  rates = ("answer_rate", "leak_rate", "parse_failure_rate", "positive_rate", "accept_rate")
  for name in ("gain", "letter_gain", "reliance", *rates):
    assert nothing[name] is None, name
  assert nothing["candidates"] == nothing["hints"] == nothing["accepted"] == 0


@pytest.mark.parametrize(
  ("pieces", "place"),
  [
    (["<think>", " B", "</think>", "<answer>", " B", "</answer>"], 4),
    (["<think> A B</think>", "<", "answer", ">B", "</answer>"], 3),
    (["<answer>", " ", "\n", "C", "</answer>", " B"], 3),
    (["<think> B</think>", "<answer>", "</answer>"], None),
    ([], None),
  ],
)
def test_the_token_of_the_letter(pieces, place):
  assert hints.letter_place(np.arange(len(pieces)), lambda tokens: "".join(pieces[n] for n in tokens)) == place
