"""The reward conventions of METHOD, case by case."""

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


RIGHT = "<think>a</think><answer>B</answer>"
THINKING_ALOUD = "<think>not <answer>A</answer></think><answer>B</answer>"  # an answer block inside the think block


@pytest.mark.parametrize(
  "completion, expected",
  [
    (RIGHT, 1),
    (RIGHT + "\n", 1),  # what follows the block is not looked at
    ("<answer>\n B </answer> and more", 1),
    ("<answer>A\nB</answer>", 0),
    ("<answer>A</answer><answer>B</answer>", 0),  # the first block counts
    (THINKING_ALOUD, 0),  # wherever it stands
    ("<answer><answer>B</answer></answer>", 0),  # the first block holds "<answer>B"
    ("<answer></answer>", 0),
    ("<answer> </answer>B", 0),
    ("<answer>b</answer>", 0),  # case matters
    ("<ANSWER>B</ANSWER>", 0),  # that of the tags as well: here is no block, and the whole is compared
    ("<answer>B)</answer>", 0),
    ("<answer>Brain</answer>", 0),
    ("B", 1),  # no tag at all: everything is compared
    ("  B\n", 1),
    ("The answer is B", 0),
    ("<think>a</think>B", 0),
    ("<answer>B", 0),
    ("</answer>B<answer>", 0),
    ("", 0),
  ],
)
def test_accuracy(completion, expected):
  assert rewards.accuracy(completion, BRAIN) == expected


@pytest.mark.parametrize(
  "completion, expected",
  [
    (RIGHT, 1),
    ("<think>two\nlines</think>\n \n<answer>any\nthing</answer>", 1),
    ("<think></think><answer></answer>", 1),
    (THINKING_ALOUD, 1),
    ("<think><think>a</think></think><answer>B</answer>", 1),  # the blocks stretch over tags inside
    ("<think>a</think><answer><answer>B</answer></answer>", 1),
    ("<think>a</think><answer>A</answer> or <answer>B</answer>", 1),
    (RIGHT + "\n", 0),  # a trailing newline fails
    (RIGHT + " ", 0),
    ("\n" + RIGHT, 0),
    ("<think>a</think> so <answer>B</answer>", 0),
    ("<answer>B</answer><think>a</think>", 0),
    ("<answer>B</answer>", 0),
    ("<think>a<answer>B</answer>", 0),
    ("<think>a</think><answer>B", 0),
    ("<THINK>a</THINK><answer>B</answer>", 0),
    ("B", 0),
    ("", 0),
  ],
)
def test_strict_format(completion, expected):
  assert rewards.strict_format(completion) == expected == rewards.strict_format(completion, BRAIN)


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<answer>B</answer>", 1),
    ("<answer>\n B\n</answer>", 1),
    ("<answer></answer>", 1),
    ("<answer>B</answer> ", 0),
    ("<answer>B</answer>\n", 0),
    (" <answer>B</answer>", 0),
    ("<ANSWER>B</ANSWER>", 0),
    ("<answer>A</answer><answer>B</answer>", 0),  # one block
    ("<answer><answer>B</answer></answer>", 0),
    (RIGHT, 0),
    ("B", 0),
    ("", 0),
  ],
)
def test_answer_format(completion, expected):
  assert rewards.answer_format(completion) == expected == rewards.answer_format(completion, BRAIN)


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<answer>B</answer>", 1),
    ("<Answer>\n B </ANSWER>", 1),
    ("<answer>B) Brain</answer>", 0.5),
    ("<answer>B.</answer>", 0.5),
    ("<ANSWER>the letter\nB, surely</ANSWER>", 0.5),
    ("<answer>B, not K</answer>", 0.5),  # there are letters from A to J
    ("<answer>A or B</answer>", 0),
    ("<answer>A, B, C</answer>", 0),
    ("<answer>B B</answer>", 0),
    ("<answer>I say B</answer>", 0),  # a pronoun is a letter too
    ("<answer>Brain</answer>", 0),  # the letter must stand alone
    ("<answer>b</answer>", 0),
    ("<answer>A</answer>", 0),
    ("<answer>A) Chest</answer>", 0),
    ("<answer></answer>", 0),
    ("<answer>A</answer><answer>B</answer>", 0),
    (THINKING_ALOUD, 0),
    ("<answer><ANSWER>B</answer></answer>", 0.5),  # the first block holds "<ANSWER>B": other text
    ("B", 0),
    ("", 0),
  ],
)
def test_medvlm_accuracy(completion, expected):
  assert rewards.medvlm_accuracy(completion, BRAIN) == expected


@pytest.mark.parametrize(
  "completion, expected",
  [
    ("<think>x</think> <answer> B </answer>", "B"),
    ("<answer>\nB\n</answer>", "B"),
    ("<answer>Brain</answer>", "Brain"),  # parsed, and wrong
    ("<answer>b</answer>", "b"),
    ("<answer>B.</answer>", None),
    ("<answer>left knee</answer>", None),  # two words
    ("<answer></answer>", None),
    ("<ANSWER>B</ANSWER>", None),
    ("<answer>the brain</answer> <answer>C</answer>", "C"),
    ("<answer><answer>B</answer></answer>", "B"),
    ("B", None),
  ],
)
def test_answer_letter(completion, expected):
  assert rewards.answer_letter(completion) == expected


@pytest.mark.parametrize(
  "completion, expected",
  [
    (RIGHT, "B"),
    ("<answer>(b)</answer>", "B"),
    ("<answer>B.</answer>", "B"),
    ("<ANSWER>b</ANSWER>", "B"),
    ("<answer>\nB\n</answer>", "B"),
    ("<answer>**B) Brain**</answer>", "B"),
    ("<answer>brain.</answer>", "B"),
    ("<answer>Left  knee</answer>", "C"),
    ("<answer><answer>B</answer></answer>", "B"),
    ("<think>A or C?</think> The answer is B.", "B"),
    ("<think>A</think>", None),  # what is thought is no answer
    ("<think>x</think><answer>C", "C"),
    ("Option C: left knee", "C"),
    ("D", None),  # there are three options
    ("a shadow near the left side", None),
    ("I cannot tell", None),
    ("<answer></answer>", None),
    ("", None),
  ],
)
def test_lenient_letter(completion, expected):
  assert rewards.lenient_letter(completion, BRAIN) == expected
  assert rewards.lenient_accuracy(completion, BRAIN) == (expected == "B")


@pytest.mark.parametrize(
  ("convention", "completion", "accuracy", "well_formed"),
  [
    ("med_r1", RIGHT, 1, 1),
    ("med_r1", "<answer>B</answer>", 1, 0),
    ("med_r1", "<think>a</think><answer>(b)</answer>", 0, 1),
    ("medvlm_r1", RIGHT, 1, 1),
    ("medvlm_r1", "<think>a</think><answer>B) Brain</answer>", 0.5, 1),
    ("medvlm_r1", "<think>a</think><ANSWER>B</ANSWER>", 1, 0),
    ("no_think", "<answer>B</answer>", 1, 1),
    ("no_think", "<answer>A</answer>", 0, 1),
    ("no_think", RIGHT, 1, 0),
    ("lenient", "<think>a</think><answer>(b)</answer>", 1, 1),
    ("lenient", "It is the brain", 0, 0),
    ("lenient", "Brain", 1, 0),
  ],
)
def test_conventions(convention, completion, accuracy, well_formed):
  found = rewards.CONVENTIONS[convention]
  assert found.accuracy(completion, BRAIN) == accuracy
  assert found.format(completion, BRAIN) == well_formed


def test_every_named_reward_takes_completion_and_example():
  for name, reward in rewards.REWARDS.items():
    assert rewards.named_reward(name) is reward
    assert reward(RIGHT, BRAIN) == (0 if name == "answer_format" else 1)
