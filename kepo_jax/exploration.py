"""Hints and rejection sampling for prompts on which every rollout fails.

The teacher, shown image, question and gold answer, writes a hint; the student samples candidates under it. A
candidate that is accurate, well formed and does not talk about the hint is accepted (by default, see `Acceptance`), and
replaces a random rollout of the group (Algorithm 1 of arXiv 2602.00400, with acceptance per candidate).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax import rewards
from kepo_jax.types import Example

QUOTED_WORDS = 12  # consecutive words of a hint that count as a quotation in `hint/quote_rate`
TRIGGERS = ("accuracy_all_zero", "reward_all_zero", "always", "never")
HINTS = ("each_round", "once")
_HINT = re.compile(r"<hint>(.*?)</hint>", re.DOTALL)
# Phrases that the leak filter refuses: the student would learn to mention help that it will not have.
_LEAKS = re.compile(
  r"\b(?:the|this|that|your|given|provided) (?:\w+ )?hint\b|\bhint(?:ed)? (?:says?|said|tells?|told|points?|is|was)\b"
  r"|\bhint:|\b(?:the|this|that|your|given) advice\b|\bsomething to look for\b"
  r"|\b(?:the|a|as) (?:given|provided|supplied|told|stated) (?:correct |right |gold )?(?:answer|option)\b"
  r"|\b(?:answer|option)(?: [A-J])? (?:is|was|has been) (?:given|provided|supplied|already known)\b"
  r"|\b(?:i|we) (?:am|are|was|were|have been) told\b|\bas (?:i was |we were )?(?:told|instructed)\b",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One completion sampled under a hint, on the host."""

  tokens: np.ndarray  # int32[T]
  logps: np.ndarray  # float32[T], nats, given the hint
  mask: np.ndarray  # bool[T]
  text: str
  hint: str
  accurate: bool
  well_formed: bool
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # reward name -> value, "total" among them
  attempt: int = 0  # round that produced it, from 1

  @property
  def leaks(self) -> bool:
    """Whether the text reveals that help was given."""
    return reveals_help(self.text)

  @property
  def quotes_hint(self) -> bool:
    """Whether the text repeats twelve or more consecutive words of the hint."""
    return quotes(self.text, self.hint)


@dataclasses.dataclass(frozen=True)
class Acceptance:
  """Which candidates may replace a rollout."""

  rule: str = "accurate_and_formatted"
  leak_filter: bool = True  # refuse texts that talk about the help

  def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the accepted candidates of one prompt and round, in their order."""
    return ACCEPTANCE_RULES[self.rule](candidates, self.leak_filter)


def _accurate_and_formatted(candidates: Sequence[Candidate], leak_filter: bool) -> list[Candidate]:
  """Accepts each candidate alone: accurate and well formed."""
  return [
    candidate
    for candidate in candidates
    if candidate.accurate and candidate.well_formed and not (leak_filter and candidate.leaks)
  ]


def _all_or_none_accurate(candidates: Sequence[Candidate], leak_filter: bool) -> list[Candidate]:
  """Accepts all candidates of a prompt and round if each is accurate; one that leaks refuses all."""
  good = all(candidate.accurate and not (leak_filter and candidate.leaks) for candidate in candidates)
  return list(candidates) if good else []


ACCEPTANCE_RULES = {"accurate_and_formatted": _accurate_and_formatted, "all_or_none_accurate": _all_or_none_accurate}


@dataclasses.dataclass
class Exploration:
  """The outcome of the rounds of one step, by row of the batch that asked for hints."""

  accepted: dict[int, list[Candidate]]  # in order of acceptance, at most K
  candidates: dict[int, list[Candidate]]  # all that were sampled, accepted or not
  hints: dict[int, list[str]]  # the teacher's texts, parsed or not

  @property
  def hints_asked(self) -> int:
    """Hints that the teacher wrote."""
    return sum(map(len, self.hints.values()))

  @property
  def hints_unparsed(self) -> int:
    """Hints that could not be parsed."""
    return sum(parse_hint(text) is None for texts in self.hints.values() for text in texts)


def reveals_help(text: str) -> bool:
  """Returns whether a completion mentions the hint or an answer that was given to it."""
  return _LEAKS.search(text) is not None


def quotes(text: str, hint: str, words: int = QUOTED_WORDS) -> bool:
  """Returns whether `words` consecutive words of the hint occur in the text, in any case and punctuation."""
  parts = _words(hint).split()
  spans = (" ".join(parts[i : i + words]) for i in range(len(parts) - words + 1))
  return any(f" {span} " in _words(text) for span in spans)


def _words(text: str) -> str:
  """Returns the words in lower case, each between spaces."""
  words = re.findall(r"\w+", text.lower())
  return f" {' '.join(words)} "


def parse_hint(text: str) -> str | None:
  """Returns the text of the first hint block, or None where there is none or it is empty."""
  block = _HINT.search(text)
  return (block.group(1).strip() or None) if block else None


def triggered(accuracy: np.ndarray, total: np.ndarray, trigger: str) -> list[int]:
  """Returns the rows of the batch that ask for hints.

  Args:
    accuracy: float32[P, G], accuracy of each rollout.
    total: float32[P, G], its reward.
    trigger: "accuracy_all_zero" (no rollout of the prompt is accurate), "reward_all_zero" (none has a reward above 0),
      "always" or "never".
  """
  triggers = {
    "accuracy_all_zero": lambda: (np.asarray(accuracy) == 0).all(axis=1),
    "reward_all_zero": lambda: (np.asarray(total) <= 0).all(axis=1),
    "always": lambda: np.ones(len(accuracy), bool),
    "never": lambda: np.zeros(len(accuracy), bool),
  }
  return [int(row) for row in np.flatnonzero(triggers[trigger]())]


def explore(
  failed: Sequence[int],
  ask_hints: Callable[[Sequence[int], int], Sequence[str]],
  sample_hinted: Callable[[Sequence[int], Sequence[str], int], Sequence[Sequence[Candidate]]],
  *,
  rounds: int,
  replacements: int,
  accept: Callable[[Sequence[Candidate]], list[Candidate]] = Acceptance(),
  hints: str = "each_round",
) -> Exploration:
  """Asks for hints and samples under them until each failed prompt has its replacements or the rounds are over.

  A hint that cannot be parsed costs its prompt the round. A prompt without an accepted candidate keeps its group.

  Args:
    failed: rows of the batch that ask for hints.
    ask_hints: (rows, round) -> the teacher's raw text per row.
    sample_hinted: (rows, hints, round) -> candidates per row.
    rounds: B, largest number of rounds per prompt.
    replacements: K, accepted candidates wanted per prompt.
    accept: returns the accepted ones among the candidates of one prompt and round.
    hints: "each_round" asks for a new hint in each round, "once" keeps the first that could be parsed.
  """
  outcome = Exploration({row: [] for row in failed}, {row: [] for row in failed}, {row: [] for row in failed})
  parsed: dict[int, str] = {}
  for attempt in range(1, rounds + 1):
    open_rows = [row for row in failed if len(outcome.accepted[row]) < replacements]
    if not open_rows:
      break
    if unhinted := [row for row in open_rows if row not in parsed]:
      for row, text in zip(unhinted, ask_hints(unhinted, attempt), strict=True):
        outcome.hints[row].append(text)
        if hint := parse_hint(text):
          parsed[row] = hint
    if hinted := [row for row in open_rows if row in parsed]:
      sampled = sample_hinted(hinted, [parsed[row] for row in hinted], attempt)
      for row, completions in zip(hinted, sampled, strict=True):
        candidates = [dataclasses.replace(candidate, attempt=attempt) for candidate in completions]
        outcome.candidates[row] += candidates
        outcome.accepted[row] += accept(candidates)[: replacements - len(outcome.accepted[row])]
    if hints == "each_round":
      parsed.clear()
  return outcome


def explore_at_once(
  failed: Sequence[int],
  ask_hints: Callable[[Sequence[int], Sequence[int]], Sequence[Sequence[str]]],
  sample_hinted: Callable[[Sequence[tuple[int, int]], Sequence[str]], Sequence[Sequence[Candidate]]],
  *,
  rounds: int,
  hints: str = "each_round",
  **settings: Any,
) -> Exploration:
  """Does what `explore` does with one batch of hints and one of candidates for all rounds.

  Rounds are independent given the prompt, so the outcome is that of `explore` if hints and candidates are drawn with
  the same keys. What a prompt that has its replacements would not have asked for is dropped.

  Args:
    failed: rows of the batch that ask for hints.
    ask_hints: (rows, rounds) -> the teacher's raw texts, one per row and round.
    sample_hinted: (pairs of row and round, hints) -> candidates per pair.
    rounds: B, rounds per prompt.
    hints: as for `explore`.
    **settings: further arguments of `explore`.
  """
  attempts = range(1, rounds + 1)
  texts = dict(zip(failed, ask_hints(failed, attempts), strict=True)) if failed else {}
  hinted: dict[tuple[int, int], str] = {}
  for row in failed:
    for attempt, text in zip(attempts, texts[row], strict=True):
      hint = parse_hint(text)
      if hints == "once":
        hint = hinted.get((row, attempt - 1)) or hint
      if hint:
        hinted[row, attempt] = hint
  sampled = sample_hinted(list(hinted), list(hinted.values())) if hinted else ()
  candidates = dict(zip(hinted, sampled, strict=True))
  return explore(
    failed,
    lambda rows, attempt: [texts[row][attempt - 1] for row in rows],
    lambda rows, _, attempt: [candidates[row, attempt] for row in rows],
    rounds=rounds,
    hints=hints,
    **settings,
  )


def injections(outcome: Exploration, rollouts: int, seed: Sequence[int]) -> list[tuple[int, int, Candidate]]:
  """Draws distinct random slots for the accepted candidates.

  Args:
    outcome: of the rounds.
    rollouts: G.
    seed: fixes the draw, together with the row.

  Returns:
    (row of the batch, rollout of the group, the candidate that replaces it).
  """
  placed = []
  for row, candidates in sorted(outcome.accepted.items()):
    slots = np.random.default_rng([*seed, row]).permutation(rollouts)
    placed += [(row, int(slot), candidate) for slot, candidate in zip(slots, candidates, strict=False)]
  return placed


def names_answer(text: str, example: Example) -> bool:
  """Returns whether a hint holds the text of the gold option, in any case and punctuation, or its letter."""
  answer = _words(example.answer_text)
  return (bool(answer.strip()) and answer in _words(text)) or example.answer in rewards.named_letters(text)


def exploration_metrics(
  outcome: Exploration, *, prompts: int, rounds: int, examples: Sequence[Example]
) -> dict[str, float]:
  """Computes the `hint/*` metrics of one step; rates without a denominator are left out.

  Args:
    outcome: of the rounds.
    prompts: of the step.
    rounds: B.
    examples: the questions by row of the outcome.
  """
  failed = len(outcome.accepted)
  metrics = {"hint/trigger_rate": failed / prompts, "hint/attempts": float(outcome.hints_asked)}
  if outcome.hints_asked:
    metrics["hint/parse_failure_rate"] = outcome.hints_unparsed / outcome.hints_asked
    named = [names_answer(text, examples[row]) for row, texts in outcome.hints.items() for text in texts]
    metrics["hint/answer_rate"] = sum(named) / len(named)
  if candidates := [candidate for row in outcome.candidates.values() for candidate in row]:
    metrics["hint/leak_rate"] = sum(candidate.leaks for candidate in candidates) / len(candidates)
    metrics["hint/quote_rate"] = sum(candidate.quotes_hint for candidate in candidates) / len(candidates)
  if failed:
    firsts = [candidates[0].attempt for candidates in outcome.accepted.values() if candidates]
    for b in range(1, rounds + 1):
      metrics[f"hint/accept_rate@{b}"] = sum(first <= b for first in firsts) / failed
  return metrics
