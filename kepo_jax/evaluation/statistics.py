"""Intervals, tests and estimators of an evaluation.

Wilson's intervals and McNemar's test count questions. A bootstrap draws clusters: questions about one image are drawn
together, since what a model sees in a picture it sees for all of them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy  # which imports scipy.stats at its first use: half a second that most runs save

NORMAL_QUANTILE = 1.959963984540054  # of 0.975: two-sided 95 %
RESAMPLES = 10_000


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a share of successes; (0, 1) without trials."""
  if not count:
    return 0.0, 1.0
  interval = scipy.stats.binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
  return float(interval.low), float(interval.high)


def share(correct: int, count: int) -> dict[str, Any]:
  """Returns a share of correct answers with its 95 % interval: count, correct, accuracy, low, high."""
  low, high = wilson_interval(correct, count)
  return {"count": count, "correct": correct, "accuracy": correct / count if count else 0.0, "low": low, "high": high}


def resampled_means(values: np.ndarray, rng: np.random.Generator, clusters: np.ndarray | None = None) -> np.ndarray:
  """Bootstraps a mean: draws as many clusters as there are, with replacement, and averages all their values.

  Args:
    values: float[n], one figure per question.
    rng: draws.
    clusters: int[n], the cluster of each question; None: each question is its own.

  Returns:
    float64[RESAMPLES].
  """
  _, members = np.unique(np.arange(len(values)) if clusters is None else clusters, return_inverse=True)
  table = np.stack([np.bincount(members, weights=values), np.bincount(members)], axis=1)  # sum and size of each cluster
  # How often each distinct row is drawn is multinomial; few rows are distinct, so no index is ever drawn.
  rows, counts = np.unique(table, axis=0, return_counts=True)
  drawn = rng.multinomial(len(table), counts[::-1] / len(table), RESAMPLES)
  sums, sizes = (drawn @ rows[::-1]).T
  return sums / sizes


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
  """Returns the middle 95 % of bootstrap draws."""
  low, high = np.percentile(draws, [2.5, 97.5])
  return float(low), float(high)


def mean_share(values: np.ndarray, clusters: np.ndarray | None = None, *, seed: int = 0) -> dict[str, Any]:
  """Averages one value per question, float[n] in [0, 1], with a bootstrap 95 % interval: count, accuracy, low, high."""
  low, high = percentile_interval(resampled_means(values, np.random.default_rng(seed), clusters))
  return {"count": len(values), "accuracy": float(np.mean(values)), "low": low, "high": high}


def mean_over_groups(
  groups: Mapping[str, np.ndarray], clusters: Mapping[str, np.ndarray] | None = None, *, seed: int = 0
) -> dict[str, Any] | None:
  """Averages the means of groups, unweighted, with a bootstrap 95 % interval; draws clusters inside each group.

  Args:
    groups: name of a modality -> one value per question, float[n].
    clusters: name -> the cluster of each question, int[n]; None: each question is its own.
    seed: of the resampling.

  Returns:
    mean, low, high, count and the names; None for no group.
  """
  if not groups:
    return None
  rng = np.random.default_rng(seed)
  draws = [resampled_means(values, rng, clusters[name] if clusters else None) for name, values in groups.items()]
  low, high = percentile_interval(np.mean(draws, axis=0))
  return {
    "mean": float(np.mean([np.mean(values) for values in groups.values()])),
    "low": low,
    "high": high,
    "count": sum(len(values) for values in groups.values()),
    "modalities": list(groups),
  }


def guessing(groups: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
  """Returns what guessing scores: expected accuracy, and the bounds between which 95 % of uniform guessers fall.

  Args:
    groups: name -> 1 / number of options of each question, float[n]; groups count the same.

  Returns:
    (mean, low, high); the bounds are those of the normal distribution with the variance of the guesses.
  """
  mean = float(np.mean([values.mean() for values in groups.values()]))
  variance = sum(float((values * (1 - values)).sum()) / len(values) ** 2 for values in groups.values())
  half = NORMAL_QUANTILE * math.sqrt(variance) / len(groups)
  return mean, max(0.0, mean - half), min(1.0, mean + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
  """Estimates without bias, from n samples of which c are right, the chance that one of k is (arXiv:2107.03374, Eq. 1).

  1 - C(n - c, k) / C(n, k): the share of the subsets of k samples that hold a right one.

  Args:
    samples: n, completions of one question.
    correct: c.
    k: at most n.

  Raises:
    ValueError: k is outside 1..n.
  """
  if not 1 <= k <= samples:
    raise ValueError(f"pass@{k} cannot be estimated from {samples} samples; k is at least 1 and at most their number.")
  return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mcnemar(gained: int, lost: int) -> float:
  """Returns the two-sided exact p-value of McNemar's test.

  Args:
    gained: questions that only the second model got right.
    lost: questions that only the first one got right.
  """
  return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
  """Corrects the p-values of a family of tests after Holm (1979); keeps their order.

  The i-th smallest of m is multiplied by m - i + 1, and none may be below a smaller one's: rejecting what is below
  0.05 errs anywhere in the family with a probability of at most 0.05.
  """
  # scipy has no Holm, and six lines are no reason to depend on statsmodels.
  corrected, largest = dict(p_values), 0.0
  for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
    largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
    corrected[name] = largest
  return corrected
