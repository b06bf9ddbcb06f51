"""Estimators and tests against enumeration, published values and slow loops."""

import fractions
import itertools
import math

import numpy as np
import pytest

from kepo_jax.evaluation import statistics


@pytest.mark.parametrize(
  ("correct", "count", "low", "high"),
  # Newcombe (1998), Statistics in Medicine 17, Table I, method 3: score without continuity correction.
  [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_intervals(correct, count, low, high):
  assert statistics.wilson_interval(correct, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
  for samples in range(1, 8):
    for correct in range(samples + 1):
      answers = [True] * correct + [False] * (samples - correct)
      for k in range(1, samples + 1):
        subsets = list(itertools.combinations(answers, k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert statistics.pass_at_k(samples, correct, k) == pytest.approx(expected)
  # 8 samples, 2 right, k = 4: 1 - C(6, 4) / C(8, 4) = 1 - 15/70.
  assert statistics.pass_at_k(8, 2, 4) == pytest.approx(55 / 70)


def test_pass_at_k_is_unbiased():
  # The expectation over the number of right answers is the true probability, 1 - (1 - p)^k; plugging the share of
  # right answers into that formula is not.
  chance, samples, k = 0.3, 6, 4
  mass = [math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c) for c in range(samples + 1)]
  truth = 1 - (1 - chance) ** k
  assert sum(m * statistics.pass_at_k(samples, c, k) for c, m in enumerate(mass)) == pytest.approx(truth)
  plugged = sum(m * (1 - (1 - c / samples) ** k) for c, m in enumerate(mass))
  assert abs(plugged - truth) > 0.02


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k):
  with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from 4 samples"):
    statistics.pass_at_k(4, 2, k)


def test_resampled_means_against_indices(rng):
  values = rng.integers(0, 5, 80) / 4
  drawn = statistics.resampled_means(values, rng)
  slow = np.array([values[rng.integers(0, 80, 80)].mean() for _ in range(5000)])
  assert drawn.shape == (statistics.RESAMPLES,)
  np.testing.assert_allclose(drawn.mean(), values.mean(), atol=0.002)
  np.testing.assert_allclose(drawn.std(), values.std() / math.sqrt(80), rtol=0.03)
  np.testing.assert_allclose(np.percentile(drawn, [2.5, 50, 97.5]), np.percentile(slow, [2.5, 50, 97.5]), atol=0.006)


def test_resampled_means_of_equal_values():
  np.testing.assert_array_equal(statistics.resampled_means(np.full(7, 0.25), np.random.default_rng(0)), 0.25)


def all_draws(values, clusters):
  """Every equally likely draw of whole clusters, with the mean of all values in it: slow, and exact."""
  members = [values[clusters == name] for name in sorted({*clusters.tolist()})]
  drawn = itertools.product(members, repeat=len(members))
  return np.array([np.concatenate(each).mean() for each in drawn])


@pytest.mark.parametrize(
  ("values", "clusters"),
  [
    ([1, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2]),  # of sizes 1, 2, 3: the mean of a draw is a ratio of two sums
    ([1, 1, 0, 0], [7, 7, 3, 3]),
    ([0.5, 1, 0, 0.25, 1], [0, 0, 1, 2, 3]),
    ([1, 0, 1, 0], [0, 1, 2, 3]),  # every question alone
    ([1, 0, 1], [4, 4, 4]),
  ],
)
def test_clusters_against_every_possible_draw(rng, values, clusters):
  values, clusters = np.array(values, float), np.array(clusters)
  drawn, exact = statistics.resampled_means(values, rng, clusters), all_draws(values, clusters)
  assert drawn.mean() == pytest.approx(exact.mean(), abs=0.012) and drawn.std() == pytest.approx(exact.std(), abs=0.01)
  for level in np.unique(exact.round(9)):
    assert (abs(drawn - level) < 1e-8).mean() == pytest.approx((abs(exact - level) < 1e-8).mean(), abs=0.02)
  assert {*drawn.round(9)} <= {*exact.round(9)}


def test_a_question_asked_twice_about_a_picture_counts_once(rng):
  values = rng.integers(0, 2, 60).astype(float)
  once = statistics.mean_share(values)
  twice = statistics.mean_share(np.repeat(values, 2), np.repeat(np.arange(60), 2))
  # m equal clusters: the variance of the mean is that of m figures, here p (1 - p) / 60, whatever their size.
  assert (twice["low"], twice["high"]) == (once["low"], once["high"]) and twice["count"] == 120
  half = 1.96 * math.sqrt(values.var() / 60)
  assert twice["high"] - twice["accuracy"] == pytest.approx(half, abs=0.02)
  blind = statistics.mean_share(np.repeat(values, 2))
  width = [found["high"] - found["low"] for found in (blind, twice)]
  assert width[1] / width[0] == pytest.approx(math.sqrt(2), abs=0.1)


def test_clusters_of_one_change_nothing():
  values = np.random.default_rng(1).integers(0, 5, 40) / 4
  names = np.random.default_rng(2).permutation(40)
  assert statistics.mean_share(values) == statistics.mean_share(values, names)
  assert statistics.mean_over_groups({"CT": values}) == statistics.mean_over_groups({"CT": values}, {"CT": names})


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


def test_a_mean_over_groups_draws_inside_each(rng):
  groups = {"CT": rng.integers(0, 3, 40) / 2, "OCT": rng.integers(0, 3, 400) / 2}
  found = statistics.mean_over_groups(groups)
  assert found["mean"] == pytest.approx(np.mean([values.mean() for values in groups.values()]))
  assert (found["count"], found["modalities"]) == (440, ["CT", "OCT"])
  # Groups count the same: the small one's spread dominates.
  error = 1.96 * math.sqrt(sum(values.var() / len(values) for values in groups.values())) / 2
  assert found["high"] - found["low"] == pytest.approx(2 * error, rel=0.05)


def test_mean_over_modalities_is_that_of_right_and_wrong():
  entries = {"CT": statistics.share(3, 10), "OCT": statistics.share(7, 9)}
  values = {"CT": np.repeat([1.0, 0.0], [3, 7]), "OCT": np.repeat([1.0, 0.0], [7, 2])}
  assert statistics.mean_over_modalities(entries) == statistics.mean_over_groups(values)


def test_mean_share_brackets_its_mean():
  found = statistics.mean_share(np.array([0.0, 0.5, 1.0, 1.0]))
  assert found["accuracy"] == 0.625 and found["count"] == 4
  assert 0 <= found["low"] < 0.625 < found["high"] <= 1


def test_guessing_against_guessers(rng):
  groups = {"CT": np.array([0.5] * 30 + [0.25] * 20), "OCT": np.full(40, 1 / 3)}
  mean, low, high = statistics.guessing(groups)
  # (0.5 * 30 + 0.25 * 20) / 50 = 0.4; with 1/3 for the other: 11/30.
  assert mean == pytest.approx((0.4 + 1 / 3) / 2)
  guessers = np.mean([(rng.random((20_000, len(p))) < p[None]).mean(1) for p in groups.values()], axis=0)
  np.testing.assert_allclose([low, high], np.percentile(guessers, [2.5, 97.5]), atol=0.011)
  assert ((guessers >= low) & (guessers <= high)).mean() == pytest.approx(0.95, abs=0.015)
  assert statistics.guessing({"": np.ones(3)}) == (1, 1, 1)


def test_mcnemar_is_a_binomial_tail():
  # Closed form in exact fractions: twice the probability of at most min(b, c) heads in b + c fair throws.
  for gained, lost in itertools.product(range(8), repeat=2):
    count = gained + lost
    tail = sum(fractions.Fraction(math.comb(count, k), 2**count) for k in range(min(gained, lost) + 1))
    assert statistics.mcnemar(gained, lost) == float(min(fractions.Fraction(1), 2 * tail))


def test_mcnemar_is_the_permutation_test_of_signs():
  # Every assignment of signs to the discordant pairs, equally likely if the models are alike.
  for gained, lost in ((5, 1), (3, 3), (7, 2), (0, 6)):
    sums = [sum(signs) for signs in itertools.product((-1, 1), repeat=gained + lost)]
    as_far = sum(abs(total) >= abs(gained - lost) for total in sums) / len(sums)
    assert statistics.mcnemar(gained, lost) == pytest.approx(as_far)


def test_holm():
  # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 gives 0.04, 0.06, 0.06, 0.5.
  found = statistics.holm({"a": 0.5, "b": 0.02, "c": 0.01, "d": 0.03})
  assert found == pytest.approx({"a": 0.5, "b": 0.06, "c": 0.04, "d": 0.06}) and list(found) == list("abcd")
  # The third, 2 * 0.025 = 0.05, may not be below the second, 3 * 0.02.
  assert statistics.holm({"a": 0.001, "b": 0.02, "c": 0.025, "d": 0.9})["c"] == pytest.approx(0.06)
  assert statistics.holm({"a": 0.4, "b": 0.9}) == pytest.approx({"a": 0.8, "b": 0.9})
  assert statistics.holm({}) == {}


def test_holm_keeps_the_family_wise_error(rng):
  # 8 true hypotheses, p uniform: any rejection at 0.05 is an error.
  errors = [min(statistics.holm(dict(enumerate(rng.random(8)))).values()) < 0.05 for _ in range(4000)]
  assert np.mean(errors) < 0.06


def test_correlation_with_fishers_interval():
  found = statistics.correlation([1, 2, 3, 4, 5, 6, 7], [2, 1, 4, 3, 7, 5, 6])
  # 1 - 6 * 10 / (7 * 48), ranks being the values; atanh +- 1.96 / 2.
  assert found["r"] == pytest.approx(23 / 28) and found["count"] == 7
  assert found["low"] == pytest.approx(np.tanh(np.arctanh(23 / 28) - 0.98), abs=1e-3)
  assert found["high"] == pytest.approx(np.tanh(np.arctanh(23 / 28) + 0.98), abs=1e-3)
  assert statistics.correlation([1, 2, 3], [1, 0, 1])["low"] is None
  assert statistics.correlation([1, 2, 3], [1, 1, 1])["r"] is None and statistics.correlation([], [])["r"] is None
