"""Exploration: rounds, acceptance, slots and figures, on candidates made by hand."""

import numpy as np
import pytest

from kepo_jax import exploration

GOOD = "<think> the left lobe is dark </think><answer> B </answer>"


def candidate(text=GOOD, *, accurate=True, well_formed=True):
  tokens = np.arange(4, dtype=np.int32)
  return exploration.Candidate(
    tokens=tokens,
    logps=np.zeros(4, np.float32),
    mask=np.ones(4, bool),
    text=text,
    hint="look left",
    accurate=accurate,
    well_formed=well_formed,
  )


class Student:
  """Fails until round `succeeds_at`, then all its candidates are accepted; remembers what it was asked."""

  def __init__(self, succeeds_at, candidates=2):
    self.succeeds_at, self.candidates, self.calls = succeeds_at, candidates, []

  def ask_hints(self, rows, attempt):
    return [f"<hint> round {attempt} for {row} </hint>" for row in rows]

  def sample_hinted(self, rows, hints, attempt):
    self.calls.append((tuple(rows), tuple(hints)))
    return [[candidate(accurate=attempt >= self.succeeds_at[row]) for _ in range(self.candidates)] for row in rows]


def explore(student, failed, rounds=5, replacements=2):
  return exploration.explore(failed, student.ask_hints, student.sample_hinted, rounds=rounds, replacements=replacements)


@pytest.mark.parametrize(
  "text",
  [
    "as the hint says, B",
    "The Hint points left",
    "the given answer is B",
    "since the correct answer was provided, B",
    "we were told that it is B",
    "following the advice, B",
    "as instructed, it is B",
    "following the given hint, B",
    "the answer was provided",
  ],
)
def test_texts_that_reveal_help(text):
  assert exploration.reveals_help(text)


@pytest.mark.parametrize(
  "text",
  [
    GOOD,
    "given the image, the answer is B",
    "no chintz, white tissue",
    "the bright rim hints at a tumour",
    "as suggested by the dark signal",
    "a hint of contrast, so the lesion provided option B is right",
    "",
  ],
)
def test_texts_that_do_not(text):
  assert not exploration.reveals_help(text)


@pytest.mark.parametrize(
  ("text", "hint"),
  [
    ("<hint> look left </hint>", "look left"),
    ("so: <hint>two\nlines</hint> and <hint>another</hint>", "two\nlines"),
    ("<hint> </hint>", None),
    ("<hint> never closed", None),
    ("look left", None),
  ],
)
def test_parse_hint(text, hint):
  assert exploration.parse_hint(text) == hint


def test_a_quotation_is_twelve_words_in_a_row():
  hint = "The dark rim on the left side is thick, and it pushes the midline to the right"
  assert exploration.quotes("<think> the dark rim, on the left side is thick and it pushes the </think>", hint)
  assert not exploration.quotes("<think> the dark rim on the left side is thick and it </think>", hint)
  assert not exploration.quotes("anything", "a short hint")


@pytest.mark.parametrize("flaw", [{"accurate": False}, {"well_formed": False}, {"text": "the hint says B"}])
def test_a_flaw_is_not_accepted(flaw):
  assert candidate().accepted
  assert not candidate(**flaw).accepted


def test_triggered_by_prompts_without_an_accurate_rollout():
  accuracy = np.array([[0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]], np.float32)
  assert exploration.triggered(accuracy, "accuracy_all_zero") == [1, 3]
  assert exploration.triggered(accuracy, "never") == []
  with pytest.raises(ValueError, match="sometimes"):
    exploration.triggered(accuracy, "sometimes")


def test_each_prompt_stops_when_it_has_enough_and_gets_a_new_hint_each_round():
  student = Student({2: 1, 5: 3})
  outcome = explore(student, [2, 5])
  assert [rows for rows, _ in student.calls] == [(2, 5), (5,), (5,)]
  assert student.calls[2][1] == ("round 3 for 5",)
  assert [c.attempt for c in outcome.accepted[2]] == [1, 1]
  assert [c.attempt for c in outcome.accepted[5]] == [3, 3]
  assert outcome.hints_asked == 4


def test_no_more_than_the_wanted_replacements():
  outcome = explore(Student({0: 1}, candidates=7), [0])
  assert len(outcome.accepted[0]) == 2
  assert len(outcome.candidates) == 7


def test_one_accepted_candidate_keeps_asking_for_the_second():
  student = Student({0: 1}, candidates=1)
  outcome = explore(student, [0])
  assert [c.attempt for c in outcome.accepted[0]] == [1, 2]


def test_nothing_accepted_leaves_the_group():
  outcome = explore(Student({0: 9}), [0])
  assert outcome.accepted == {0: []}
  assert exploration.injections(outcome, 8, seed=(0, 0)) == []


@pytest.mark.parametrize("budget", [{"rounds": 0}, {"replacements": 0}])
def test_no_budget_asks_for_nothing(budget):
  student = Student({0: 1})
  assert explore(student, [0], **budget).hints_asked == 0
  assert student.calls == []


def test_unparsed_hints_are_counted_and_survived():
  student = Student({0: 1, 1: 1})
  student.ask_hints = lambda rows, attempt: ["no tags" if row == 0 else "<hint> ok </hint>" for row in rows]
  outcome = explore(student, [0, 1], rounds=3)
  assert outcome.hints_unparsed == 3
  assert not outcome.accepted[0]
  assert len(outcome.accepted[1]) == 2


def test_slots_are_distinct_repeatable_and_depend_on_the_seed():
  outcome = explore(Student({0: 1, 3: 1}, candidates=2), [0, 3])
  first = exploration.injections(outcome, 8, seed=(0, 11))
  slots = [(i.prompt, i.slot) for i in first]
  assert len(set(slots)) == 4
  assert slots == [(i.prompt, i.slot) for i in exploration.injections(outcome, 8, seed=(0, 11))]
  draws = {tuple(i.slot for i in exploration.injections(outcome, 8, seed=(0, step))) for step in range(20)}
  assert len(draws) > 10


def test_metrics():
  student = Student({0: 1, 1: 3, 2: 9})
  metrics = exploration.exploration_metrics(explore(student, [0, 1, 2], rounds=3), prompts=8, rounds=3)
  # Prompt 0 asks once, prompts 1 and 2 three times each.
  assert metrics["hint/trigger_rate"] == 3 / 8
  assert metrics["hint/attempts"] == 7
  assert metrics["hint/parse_failure_rate"] == 0
  assert [metrics[f"hint/accept_rate@{b}"] for b in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 2 / 3])


def test_metrics_without_failures_have_no_rates():
  metrics = exploration.exploration_metrics(explore(Student({}), []), prompts=8, rounds=5)
  assert metrics == {"hint/trigger_rate": 0.0, "hint/attempts": 0.0}
