"""Reading validation curves at the same cost."""

import pytest

from kepo_jax.evaluation import equal_cost


def training(method, seed, points, *, teacher=0.0):
  """An entry with validation records of (step, cost, accuracy)."""
  records = [
    {"step": step, "in_domain": value, "out_of_domain": value / 2, "overall": value / 4, "modalities": {"CT": value},
     "cost": {"student_tokens": cost - teacher, "teacher_tokens": teacher, "seconds": cost / 10}}
    for step, cost, value in points
  ]  # fmt: skip
  return {"method": method, "seed": seed, "learning_rate": 1e-4, "validation": records, "cost": records[-1]["cost"]}


_BEFORE = {"step": 0, "in_domain": 0.2, "out_of_domain": 0.1, "overall": 0.05, "modalities": {"CT": 0.3}}
START = {"method": "start", "seed": None, "validation": [_BEFORE]}
CHEAP = [training("cheap", seed, [(10, 50, 0.4), (20, 100, 0.6 + seed / 10)]) for seed in (0, 1)]
DEAR = [training("dear", 0, [(10, 200, 0.8), (20, 400, 0.9)], teacher=20)]


def test_a_curve_begins_with_the_untrained_model():
  steps, values = equal_cost.validation_curve(DEAR[0], START, "in_domain")
  assert (steps.tolist(), values.tolist()) == ([0, 10, 20], [0.2, 0.8, 0.9])
  tokens, values = equal_cost.validation_curve(DEAR[0], START, "CT", "tokens")
  assert (tokens.tolist(), values.tolist()) == ([0, 200, 400], [0.3, 0.8, 0.9])
  seconds, _ = equal_cost.validation_curve(DEAR[0], None, "in_domain", "seconds")
  assert seconds.tolist() == [20, 40]
  own = training("own", 0, [(0, 0, 0.25), (10, 50, 0.5)])  # validated before its first step
  assert equal_cost.validation_curve(own, START, "in_domain")[1].tolist() == [0.25, 0.5]


def test_accuracy_at_the_smallest_final_cost():
  found = equal_cost.accuracy_at_cost([START, *CHEAP, *DEAR], "tokens")
  # Both trainings of cheap end at 100 tokens; dear is then half way from 0.2 at 0 to 0.8 at 200.
  assert found["cheap"]["in_domain"] == pytest.approx(
    {"mean": 0.65, "low": 0.6, "high": 0.7, "seeds": 2, "budget": 100}
  )
  assert found["dear"]["in_domain"]["mean"] == pytest.approx(0.5)
  assert found["dear"]["out_of_domain"]["mean"] == pytest.approx(0.25)
  assert equal_cost.accuracy_at_cost([START, *CHEAP, *DEAR], "seconds")["dear"]["overall"]["budget"] == 10


def test_a_method_that_ends_before_is_beyond_its_budget():
  found = equal_cost.accuracy_at_cost([START, *CHEAP, *DEAR], "tokens", budget=300)
  assert found["cheap"]["in_domain"] == {"mean": None, "final": 100, "seeds": 2, "budget": 300}
  assert found["dear"]["in_domain"]["mean"] == pytest.approx(0.85)
  short = training("mixed", 1, [(10, 60, 0.5), (20, 90, 0.6)])  # one seed is enough
  found = equal_cost.accuracy_at_cost([CHEAP[0] | {"method": "mixed"}, short], "tokens", budget=98)
  assert found["mixed"]["in_domain"]["mean"] is None
  # A few percent are no difference.
  found = equal_cost.accuracy_at_cost([START, *CHEAP], "tokens", budget=104)
  assert found["cheap"]["in_domain"]["mean"] == pytest.approx(0.65)  # of the end, at 100
  assert equal_cost.accuracy_at_cost([START, *CHEAP], "tokens", budget=106)["cheap"]["in_domain"]["mean"] is None


def test_what_costs_nothing_sets_no_budget():
  free = training("free", 0, [(10, 0, 0.3), (20, 0, 0.4)])
  assert equal_cost.smallest_budget([START, free, *DEAR], "tokens") == 400
  assert equal_cost.accuracy_at_cost([free, *DEAR], "tokens")["free"]["in_domain"]["mean"] is None


def test_differences_at_the_same_cost_are_paired_by_seed():
  dear = [training("dear", seed, [(10, 200, 0.8), (20, 400, 0.9)]) for seed in (1, 2)]
  found = equal_cost.differences_at_cost([START, *CHEAP, *dear], "cheap", "in_domain", "tokens", budget=100)
  # Of the seed that both have: half way from 0.2 to 0.8, less 0.7.
  assert found == {"dear": {"mean": pytest.approx(-0.2), "low": None, "high": None, "seeds": 1}}
  both = [training("dear", seed, [(10, 100, 0.5 - seed / 10)]) for seed in (0, 1)]
  (gap,) = equal_cost.differences_at_cost([*CHEAP, *both], "cheap", "in_domain", "tokens", budget=100).values()
  assert gap["mean"] == pytest.approx(-0.2) and gap["low"] < -0.3 and gap["high"] > -0.1 and gap["seeds"] == 2
  # What ends before the budget is compared with nothing.
  for reference in ("cheap", "dear"):
    every = [START, *CHEAP, *DEAR]
    assert equal_cost.differences_at_cost(every, reference, "in_domain", "tokens", budget=300) == {}, reference
