"""The reward conventions of METHOD, case by case."""

import numpy as np
import pytest

from kepo_jax import rewards
from kepo_jax.types import Example

BRAIN = Example(
  id="x/1",
  question="Which organ?",
  options=("Chest", "Brain", "Left knee."),
  answer="B",
  images=(),
  modality="MRI",
)


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<think>a</think><answer>B</answer>", 1),
    ("<answer>\n B </answer> and more", 1),
    ("<answer>A</answer><answer>B</answer>", 0),  # the first block counts
    ("<answer>b</answer>", 0),  # case matters
    ("<answer>B)</answer>", 0),
    ("<answer>Brain</answer>", 0),
    ("B", 1),  # no tag at all: everything is compared
    ("  B\n", 1),
    ("The answer is B", 0),
    ("<answer>B", 0),
    ("", 0),
  ],
)
def test_accuracy(completion, expected):
  assert rewards.accuracy(completion, BRAIN) == expected


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<think>a</think><answer>B</answer>", 1),
    ("<think>two\nlines</think>\n \n<answer>anything</answer>", 1),
    ("<think></think><answer></answer>", 1),
    ("<think>a</think><answer>B</answer>\n", 0),  # a trailing newline fails
    (" <think>a</think><answer>B</answer>", 0),
    ("<think>a</think> so <answer>B</answer>", 0),
    ("<answer>B</answer><think>a</think>", 0),
    ("<answer>B</answer>", 0),
    ("<THINK>a</THINK><answer>B</answer>", 0),
  ],
)
def test_strict_format(completion, expected):
  assert rewards.strict_format(completion) == expected == rewards.strict_format(completion, BRAIN)


@pytest.mark.parametrize(
  "completion, expected",
  [("<answer>B</answer>", 1), ("<answer>B</answer> ", 0), ("<think>a</think><answer>B</answer>", 0), ("B", 0)],
)
def test_answer_format(completion, expected):
  assert rewards.answer_format(completion) == expected


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<Answer> B </ANSWER>", 1),
    ("<answer>B) Brain</answer>", 0.5),
    ("<answer>A or B</answer>", 0),
    ("<answer>B B</answer>", 0),
    ("<answer>Brain</answer>", 0),  # the letter must stand alone
    ("<answer>A</answer>", 0),
    ("B", 0),
  ],
)
def test_medvlm_accuracy(completion, expected):
  assert rewards.medvlm_accuracy(completion, BRAIN) == expected


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<think>x</think> <answer> B </answer>", "B"),
    ("<answer>Brain</answer>", "Brain"),  # parsed, and wrong
    ("<answer>B.</answer>", None),
    ("<answer>the brain</answer> <answer>C</answer>", "C"),
    ("B", None),
  ],
)
def test_answer_letter(completion, expected):
  assert rewards.answer_letter(completion) == expected


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<answer>(b)</answer>", "B"),
    ("<answer>B.</answer>", "B"),
    ("<answer>**B) Brain**</answer>", "B"),
    ("<answer>brain.</answer>", "B"),
    ("<answer>Left  knee</answer>", "C"),
    ("<think>A or C?</think> The answer is B.", "B"),
    ("<think>x</think><answer>C", "C"),
    ("Option C: left knee", "C"),
    ("D", None),  # there are three options
    ("a shadow near the left side", None),
    ("I cannot tell", None),
    ("<answer></answer>", None),
  ],
)
def test_lenient_letter(completion, expected):
  assert rewards.lenient_letter(completion, BRAIN) == expected


def test_score_weighs_and_adds():
  completions = [
    ["<think>a</think><answer>B</answer>", "B"],
    ["<answer>A</answer>", "<think></think><answer></answer>"],
  ]
  pair = {"accuracy": rewards.accuracy, "format": rewards.strict_format}
  scores = rewards.score(completions, [BRAIN, BRAIN], pair, {"accuracy": 1.0, "format": 0.5})
  assert scores == {
    "accuracy": [[1, 1], [0, 0]],
    "format": [[1, 0], [0, 1]],
    "total": [[1.5, 1.0], [0.0, 0.5]],
  }


def test_score_refuses_what_cannot_be_added():
  with pytest.raises(ValueError, match="same names"):
    rewards.score([["B"]], [BRAIN], {"accuracy": rewards.accuracy}, {})
  for value in (float("nan"), None, "1", b"1", 1j, np.float32("inf"), np.array([1.0, 2.0]), 10**400):
    with pytest.raises(ValueError, match=r"reward 'mine' gave .* for question x/1"):
      rewards.score([["B"]], [BRAIN], {"mine": lambda text, example, value=value: value}, {"mine": 1.0})


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.float16(1), np.int64(1), np.bool_(True), np.array(1.0)])
def test_score_takes_every_finite_number(value):
  scores = rewards.score([["B"]], [BRAIN], {"mine": lambda text, example: value}, {"mine": 2.0})
  assert scores == {"mine": [[1.0]], "total": [[2.0]]} and type(scores["mine"][0][0]) is float


def test_every_named_reward_takes_completion_and_example():
  for name, reward in rewards.REWARDS.items():
    assert reward("<think>a</think><answer>B</answer>", BRAIN) == (0 if name == "answer_format" else 1)
