"""From entries of a study to its statistics: packing, pairs, the choice of learning rates, stability."""

import numpy as np
import pytest

from kepo_jax.evaluation import studies
from tests import studies_data

ITEMS = studies_data.items(20)
ENTRIES = studies_data.entries(ITEMS)


def test_packing_is_undone(rng):
  for count in (1, 8, 9, 300):
    right = rng.random(count) < 0.5
    text = studies.packed(right)
    assert bytes.fromhex(text) == np.packbits(right).tobytes()
    np.testing.assert_array_equal(studies.unpacked(text, count), right)
  with pytest.raises(ValueError, match="24 answers are packed where 9 questions are expected"):
    studies.unpacked("ffffff", 9)


def test_a_summary_holds_what_was_measured():
  summary = studies.summarised(ENTRIES, ITEMS, resamples=200)
  assert list(summary["methods"]) == ["start", "teacher", *studies_data.METHODS]
  assert set(summary["differences"]) == {"grpo", "gkd-1"} and summary["items"] == summary["images"] == 160
  for name, entries in studies.methods(ENTRIES).items():
    found = summary["methods"][name]
    assert found["seeds"] == [entry["seed"] for entry in entries]
    for figure in ("in_domain", "out_of_domain", "overall"):
      measured = [entry["test"][figure] for entry in entries]
      assert found["statistics"][figure]["values"] == pytest.approx(measured, abs=1e-6)
      assert found["statistics"][figure]["mean"] == pytest.approx(np.mean(measured), abs=1e-6)
    assert found["format"] == pytest.approx(np.mean([entry["test"]["format"] for entry in entries]))
  assert summary["chance"]["overall"] == pytest.approx(np.mean(ITEMS["chance"]))


def grid(figures):
  """Entries of a grid without test figures: method -> rate -> seed -> validation accuracy at the last step."""
  return [
    {"method": method, "label": method, "student": "s", "teacher": "t", "learning_rate": rate, "seed": seed,
     "validation": [{"step": 20, "overall": 1 - value}, {"step": 10, "overall": 0.99},
                    {"step": 40, "overall": value, "in_domain": 1 - value}]}
    for method, rates in figures.items() for rate, found in rates.items() for seed, value in found.items()
  ]  # fmt: skip


def test_the_best_rate_on_the_validation_set_is_chosen():
  # Means: 0.6, 0.7, 0.65; for b a tie of 0.1 + 0.2 + 0.3 in two orders, whose sums differ in the last bit.
  entries = grid({
    "a": {3e-4: {0: 0.6, 1: 0.6}, 1e-4: {0: 0.9, 1: 0.5}, 2e-4: {0: 0.6, 1: 0.7}},
    "b": {3e-4: {0: 0.1, 1: 0.2, 2: 0.3}, 2e-4: {0: 0.3, 1: 0.2, 2: 0.1}, 1e-4: {0: 0.1, 1: 0.1, 2: 0.1}},
  })  # fmt: skip
  assert studies.chosen_rates(entries) == {"a": 1e-4, "b": 2e-4}
  assert studies.rate_means(entries)["a"] == pytest.approx({1e-4: 0.7, 2e-4: 0.65, 3e-4: 0.6})
  assert studies.chosen_rates(entries, "in_domain") == {"a": 3e-4, "b": 1e-4}
  # Only seeds of all rates count; b has none.
  entries = grid({"a": {1e-4: {0: 0.5, 1: 0.9}, 2e-4: {0: 0.6}}, "b": {1e-4: {0: 0.5}, 2e-4: {1: 0.5}}})
  assert studies.rate_means(entries) == {"a": {1e-4: 0.5, 2e-4: 0.6}} and studies.chosen_rates(entries) == {"a": 2e-4}
  with pytest.raises(ValueError, match="a has two entries of seed 0"):
    studies.methods([entry for entry in entries if entry["method"] == "a" and entry["seed"] == 0])
  entries[0]["validation"] = entries[0]["validation"][:1]
  with pytest.raises(ValueError, match="a was validated last at steps 20 and 40"):
    studies.rate_means(entries)


def test_stability():
  entries = [entry for entry in ENTRIES if entry["method"] == "grpo"]
  for entry, last in zip(entries, ([0.2, 0.5, 0.6, 0.7], [0.9, 0.6, 0.6, 0.6]), strict=True):
    entry["validation"] = [{"step": n, "out_of_domain": value} for n, value in enumerate(last)]
  found = studies.stability(entries, ITEMS)["grpo"]
  # Sample deviations of .5 .6 .7 and of three equal figures: 0.1 and 0.
  assert found["validations"] == pytest.approx(0.05)
  ends = [entry["test"]["out_of_domain"] for entry in entries]
  assert found["seeds"] == pytest.approx(abs(ends[0] - ends[1]) / np.sqrt(2), abs=1e-6)
  assert found["seeds_interval"] == pytest.approx((0.446 * found["seeds"], 31.910 * found["seeds"]), rel=1e-3)
  alone = studies.stability(entries[:1], ITEMS)["grpo"]
  assert alone["seeds"] is alone["seeds_interval"] is None
  assert studies.stability(ENTRIES[:2], ITEMS) == {}
