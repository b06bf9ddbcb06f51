import numpy as np
import pytest

from experiments.studies import bootstrap
from tests.experiments.studies import cases


def one_group(count):
  """A benchmark of one modality and one question type."""
  zeros = [0] * count
  return {"modalities": ["CT"], "modality": zeros, "question_types": ["any"], "question_type": zeros,
          "image": list(range(count)), "train_modality": "CT", "unseen": []}  # fmt: skip


def crossed(rng, size, count, *, by_seed=0.02, by_item=0.3, both=0.2):
  """float[size, count] with effects of seed, question and both around 0.5; the parameters are standard deviations."""
  return (
    0.5 + rng.normal(0, by_seed, (size, 1)) + rng.normal(0, by_item, (1, count)) + rng.normal(0, both, (size, count))
  )


def spread(values, plan, *, factor, resamples, seed=0):
  """Bootstrap draws of `overall` of one method."""
  draws = bootstrap.item_draws(values, plan, resamples=resamples, seed=seed)
  shifts = bootstrap.seed_shifts(range(len(values)), resamples=resamples, seed=seed)
  return bootstrap.mean_draws(bootstrap.points(values, plan), draws, shifts, factor)[:, plan.names.index("overall")]


def test_variance_given_the_data(rng):
  size, count = 5, 80
  values = crossed(rng, size, count, by_seed=0.03)
  rows = values.mean(axis=1) - values.mean()
  columns = values.mean(axis=0) - values.mean()
  both = values - values.mean() - rows[:, None] - columns
  # Draws of S seeds and of N questions are independent; e / N is taken from the variance between bootstrap.
  between, noise = (rows**2).sum() / (size - 1), (both**2).sum() / (size - 1) / count**2
  assert 0.2 < noise / between < 0.8
  exact = 4 * (rows**2).sum() / size**2 * (1 - noise / between) + (columns**2).sum() / count**2
  drawn = spread(values, bootstrap.design(one_group(count)), factor=2.0, resamples=8000)
  assert drawn.var() == pytest.approx(exact, rel=0.05) and drawn.mean() == pytest.approx(values.mean(), abs=0.003)


@pytest.mark.parametrize("by_seed", [0.2, 0.0])
def test_intervals_of_few_seeds_cover_the_truth(rng, by_seed):
  plan, hit = bootstrap.design(one_group(60)), 0
  for trial in range(300):
    drawn = spread(crossed(rng, 3, 60, by_seed=by_seed), plan, factor=bootstrap.widening(3), resamples=300, seed=trial)
    low, high = np.percentile(drawn, [2.5, 97.5])
    hit += low <= 0.5 <= high
  assert 0.915 <= hit / 300 <= 0.985


def test_a_slow_loop_with_the_same_draws(rng):
  items = cases.items(6, questions_per_image=2)
  kinds = items["question_type"]
  plan, right = bootstrap.design(items), rng.random((3, 48)) < 0.6
  fast = bootstrap.item_draws(right, plan, resamples=700, seed=4)
  counts = np.concatenate(list(bootstrap.cluster_counts(plan, resamples=700, seed=4))).astype(int)
  assert counts.shape == (700, 24) and (counts.reshape(700, 8, 3).sum(axis=2) == 3).all()
  names = np.array(items["modalities"])[items["modality"]]
  for draw in (0, 1, 499, 500, 699):
    picked = [n for cluster in range(24) for n in [2 * cluster, 2 * cluster + 1] * counts[draw, cluster]]
    shares = {name: right[:, [n for n in picked if names[n] == name]].mean(axis=1) for name in items["modalities"]}
    others = [shares[name] for name in items["modalities"] if name != "MRI"]
    seen = [shares[name] for name in items["modalities"] if name not in ("MRI", "Fundus Photography")]
    for name, expected in {
      "in_domain": shares["MRI"], "out_of_domain": np.mean(others, axis=0), "unseen": shares["Fundus Photography"],
      "out_of_domain_seen": np.mean(seen, axis=0), "modalities/CT": shares["CT"],
      "overall": right[:, picked].mean(axis=1),
      "question_types/Lesion Grading": right[:, [n for n in picked if kinds[n] == 2]].mean(axis=1),
    }.items():  # fmt: skip
      np.testing.assert_allclose(fast[draw, :, plan.names.index(name)], expected, atol=1e-6, err_msg=name)


def test_a_draw_without_a_question_of_a_type_is_left_out():
  items = one_group(6) | {"question_types": ["any", "rare"], "question_type": [0, 0, 0, 0, 0, 1]}
  plan = bootstrap.design(items)
  assert plan.names == ("in_domain", "modalities/CT", "question_types/any", "question_types/rare", "overall")
  draws = bootstrap.item_draws(np.ones((1, 6)), plan, resamples=600)[:, 0]
  empty = np.isnan(draws[:, plan.names.index("question_types/rare")]).mean()
  assert empty == pytest.approx((5 / 6) ** 6, abs=0.06)  # none of six draws
  assert np.isfinite(draws[:, plan.names.index("overall")]).all()
  found = bootstrap.bootstrap({"m": {None: np.ones(6)}}, plan, resamples=600)["methods"]["m"]["statistics"]
  assert (found["question_types/rare"]["low"], found["question_types/rare"]["high"]) == (1, 1)


def test_differences_are_paired(rng):
  # Two methods that fail at the same questions but for some: their difference is nearly certain, each is not.
  hard = rng.random((4, 200)) < 0.5
  better = hard | (rng.random((4, 200)) < 0.15)
  answers = {"base": dict(enumerate(hard)), "better": dict(enumerate(better))}
  found = bootstrap.bootstrap(answers, bootstrap.design(one_group(200)), references=("base", "absent"), resamples=800)
  (entry,) = found["differences"]["base"].values()
  assert entry["seeds"] == [0, 1, 2, 3] and entry["paired"]
  gap = entry["statistics"]["overall"]
  np.testing.assert_allclose(gap["values"], (better.astype(float) - hard).mean(axis=1), atol=1e-9)
  alone = found["methods"]["better"]["statistics"]["overall"]
  assert 0 < gap["low"] < gap["mean"] < gap["high"] and gap["high"] - gap["low"] < 0.8 * (alone["high"] - alone["low"])


def test_which_seeds_are_paired(rng):
  def some(*numbers):
    return {number: rng.random(40) < 0.5 for number in numbers}

  answers = {"base": some(0, 1, 2), "two": some(1, 2, 3), "one": some(2), "other": some(7, 8), "start": some(None)}
  found = bootstrap.bootstrap(answers, bootstrap.design(one_group(40)), references=("base", "start"), resamples=300)
  less = found["differences"]["base"]
  assert [less[name]["seeds"] for name in ("two", "one", "other")] == [[1, 2], [2], [7, 8]]
  assert [less[name]["paired"] for name in ("two", "one", "other", "start")] == [True, True, False, True]
  assert less["one"]["interval"] == "items" and less["other"]["interval"] == "seeds and items"
  apart = less["other"]["statistics"]["overall"]
  expected = np.mean([*map(np.mean, answers["other"].values())]) - np.mean([*map(np.mean, answers["base"].values())])
  assert apart["mean"] == pytest.approx(expected) and apart["low"] < expected < apart["high"] and "values" not in apart
  expected = [answers["two"][n].mean() - answers["base"][n].mean() for n in (1, 2)]
  assert less["two"]["statistics"]["overall"]["values"] == pytest.approx(expected)
  gain, loss = found["differences"]["start"]["base"], less["start"]
  for entry in (gain, loss):
    assert entry["seeds"] == [0, 1, 2] and entry["interval"] == "seeds and items"
  gain, loss = gain["statistics"]["overall"], loss["statistics"]["overall"]
  assert loss["mean"] == pytest.approx(-gain["mean"]) and loss["low"] == pytest.approx(-gain["high"], abs=1e-6)


def test_the_factor_is_that_of_student():
  # t(0.975) with 1 and 4 degrees of freedom is 12.706 and 2.776, of the normal distribution 1.960.
  assert bootstrap.widening(2) == pytest.approx(2**0.5 * 12.706 / 1.95996, rel=1e-4)
  assert bootstrap.widening(5) == pytest.approx(1.25**0.5 * 2.7764 / 1.95996, rel=1e-4)


def test_an_interval_over_seeds_alone_is_about_that_of_student():
  values = {number: value for number, value in enumerate((0.02, 0.11, -0.01, 0.09, 0.05))}
  found = bootstrap.seeds_alone(values)
  half = 2.776 * np.std(list(values.values()), ddof=1) / 5**0.5
  assert found["mean"] == pytest.approx(0.052) and found["seeds"] == 5
  np.testing.assert_allclose([found["low"], found["high"]], [0.052 - half, 0.052 + half], atol=0.12 * half)
  assert bootstrap.seeds_alone({3: 0.5}) == {"mean": 0.5, "low": None, "high": None, "seeds": 1}
