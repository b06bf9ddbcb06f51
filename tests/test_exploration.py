"""Exploration: rounds, acceptance, slots and figures, on candidates made by hand."""

import numpy as np
import pytest

from kepo_jax import exploration

GOOD = "<think> the left lobe is dark </think><answer> B </answer>"


def candidate(text=GOOD, *, accurate=True, well_formed=True, hint="look left"):
  tokens = np.arange(4, dtype=np.int32)
  return exploration.Candidate(
    tokens=tokens,
    logps=np.zeros(4, np.float32),
    mask=np.ones(4, bool),
    text=text,
    hint=hint,
    accurate=accurate,
    well_formed=well_formed,
  )


class Student:
  """Fails until round `succeeds_at`, then all its candidates are accepted; remembers what it was asked."""

  def __init__(self, succeeds_at, candidates=2):
    self.succeeds_at, self.candidates, self.calls, self.asked = succeeds_at, candidates, [], []

  def ask_hints(self, rows, attempt):
    self.asked.append(tuple(rows))
    return [f"<hint> round {attempt} for {row} </hint>" for row in rows]

  def sample_hinted(self, rows, hints, attempt):
    self.calls.append((tuple(rows), tuple(hints)))
    return [[candidate(accurate=attempt >= self.succeeds_at[row]) for _ in range(self.candidates)] for row in rows]


def explore(student, failed, rounds=5, replacements=2, **settings):
  return exploration.explore(
    failed, student.ask_hints, student.sample_hinted, rounds=rounds, replacements=replacements, **settings
  )


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


# ---- acceptance ----

FLAWS = {"accurate": {"accurate": False}, "well_formed": {"well_formed": False}, "silent": {"text": "the hint says B"}}


@pytest.mark.parametrize(
  ("settings", "forgiven"),
  [
    ({}, set()),
    ({"rule": "accurate_and_formatted"}, set()),
    ({"rule": "accurate"}, {"well_formed"}),
    ({"rule": "all_or_none"}, set()),
    ({"leak_filter": False}, {"silent"}),
    ({"rule": "accurate", "leak_filter": False}, {"well_formed", "silent"}),
  ],
)
def test_which_flaws_a_rule_forgives(settings, forgiven):
  accept = exploration.Acceptance(**settings)
  assert len(accept([candidate()])) == 1
  assert {name for name, flaw in FLAWS.items() if accept([candidate(**flaw)])} == forgiven


def test_candidates_are_accepted_one_by_one_in_their_order():
  good, wrong, other = candidate(), candidate(accurate=False), candidate("<think>b</think><answer> B </answer>")
  assert exploration.Acceptance()([good, wrong, other]) == [good, other]
  assert exploration.Acceptance()([wrong]) == exploration.Acceptance()([]) == []


def test_all_or_none():
  accept = exploration.Acceptance("all_or_none")
  good = [candidate() for _ in range(3)]
  assert accept(good) == good
  for flaw in FLAWS.values():
    assert accept([*good, candidate(**flaw)]) == []
  # Without the filter a leak is no flaw, alone or together.
  leaking = [*good, candidate(**FLAWS["silent"])]
  assert exploration.Acceptance("all_or_none", leak_filter=False)(leaking) == leaking
  assert accept([]) == []


def test_quoted_words_are_refused_where_they_are_counted():
  hint = "The dark rim on the left"  # six words
  quoting = candidate("<think> A dark rim: on the left! </think><answer> B </answer>", hint=hint)  # the last five
  accepted = [bool(exploration.Acceptance(quoted_words=words)([quoting])) for words in (0, 4, 5, 6, 12)]
  assert accepted == [True, False, False, True, True]
  assert not quoting.quotes_hint  # the logged figure counts twelve, whatever is refused


def test_an_unknown_rule_is_refused():
  with pytest.raises(ValueError, match="exploration.acceptance='some' is unknown; use one of .*all_or_none"):
    exploration.Acceptance("some")([])


# ---- triggers ----


@pytest.mark.parametrize(
  ("trigger", "rows"),
  [("accuracy_all_zero", [1, 2, 4]), ("reward_all_zero", [1, 4]), ("always", [0, 1, 2, 3, 4]), ("never", [])],
)
def test_triggers(trigger, rows):
  # One accurate; nothing; well formed alone, which is rewarded; graded accuracy; punished.
  accuracy = np.array([[0, 1], [0, 0], [0, 0], [0.5, 0], [0, 0]], np.float32)
  total = np.array([[0, 2], [0, 0], [1, 0], [0.5, 0], [-0.1, 0]], np.float32)
  assert exploration.triggered(accuracy, total, trigger) == rows


def test_an_unknown_trigger_is_refused():
  with pytest.raises(ValueError, match="exploration.trigger='sometimes' is unknown; use one of .*'always'"):
    exploration.triggered(np.zeros((1, 2)), np.zeros((1, 2)), "sometimes")


# ---- rounds ----


def test_each_prompt_stops_when_it_has_enough_and_gets_a_new_hint_each_round():
  student = Student({2: 1, 5: 3})
  outcome = explore(student, [2, 5])
  assert [rows for rows, _ in student.calls] == [(2, 5), (5,), (5,)]
  assert student.calls[2][1] == ("round 3 for 5",)
  assert [c.attempt for c in outcome.accepted[2]] == [1, 1]
  assert [c.attempt for c in outcome.accepted[5]] == [3, 3]
  assert outcome.hints_asked == 4 and student.asked == [(2, 5), (5,), (5,)]


def test_no_more_than_the_wanted_replacements():
  outcome = explore(Student({0: 1}, candidates=7), [0])
  assert len(outcome.accepted[0]) == 2
  assert len(outcome.candidates[0]) == 7


def test_everything_that_was_tried_is_kept():
  student = Student({2: 1, 5: 2}, candidates=3)
  outcome = explore(student, [2, 5])
  assert outcome.hints == {2: ["<hint> round 1 for 2 </hint>"], 5: [f"<hint> round {b} for 5 </hint>" for b in (1, 2)]}
  tried = {row: [(c.attempt, c.accurate) for c in candidates] for row, candidates in outcome.candidates.items()}
  assert tried == {2: [(1, True)] * 3, 5: [(1, False)] * 3 + [(2, True)] * 3}
  # The accepted ones are among them, as the same objects.
  assert all(any(c is each for each in outcome.candidates[row]) for row in (2, 5) for c in outcome.accepted[row])


def test_one_accepted_candidate_keeps_asking_for_the_second():
  student = Student({0: 1}, candidates=1)
  outcome = explore(student, [0])
  assert [c.attempt for c in outcome.accepted[0]] == [1, 2]


def test_what_is_accepted_is_up_to_the_rule():
  student = Student({0: 1}, candidates=3)
  student.sample_hinted = lambda rows, hints, attempt: [
    [candidate(well_formed=False), candidate(), candidate(accurate=attempt == 2, well_formed=False)]
  ]
  # Per round: by default the second alone; by accuracy the first two; together none (the first is never well formed),
  # or, by accuracy, all three of the second round, of which two are wanted.
  attempts = {
    rule: [c.attempt for c in explore(student, [0], rounds=2, accept=exploration.Acceptance(rule)).accepted[0]]
    for rule in exploration.RULES
  }
  assert attempts == {
    "accurate_and_formatted": [1, 2],
    "accurate": [1, 1],
    "all_or_none": [],
    "all_or_none_accurate": [2, 2],
  }


def test_all_or_none_looks_at_each_prompt_and_round_alone():
  student = Student({0: 1, 1: 2}, candidates=3)
  outcome = explore(student, [0, 1], accept=exploration.Acceptance("all_or_none"))
  assert [c.attempt for c in outcome.accepted[0]] == [1, 1]  # three were good, two are wanted
  assert [c.attempt for c in outcome.accepted[1]] == [2, 2]


def test_nothing_accepted_leaves_the_group():
  outcome = explore(Student({0: 9}), [0])
  assert outcome.accepted == {0: []}
  assert exploration.injections(outcome, 8, seed=(0, 0)) == []


@pytest.mark.parametrize("hints", exploration.HINTS)
@pytest.mark.parametrize("budget", [{"rounds": 0}, {"replacements": 0}])
def test_no_budget_asks_for_nothing(budget, hints):
  student = Student({0: 1})
  outcome = explore(student, [0], hints=hints, **budget)
  assert outcome == exploration.Exploration(accepted={0: []}, candidates={0: []}, hints={0: []})
  assert (outcome.hints_asked, outcome.hints_unparsed) == (0, 0)
  assert student.calls == student.asked == []


def test_unparsed_hints_are_counted_and_survived():
  student = Student({0: 1, 1: 1})
  student.ask_hints = lambda rows, attempt: ["no tags" if row == 0 else "<hint> ok </hint>" for row in rows]
  outcome = explore(student, [0, 1], rounds=3)
  assert (outcome.hints_asked, outcome.hints_unparsed) == (4, 3)
  assert not outcome.accepted[0]
  assert len(outcome.accepted[1]) == 2
  assert [rows for rows, _ in student.calls] == [(1,)]  # without a hint nothing is sampled


def test_a_hint_that_is_given_once_is_asked_once():
  student = Student({2: 1, 5: 3})
  outcome = explore(student, [2, 5], hints="once")
  assert student.asked == [(2, 5)] and outcome.hints_asked == 2
  first = [f"round 1 for {row}" for row in (2, 5)]
  assert student.calls == [((2, 5), tuple(first)), ((5,), (first[1],)), ((5,), (first[1],))]
  assert [c.attempt for c in outcome.accepted[5]] == [3, 3]


def test_a_hint_that_cannot_be_parsed_is_asked_again_in_the_next_round():
  student = Student({0: 9, 1: 9})
  replies = {(0, 1): "<hint> </hint>", (0, 2): "none", (0, 3): "<hint> third </hint>", (1, 1): "<hint> first </hint>"}
  asked = []

  def ask_hints(rows, attempt):
    asked.append((tuple(rows), attempt))
    return [replies[row, attempt] for row in rows]

  student.ask_hints = ask_hints
  outcome = explore(student, [0, 1], rounds=4, hints="once")
  assert asked == [((0, 1), 1), ((0,), 2), ((0,), 3)]
  assert (outcome.hints_asked, outcome.hints_unparsed) == (4, 2)
  assert outcome.hints == {row: [text for (of, _), text in replies.items() if of == row] for row in (0, 1)}
  assert student.calls == [((1,), ("first",))] * 2 + [((0, 1), ("third", "first"))] * 2


def test_unknown_hints_are_refused():
  with pytest.raises(ValueError, match="exploration.hints='twice' is unknown; use one of .*'once'"):
    explore(Student({}), [], hints="twice")


# ---- slots and figures ----


def test_slots_are_distinct_repeatable_and_depend_on_the_seed():
  outcome = explore(Student({0: 1, 3: 1}, candidates=2), [0, 3])
  first = exploration.injections(outcome, 8, seed=(0, 11))
  slots = [(i.prompt, i.slot) for i in first]
  assert len(set(slots)) == 4
  assert slots == [(i.prompt, i.slot) for i in exploration.injections(outcome, 8, seed=(0, 11))]
  draws = {tuple(i.slot for i in exploration.injections(outcome, 8, seed=(0, step))) for step in range(20)}
  assert len(draws) > 10


def test_slots_lie_among_the_rollouts_and_each_is_drawn():
  outcome = explore(Student({3: 1}), [3])
  draws = [exploration.injections(outcome, 3, seed=(0, step)) for step in range(40)]
  assert all(len({i.slot for i in placed}) == 2 for placed in draws)
  assert {i.slot for placed in draws for i in placed} == {0, 1, 2}
  assert {i.prompt for placed in draws for i in placed} == {3}
  assert [i.candidate for i in draws[0]] == outcome.accepted[3]


def test_a_prompt_has_the_slots_that_it_has_without_the_others():
  alone = exploration.injections(explore(Student({3: 1}), [3]), 8, seed=(0, 4))
  together = exploration.injections(explore(Student({0: 1, 3: 1}), [0, 3]), 8, seed=(0, 4))
  assert [i.slot for i in together if i.prompt == 3] == [i.slot for i in alone]


def test_metrics():
  student = Student({0: 1, 1: 3, 2: 9})
  metrics = exploration.exploration_metrics(explore(student, [0, 1, 2], rounds=3), prompts=8, rounds=3)
  # Prompt 0 asks once, prompts 1 and 2 three times each.
  assert metrics["hint/trigger_rate"] == 3 / 8
  assert metrics["hint/attempts"] == 7
  assert metrics["hint/parse_failure_rate"] == 0
  assert [metrics[f"hint/accept_rate@{b}"] for b in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 2 / 3])


def test_rates_of_leaks_quotations_and_unparsed_hints():
  words = "one two three four five six seven eight nine ten eleven twelve"
  said = {0: [candidate(f"so {words}", hint=words), candidate("the hint says B"), candidate()], 1: [candidate()]}
  hints = {0: ["<hint> one </hint>", "none", "<hint> two </hint>"], 1: ["<hint></hint>", "<hint> three </hint>"]}
  outcome = exploration.Exploration(accepted={0: [], 1: []}, candidates=said, hints=hints)
  assert exploration.exploration_metrics(outcome, prompts=4, rounds=1) == {
    "hint/trigger_rate": 2 / 4,
    "hint/attempts": 5.0,
    "hint/parse_failure_rate": 2 / 5,
    "hint/leak_rate": 1 / 4,
    "hint/quote_rate": 1 / 4,
    "hint/accept_rate@1": 0.0,
  }


def test_metrics_without_failures_have_no_rates():
  metrics = exploration.exploration_metrics(explore(Student({}), []), prompts=8, rounds=5)
  assert metrics == {"hint/trigger_rate": 0.0, "hint/attempts": 0.0}
