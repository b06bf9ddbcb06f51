"""Hierarchical bootstrap over seeds and questions, for trainings that were repeated with several seeds.

Every seed answers the same questions, so the design is crossed: seeds and images are drawn with replacement,
independently of each other (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007), images inside
their modality, questions about one image together. One draw serves all methods, which makes differences paired. What
such a bootstrap does to the variance of a mean over S seeds and N questions with effects of seed (a), question (b) and
both (e) is known: E = var_a (S-1)/S^2 + var_b (N-1)/N^2 + about 3 var_e / (S N). The factor of three errs on the safe
side. (S-1)/S and the normal tails do not with a handful of seeds: draws are therefore moved away from the mean over
seeds by `widening` (Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69, 2015),
which gives them the spread of Student's t with S - 1 degrees of freedom.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kepo_jax.evaluation import statistics

# 0.975 quantiles of Student's t for 1 to 9 degrees of freedom.
_T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
_CHUNK = 500  # draws whose sums exist at one time
Answers = Mapping[int | None, np.ndarray]  # seed, None of a model that was not trained -> bool[n]


@dataclasses.dataclass(frozen=True)
class Design:
  """Which questions count for which statistic: the unweighted mean of the accuracies of some groups of questions."""

  names: tuple[str, ...]  # of the statistics: in_domain, out_of_domain, .., modalities/CT, .., question_types/..
  members: np.ndarray  # bool[groups, n]
  mixing: np.ndarray  # float32[names, groups], rows add up to 1
  clusters: np.ndarray  # int[n], numbered through modality by modality
  strata: tuple[int, ...]  # clusters of each modality


def design(items: Mapping[str, Any]) -> Design:
  """The statistics of a benchmark.

  `in_domain` is the accuracy on the training modality; `out_of_domain` the unweighted mean over the other modalities,
  `out_of_domain_seen` that without the unseen ones, `unseen` that of the unseen ones; `overall` that of all questions.
  Statistics without a question are left out.

  Args:
    items: the record of items.json: `modalities` and `question_types` (names), `modality`, `question_type` and `image`
      (int per question), `train_modality` and `unseen` (names).
  """
  modality, kind = np.asarray(items["modality"]), np.asarray(items["question_type"])
  modalities, kinds = list(items["modalities"]), list(items["question_types"])
  groups = {f"modalities/{name}": modality == i for i, name in enumerate(modalities)}
  groups |= {f"question_types/{name}": kind == i for i, name in enumerate(kinds)}
  groups = {name: found for name, found in groups.items() if found.any()} | {"overall": np.ones(len(modality), bool)}
  others = [name for name in modalities if name != items["train_modality"]]
  means = {
    "in_domain": [items["train_modality"]],
    "out_of_domain": others,
    "out_of_domain_seen": [name for name in others if name not in items["unseen"]],
    "unseen": [name for name in others if name in items["unseen"]],
  }
  parts = {name: [f"modalities/{each}" for each in found] for name, found in means.items()}
  parts = {name: [each for each in found if each in groups] for name, found in parts.items()}
  parts = {name: found for name, found in parts.items() if found} | {name: [name] for name in groups}
  mixing = np.array([[(name in found) / len(found) for name in groups] for found in parts.values()], np.float32)
  clusters, strata = _clusters(modality, np.asarray(items["image"]))
  return Design(tuple(parts), np.array(list(groups.values())), mixing, clusters, strata)


def _clusters(modality: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
  pairs, clusters = np.unique(np.stack([modality, image], axis=1), axis=0, return_inverse=True)
  return clusters.ravel(), tuple(np.unique(pairs[:, 0], return_counts=True)[1].tolist())


def points(answers: np.ndarray, plan: Design) -> np.ndarray:
  """float64[rows, statistics] of answers [rows, n]: right or wrong, or any figure per question."""
  members = plan.members.astype(float)
  return (np.asarray(answers, float) @ members.T / members.sum(axis=1)) @ plan.mixing.T.astype(float)


def cluster_counts(plan: Design, *, resamples: int, seed: int) -> Iterator[np.ndarray]:
  """How often each cluster is drawn, float32[up to 500, clusters] at a time: as many of each modality as it has."""
  rng = np.random.default_rng([0, seed])
  for start in range(0, resamples, _CHUNK):
    rows = min(_CHUNK, resamples - start)
    drawn = [_counts(rng.integers(size, size=(rows, size)), size) for size in plan.strata]
    yield np.concatenate(drawn, axis=1).astype(np.float32)


def _counts(picked: np.ndarray, size: int) -> np.ndarray:
  places = picked + size * np.arange(len(picked))[:, None]
  return np.bincount(places.ravel(), minlength=len(picked) * size).reshape(-1, size)


def item_draws(
  answers: np.ndarray, plan: Design, *, resamples: int = statistics.RESAMPLES, seed: int = 0
) -> np.ndarray:
  """Statistics of each row of answers under resampled questions, the same draws for all rows.

  Args:
    answers: bool or float[rows, n], a row per training.
    plan: of `design`.
    resamples: R.
    seed: of the draws.

  Returns:
    float32[R, rows, statistics]; nan where a draw holds no question of a question type.
  """
  rows, groups = len(answers), len(plan.members)
  each = np.asarray(answers, np.float32).T[:, :, None] * plan.members.T[:, None, :]  # [n, rows, groups]
  each = np.concatenate([each.reshape(len(each), -1), plan.members.T], axis=1, dtype=np.float32)
  order = np.argsort(plan.clusters, kind="stable")
  table = np.add.reduceat(each[order], np.searchsorted(plan.clusters[order], np.arange(sum(plan.strata))), axis=0)
  found = []
  for counts in cluster_counts(plan, resamples=resamples, seed=seed):
    sums = counts @ table  # of right answers exact in float32: they are whole numbers
    with np.errstate(invalid="ignore"):
      means = sums[:, : rows * groups].reshape(-1, rows, groups) / sums[:, None, rows * groups :]
      # A group without a question must not spoil the statistics that do not use it.
      mixed = np.where(np.isfinite(means), means, 0) @ plan.mixing.T
    lost = (~np.isfinite(means)).astype(np.float32) @ (plan.mixing.T > 0)
    found.append(np.where(lost > 0, np.float32(np.nan), mixed))
  return np.concatenate(found)


def widening(seeds: int) -> float:
  """By how much draws of S seeds are moved away from their mean: sqrt(S / (S - 1)) t(0.975, S - 1) / z(0.975)."""
  z = statistics.NORMAL_QUANTILE
  return math.sqrt(seeds / (seeds - 1)) * t_quantile(seeds - 1) / z


def t_quantile(freedom: int) -> float:
  """0.975 quantile of Student's t; from 10 degrees of freedom on by Cornish and Fisher's expansion (error < 1e-4)."""
  if freedom <= len(_T_QUANTILES):
    return _T_QUANTILES[freedom - 1]
  z, n = statistics.NORMAL_QUANTILE, freedom
  third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
  return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third


def seed_weights(
  seeds: Sequence[int], *, resamples: int = statistics.RESAMPLES, seed: int = 0, widened: bool = True
) -> np.ndarray:
  """Weights of the seeds in each draw, float64[R, S], rows add up to 1; the same seeds get the same draws.

  Args:
    seeds: their numbers.
    resamples: R.
    seed: of the draws.
    widened: False for the plain bootstrap, whose intervals are too narrow with few seeds.
  """
  size = len(seeds)
  if size == 1:
    return np.ones((resamples, 1))
  drawn = np.random.default_rng([1, seed, *seeds]).multinomial(size, np.full(size, 1 / size), resamples) / size
  return 1 / size + (widening(size) if widened else 1.0) * (drawn - 1 / size)


def bootstrap(
  answers: Mapping[str, Answers],
  plan: Design,
  *,
  references: Sequence[str] = (),
  resamples: int = statistics.RESAMPLES,
  seed: int = 0,
  widened: bool = True,
) -> dict[str, Any]:
  """Every statistic of every method, and paired differences to some, with 95 % intervals.

  Args:
    answers: method -> seed (None where nothing was trained) -> bool[n].
    plan: of `design`.
    references: methods that all others are compared with; those without answers are skipped.
    resamples: R.
    seed: of the draws.
    widened: see `seed_weights`.

  Returns:
    `methods`: method -> entry, `differences`: reference -> method -> entry of the method less the reference. An entry
    has `seeds`, `interval` ("seeds and items", or "items": one training says nothing about others) and `statistics`:
    name -> mean, low, high, and `values`, one per seed. A difference pairs the seeds that both have; where there are
    none, each method's are drawn for themselves and `paired` is False; an untrained model is subtracted from every
    seed. Bounds of accuracies are cut to [0, 1].
  """
  rows = [(method, number) for method, found in answers.items() for number in found]
  stacked = np.stack([answers[method][number] for method, number in rows])
  exact, draws = points(stacked, plan), item_draws(stacked, plan, resamples=resamples, seed=seed)
  place = {row: i for i, row in enumerate(rows)}

  def drawn(method: str, seeds: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
    chosen = [place[method, number] for number in seeds]
    trained = [number for number in seeds if number is not None]
    weights = seed_weights(trained or [0], resamples=resamples, seed=seed, widened=widened)
    return exact[chosen], np.einsum("rs,rsk->rk", weights, draws[:, chosen])

  methods = {method: _entry(list(found), *drawn(method, list(found)), plan) for method, found in answers.items()}
  differences: dict[str, Any] = {
    reference: {
      method: _difference(answers[method], answers[reference], method, reference, drawn, plan)
      for method in answers
      if method != reference
    }
    for reference in references
    if reference in answers
  }
  return {"methods": methods, "differences": differences}


def _difference(first: Answers, second: Answers, name: str, reference: str, drawn: Any, plan: Design) -> dict[str, Any]:
  shared: list[int | None] = [number for number in first if number in second and number is not None]
  untrained = None in first or None in second
  pairs = (shared, shared) if shared else (list(first), list(second))
  (left, left_draws), (right, right_draws) = (
    drawn(each, seeds) for each, seeds in zip((name, reference), pairs, strict=True)
  )
  paired = bool(shared) or untrained
  # Without pairs, and for a model that was not trained, there is one mean to subtract.
  values = left - right if shared else left - right.mean(axis=0) if None not in first else left.mean(axis=0) - right
  seeds: Sequence[int | None] = shared or (list(second) if None in first else list(first))
  entry = _entry(seeds, values, left_draws - right_draws, plan, bounds=(-1.0, 1.0))
  several = entry["interval"] == "seeds and items" or (not shared and max(len(first), len(second)) > 1)
  return entry | {"paired": paired, "interval": "seeds and items" if several else "items"}


def _entry(
  seeds: Sequence[int | None],
  values: np.ndarray,
  draws: np.ndarray,
  plan: Design,
  bounds: tuple[float, float] = (0.0, 1.0),
) -> dict[str, Any]:
  known = np.isfinite(draws).all()
  low, high = (np.percentile if known else np.nanpercentile)(draws, [2.5, 97.5], axis=0)
  low, high = np.clip(low, *bounds), np.clip(high, *bounds)
  found = {
    name: {"mean": float(values[:, i].mean()), "low": float(low[i]), "high": float(high[i]),
           "values": [float(value) for value in values[:, i]]}
    for i, name in enumerate(plan.names)
  }  # fmt: skip
  return {"seeds": list(seeds), "interval": "seeds and items" if len(seeds) > 1 else "items", "statistics": found}
