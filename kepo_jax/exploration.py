"""Hints and rejection sampling for prompts on which every rollout fails.

The teacher, shown image, question and gold answer, writes a hint; the student samples candidates under it. A
candidate that is accurate, well formed and does not talk about the hint is accepted; accepted candidates
replace random rollouts of the group (Algorithm 1 of arXiv 2602.00400, with acceptance per candidate).
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

QUOTED_WORDS = 12  # consecutive words of a hint that make a quotation
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
  attempt: int = 0  # round that produced it, from 1

  @property
  def leaks(self) -> bool:
    """Whether the text reveals that help was given."""
    return reveals_help(self.text)

  @property
  def quotes_hint(self) -> bool:
    """Whether the text repeats twelve or more consecutive words of the hint."""
    return quotes(self.text, self.hint)

  @property
  def accepted(self) -> bool:
    """Accurate, well formed, and without a word about the help."""
    return self.accurate and self.well_formed and not self.leaks


@dataclasses.dataclass
class Exploration:
  """What the rounds left behind for one step."""

  accepted: dict[int, list[Candidate]]  # per failed prompt, in order of acceptance, at most K
  candidates: list[Candidate]  # everything sampled, accepted or not
  hints_asked: int = 0
  hints_unparsed: int = 0


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


def triggered(accuracy: np.ndarray, trigger: str) -> list[int]:
  """Rows of float32[P, G] accuracies that ask for help.

  Args:
    accuracy: float32[P, G], accuracy of each rollout.
    trigger: "accuracy_all_zero" (no rollout of the prompt is accurate) or "never".

  Raises:
    ValueError: the trigger is neither.
  """
  triggers = {
    "accuracy_all_zero": lambda: [int(i) for i in np.flatnonzero((np.asarray(accuracy) == 0).all(axis=1))],
    "never": lambda: [],
  }
  if trigger not in triggers:
    raise ValueError(f"exploration.trigger={trigger!r} is unknown; use one of {sorted(triggers)}.")
  return triggers[trigger]()


def explore(
  failed: Sequence[int],
  ask_hints: Callable[[Sequence[int], int], Sequence[str]],
  sample_hinted: Callable[[Sequence[int], Sequence[str], int], Sequence[Sequence[Candidate]]],
  *,
  rounds: int,
  replacements: int,
) -> Exploration:
  """Asks for hints and samples under them until each failed prompt has its replacements or the rounds are over.

  Args:
    failed: rows of the batch without an accurate rollout.
    ask_hints: (rows, round) -> the teacher's raw text per row; a new hint each round.
    sample_hinted: (rows, hints, round) -> candidates per row.
    rounds: B, largest number of hints per prompt.
    replacements: K, accepted candidates wanted per prompt.
  """
  outcome = Exploration(accepted={row: [] for row in failed}, candidates=[])
  for attempt in range(1, rounds + 1):
    open_rows = [row for row in failed if len(outcome.accepted[row]) < replacements]
    if not open_rows:
      break
    hints = [parse_hint(text) for text in ask_hints(open_rows, attempt)]
    outcome.hints_asked += len(hints)
    outcome.hints_unparsed += sum(hint is None for hint in hints)
    hinted = [(row, hint) for row, hint in zip(open_rows, hints, strict=True) if hint is not None]
    if not hinted:
      continue
    rows, texts = zip(*hinted, strict=True)
    for row, candidates in zip(rows, sample_hinted(rows, texts, attempt), strict=True):
      candidates = [dataclasses.replace(candidate, attempt=attempt) for candidate in candidates]
      outcome.candidates.extend(candidates)
      room = replacements - len(outcome.accepted[row])
      outcome.accepted[row].extend([candidate for candidate in candidates if candidate.accepted][:room])
  return outcome


def injections(outcome: Exploration, rollouts: int, seed: Sequence[int]) -> list[Injection]:
  """Distinct random slots for the accepted candidates; `seed` (with the row added) fixes the draw."""
  placed = []
  for row, candidates in sorted(outcome.accepted.items()):
    slots = np.random.default_rng([*seed, row]).permutation(rollouts)
    placed += [Injection(row, int(slot), candidate) for slot, candidate in zip(slots, candidates, strict=False)]
  return placed


def exploration_metrics(outcome: Exploration, *, prompts: int, rounds: int) -> dict[str, float]:
  """The `hint/*` figures of one step; rates without a denominator are left out."""
  failed = len(outcome.accepted)
  metrics = {"hint/trigger_rate": failed / prompts, "hint/attempts": float(outcome.hints_asked)}
  if outcome.hints_asked:
    metrics["hint/parse_failure_rate"] = outcome.hints_unparsed / outcome.hints_asked
  if outcome.candidates:
    metrics["hint/leak_rate"] = sum(c.leaks for c in outcome.candidates) / len(outcome.candidates)
    metrics["hint/quote_rate"] = sum(c.quotes_hint for c in outcome.candidates) / len(outcome.candidates)
  if failed:
    firsts = [candidates[0].attempt for candidates in outcome.accepted.values() if candidates]
    for b in range(1, rounds + 1):
      metrics[f"hint/accept_rate@{b}"] = sum(first <= b for first in firsts) / failed
  return metrics
