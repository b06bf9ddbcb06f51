"""How good hints are: rates of the candidates sampled under them, and what they do to the student's likelihoods."""

import bisect
import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax import exploration
from kepo_jax.evaluation.statistics import percentile_interval, resampled_means
from kepo_jax.types import Example

_LETTER_BEGUN = re.compile(r"<answer>\s*\w")


@dataclasses.dataclass(frozen=True)
class HintEffect:
  """What the hints of one question do to the student's log-probabilities: log pi(y | x, h) - log pi(y | x), nats."""

  reliance: np.ndarray  # float[n], of the n tokens of its accepted candidates, each under its own hint
  gain: np.ndarray  # float[m], of the m tokens of the teacher's right answers, each a mean over the question's hints
  letter_gain: np.ndarray  # float[k], of those among the m that say the letter, at most one per answer
  answers: int  # of the teacher that the m tokens belong to


def letter_place(tokens: np.ndarray, decode: Callable[[np.ndarray], str]) -> int | None:
  """Place of the token that says the letter of an answer.

  It is the first token with which the text has a word character behind its answer tag; tokens that merge the letter
  with a space or a part of the tag are found as well.

  Args:
    tokens: int32[n], a completion without padding.
    decode: tokens -> text.

  Returns:
    index into tokens; None where no prefix has a letter.
  """

  def said(place: int) -> bool:
    return _LETTER_BEGUN.search(decode(tokens[: place + 1])) is not None

  # Once the text of a prefix has the letter, that of every longer one has it: few prefixes need to be decoded.
  place = bisect.bisect_left(range(len(tokens)), True, key=said)
  return place if place < len(tokens) else None


def hint_record(
  outcome: exploration.Exploration,
  effects: Mapping[int, HintEffect],
  cliffs: Sequence[Example],
  rows: Sequence[int],
  *,
  questions: int,
  rounds: int,
  seed: int = 0,
) -> dict[str, Any]:
  """The figures of some cliffs, all of which went through all rounds.

  Args:
    outcome: of the rounds; every accepted candidate is in it, however many there are.
    effects: row -> what its hints do.
    cliffs: the questions by row of the outcome.
    rows: the cliffs to count, of `outcome`; the figures of none are null.
    questions: asked, of which these are the cliffs.
    rounds: B.
    seed: of the bootstrap.

  Returns:
    JSON-able counts, rates in [0, 1], nats per token, and 95 % intervals from a bootstrap over prompts, which are null
    for fewer than two prompts. `accept_rate` is cumulative: share of the prompts after 1 to B rounds.
  """
  part = exploration.Exploration(
    **{name: {row: getattr(outcome, name)[row] for row in rows} for name in ("accepted", "candidates", "hints")}
  )
  figures = exploration.exploration_metrics(part, prompts=max(1, questions), rounds=rounds, examples=cliffs)
  candidates = [part.candidates[row] for row in rows]
  found = [effects[row] for row in rows]
  positive, positive_interval = _mean(
    [[each.accurate and each.well_formed for each in row] for row in candidates], seed
  )
  gain, gain_interval = _mean([effect.gain for effect in found], seed)
  return {
    "questions": questions,
    "prompts": len(rows),
    "hints": part.hints_asked,
    "candidates": sum(map(len, candidates)),
    "accepted": sum(map(len, part.accepted.values())),
    "gain": gain,
    "gain_interval": gain_interval,
    "gain_answers": sum(effect.answers for effect in found),
    "letter_gain": _mean([effect.letter_gain for effect in found], seed)[0],
    "reliance": _mean([effect.reliance for effect in found], seed)[0],
    "answer_rate": figures.get("hint/answer_rate"),
    "leak_rate": figures.get("hint/leak_rate"),
    "quote_rate": figures.get("hint/quote_rate"),
    "parse_failure_rate": figures.get("hint/parse_failure_rate"),
    "accurate_rate": _mean([[each.accurate for each in row] for row in candidates], seed)[0],
    "format_rate": _mean([[each.well_formed for each in row] for row in candidates], seed)[0],
    "positive_rate": positive,
    "positive_rate_interval": positive_interval,
    "accept_rate": [figures[f"hint/accept_rate@{b}"] for b in range(1, rounds + 1)] if rows else None,
  }


def hint_records(
  outcome: exploration.Exploration,
  effects: Mapping[int, HintEffect],
  cliffs: Sequence[Example],
  asked: Sequence[Example],
  *,
  rounds: int,
  seed: int = 0,
) -> list[dict[str, Any]]:
  """`hint_record` of every modality, in order of name, and of "all".

  Args:
    outcome: rows 0 to n - 1 are the cliffs.
    effects: row -> what its hints do.
    cliffs: the n questions.
    asked: every question that was asked.
    rounds: B.
    seed: of the bootstrap.
  """

  def record(name: str, rows: Sequence[int], questions: int) -> dict[str, Any]:
    figures = hint_record(outcome, effects, cliffs, rows, questions=questions, rounds=rounds, seed=seed)
    return {"modality": name} | figures

  counts = collections.Counter(example.modality for example in asked)
  rows_of = {name: [i for i, example in enumerate(cliffs) if example.modality == name] for name in sorted(counts)}
  records = [record(name, rows, counts[name]) for name, rows in rows_of.items()]
  return [*records, record("all", range(len(cliffs)), len(asked))]


def _mean(values: Sequence[Any], seed: int) -> tuple[float | None, list[float] | None]:
  """Mean of figures that belong to prompts, float[...] of each, and its interval over the prompts that have any."""
  parts = [np.asarray(each, float) for each in values if len(each)]
  if not parts:
    return None, None
  joined = np.concatenate(parts)
  if len(parts) < 2:  # one prompt drawn again and again would pretend to certainty
    return float(joined.mean()), None
  clusters = np.repeat(np.arange(len(parts)), [len(each) for each in parts])
  draws = resampled_means(joined, np.random.default_rng(seed), clusters)
  return float(joined.mean()), list(percentile_interval(draws))
