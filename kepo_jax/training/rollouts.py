"""Groups of rollouts on the host: decoded, scored, injected into, and joined for the update."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from kepo_jax import exploration, multihost, rewards, sharding
from kepo_jax.types import Example, Experience, Prompts, Rollouts


@dataclasses.dataclass
class Groups:
  """The rollouts of one step; accepted candidates replace rows in place."""

  examples: Sequence[Example]
  tokens: np.ndarray  # int32[P, G, T]
  mask: np.ndarray  # bool[P, G, T]
  logps: np.ndarray  # float32[P, G, T], the sampler's
  texts: np.ndarray  # object[P, G], str
  scores: dict[str, np.ndarray]  # reward name -> float32[P, G]; "total" combines them
  injected: np.ndarray  # bool[P, G]
  supervised: np.ndarray  # bool[P, G], rows that the student did not sample
  hints: np.ndarray  # object[P, G], str, "" for rollouts without


_ARRAYS = ("tokens", "mask", "logps", "texts", "injected", "supervised", "hints")


def on_host(rollouts: Rollouts) -> Rollouts:
  """Returns rollouts as arrays of this host, which may be written to; waits until they are sampled."""
  return jax.tree.map(lambda x: np.array(sharding.to_host(x)), rollouts)


def texts_of(processor: Any, rollouts: Rollouts, *, prompts: int) -> np.ndarray:
  """Decodes the first prompts of rollouts [P, G, T] on the host, each on the process that owns it.

  Returns:
    object[prompts, G], str.

  Raises:
    OSError: another process of the run has failed.
  """

  def decode(prompt: int, numbers: Sequence[int]) -> list[str]:
    return processor.decode(rollouts.tokens[prompt, numbers], rollouts.mask[prompt, numbers])

  return multihost.gather_from_owners(rollouts.tokens.shape[:2], prompts, decode)


def scored_groups(processor: Any, scorer: rewards.Scorer, examples: Sequence[Example], rollouts: Rollouts) -> Groups:
  """Fetches rollouts to the host, and decodes and scores each on the process that owns it.

  Args:
    processor: decodes tokens.
    scorer: every reward of the run.
    examples: at most P questions; rollouts of later prompts are padding.
    rollouts: [P, G, T] as sampled or given.

  Returns:
    groups of the questions, without the padding.

  Raises:
    ValueError: a reward is not a finite number.
    OSError: another process of the run has failed.
  """
  host: Any = on_host(rollouts)

  def read(prompt: int, numbers: Sequence[int]) -> list[tuple[str, dict[str, float]]]:
    texts = processor.decode(host.tokens[prompt, numbers], host.mask[prompt, numbers])
    scores = scorer([texts], [examples[prompt]])
    rows = [{name: float(values[0, i]) for name, values in scores.items()} for i in range(len(texts))]
    return list(zip(texts, rows, strict=True))

  count = len(examples)
  scored = multihost.gather_from_owners(host.tokens.shape[:2], count, read)

  def array(values: Iterable[Any], dtype: Any) -> np.ndarray:
    return np.array(list(values), dtype).reshape(scored.shape)

  return Groups(
    examples=examples,
    tokens=host.tokens[:count],
    mask=host.mask[:count],
    logps=host.logps[:count],
    texts=array((text for text, _ in scored.flat), object),
    scores={name: array((scores[name] for _, scores in scored.flat), np.float32) for name in scored[0, 0][1]},
    injected=np.zeros(scored.shape, bool),
    supervised=np.zeros(scored.shape, bool),
    hints=np.full(scored.shape, "", object),
  )


def accepted_answers(groups: Groups) -> np.ndarray:
  """Returns bool[P, G]: accurate and well-formed completions, the only ones of a teacher that are learnt."""
  return (groups.scores["accuracy"] == 1) & (groups.scores["format"] == 1)


def supervised_groups(groups: Groups, *, accepted: np.ndarray | None = None) -> Groups:
  """Marks groups as not sampled by the student.

  Args:
    groups: from `scored_groups`.
    accepted: bool[P, G], rows that are kept; the others become empty. None keeps all.
  """
  mask = groups.mask if accepted is None else groups.mask & accepted[..., None]
  return dataclasses.replace(groups, mask=mask, supervised=np.ones_like(groups.supervised))


def given_rollouts(processor: Any, texts: Sequence[str], rows: int, length: int) -> Rollouts:
  """Encodes written completions as Rollouts [P, rows, T], each repeated; log-probs are 0.

  Args:
    processor: encodes texts.
    texts: one per question.
    rows: G, per question.
    length: T.

  Raises:
    ValueError: a text is longer than T tokens.
  """
  tokens, mask = (np.repeat(x[:, None], rows, axis=1) for x in processor.completions(texts, length))
  return Rollouts(tokens=tokens, mask=mask, logps=np.zeros(tokens.shape, np.float32))


def joined(first: Groups, second: Groups, *, axis: int) -> Groups:
  """Concatenates groups: axis 0 adds prompts, axis 1 adds rollouts to each group."""
  return Groups(
    examples=first.examples if axis else [*first.examples, *second.examples],
    scores={name: np.concatenate([first.scores[name], second.scores[name]], axis) for name in first.scores},
    **{name: np.concatenate([getattr(first, name), getattr(second, name)], axis) for name in _ARRAYS},
  )


def selected(groups: Groups, rows: Sequence[int]) -> Groups:
  """Returns the groups of some prompts."""
  rows = list(rows)
  return Groups(
    examples=[groups.examples[row] for row in rows],
    scores={name: values[rows] for name, values in groups.scores.items()},
    **{name: getattr(groups, name)[rows] for name in _ARRAYS},
  )


def has_signal(groups: Groups) -> np.ndarray:
  """Returns bool[P]: groups whose rewards are not all exactly equal."""
  total = groups.scores["total"]
  return (total != total[:, :1]).any(axis=1)


def inject(groups: Groups, injections: Sequence[tuple[int, int, exploration.Candidate]]) -> None:
  """Replaces rollouts by accepted candidates, with their scores."""
  for row, slot, candidate in injections:
    for name in ("tokens", "mask", "logps"):
      getattr(groups, name)[row, slot] = getattr(candidate, name)
    for name, value in candidate.scores.items():
      groups.scores[name][row, slot] = value
    groups.texts[row, slot] = candidate.text
    groups.hints[row, slot] = candidate.hint
    groups.injected[row, slot] = True


def to_candidates(groups: Groups, hints: Sequence[str]) -> list[list[exploration.Candidate]]:
  """Converts scored groups, sampled under one hint per question, to candidates per question."""

  def candidate(p: int, m: int) -> exploration.Candidate:
    scores = {name: float(values[p, m]) for name, values in groups.scores.items()}
    return exploration.Candidate(
      tokens=groups.tokens[p, m],
      logps=groups.logps[p, m],
      mask=groups.mask[p, m],
      text=groups.texts[p, m],
      hint=hints[p],
      accurate=scores["accuracy"] == 1,
      well_formed=scores["format"] == 1,
      scores=scores,
    )

  return [[candidate(p, m) for m in range(groups.tokens.shape[1])] for p in range(len(groups.examples))]


def truncated(groups: Groups, end_ids: Sequence[int]) -> np.ndarray:
  """Returns bool[P, G]: rollouts of the student without an end token."""
  ended = (np.isin(groups.tokens, end_ids) & groups.mask).any(axis=2)
  return ~ended & ~groups.supervised


def make_experience(
  groups: Groups,
  prompts: Prompts,
  advantages: ArrayLike,
  gate: ArrayLike,
  *,
  kept: np.ndarray,
) -> Experience:
  """Builds the batch of one update on the host; `types.Experience` documents the arguments."""
  return Experience(
    prompts=prompts,
    tokens=groups.tokens,
    mask=groups.mask,
    logps=groups.logps,
    advantages=np.asarray(advantages, np.float32),
    gate=np.asarray(gate, bool),
    injected=groups.injected,
    supervised=groups.supervised,
    kept=kept,
  )
