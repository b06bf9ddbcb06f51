"""Hints and rejection sampling for prompts on which every rollout fails.

The teacher, shown image, question and gold answer, writes a hint; the student samples candidates under it. A
candidate that is accurate, well formed and does not talk about the hint is accepted (by default, see `Acceptance`), and
replaces a random rollout of the group (Algorithm 1 of arXiv 2602.00400, with acceptance per candidate).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kepo_jax import rewards
from kepo_jax.types import Example

QUOTED_WORDS = 12  # consecutive words of a hint that make a quotation, in the figure that is always logged
TRIGGERS = ("accuracy_all_zero", "reward_all_zero", "always", "never")
RULES = ("accurate_and_formatted", "all_or_none_accurate")
HINTS = ("each_round", "once")
_HINT = re.compile(r"<hint>(.*?)</hint>", re.DOTALL)
# What a completion must not say: it would teach the student to talk about help that it will not have.
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

  # One of RULES: "accurate_and_formatted" looks at each candidate alone; under "all_or_none_accurate" those of a prompt
  # and a round are accepted together, if every one is accurate.
  rule: str = "accurate_and_formatted"
  leak_filter: bool = True  # refuse texts that talk about the help

  def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The accepted ones among the candidates of one prompt and round, in their order.

    Raises:
      ValueError: an unknown rule.
    """
    if self.rule not in RULES:
      raise ValueError(f"exploration.acceptance={self.rule!r} is unknown; use one of {RULES}.")
    good = [candidate for candidate in candidates if self._alone(candidate)]
    return [] if self.rule == "all_or_none_accurate" and len(good) < len(candidates) else good

  def _alone(self, candidate: Candidate) -> bool:
    formed = candidate.well_formed or self.rule == "all_or_none_accurate"
    return candidate.accurate and formed and not (self.leak_filter and candidate.leaks)


@dataclasses.dataclass
class Exploration:
  """What the rounds left behind for one step."""

  accepted: dict[int, list[Candidate]]  # per prompt that asked for help, in order of acceptance, at most K
  candidates: dict[int, list[Candidate]]  # everything sampled for them, accepted or not
  hints: dict[int, list[str]]  # what the teacher wrote for them, parsed or not

  @property
  def hints_asked(self) -> int:
    """Hints that the teacher wrote."""
    return sum(map(len, self.hints.values()))

  @property
  def hints_unparsed(self) -> int:
    """Those of them without a hint block."""
    return sum(parse_hint(text) is None for texts in self.hints.values() for text in texts)


@dataclasses.dataclass(frozen=True)
class Injection:
  """An accepted candidate and the rollout that it replaces."""

  prompt: int  # row of the batch
  slot: int  # rollout of the group
  candidate: Candidate


def reveals_help(text: str) -> bool:
  """Whether a completion mentions the hint or an answer that was given to it."""
  return _LEAKS.search(text) is not None


def quotes(text: str, hint: str, words: int = QUOTED_WORDS) -> bool:
  """Whether `words` consecutive words of the hint occur in the text, in any case and punctuation."""
  said, wanted = (" ".join(re.findall(r"\w+", each.lower())) for each in (text, hint))
  parts = wanted.split()
  spans = (" ".join(parts[i : i + words]) for i in range(len(parts) - words + 1))
  return any(f" {span} " in f" {said} " for span in spans)


def parse_hint(text: str) -> str | None:
  """The text of the first hint block, or None where there is none or it is empty."""
  found = _HINT.search(text)
  return (found.group(1).strip() or None) if found else None


def triggered(accuracy: np.ndarray, total: np.ndarray, trigger: str) -> list[int]:
  """Rows of the batch that ask for help.

  Args:
    accuracy: float32[P, G], accuracy of each rollout.
    total: float32[P, G], its reward.
    trigger: "accuracy_all_zero" (no rollout of the prompt is accurate), "reward_all_zero" (none has a reward above 0),
      "always" or "never".

  Raises:
    ValueError: the trigger is none of these.
  """
  triggers = {
    "accuracy_all_zero": lambda: (np.asarray(accuracy) == 0).all(axis=1),
    "reward_all_zero": lambda: (np.asarray(total) <= 0).all(axis=1),
    "always": lambda: np.ones(len(accuracy), bool),
    "never": lambda: np.zeros(len(accuracy), bool),
  }
  if trigger not in triggers:
    raise ValueError(f"exploration.trigger={trigger!r} is unknown; use one of {TRIGGERS}.")
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
    failed: rows of the batch that ask for help.
    ask_hints: (rows, round) -> the teacher's raw text per row.
    sample_hinted: (rows, hints, round) -> candidates per row.
    rounds: B, largest number of rounds per prompt.
    replacements: K, accepted candidates wanted per prompt.
    accept: the accepted ones among the candidates of one prompt and round.
    hints: "each_round" asks for a new hint in each round, "once" keeps the first that could be parsed.

  Raises:
    ValueError: `hints` is neither.
  """
  if hints not in HINTS:
    raise ValueError(f"exploration.hints={hints!r} is unknown; use one of {HINTS}.")
  outcome = Exploration(
    accepted={row: [] for row in failed}, candidates={row: [] for row in failed}, hints={row: [] for row in failed}
  )
  known: dict[int, str] = {}
  for attempt in range(1, rounds + 1):
    open_rows = [row for row in failed if len(outcome.accepted[row]) < replacements]
    if not open_rows:
      break
    if asked := [row for row in open_rows if row not in known]:
      known |= _parsed_hints(outcome, asked, ask_hints(asked, attempt))
    hinted = [row for row in open_rows if row in known]
    if hinted:
      _sample_round(outcome, hinted, known, sample_hinted, accept, attempt, replacements)
    if hints == "each_round":
      known.clear()
  return outcome


def _parsed_hints(outcome: Exploration, rows: Sequence[int], texts: Sequence[str]) -> dict[int, str]:
  """Row -> its hint where one can be parsed; adds every text to the outcome."""
  for row, text in zip(rows, texts, strict=True):
    outcome.hints[row].append(text)
  parsed = {row: parse_hint(text) for row, text in zip(rows, texts, strict=True)}
  return {row: hint for row, hint in parsed.items() if hint is not None}


def _sample_round(outcome, rows, hints, sample_hinted, accept, attempt: int, replacements: int) -> None:
  """Adds the candidates of one round to the outcome, and the accepted ones up to K per prompt."""
  for row, sampled in zip(rows, sample_hinted(rows, [hints[row] for row in rows], attempt), strict=True):
    candidates = [dataclasses.replace(candidate, attempt=attempt) for candidate in sampled]
    outcome.candidates[row].extend(candidates)
    room = replacements - len(outcome.accepted[row])
    outcome.accepted[row].extend(accept(candidates)[:room])


def injections(outcome: Exploration, rollouts: int, seed: Sequence[int]) -> list[Injection]:
  """Distinct random slots for the accepted candidates; `seed` (with the row added) fixes the draw."""
  placed = []
  for row, candidates in sorted(outcome.accepted.items()):
    slots = np.random.default_rng([*seed, row]).permutation(rollouts)
    placed += [Injection(row, int(slot), candidate) for slot, candidate in zip(slots, candidates, strict=False)]
  return placed


def names_answer(text: str, example: Example) -> bool:
  """Whether a hint holds the text of the gold option, in any case and punctuation, or its letter."""
  said, answer = (" ".join(re.findall(r"\w+", each.lower())) for each in (text, example.answer_text))
  return (bool(answer) and f" {answer} " in f" {said} ") or example.answer in rewards.named_letters(text)


def exploration_metrics(
  outcome: Exploration, *, prompts: int, rounds: int, examples: Sequence[Example]
) -> dict[str, float]:
  """The `hint/*` figures of one step; rates without a denominator are left out.

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
    told = [names_answer(text, examples[row]) for row, texts in outcome.hints.items() for text in texts]
    metrics["hint/answer_rate"] = sum(told) / len(told)
  if candidates := [candidate for row in outcome.candidates.values() for candidate in row]:
    metrics["hint/leak_rate"] = sum(candidate.leaks for candidate in candidates) / len(candidates)
    metrics["hint/quote_rate"] = sum(candidate.quotes_hint for candidate in candidates) / len(candidates)
  if failed:
    firsts = [candidates[0].attempt for candidates in outcome.accepted.values() if candidates]
    for b in range(1, rounds + 1):
      metrics[f"hint/accept_rate@{b}"] = sum(first <= b for first in firsts) / failed
  return metrics
