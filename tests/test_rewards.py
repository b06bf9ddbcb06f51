"""The reward conventions of METHOD, case by case."""

import dataclasses
import time

import hypothesis
import pytest
from hypothesis import strategies as st

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
    # Which part of a completion is read.
    (RIGHT, "B"),
    ("<answer>(b)</answer>", "B"),
    ("<ANSWER>b</ANSWER>", "B"),
    ("<answer>\nB\n</answer>", "B"),
    ("<answer><answer>B</answer></answer>", "B"),
    ("<think>A or C?</think> The answer is B.", "B"),
    ("<think>the answer is A</think><answer>(B)</answer>", "B"),
    ("<think>A</think>", None),  # what is thought is no answer
    ("<think>x</think><answer>C", "C"),
    ("<think>the answer is B", None),  # and this thought was not finished
    ("<think>x</think>\nThe answer is B. <think>C", "B"),
    (THINKING_ALOUD, "A"),  # as the strict parser reads it
    ("<answer>the chest</answer><answer>B</answer>", "B"),  # likewise
    ("<answer></answer>", None),
    ("<answer></answer>B", None),
    ("", None),
    # The text of an option.
    ("<answer>brain.</answer>", "B"),
    ("<answer>Left  knee</answer>", "C"),
    ("left knee", "C"),
    ("left", None),
    ("brain and chest", None),
    # A letter at the beginning.
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("'B'.", "B"),
    ("(c)", "C"),
    ("**B**", "B"),
    ("**B) Brain**", "B"),
    ("B: Brain", "B"),
    ("B.Brain", "B"),
    ("B - Brain", "B"),
    ("B Brain", "B"),
    ("b) brain", "B"),
    ("B Brain, since it shows gyri", "B"),
    ("B. The image shows gyri", "B"),
    ("B\nThe image shows gyri", "B"),
    ("B because of the gyri", "B"),
    ("option a", "A"),
    ("Option C: left knee", "C"),
    ("The answer B", "B"),
    ("A is correct", "A"),
    ("B is the right answer", "B"),
    ("D", None),  # there are three options
    ("D: Liver", None),
    # Words that begin like a letter.
    ("A mass is visible in the left lobe.", None),
    ("A chest radiograph is shown", None),
    ("A brain", None),  # the article, or the option A?
    ("a shadow near the left side", None),
    ("a. brain, probably", None),  # a lower-case letter, and more than its option
    ("A-lines are seen", None),
    ("B-mode image", None),
    ("B's text", None),
    ("C 3 is fractured", None),
    ("I cannot tell", None),
    ("Abdomen", None),
    # Several letters, or a letter and another option's text.
    ("A, B", None),
    ("A and B", None),
    ("A/B", None),
    ("(A) or (C)", None),
    ("A) Chest B) Brain", None),
    ("A) Chest\nB) Brain\nC) Left knee.", None),
    ("a) chest, b) brain", None),
    ("B, not C.", None),
    ("B) Chest", None),
    ("B. A mass is visible, I think", "B"),  # an article and a pronoun
    ("C: left knee. D is no option", "C"),
    # A stated answer, anywhere.
    ("The answer is B.", "B"),
    ("I think the answer is B", "B"),
    ("I think it is B", None),
    ("**Answer:** (b)", "B"),
    ("**Answer**: brain", "B"),
    ("The correct answer is: **B) Brain**", "B"),
    ("Gyri are visible, so the correct option is C", "C"),
    ("The answer is Left knee. It shows a patella.", "C"),
    ("The answer is B because A shows no gyri", "B"),
    ("The answer is B. Options A and C are wrong.", "B"),
    ("Option A is wrong. The answer is B.", "B"),
    ("the answer is a", "A"),
    ("the answer is a.", "A"),
    ("The answer is a mass", None),
    ("The answer is A mass", None),
    ("The answer is not B", None),
    ("The incorrect answer is A", None),
    ("The answer is A or B", None),
    ("The answer is A, B", None),
    ("The answer is B. No, the answer is C.", None),
    ("The answer is B. Yes, the answer is B.", "B"),
    ("The answer is B) Chest", None),
    ("The answer is D", None),
  ],
)
def test_lenient_letter(completion, expected):
  assert rewards.lenient_letter(completion, BRAIN) == expected
  assert rewards.lenient_accuracy(completion, BRAIN) == (expected == "B")


def asked(*options):
  return dataclasses.replace(BRAIN, options=options, answer="B")


def test_a_letter_with_its_own_text_is_no_article():
  found = [rewards.lenient_letter("A mass", asked(*options)) for options in (("mass", "cyst"), ("cyst", "mass"))]
  assert found == ["A", None]
  assert rewards.lenient_letter("A mass is visible", asked("mass", "cyst")) is None  # a sentence again
  assert rewards.lenient_letter("B: left knee", asked("left knee", "left")) is None  # the other option's text
  assert rewards.lenient_letter("B: left", asked("left knee", "left")) == "B"


def test_options_that_words_do_not_tell_apart():
  assert rewards.lenient_letter("<answer>> 5 mm</answer>", asked("< 5 mm", "> 5 mm")) == "B"
  assert rewards.lenient_letter("<answer>5 mm</answer>", asked("< 5 mm", "> 5 mm")) is None
  assert rewards.lenient_letter("<answer>?</answer>", asked("?", "+")) is None  # no word at all
  assert rewards.lenient_letter("<answer>cyst</answer>", asked("cyst", "mass", "cyst")) is None  # one of two
  assert rewards.lenient_letter("<answer>B</answer>", asked("B", "A")) == "B"  # a letter first, as strictly


PIECES = st.sampled_from(
  ["<think>", "</think>", "<answer>", "</answer>", "The answer is ", "option ", "A", "B", "c", "D", "I", "mass",
   "Brain", "left knee", ".", ")", "(", ":", ", ", " ", "\n", "**", " or ", " is correct", "'", "-", "é"]
)  # fmt: skip


@hypothesis.given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40))
@hypothesis.settings(max_examples=500, deadline=None)
def test_the_forgiving_parser_reads_all_that_the_strict_one_reads(completion):
  strict, lenient = rewards.answer_letter(completion), rewards.lenient_letter(completion, BRAIN)
  assert lenient in ("A", "B", "C", None)
  if strict in ("A", "B", "C"):
    assert lenient == strict
  gold = rewards.lenient_letter(completion, dataclasses.replace(BRAIN, answer="C"))
  assert gold == lenient  # the answer does not help


@hypothesis.given(
  letter=st.sampled_from("ABC"),
  word=st.sampled_from(["mass", "lesion", "small", "left", "visible", "cells", "and", "large", "T2"]),
  more=st.sampled_from(["", " is visible.", " near the brain", ", the answer"]),
)
def test_a_letter_before_a_word_is_a_word(letter, word, more):
  assert rewards.lenient_letter(f"{letter} {word}{more}", BRAIN) is None


def test_the_forgiving_parser_is_fast_on_repetition():
  start = time.perf_counter()
  for piece in ("(", "A ", "answer is ", "<think>", "answer: A, ", "\n", "**", "Brain "):
    rewards.lenient_letter(piece * 4000, BRAIN)
  assert time.perf_counter() - start < 5  # 0.3 s; a quadratic one took 12


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
