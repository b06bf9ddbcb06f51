import itertools
import math

import numpy as np
import pytest

from kepo_jax.evaluation import statistics


def test_wilson_by_its_closed_form():
  z = 1.959963984540054
  for correct, count in [(0, 1), (1, 1), (8, 10), (0, 20), (20, 20), (81, 263), (150, 300)]:
    p, low_high = correct / count, statistics.wilson_interval(correct, count)
    center, half = (p + z**2 / (2 * count)), z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    np.testing.assert_allclose(low_high, np.array([center - half, center + half]) / (1 + z**2 / count), atol=1e-9)
    assert 0 <= low_high[0] <= p <= low_high[1] <= 1
  assert statistics.wilson_interval(0, 0) == (0, 1)
  assert statistics.share(0, 0) == {"count": 0, "correct": 0, "accuracy": 0, "low": 0, "high": 1}


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
  for samples in range(1, 8):
    for correct in range(samples + 1):
      answers = [True] * correct + [False] * (samples - correct)
      for k in range(1, samples + 1):
        subsets = list(itertools.combinations(answers, k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert statistics.pass_at_k(samples, correct, k) == pytest.approx(expected), (samples, correct, k)
  with pytest.raises(ValueError, match="pass@5 cannot be estimated from 4 samples"):
    statistics.pass_at_k(4, 2, 5)


def all_draws(values, clusters):
  """Every equally likely draw of whole clusters, with the mean of all values in it: slow, and exact."""
  members = [values[clusters == name] for name in sorted({*clusters.tolist()})]
  drawn = itertools.product(members, repeat=len(members))
  return np.array([np.concatenate(each).mean() for each in drawn])


@pytest.mark.parametrize(("values", "clusters"), [
  ([1, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2]),  # of sizes 1, 2, 3: the mean of a draw is a ratio of two sums
  ([0.5, 1, 0, 0.25, 1], [7, 7, 0, 2, 3]),
  ([1, 0, 1, 0], None),  # every question alone
])  # fmt: skip
def test_clusters_against_every_possible_draw(rng, values, clusters):
  values = np.array(values, float)
  clusters = clusters and np.array(clusters)
  drawn = statistics.resampled_means(values, rng, clusters)
  exact = all_draws(values, np.arange(len(values)) if clusters is None else clusters)
  assert drawn.shape == (statistics.RESAMPLES,)
  assert drawn.mean() == pytest.approx(exact.mean(), abs=0.012) and drawn.std() == pytest.approx(exact.std(), abs=0.01)
  for level in np.unique(exact.round(9)):
    assert (abs(drawn - level) < 1e-8).mean() == pytest.approx((abs(exact - level) < 1e-8).mean(), abs=0.02)
  assert {*drawn.round(9)} <= {*exact.round(9)}


def test_a_mean_over_groups_draws_clusters_inside_each(rng):
  groups = {name: rng.integers(0, 2, 200).astype(float) for name in ("CT", "OCT")}
  groups["CT"] = np.repeat(groups["CT"][:20], 10)  # ten questions about each picture, answered alike
  clusters = {"CT": np.arange(200) // 10, "OCT": np.arange(200)}
  found = statistics.mean_over_groups(groups, clusters)
  slow = []
  for _ in range(4000):
    picked = rng.integers(0, 20, 20)
    ct = np.concatenate([groups["CT"][clusters["CT"] == name] for name in picked]).mean()
    slow.append((ct + groups["OCT"][rng.integers(0, 200, 200)].mean()) / 2)
  np.testing.assert_allclose([found["low"], found["high"]], np.percentile(slow, [2.5, 97.5]), atol=0.01)


def test_modalities_count_the_same():
  values = {"CT": np.repeat([1.0, 0.0], [15, 25]), "OCT": np.repeat([1.0, 0.0], [240, 60])}
  found = statistics.mean_over_groups(values)
  assert found["mean"] == pytest.approx((15 / 40 + 240 / 300) / 2) and found["modalities"] == ["CT", "OCT"]
  assert found["count"] == 340 and found == statistics.mean_over_groups(values)  # seeded
  # The small one's spread dominates.
  error = 1.96 * math.sqrt(0.375 * 0.625 / 40 + 0.8 * 0.2 / 300) / 2
  assert found["high"] - found["low"] == pytest.approx(2 * error, rel=0.05)
  assert statistics.mean_over_groups({}) is None


def test_guessing_against_guessers(rng):
  groups = {"CT": np.array([0.5] * 30 + [0.25] * 20), "OCT": np.full(40, 1 / 3)}
  mean, low, high = statistics.guessing(groups)
  # (0.5 * 30 + 0.25 * 20) / 50 = 0.4; with 1/3 for the other: 11/30.
  assert mean == pytest.approx((0.4 + 1 / 3) / 2)
  guessers = np.mean([(rng.random((20_000, len(p))) < p[None]).mean(1) for p in groups.values()], axis=0)
  np.testing.assert_allclose([low, high], np.percentile(guessers, [2.5, 97.5]), atol=0.011)
  assert statistics.guessing({"": np.ones(3)}) == (1, 1, 1)


def test_mcnemar_is_twice_the_binomial_tail():
  for gained, lost in [(0, 0), (1, 0), (5, 1), (1, 5), (3, 3), (0, 10), (90, 150)]:
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    assert statistics.mcnemar(gained, lost) == pytest.approx(min(1, 2 * tail), rel=1e-9), (gained, lost)


def test_holm():
  # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 gives 0.04, 0.06, 0.06, 0.5.
  found = statistics.holm({"a": 0.5, "b": 0.02, "c": 0.01, "d": 0.03})
  assert found == pytest.approx({"a": 0.5, "b": 0.06, "c": 0.04, "d": 0.06}) and list(found) == list("abcd")
  # The third, 2 * 0.025 = 0.05, may not be below the second, 3 * 0.02.
  assert statistics.holm({"a": 0.001, "b": 0.02, "c": 0.025, "d": 0.9})["c"] == pytest.approx(0.06)
  assert statistics.holm({"a": 0.4, "b": 0.9}) == pytest.approx({"a": 0.8, "b": 0.9}) and statistics.holm({}) == {}
