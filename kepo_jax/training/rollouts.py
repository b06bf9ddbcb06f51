"""Groups of rollouts on the host: decoded, rewarded, explored, and put together for the update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
  scores: dict[str, np.ndarray]  # reward name -> float32[P, G]; "total" is what they are together
  injected: np.ndarray  # bool[P, G]
  supervised: np.ndarray  # bool[P, G], rows that the student did not sample
  hints: np.ndarray  # object[P, G], str, "" for rollouts without


_ARRAYS = ("tokens", "mask", "logps", "texts", "injected", "supervised", "hints")


def texts_of(processor: Any, rollouts: Rollouts, *, prompts: int) -> np.ndarray:
  """Texts object[prompts, G] of the first prompts of some rollouts [P, G, T], each decoded by the host that holds it.

  Raises:
    OSError: another process of the run has failed.
  """
  tokens, mask, _ = _arrays(rollouts)
  return multihost.by_holders(tokens.shape[:2], prompts, _decoder(processor, tokens, mask))


def _arrays(rollouts: Rollouts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, mask and log-probs [P, G, T] on the host."""
  host = on_host(rollouts)
  return np.asarray(host.tokens), np.asarray(host.mask), np.asarray(host.logps)


def _decoder(processor: Any, tokens: np.ndarray, mask: np.ndarray) -> Callable[[int, Sequence[int]], list[str]]:
  """The function (prompt, rollouts of it) -> their texts."""
  return lambda prompt, slots: processor.decode(tokens[prompt, slots], mask[prompt, slots])


def on_host(rollouts: Rollouts) -> Rollouts:
  """Rollouts as arrays of this host, which may be written to; waits until they are sampled."""
  return jax.tree.map(lambda x: np.array(sharding.to_host(x)), rollouts)


def scored_groups(processor: Any, examples: Sequence[Example], rollouts: Rollouts, scorer: rewards.Scorer) -> Groups:
  """Rollouts fetched to the host, decoded, and scored by every reward function, each by the host that holds it.

  Args:
    processor: decodes tokens.
    examples: the P questions.
    rollouts: [P, G, T] as sampled or given.
    scorer: of the run.

  Raises:
    ValueError: a reward is not a finite number.
    OSError: another process of the run has failed.
  """
  tokens, mask, logps = _arrays(rollouts)
  texts = _decoder(processor, tokens, mask)

  def read(prompt: int, slots: Sequence[int]) -> list[tuple[str, dict[str, float]]]:
    said = texts(prompt, slots)
    return list(zip(said, _scored(scorer, said, examples[prompt]), strict=True))

  rows = tokens.shape[:2]
  found = multihost.by_holders(rows, len(examples), read)
  return Groups(
    examples=examples,
    tokens=tokens,
    mask=mask,
    logps=logps,
    texts=_each(lambda text, scores: text, found, object),
    scores={name: _each(lambda text, scores, name=name: scores[name], found, np.float32) for name in found[0, 0][1]},
    injected=np.zeros(rows, bool),
    supervised=np.zeros(rows, bool),
    hints=np.full(rows, "", object),
  )


def _scored(scorer: rewards.Scorer, texts: Sequence[str], example: Example) -> list[dict[str, float]]:
  """Reward name -> value, the total among them, of each of some completions of a question."""
  scores = scorer([texts], [example])
  return [{name: float(values[0, i]) for name, values in scores.items()} for i in range(len(texts))]


def _each(function: Callable[..., Any], found: np.ndarray, dtype: Any) -> np.ndarray:
  """function(*each) of each element of object[P, G]."""
  return np.array([[function(*each) for each in row] for row in found], dtype).reshape(found.shape)


def accepted_answers(groups: Groups) -> np.ndarray:
  """bool[P, G]: accurate and well-formed completions, which is what the reward accepts of a teacher's."""
  return (groups.scores["accuracy"] == 1) & (groups.scores["format"] == 1)


def supervised_groups(groups: Groups, *, accepted: np.ndarray | None = None) -> Groups:
  """Groups that somebody else than the student wrote.

  Args:
    groups: as `scored_groups` gives them.
    accepted: bool[P, G], rows that are kept; the others become empty. None keeps all.
  """
  mask = groups.mask if accepted is None else groups.mask & accepted[..., None]
  return dataclasses.replace(groups, mask=mask, supervised=np.ones_like(groups.supervised))


def given_rollouts(processor: Any, texts: Sequence[str], rows: int, length: int) -> Rollouts:
  """Completions that were written, not sampled, as Rollouts [P, rows, T], each repeated; log-probs are 0.

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
  """Two sets of groups as one: axis 0 puts more prompts behind the others, axis 1 more rollouts into each group."""
  return Groups(
    examples=first.examples if axis else [*first.examples, *second.examples],
    scores={name: np.concatenate([first.scores[name], second.scores[name]], axis) for name in first.scores},
    **{name: np.concatenate([getattr(first, name), getattr(second, name)], axis) for name in _ARRAYS},
  )


def selected(groups: Groups, rows: Sequence[int]) -> Groups:
  """The groups of some prompts."""
  rows = list(rows)
  return Groups(
    examples=[groups.examples[row] for row in rows],
    scores={name: values[rows] for name, values in groups.scores.items()},
    **{name: getattr(groups, name)[rows] for name in _ARRAYS},
  )


def has_signal(groups: Groups) -> np.ndarray:
  """bool[P]: groups whose rewards are not all equal, by exact equality."""
  total = groups.scores["total"]
  return (total != total[:, :1]).any(axis=1)


def inject(groups: Groups, placed: Sequence[exploration.Injection]) -> None:
  """Puts accepted candidates in their slots, with their scores."""
  for injection in placed:
    row, slot, candidate = injection.prompt, injection.slot, injection.candidate
    for name in ("tokens", "mask", "logps"):
      getattr(groups, name)[row, slot] = getattr(candidate, name)
    for name, value in candidate.scores.items():
      groups.scores[name][row, slot] = value
    groups.texts[row, slot] = candidate.text
    groups.hints[row, slot] = candidate.hint
    groups.injected[row, slot] = True


def candidates(
  processor: Any, examples: Sequence[Example], hints: Sequence[str], rollouts: Rollouts, scorer: rewards.Scorer
) -> list[list[exploration.Candidate]]:
  """Hinted rollouts [P, M, T] as scored candidates per question, each scored by the host that holds it.

  Args:
    processor: decodes tokens.
    examples: questions, at most P; rows beyond them are padding.
    hints: one per question.
    rollouts: as sampled under them.
    scorer: of the run.

  Raises:
    ValueError: a reward is not a finite number.
    OSError: another process of the run has failed.
  """
  groups = scored_groups(processor, examples, rollouts, scorer)

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

  return [[candidate(p, m) for m in range(groups.tokens.shape[1])] for p in range(len(examples))]


GATE_SIGNALS: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
  "accuracy": lambda scores: scores["accuracy"],
  "mean": lambda scores: (scores["accuracy"] + scores["format"]) / 2,
  "sum": lambda scores: scores["accuracy"] + scores["format"],
  "product": lambda scores: scores["accuracy"] * scores["format"],
}


def gate_signal(scores: Mapping[str, np.ndarray], signal: str) -> np.ndarray:
  """Quality of each rollout that the gate looks at: float32[P, G].

  Args:
    scores: must hold "accuracy" and "format".
    signal: "accuracy", or "mean", "sum" or "product" of accuracy and format.

  Raises:
    ValueError: the signal is none of these.
  """
  if signal not in GATE_SIGNALS:
    raise ValueError(f"objective.gate_signal={signal!r} is unknown; use one of {sorted(GATE_SIGNALS)}.")
  return GATE_SIGNALS[signal](scores)


def truncated(groups: Groups, end_ids: Sequence[int]) -> np.ndarray:
  """bool[P, G]: rollouts of the student without an end token."""
  ended = (np.isin(groups.tokens, end_ids) & groups.mask).any(axis=2)
  return ~ended & ~groups.supervised


def experience(
  groups: Groups,
  prompts: Prompts,
  advantages: ArrayLike,
  gate: ArrayLike,
  *,
  kept: np.ndarray,
) -> Experience:
  """The batch of one update, on the host; every row of `Experience` as documented there."""
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
