"""Rewards of a completion's text: the conventions of Med-R1 and KEPO, and their relatives by name.

A reward is a function of (completion, example) that returns a finite float; the example may be ignored.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax import answers
from kepo_jax.answers import named_letters as named_letters
from kepo_jax.types import Example

Reward = Callable[[str, Example], float]
WeightedRewards = Mapping[str, tuple[Reward, float]]  # name -> (function, weight in the total)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_ANSWER_ANY_CASE = re.compile(r"<answer(?:\s[^<>]*)?>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_STRICT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_ANSWER_ALONE = re.compile(r"<answer>[^<]*</answer>")
_EVALUATED = re.compile(r"<answer>\s*(\w+)\s*</answer>")
_ISOLATED_LETTER = re.compile(r"(?<![A-Za-z])[A-J](?![A-Za-z])")


def accuracy(completion: str, example: Example) -> float:
  """Gives 1.0 when the stripped content of the first answer block is the gold letter, else 0.0 (Med-R1, KEPO).

  Case matters. Without an answer block the whole stripped completion is compared.
  """
  match = _ANSWER.search(completion)
  return float((match.group(1) if match else completion).strip() == example.answer)


def strict_format(completion: str, example: Example | None = None) -> float:
  """Gives 1.0 when the completion is a think block, white space and an answer block alone (Med-R1, KEPO)."""
  del example
  return float(_STRICT.fullmatch(completion) is not None)


def answer_format(completion: str, example: Example | None = None) -> float:
  """Gives 1.0 when the completion is one answer block and nothing else: the format of the no-think prompt."""
  del example
  return float(_ANSWER_ALONE.fullmatch(completion) is not None)


def medvlm_accuracy(completion: str, example: Example) -> float:
  """Gives the graded accuracy of MedVLM-R1: tags in any case, one letter A-J.

  1.0 when the first answer block is the gold letter alone, 0.5 when it holds that letter among other text, 0.0
  otherwise and when it holds several letters.
  """
  match = _ANSWER_ANY_CASE.search(completion)
  content = match.group(1).strip() if match else ""
  if content == example.answer:
    return 1.0
  return 0.5 * float(_ISOLATED_LETTER.findall(content) == [example.answer])


def answer_letter(completion: str) -> str | None:
  """Returns what evaluation reads as the answer: the word in the first answer block that holds one word alone.

  Compared with the gold letter exactly; None, unparsed, counts as wrong (Med-R1). KEPO's released evaluation compares a
  completion without the word "answer" as a whole instead: a bare "B" is right there, and unparsed here.
  """
  match = _EVALUATED.search(completion)
  return match.group(1) if match else None


def lenient_letter(completion: str, example: Example) -> str | None:
  """Returns the option that a forgiving reader would see in a completion, None where there is none.

  What the strict parser (`answer_letter`) reads as one of the letters is kept. Otherwise the first answer block is
  read, or, where there is none, what stands outside of think blocks, with full-width letters as plain ones, in this
  order:

  1. it is the text of one option, but for case, punctuation and an article, alone or with its letter, "x (B)";
  2. it has boxed answers, or the field "answer" of a JSON object: letters or texts of options, all the same;
  3. it states an answer, "the answer is probably ..", "correct option: ..", "I choose ..", anywhere and in several
     languages: letters or texts of options, all the same;
  4. it begins with a letter, or "option B", and names no other.

  A box, statement or beginning is void where its sentence negates it ("I don't think ..", ".. is wrong"), gives an
  alternative or a condition (".. or ..", "if .."), or names another option, where the next sentence takes it back
  ("This is wrong."), and where the list of options follows. What is said behind "because" does not matter.

  A letter, in either case, must be followed by nothing, by punctuation, by its option's own text or by words such as
  "is correct", and not by the text of another option: "A mass is visible" has an article. At the beginning a lower-case
  letter counts only if nothing but its option's text follows.

  Args:
    completion: of a model.
    example: the question; its gold answer is not looked at.
  """
  letters = [chr(ord("A") + i) for i in range(len(example.options))]
  strict = answer_letter(completion)
  if strict in letters:
    return strict
  return answers.option_letter(completion, example.options)


def lenient_accuracy(completion: str, example: Example) -> float:
  """Gives 1.0 when `lenient_letter` reads the gold option in the completion, else 0.0."""
  return float(lenient_letter(completion, example) == example.answer)


@dataclasses.dataclass(frozen=True)
class Convention:
  """What counts as accurate and as well formed: for the reward, the gate, cliffs, and acceptance."""

  accuracy: Reward
  format: Reward


CONVENTIONS: Mapping[str, Convention] = {
  "med_r1": Convention(accuracy, strict_format),  # Med-R1, KEPO
  "medvlm_r1": Convention(medvlm_accuracy, strict_format),
  "no_think": Convention(accuracy, answer_format),
  "lenient": Convention(lenient_accuracy, strict_format),
}
REWARDS: Mapping[str, Reward] = {
  "accuracy": accuracy,
  "format": strict_format,
  "answer_format": answer_format,
  "medvlm_accuracy": medvlm_accuracy,
  "lenient_accuracy": lenient_accuracy,
}
COMBINATIONS = ("sum", "product")
_LARGEST = float(np.finfo(np.float32).max)  # scores are float32: a larger number would become inf there


def named_reward(name: str) -> Reward:
  """Finds a reward function by its name in `REWARDS`, or by its dotted path, `package.module.function`.

  Raises:
    ValueError: there is no such name, module or function.
  """
  if name in REWARDS:
    return REWARDS[name]
  module, _, function = name.rpartition(".")
  if not module or module.startswith("."):
    raise ValueError(f"reward {name!r} is neither one of {sorted(REWARDS)} nor a dotted path package.module.function.")
  try:
    reward = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"reward {name!r} cannot be imported ({error}); the module must lie on PYTHONPATH.") from error
  if not callable(reward):
    raise ValueError(f"reward {name!r} is no function of (completion, example).")
  return reward


def parsed_rewards(text: str) -> dict[str, tuple[Reward, float]]:
  """Parses rewards written as "name:weight, name:weight", each name as in `named_reward`.

  Returns:
    last part of the name -> (function, weight); in order.

  Raises:
    ValueError: a part that does not read so, a name that is unknown or comes twice.
  """
  rewards: dict[str, tuple[Reward, float]] = {}
  for part in (part.strip() for part in text.split(",") if part.strip()):
    name, weight = (side.strip() for side in part.rpartition(":")[::2])
    try:
      number = float(weight)
    except ValueError:
      number = math.nan
    if not name or not math.isfinite(number):
      raise ValueError(f"reward {part!r} does not read as name:weight, for example lenient_accuracy:0.5.")
    short = name.rpartition(".")[2]
    if short in rewards:
      raise ValueError(f"two rewards are called {short!r}; give one of them another name.")
    rewards[short] = (named_reward(name), number)
  return rewards


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Scores completions with every reward, and adds them up.

  The total is the weighted sum of all rewards; with `combination` "product" the weight of accuracy times the product
  of accuracy and format stands in place of these two (arXiv:2602.00400 calls the reward binary).
  """

  rewards: WeightedRewards  # holds "accuracy" and "format"
  combination: str = "sum"  # of accuracy and format; or product

  def __post_init__(self):
    if not {"accuracy", "format"} <= self.rewards.keys() or "total" in self.rewards:
      raise ValueError(f"rewards {sorted(self.rewards)} must hold accuracy and format, and none called 'total'.")
    for name, pair in self.rewards.items():
      if not (isinstance(pair, tuple) and len(pair) == 2 and callable(pair[0])):
        raise ValueError(f"reward {name!r} is {pair!r}; give a pair of function and weight, (function, 1.0).")
    if self.combination not in COMBINATIONS:
      raise ValueError(f"reward combination {self.combination!r} is unknown; use one of {COMBINATIONS}.")

  def __call__(self, completions: Sequence[Sequence[str]], examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Returns name -> float32[P, G], and their combination under the name "total".

    Args:
      completions: [P][G] texts.
      examples: the P questions.

    Raises:
      ValueError: a reward is not a finite number; names the reward and the question.
    """
    shape = (len(examples), len(completions[0]) if completions else 0)
    scores = {
      name: np.array(
        [
          [_finite(name, reward(text, example), example) for text in group]
          for group, example in zip(completions, examples, strict=True)
        ],
        np.float32,
      ).reshape(shape)
      for name, (reward, _) in self.rewards.items()
    }
    weighted = {name: np.float32(self.rewards[name][1]) * values for name, values in scores.items()}
    if self.combination == "product":
      weighted["accuracy"] = weighted["accuracy"] * scores["format"]
      del weighted["format"]
    return scores | {"total": sum(weighted.values(), np.zeros(shape, np.float32))}


def _finite(name: str, value: Any, example: Example) -> float:
  try:
    # A text is no number, even where float() could read one.
    number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not abs(number) <= _LARGEST:  # nan is refused as well
    raise ValueError(f"reward {name!r} gave {value!r} for question {example.id}; it must return a finite number.")
  return number
