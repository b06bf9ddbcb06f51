"""How good hints are: rates of the candidates sampled under them, and what they do to the student's likelihoods."""

import bisect
import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kepo_jax import exploration
from kepo_jax.config import Config
from kepo_jax.evaluation.statistics import percentile_interval, resampled_means
from kepo_jax.rewards import Scorer
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.training import setup
from kepo_jax.training.batched_model import BatchedModel
from kepo_jax.training.programs import SamplingSettings
from kepo_jax.training.rollouts import Groups
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
  """Returns the place of the token that says the letter of an answer.

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
  """Returns the metrics of some cliffs, all of which went through all rounds.

  Args:
    outcome: of the rounds; every accepted candidate is in it, however many there are.
    effects: row -> what its hints do.
    cliffs: the questions by row of the outcome.
    rows: the cliffs to count, of `outcome`; the metrics of none are null.
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
  metrics = exploration.exploration_metrics(part, prompts=max(1, questions), rounds=rounds, examples=cliffs)
  candidates = [part.candidates[row] for row in rows]
  found = [effects[row] for row in rows]
  positive, positive_interval = _mean([[one.accurate and one.well_formed for one in row] for row in candidates], seed)
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
    "answer_rate": metrics.get("hint/answer_rate"),
    "leak_rate": metrics.get("hint/leak_rate"),
    "quote_rate": metrics.get("hint/quote_rate"),
    "parse_failure_rate": metrics.get("hint/parse_failure_rate"),
    "accurate_rate": _mean([[one.accurate for one in row] for row in candidates], seed)[0],
    "format_rate": _mean([[one.well_formed for one in row] for row in candidates], seed)[0],
    "positive_rate": positive,
    "positive_rate_interval": positive_interval,
    "accept_rate": [metrics[f"hint/accept_rate@{b}"] for b in range(1, rounds + 1)] if rows else None,
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
  """Returns `hint_record` of every modality, in order of name, and of "all".

  Args:
    outcome: rows 0 to n - 1 are the cliffs.
    effects: row -> what its hints do.
    cliffs: the n questions.
    asked: every question that was asked.
    rounds: B.
    seed: of the bootstrap.
  """

  def record(name: str, rows: Sequence[int], questions: int) -> dict[str, Any]:
    metrics = hint_record(outcome, effects, cliffs, rows, questions=questions, rounds=rounds, seed=seed)
    return {"modality": name} | metrics

  counts = collections.Counter(example.modality for example in asked)
  rows_of = {name: [i for i, example in enumerate(cliffs) if example.modality == name] for name in sorted(counts)}
  records = [record(name, rows, counts[name]) for name, rows in rows_of.items()]
  return [*records, record("all", range(len(cliffs)), len(asked))]


def _mean(values: Sequence[Any], seed: int) -> tuple[float | None, list[float] | None]:
  """Averages metrics that belong to prompts, float[...] of each, and its interval over the prompts that have any."""
  parts = [np.asarray(numbers, float) for numbers in values if len(numbers)]
  if not parts:
    return None, None
  joined = np.concatenate(parts)
  if len(parts) < 2:  # one prompt drawn again and again would pretend to certainty
    return float(joined.mean()), None
  clusters = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
  draws = resampled_means(joined, np.random.default_rng(seed), clusters)
  return float(joined.mean()), list(percentile_interval(draws))


Keys = Callable[[str, int], jax.Array]  # (purpose, round) -> random key
Progress = Callable[[str, int, int], None]  # (what, done, total)


def quiet(what: str, done: int, total: int) -> None:
  """Shows no progress."""
  del what, done, total


def all_rounds(
  student: BatchedModel,
  teacher: BatchedModel,
  examples: Sequence[Example],
  keys: Keys,
  *,
  hint: SamplingSettings,
  candidate: SamplingSettings,
  hint_prompt: str,
  rounds: int,
  scorer: Scorer,
  accept: exploration.Acceptance,
  progress: Progress = quiet,
) -> exploration.Exploration:
  """Samples with hints for every question in every round, with a new hint each: no success ends it early.

  Training stops a prompt when it has its replacements, so that the prompts of its later rounds are the hard ones; here
  rates are the same in expectation in every round. When a prompt has its first accepted candidate is the same in both.

  Args:
    student: samples candidates.
    teacher: writes hints.
    examples: the questions, in the order of the rows of the outcome.
    keys: of "hint" and "candidate" in a round, from 1.
    hint: how the teacher is sampled, one sample per question.
    candidate: how the student is sampled.
    hint_prompt: "hint_and_answer" or "hint_only".
    rounds: B.
    scorer: judges candidates.
    accept: which of them count as accepted.
    progress: is told how far each round has come.
  """

  def ask_hints(rows: Sequence[int], attempt: int) -> list[str]:
    asked = [examples[row] for row in rows]
    tell = functools.partial(progress, f"hints of round {attempt}")
    written = teacher.rollouts(asked, "hint_request", hint, keys("hint", attempt), progress=tell)
    return rollouts_lib.texts_of(teacher.processor, written, prompts=len(rows))[:, 0].tolist()

  def sample_hinted(rows: Sequence[int], hints: Sequence[str], attempt: int) -> list[list[exploration.Candidate]]:
    asked = [examples[row] for row in rows]
    tell = functools.partial(progress, f"candidates of round {attempt}")
    key = keys("candidate", attempt)
    rollouts = student.rollouts(asked, hint_prompt, candidate, key, hints=hints, progress=tell)
    return rollouts_lib.to_candidates(rollouts_lib.scored_groups(student.processor, scorer, asked, rollouts), hints)

  enough = rounds * candidate.samples + 1  # more than there can be
  return exploration.explore(
    range(len(examples)), ask_hints, sample_hinted, rounds=rounds, replacements=enough, accept=accept
  )


def reliances(
  student: BatchedModel,
  examples: Sequence[Example],
  outcome: exploration.Exploration,
  *,
  kind: str,
  hint_prompt: str,
  temperature: float,
  progress: Progress = quiet,
) -> list[np.ndarray]:
  """Computes log pi(y | x, h) - log pi(y | x) of the tokens of accepted candidates: float32[n], nats, per question.

  Args:
    student: scores both, given the whole text before each token.
    examples: the questions, in the order of the rows of the outcome.
    outcome: of the rounds.
    kind: wording of the prompt without a hint.
    hint_prompt: wording of the one with it.
    temperature: divides the logits.
    progress: is told how far this has come.
  """
  found: list[list[np.ndarray]] = [[] for _ in examples]
  accepted = {id(candidate) for row in outcome.accepted.values() for candidate in row}
  tried = [  # those of a question and a round share their prompt
    (row, list(group))
    for row, candidates in outcome.candidates.items()
    for _, group in itertools.groupby(candidates, key=lambda candidate: candidate.attempt)
  ]
  tried = [(row, group) for row, group in tried if any(id(candidate) in accepted for candidate in group)]
  if tried:
    tokens = np.stack([[candidate.tokens for candidate in group] for _, group in tried])
    asked, hints = [examples[row] for row, _ in tried], [group[0].hint for _, group in tried]
    score = functools.partial(student.logps, asked, tokens=tokens, temperature=temperature)
    given = score(hint_prompt, hints=hints, progress=functools.partial(progress, "candidates scored with hints"))
    without = score(kind, progress=functools.partial(progress, "and without"))
    for (row, group), difference in zip(tried, given - without, strict=True):
      found[row] += [difference[i][candidate.mask] for i, candidate in enumerate(group) if id(candidate) in accepted]
  return [np.concatenate(parts) if parts else np.zeros(0, np.float32) for parts in found]


def gains(
  student: BatchedModel,
  answers: Groups,
  outcome: exploration.Exploration,
  *,
  kind: str,
  hint_prompt: str,
  temperature: float,
  progress: Progress = quiet,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Measures the effect of hints on answers that were written without them: (rows, values) for each question.

  Args:
    student: scores the answers, given the whole text before each token.
    answers: of the teacher to the questions, in the order of the rows of the outcome; those that the reward refuses
      are left out, and so is a question none of whose hints could be parsed.
    outcome: of the rounds.
    kind: wording of the prompt without a hint.
    hint_prompt: wording of the one with it.
    temperature: divides the logits.
    progress: is told how far this has come.

  Returns:
    int[k], which of the G answers they are, and float32[k, T], nats: log pi(y | x, h) - log pi(y | x) of each token, a
    mean over the question's hints. Values of padding mean nothing.
  """
  right = rollouts_lib.accepted_answers(answers)
  hints = [[hint for text in outcome.hints[row] if (hint := exploration.parse_hint(text))] for row in range(len(right))]
  rows = [row for row in range(len(right)) if right[row].any() and hints[row]]
  found = [(np.zeros(0, int), np.zeros((0, answers.tokens.shape[2]), np.float32))] * len(right)
  if not rows:
    return found
  score = functools.partial(student.logps, temperature=temperature)
  pairs = [(row, hint) for row in rows for hint in hints[row]]
  given = score(
    [answers.examples[row] for row, _ in pairs],
    hint_prompt,
    answers.tokens[[row for row, _ in pairs]],
    hints=[hint for _, hint in pairs],
    progress=functools.partial(progress, "teacher's answers scored with hints"),
  )
  tell = functools.partial(progress, "and without any")
  without = score([answers.examples[row] for row in rows], kind, answers.tokens[rows], progress=tell)
  owners = np.array([row for row, _ in pairs])
  for row, plain in zip(rows, without, strict=True):
    kept = np.flatnonzero(right[row])
    found[row] = kept, (given[owners == row].mean(axis=0) - plain)[kept]
  return found


def effects(
  processor: Any, answers: Groups, gained: Sequence[tuple[np.ndarray, np.ndarray]], relied: Sequence[np.ndarray]
) -> dict[int, HintEffect]:
  """Row -> what its hints do, from `gains` and `reliances` of its question; `processor` decodes the answers."""
  found = {}
  for row, ((numbers, values), reliance) in enumerate(zip(gained, relied, strict=True)):
    masks = answers.mask[row, numbers]
    said = [answers.tokens[row, number][mask] for number, mask in zip(numbers, masks, strict=True)]
    places = [letter_place(ids, functools.partial(_text, processor)) for ids in said]
    found[row] = HintEffect(
      reliance=reliance,
      gain=values[masks],
      letter_gain=np.array([values[i, t] for i, t in enumerate(places) if t is not None], np.float32),
      answers=len(numbers),
    )
  return found


def _text(processor: Any, tokens: np.ndarray) -> str:
  return processor.decode(tokens[None], np.ones((1, len(tokens)), bool))[0]


def measured(
  config: Config,
  student: BatchedModel,
  teacher: BatchedModel,
  examples: Sequence[Example],
  *,
  progress: Progress = quiet,
) -> list[dict[str, Any]]:
  """Returns `hint_records` of a student's cliffs: sampled, hinted at in all rounds, and scored.

  Random numbers are those of the first step of a run with this config.

  Args:
    config: of such a run: its seed, prompts, sampling, reward and exploration are used, `batch.rollouts` for the
      student's rollouts and the teacher's answers alike, and `supervised.temperature`.
    student: of the run.
    teacher: of the run.
    examples: the questions.
    progress: is told how far each part has come.
  """
  explored, sampled = config.exploration, config.sampling
  scorer = setup.make_scorer(config, {})
  policy = (sampled.max_new_tokens, sampled.temperature, sampled.top_p, sampled.top_k)
  scoring: dict[str, Any] = {
    "hint_prompt": explored.hint_prompt,
    "temperature": sampled.temperature,
    "progress": progress,
  }

  def key(purpose: str, *counters: int) -> jax.Array:
    return setup.random_key(config.seed, purpose, 0, *counters)

  def asked(model: BatchedModel, which: Sequence[Example], what: str, settings: SamplingSettings) -> Groups:
    tell = functools.partial(progress, f"{what}s")
    rollouts = model.rollouts(which, config.data.prompt, settings, key(what), progress=tell)
    return rollouts_lib.scored_groups(model.processor, scorer, which, rollouts)

  groups = asked(student, examples, "rollout", SamplingSettings(config.batch.rollouts, *policy))
  failed = exploration.triggered(groups.scores["accuracy"], groups.scores["total"], explored.trigger)
  cliffs = [examples[row] for row in failed]
  outcome = all_rounds(
    student,
    teacher,
    cliffs,
    key,
    hint=SamplingSettings(1, explored.hint_tokens, explored.hint_temperature),
    candidate=SamplingSettings(config.candidates, *policy),
    hint_prompt=explored.hint_prompt,
    rounds=explored.rounds,
    scorer=scorer,
    accept=exploration.Acceptance(explored.acceptance, explored.leak_filter),
    progress=progress,
  )
  found: dict[int, HintEffect] = {}
  if cliffs:
    settings = SamplingSettings(config.batch.rollouts, sampled.max_new_tokens, config.supervised.temperature)
    answers = asked(teacher, cliffs, "answer", settings)
    relied = reliances(student, cliffs, outcome, kind=config.data.prompt, **scoring)
    gained = gains(student, answers, outcome, kind=config.data.prompt, **scoring)
    found = effects(student.processor, answers, gained, relied)
  return hint_records(outcome, found, cliffs, examples, rounds=explored.rounds, seed=config.seed)
