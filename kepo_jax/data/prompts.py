"""Every wording that a model is shown, in one file.

A `Templates` record holds the wordings of one family; `TEMPLATES` names the families. `standard` is for
instruction-tuned checkpoints; `brief` is what the small models of the phantom benchmark were trained on, where
every word costs a prompt token. Training and evaluation wordings are separate, as in the released code.
"""

import dataclasses

from kepo_jax.data import cleaning
from kepo_jax.types import Example


@dataclasses.dataclass(frozen=True)
class Templates:
  """Wordings with the fields {problem}, {answer} and {hint}; {option} of `option_line` is one option."""

  option_line: str  # fields {letter}, {option}
  option_separator: str  # between the stem and the first option, and between options
  answer: str  # the gold answer as shown to a teacher or a hinted student: {letter}, {option}
  think: str  # training prompt: reason, then answer
  evaluation: str  # evaluation prompt: reason, then answer
  no_think: str  # answer block alone
  hint_request: str  # to the teacher: {problem}, {answer}
  hint_only: str  # to the student: {problem}, {hint}
  hint_and_answer: str  # to the student: {problem}, {hint}, {answer}
  answer_block: str  # what a student should reply to `no_think`: {letter}


STANDARD = Templates(
  option_line="{letter}) {option}",
  option_separator="\n",
  answer="{letter}) {option}",
  think=(
    "{problem}\n\nWork through the image before you decide. Put your reasoning between <think> and </think>, then "
    "the letter of the one correct option between <answer> and </answer>. Write nothing outside these two blocks."
  ),
  evaluation=(
    "{problem}\n\nReason about the image between <think> and </think>, and after that give only the letter of the "
    "correct option between <answer> and </answer>."
  ),
  no_think=(
    "{problem}\n\nReply with the letter of the correct option between <answer> and </answer>, and with nothing else."
  ),
  hint_request=(
    "{problem}\n\nThe correct option is {answer}. A student who sees the same image keeps getting this question "
    "wrong. Between <hint> and </hint>, describe in two or three sentences what in the image deserves attention and "
    "how it bears on the question, so that the student can find the answer alone. Do not name the letter."
  ),
  hint_only=(
    "{problem}\n\nSomething to look for: {hint}\n\nWork through the image before you decide, in your own words and as "
    "if nobody had helped you. Put your reasoning between <think> and </think>, then the letter of the one correct "
    "option between <answer> and </answer>. Write nothing outside these two blocks."
  ),
  hint_and_answer=(
    "{problem}\n\nSomething to look for: {hint}\nThe correct option is {answer}.\n\nExplain from the image why, in "
    "your own words and as if nobody had helped you: mention neither the advice nor that you knew the answer. Put "
    "your reasoning between <think> and </think>, then the letter of the one correct option between <answer> and "
    "</answer>. Write nothing outside these two blocks."
  ),
  answer_block="<answer>{letter}</answer>",
)

BRIEF = Templates(
  option_line="{letter}: {option}",
  option_separator=" ",
  answer="{option}",
  think="{problem} think.",
  evaluation="{problem} think.",
  no_think="{problem} answer.",
  hint_request="{problem} truth: {answer} hint.",
  hint_only="{problem} hint: {hint} think.",
  hint_and_answer="{problem} hint: {hint} truth: {answer} think.",
  answer_block="<answer> {letter}</answer>",
)

TEMPLATES = {"standard": STANDARD, "brief": BRIEF}


def problem(example: Example, templates: Templates) -> str:
  """Returns the stem of a question followed by its lettered options."""
  lines = [
    templates.option_line.format(letter=chr(ord("A") + i), option=option) for i, option in enumerate(example.options)
  ]
  return templates.option_separator.join([example.question, *lines])


def prompt_text(example: Example, templates: Templates, kind: str, *, hint: str = "") -> str:
  """Writes the user turn for one question.

  Args:
    example: the question; its gold answer is shown only by kinds that give it away.
    templates: the family of wordings.
    kind: "think", "evaluation", "no_think", "hint_request", "hint_only" or "hint_and_answer".
    hint: text of the teacher's hint, for the two hinted kinds.
  """
  answer = templates.answer.format(letter=example.answer, option=example.answer_text)
  hint = hint.replace(cleaning.IMAGE, "")  # a teacher may write the sign that marks a picture's place
  return getattr(templates, kind).format(problem=problem(example, templates), answer=answer, hint=hint)


def gold_completion(example: Example, templates: Templates) -> str:
  """Returns the answer block with the gold letter, the target of supervised training without reasoning."""
  return templates.answer_block.format(letter=example.answer)
