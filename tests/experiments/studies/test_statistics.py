import numpy as np
import pytest
from scipy import stats

from experiments.studies import statistics
from tests.experiments.studies import cases

ITEMS = cases.items(20)
ENTRIES = cases.entries(ITEMS)
REFERENCES = ("grpo", "gkd-1")
START = {"method": "start", "seed": None, "validation": [{"step": 0, "in_domain": 0.2, "out_of_domain": 0.1}]}
CHEAP = [cases.training("cheap", seed, [(10, 50, 0.4), (20, 100, 0.6 + seed / 10)]) for seed in (0, 1)]
DEAR = [cases.training("dear", 0, [(10, 200, 0.8), (20, 400, 0.9)], teacher=20)]


def test_packing_is_undone(rng):
  for count in (1, 8, 9, 300):
    right = rng.random(count) < 0.5
    np.testing.assert_array_equal(statistics.unpacked(statistics.packed(right), count), right)
  with pytest.raises(ValueError, match="24 answers are packed where 9 questions are expected"):
    statistics.unpacked("ffffff", 9)


def test_untrained_models_join_the_pairs_of_their_names():
  line = {"method": "grpo", "student": "a", "teacher": "x"}
  entries = [line, line | {"student": "b"}, {"method": "start", "student": "a", "teacher": "y"},
             {"method": "teacher", "student": "c", "teacher": "x"}]  # fmt: skip
  found = {pair: [entry["method"] for entry in group] for pair, group in statistics.pairs(entries).items()}
  assert found == {("a", "x"): ["grpo", "start", "teacher"], ("b", "x"): ["grpo", "teacher"]}


def test_a_summary_holds_what_was_measured():
  summary = statistics.summarised(ENTRIES, ITEMS, references=REFERENCES, resamples=200)
  assert list(summary["methods"]) == [*cases.FREE, *cases.METHODS]
  assert set(summary["differences"]) == set(REFERENCES) and summary["items"] == summary["images"] == 160
  for name, group in statistics.methods(ENTRIES).items():
    method = summary["methods"][name]
    assert method["seeds"] == [entry["seed"] for entry in group]
    for metric in statistics.METRICS:
      measured = [entry["test"][metric] for entry in group]
      assert method["statistics"][metric]["values"] == pytest.approx(measured, abs=1e-6)
      assert method["statistics"][metric]["mean"] == pytest.approx(np.mean(measured), abs=1e-6)
    assert method["format"] == pytest.approx(np.mean([entry["test"]["format"] for entry in group]))
  assert summary["chance"]["overall"] == pytest.approx(np.mean(ITEMS["chance"]))


def test_contrasts_are_paired_t_tests_corrected_after_holm():
  gaps = {"a": [0.1, 0.12, 0.09, 0.2], "b": [0.0, 0.05, -0.04, 0.01], "start": [0.3, 0.2, 0.3, 0.3], "c": [0.0, 0.0]}

  def entry(values, paired=True):
    return {"paired": paired, "statistics": {"out_of_domain": {"values": values}}}

  less_a = {"b": entry([x - y for x, y in zip(gaps["b"], gaps["a"], strict=True)]), "d": entry([0.1], paired=False)}
  differences = {
    "grpo": {name: entry(values) for name, values in gaps.items()},
    "a": less_a | {"grpo": entry([-0.1] * 4)},
  }
  found = {(r["method"], r["reference"]): r for r in statistics.contrasts({"differences": differences})}
  # Every pair once; neither untrained models nor what shares no seed.
  assert set(found) == {("a", "grpo"), ("b", "grpo"), ("c", "grpo"), ("b", "a")}
  p = {pair: record["p"] for pair, record in found.items()}
  assert p["a", "grpo"] == pytest.approx(stats.ttest_rel(gaps["a"], [0] * 4).pvalue)
  assert p["b", "a"] == pytest.approx(stats.ttest_rel(gaps["b"], gaps["a"]).pvalue) and p["c", "grpo"] == 1
  smallest, second, third, _ = sorted(p, key=p.get)
  assert found[smallest]["p_holm"] == pytest.approx(4 * p[smallest])
  assert found[second]["p_holm"] == pytest.approx(max(3 * p[second], 4 * p[smallest]))
  assert found[third]["p_holm"] == pytest.approx(min(1, max(2 * p[third], found[second]["p_holm"])))
  assert found["a", "grpo"]["mean"] == pytest.approx(0.1275) and found["a", "grpo"]["seeds"] == 4


def test_correlation_by_fisher(rng):
  first = rng.normal(size=9)
  for second in (first + rng.normal(size=9), -first + rng.normal(size=9)):
    found = statistics.correlation(first, second)
    r = np.corrcoef(first, second)[0, 1]
    expected = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.959964 / np.sqrt(6))
    assert (found["r"], found["count"]) == (pytest.approx(r), 9)
    assert [found["low"], found["high"]] == pytest.approx(expected, rel=1e-5)
  assert statistics.correlation([1, 2, 3], [1, 0, 1])["low"] is None
  assert statistics.correlation([1, 2, 3], [1, 1, 1])["r"] is None and statistics.correlation([], [])["r"] is None


def grid(accuracies):
  """Entries of a grid without test answers: method -> rate -> seed -> validation accuracy at the last step."""
  return [
    {"method": method, "label": method, "student": "s", "teacher": "t", "learning_rate": rate, "seed": seed,
     "validation": [{"step": 20, "overall": 1 - value}, {"step": 10, "overall": 0.99},
                    {"step": 40, "overall": value, "in_domain": 1 - value}]}
    for method, rates in accuracies.items() for rate, by_seed in rates.items() for seed, value in by_seed.items()
  ]  # fmt: skip


def test_the_best_rate_on_the_validation_set_is_chosen():
  # Means: 0.6, 0.7, 0.65; for b a tie of 0.1 + 0.2 + 0.3 in two orders, whose sums differ in the last bit.
  entries = grid({
    "a": {3e-4: {0: 0.6, 1: 0.6}, 1e-4: {0: 0.9, 1: 0.5}, 2e-4: {0: 0.6, 1: 0.7}},
    "b": {3e-4: {0: 0.1, 1: 0.2, 2: 0.3}, 2e-4: {0: 0.3, 1: 0.2, 2: 0.1}, 1e-4: {0: 0.1, 1: 0.1, 2: 0.1}},
  })  # fmt: skip
  assert statistics.chosen_rates(entries) == {"a": 1e-4, "b": 2e-4}
  assert statistics.rate_means(entries)["a"] == pytest.approx({1e-4: 0.7, 2e-4: 0.65, 3e-4: 0.6})
  assert statistics.chosen_rates(entries, "in_domain") == {"a": 3e-4, "b": 1e-4}
  # Only seeds of all rates count; b has none.
  entries = grid({"a": {1e-4: {0: 0.5, 1: 0.9}, 2e-4: {0: 0.6}}, "b": {1e-4: {0: 0.5}, 2e-4: {1: 0.5}}})
  assert statistics.rate_means(entries) == {"a": {1e-4: 0.5, 2e-4: 0.6}}
  with pytest.raises(ValueError, match="a has two entries of seed 0"):
    statistics.methods([entry for entry in entries if entry["method"] == "a" and entry["seed"] == 0])
  entries[0]["validation"] = entries[0]["validation"][:1]
  with pytest.raises(ValueError, match="a was validated last at steps 20 and 40"):
    statistics.rate_means(entries)


def test_stability():
  entries = [dict(entry) for entry in ENTRIES if entry["method"] == "grpo"]
  for entry, last in zip(entries, ([0.2, 0.5, 0.6, 0.7], [0.9, 0.6, 0.6, 0.6]), strict=True):
    entry["validation"] = [{"step": n, "out_of_domain": value} for n, value in enumerate(last)]
  found = statistics.stability(entries, ITEMS)["grpo"]
  # Sample deviations of .5 .6 .7 and of three equal values: 0.1 and 0.
  assert found["validations"] == pytest.approx(0.05)
  ends = [entry["test"]["out_of_domain"] for entry in entries]
  assert found["seeds"] == pytest.approx(abs(ends[0] - ends[1]) / np.sqrt(2), abs=1e-6)
  assert found["seeds_interval"] == pytest.approx((0.446 * found["seeds"], 31.910 * found["seeds"]), rel=1e-3)
  alone = statistics.stability(entries[:1], ITEMS)["grpo"]
  assert alone["seeds"] is alone["seeds_interval"] is None and statistics.stability(ENTRIES[:2], ITEMS) == {}


def test_accuracy_at_a_cost_is_read_from_the_curve_that_begins_with_the_untrained_model():
  tokens, values = statistics.validation_curve(DEAR[0], START, "in_domain")  # those of student and teacher
  assert (tokens.tolist(), values.tolist()) == ([0, 200, 400], [0.2, 0.8, 0.9])
  own = cases.training("own", 0, [(0, 0, 0.25), (10, 50, 0.5)])  # validated before its first step
  assert statistics.validation_curve(own, START, "in_domain")[1].tolist() == [0.25, 0.5]
  found = statistics.accuracy_at_cost([START, *CHEAP, *DEAR], "in_domain", budget=100)
  # Both trainings of cheap end at 100 tokens; dear is then half way from 0.2 at 0 to 0.8 at 200.
  assert found["cheap"] == pytest.approx({"mean": 0.65, "low": 0.6, "high": 0.7})
  assert found["dear"]["mean"] == pytest.approx(0.5)
  # A few percent are no difference; what ends further below has not reached the budget.
  assert statistics.accuracy_at_cost([START, *CHEAP], "in_domain", budget=104)["cheap"]["mean"] == pytest.approx(0.65)
  short = cases.training("cheap", 1, [(10, 60, 0.5), (20, 90, 0.6)])  # one seed is enough
  for entries, budget in ((CHEAP, 106), ([CHEAP[0], short], 98)):
    assert statistics.accuracy_at_cost(entries, "in_domain", budget=budget)["cheap"]["mean"] is None


def test_differences_at_a_cost_are_paired_by_seed():
  dear = [cases.training("dear", seed, [(10, 200, 0.8), (20, 400, 0.9)]) for seed in (1, 2)]
  found = statistics.differences_at_cost([START, *CHEAP, *dear], "cheap", "in_domain", budget=100)
  # Of the seed that both have: half way from 0.2 to 0.8, less 0.7.
  assert found == {"dear": {"mean": pytest.approx(-0.2), "low": None, "high": None, "seeds": 1}}
  both = [cases.training("dear", seed, [(10, 100, 0.5 - seed / 10)]) for seed in (0, 1)]
  (gap,) = statistics.differences_at_cost([*CHEAP, *both], "cheap", "in_domain", budget=100).values()
  assert gap["mean"] == pytest.approx(-0.2) and gap["low"] < -0.3 and gap["high"] > -0.1 and gap["seeds"] == 2
  for reference in ("cheap", "dear"):  # what ends before the budget is compared with nothing
    assert statistics.differences_at_cost([START, *CHEAP, *DEAR], reference, "in_domain", budget=300) == {}
