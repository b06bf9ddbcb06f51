"""From the text of a completion to numbers: the conventions of Med-R1 and KEPO, and their relatives by name.

A reward is a function of (completion, example) that returns a finite float; the example may be ignored.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kepo_jax.types import Example

Reward = Callable[[str, Example], float]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_ANY_CASE = re.compile(_ANSWER.pattern, re.DOTALL | re.IGNORECASE)
_STRICT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER_ALONE = re.compile(r"<answer>[^<]*</answer>")
_EVALUATED = re.compile(r"<answer>\s*(\w+)\s*</answer>")
_ISOLATED_LETTER = re.compile(r"(?<![A-Za-z])[A-J](?![A-Za-z])")
# "B", "(b)", "B.", "B) Brain", "Option B: Brain", "**B**"
_LENIENT_LETTER = re.compile(
  r"\W*(?:the\s+)?(?:(?:correct\s+)?(?:answer|option)\s*(?:is|:)?\s*)?[\(\[*]*([A-J])(?:\W.*)?",
  re.DOTALL | re.IGNORECASE,
)


def accuracy(completion: str, example: Example) -> float:
  """1.0 when the stripped content of the first answer block is the gold letter, else 0.0 (Med-R1, KEPO).

  Case matters. Without an answer block the whole stripped completion is compared.
  """
  found = _ANSWER.search(completion)
  return float((found.group(1) if found else completion).strip() == example.answer)


def strict_format(completion: str, example: Example | None = None) -> float:
  """1.0 when the completion is a think block, white space and an answer block and nothing else (Med-R1, KEPO)."""
  del example
  return float(_STRICT.fullmatch(completion) is not None)


def answer_format(completion: str, example: Example | None = None) -> float:
  """1.0 when the completion is one answer block and nothing else: the format of the no-think prompt."""
  del example
  return float(_ANSWER_ALONE.fullmatch(completion) is not None)


def medvlm_accuracy(completion: str, example: Example) -> float:
  """The graded accuracy of MedVLM-R1: tags in any case, one letter A-J.

  1.0 when the first answer block is the gold letter alone, 0.5 when it holds that letter among other text, 0.0
  otherwise and when it holds several letters.
  """
  found = _ANSWER_ANY_CASE.search(completion)
  content = found.group(1).strip() if found else ""
  if content == example.answer:
    return 1.0
  return 0.5 * float(_ISOLATED_LETTER.findall(content) == [example.answer])


REWARDS: Mapping[str, Reward] = {
  "accuracy": accuracy,
  "format": strict_format,
  "answer_format": answer_format,
  "medvlm_accuracy": medvlm_accuracy,
}


def answer_letter(completion: str) -> str | None:
  """What evaluation reads as the answer: the word in the first answer block that holds nothing else.

  Compared with the gold letter exactly; None, unparsed, counts as wrong (Med-R1, KEPO).
  """
  found = _EVALUATED.search(completion)
  return found.group(1) if found else None


def lenient_letter(completion: str, example: Example) -> str | None:
  """The option that a forgiving reader would see in a completion, None where there is none.

  Looks at the first answer block, else at what follows the think block. Accepts an option's text, and a letter in
  any case, with brackets, punctuation or the option's text behind it.
  """
  found = _ANSWER_ANY_CASE.search(completion)
  content = found.group(1) if found else completion.rpartition("</think>")[2]
  content = re.sub(r"</?answer>", "", content, flags=re.IGNORECASE).strip()
  letters = [chr(ord("A") + i) for i in range(len(example.options))]
  for letter, option in zip(letters, example.options, strict=True):
    if _plain(content) == _plain(option):
      return letter
  # A lone article is no answer: a lower-case letter counts only where little follows it.
  matched = _LENIENT_LETTER.fullmatch(content)
  if matched is None or (matched.group(1).islower() and len(content.split()) > 3):
    return None
  return matched.group(1).upper() if matched.group(1).upper() in letters else None


def _plain(text: str) -> str:
  return " ".join(re.findall(r"\w+", text.casefold()))


def score(
  completions: Sequence[Sequence[str]],
  examples: Sequence[Example],
  rewards: Mapping[str, Reward],
  weights: Mapping[str, float],
) -> dict[str, list[list[float]]]:
  """Every reward of every completion, and their weighted sum under the name "total".

  Args:
    completions: [P][G] texts.
    examples: the P questions.
    rewards: name -> function.
    weights: name -> weight; the same names.

  Raises:
    ValueError: names differ, or a reward is not a finite number; names the reward and the question.
  """
  if rewards.keys() != weights.keys() or "total" in rewards:
    raise ValueError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names, none 'total'.")
  scores = {
    name: [
      [_finite(name, reward(text, example), example) for text in group]
      for group, example in zip(completions, examples, strict=True)
    ]
    for name, reward in rewards.items()
  }
  scores["total"] = [
    [sum(weights[name] * scores[name][p][g] for name in rewards) for g in range(len(group))]
    for p, group in enumerate(completions)
  ]
  return scores


def _finite(name: str, value: Any, example: Example) -> float:
  try:
    # A text is no number, even where float() could read one.
    number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"reward {name!r} gave {value!r} for question {example.id}; it must return a finite number.")
  return number
