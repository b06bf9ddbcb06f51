"""Groups of rollouts on the host: decoded, rewarded, explored, and put together for the update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kepo_jax import exploration, sharding
from kepo_jax import rewards as scoring
from kepo_jax.types import Example, Experience, Prompts, Rollouts

WeightedRewards = Mapping[str, tuple[scoring.Reward, float]]  # name -> (function, weight in the advantage)


@dataclasses.dataclass
class Groups:
  """The rollouts of one step; accepted candidates replace rows in place."""

  examples: Sequence[Example]
  prompts: Prompts  # on the host
  tokens: np.ndarray  # int32[P, G, T]
  mask: np.ndarray  # bool[P, G, T]
  logps: np.ndarray  # float32[P, G, T], the sampler's
  texts: list[list[str]]  # [P][G]
  scores: dict[str, np.ndarray]  # reward name -> float32[P, G]; "total" is their weighted sum
  injected: np.ndarray  # bool[P, G]
  hints: list[list[str]]  # [P][G], "" for the student's own rollouts


def decode(processor: Any, rollouts: Rollouts) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list[str]]]:
  """Tokens, mask and log-probs [P, G, T] of rollouts on the host, and their texts [P][G]."""
  tokens, mask, logps = (np.array(sharding.to_host(x)) for x in (rollouts.tokens, rollouts.mask, rollouts.logps))
  return tokens, mask, logps, [processor.decode(*row) for row in zip(tokens, mask, strict=True)]


def scored_groups(
  processor: Any,
  examples: Sequence[Example],
  prompts: Prompts,
  rollouts: Rollouts,
  rewards: WeightedRewards,
) -> Groups:
  """Rollouts fetched to the host, decoded, and scored by every reward function.

  Args:
    processor: decodes tokens.
    examples: the P questions.
    prompts: their prompts, on the host.
    rollouts: [P, G, T] as sampled.
    rewards: name -> (function of (completion, example), weight).
  """
  tokens, mask, logps, texts = decode(processor, rollouts)
  return Groups(
    examples=examples,
    prompts=prompts,
    tokens=tokens,
    mask=mask,
    logps=logps,
    texts=texts,
    scores=score(texts, examples, rewards),
    injected=np.zeros(tokens.shape[:2], bool),
    hints=[[""] * tokens.shape[1] for _ in examples],
  )


def score(
  texts: Sequence[Sequence[str]], examples: Sequence[Example], rewards: WeightedRewards
) -> dict[str, np.ndarray]:
  """Every reward of every text [P][G], and their weighted sum "total", as float32[P, G]."""
  functions = {name: function for name, (function, _) in rewards.items()}
  weights = {name: weight for name, (_, weight) in rewards.items()}
  scores = scoring.score(texts, examples, functions, weights)
  return {name: np.array(values, np.float32) for name, values in scores.items()}


def inject(groups: Groups, placed: Sequence[exploration.Injection], rewards: WeightedRewards) -> None:
  """Puts accepted candidates in their slots and scores those rows again."""
  for injection in placed:
    row, slot, candidate = injection.prompt, injection.slot, injection.candidate
    groups.tokens[row, slot] = candidate.tokens
    groups.mask[row, slot] = candidate.mask
    groups.logps[row, slot] = candidate.logps
    groups.texts[row][slot] = candidate.text
    groups.hints[row][slot] = candidate.hint
    groups.injected[row, slot] = True
    for name, value in score([[candidate.text]], [groups.examples[row]], rewards).items():
      groups.scores[name][row, slot] = value[0, 0]


def candidates(
  processor: Any,
  examples: Sequence[Example],
  hints: Sequence[str],
  rollouts: Rollouts,
  rewards: WeightedRewards,
) -> list[list[exploration.Candidate]]:
  """Hinted rollouts [P, M, T] as candidates per question; rows beyond the questions are padding."""
  tokens, mask, logps, texts = decode(processor, rollouts)
  accuracy, well_formed = rewards["accuracy"][0], rewards["format"][0]
  return [
    [
      exploration.Candidate(
        tokens=tokens[p, m],
        logps=logps[p, m],
        mask=mask[p, m],
        text=texts[p][m],
        hint=hint,
        accurate=accuracy(texts[p][m], example) == 1,
        well_formed=well_formed(texts[p][m], example) == 1,
      )
      for m in range(tokens.shape[1])
    ]
    for p, (example, hint) in enumerate(zip(examples, hints, strict=True))
  ]


def gate_signal(scores: Mapping[str, np.ndarray], signal: str) -> np.ndarray:
  """Quality of each rollout that the gate looks at: float32[P, G].

  Args:
    scores: must hold "accuracy" and "format".
    signal: "accuracy", or "mean" or "sum" of accuracy and format.

  Raises:
    ValueError: the signal is none of these.
  """
  signals = {
    "accuracy": lambda: scores["accuracy"],
    "mean": lambda: (scores["accuracy"] + scores["format"]) / 2,
    "sum": lambda: scores["accuracy"] + scores["format"],
  }
  if signal not in signals:
    raise ValueError(f"objective.gate_signal={signal!r} is unknown; use one of {sorted(signals)}.")
  return signals[signal]()


def reward_metrics(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
  """The student's own figures, before injection: rewards, cliffs and groups without a signal."""
  total = scores["total"]
  dead = (total == total[:, :1]).all(axis=1)  # exact equality: a small std is not a dead group
  right = dead & (scores["accuracy"] > 0).all(axis=1)
  wrong = dead & (scores["accuracy"] == 0).all(axis=1)
  figures = {f"reward/{name}": float(values.mean()) for name, values in scores.items() if name != "total"}
  return figures | {
    "reward/mean": float(total.mean()),
    "cliff_rate": float((scores["accuracy"] == 0).all(axis=1).mean()),
    "dead_group_rate": float(dead.mean()),
    "dead_group_rate/right": float(right.mean()),
    "dead_group_rate/wrong": float(wrong.mean()),
  }


def mixed_metrics(groups: Groups, gate: np.ndarray, end_ids: Sequence[int]) -> dict[str, float]:
  """Figures of the mixed group, after injection; a completion without an end token was truncated."""
  lengths = groups.mask.sum(axis=2)
  ended = (np.isin(groups.tokens, end_ids) & groups.mask).any(axis=2)
  figures = {
    "injected_frac": float(groups.injected.mean()),
    "gate/frac": float(gate.mean()),
    "gate/token_frac": float((gate * lengths).sum() / max(1, lengths.sum())),
    "completion/length": float(lengths.mean()),
    "completion/truncated_frac": float(1 - ended.mean()),
  }
  if groups.injected.any():
    figures["injected/reward_mean"] = float(groups.scores["total"].mean())
  if gate.any():
    figures["gate/wrong_share"] = float((groups.scores["accuracy"] == 0)[gate].mean())
  return figures


def sample_records(
  groups: Groups, gate: np.ndarray, *, step: int, prompts: int, problem: Callable[[Example], str]
) -> tuple[dict[str, Any], ...]:
  """The rollouts of the first prompts of the batch as JSON-able records."""
  return tuple(
    {
      "step": step,
      "id": example.id,
      "modality": example.modality,
      "question_type": example.question_type,
      "images": list(example.images),
      "prompt": problem(example),
      "question": example.question,
      "options": list(example.options),
      "answer": example.answer,
      "rollout": g,
      "completion": groups.texts[p][g],
      "rewards": {name: float(values[p, g]) for name, values in groups.scores.items() if name != "total"},
      "reward": float(groups.scores["total"][p, g]),
      "gate": bool(gate[p, g]),
      "injected": bool(groups.injected[p, g]),
      "hint": groups.hints[p][g],
    }
    for p, example in enumerate(groups.examples[:prompts])
    for g in range(groups.tokens.shape[1])
  )


def experience(groups: Groups, advantages: ArrayLike, gate: ArrayLike) -> Experience:
  """The batch of one update, on the host."""
  return Experience(
    prompts=groups.prompts,
    tokens=groups.tokens,
    mask=groups.mask,
    logps=groups.logps,
    advantages=np.asarray(advantages, np.float32),
    gate=np.asarray(gate, bool),
    injected=groups.injected,
  )
