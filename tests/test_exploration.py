import numpy as np
import pytest

from kepo_jax import exploration
from tests.training import cases

EXAMPLE = cases.example("q")  # its gold option is B, two
GOOD = "<think> the left lobe is dark </think><answer> B </answer>"


def candidate(text=GOOD, *, accurate=True, well_formed=True, hint="look left"):
  arrays = {"tokens": np.arange(4, dtype=np.int32), "logps": np.zeros(4, np.float32), "mask": np.ones(4, bool)}
  return exploration.Candidate(**arrays, text=text, hint=hint, accurate=accurate, well_formed=well_formed)


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


def explore(student, failed, rounds=5, **settings):
  settings = {"replacements": 2} | settings
  return exploration.explore(failed, student.ask_hints, student.sample_hinted, rounds=rounds, **settings)


def test_texts_that_reveal_help():
  revealing = (
    *("as the hint says, B", "The Hint points left", "following the given hint, B", "following the advice, B"),
    *("the given answer is B", "since the correct answer was provided, B", "the answer was provided"),
    *("we were told that it is B", "as instructed, it is B"),
  )
  innocent = (
    *(GOOD, "given the image, the answer is B", "no chintz, white tissue", "the bright rim hints at a tumour"),
    *("as suggested by the dark signal", "a hint of contrast, so the lesion provided option B is right", ""),
  )
  expected = dict.fromkeys(revealing, True) | dict.fromkeys(innocent, False)
  assert {text: exploration.reveals_help(text) for text in expected} == expected


def test_parse_hint():
  expected = {
    "<hint> look left </hint>": "look left", "so: <hint>two\nlines</hint> and <hint>another</hint>": "two\nlines",
    "<hint> </hint>": None, "<hint> never closed": None, "look left": None,
  }  # fmt: skip
  assert {text: exploration.parse_hint(text) for text in expected} == expected


def test_a_quotation_is_twelve_words_in_a_row():
  hint = "The dark rim on the left side is thick, and it pushes the midline to the right"
  assert exploration.quotes("<think> the dark rim, on the left side is thick and it pushes the </think>", hint)
  assert not exploration.quotes("<think> the dark rim on the left side is thick and it </think>", hint)
  assert not exploration.quotes("anything", "a short hint")


FLAWS = {"accurate": {"accurate": False}, "well_formed": {"well_formed": False}, "silent": {"text": "the hint says B"}}


def test_which_flaws_a_rule_forgives():
  good, other = candidate(), candidate("<think>b</think><answer> B </answer>")
  for settings, forgiven in (
    ({}, set()),
    ({"rule": "all_or_none_accurate"}, {"well_formed"}),
    ({"leak_filter": False}, {"silent"}),
  ):
    accept = exploration.Acceptance(**settings)
    assert accept([good, other]) == [good, other] and accept([]) == []
    for name, flaw in FLAWS.items():
      flawed = candidate(**flaw)
      # What is refused takes the others along, or does not.
      left = [] if "rule" in settings else [good]
      assert accept([good, flawed]) == ([good, flawed] if name in forgiven else left), (settings, name)


def test_triggers():
  # One accurate; nothing; well formed alone, which is rewarded; graded accuracy; punished.
  accuracy = np.array([[0, 1], [0, 0], [0, 0], [0.5, 0], [0, 0]], np.float32)
  total = np.array([[0, 2], [0, 0], [1, 0], [0.5, 0], [-0.1, 0]], np.float32)
  expected = {"accuracy_all_zero": [1, 2, 4], "reward_all_zero": [1, 4], "always": [0, 1, 2, 3, 4], "never": []}
  assert {trigger: exploration.triggered(accuracy, total, trigger) for trigger in expected} == expected


def test_each_prompt_stops_when_it_has_enough_and_gets_a_new_hint_each_round():
  student = Student({2: 1, 5: 3}, candidates=3)
  outcome = explore(student, [2, 5])
  assert student.asked == [(2, 5), (5,), (5,)] and outcome.hints_asked == 4
  assert student.calls == [
    ((2, 5), ("round 1 for 2", "round 1 for 5")),
    *(((5,), (f"round {b} for 5",)) for b in (2, 3)),
  ]
  # Two are wanted; everything that was tried is kept, the accepted ones as the same objects.
  assert outcome.hints == {
    row: [f"<hint> round {b} for {row} </hint>" for b in range(1, n)] for row, n in ((2, 2), (5, 4))
  }
  tried = {row: [(c.attempt, c.accurate) for c in candidates] for row, candidates in outcome.candidates.items()}
  assert tried == {2: [(1, True)] * 3, 5: [(1, False)] * 3 + [(2, False)] * 3 + [(3, True)] * 3}
  for row, first in ((2, 0), (5, 6)):
    kept, accepted = outcome.candidates[row][first : first + 2], outcome.accepted[row]
    assert len(accepted) == 2 and all(x is y for x, y in zip(kept, accepted, strict=True))


def test_what_is_accepted_is_up_to_the_rule_for_each_prompt_and_round():
  def sample_hinted(rows, hints, attempt):
    right = attempt == 2
    mixed = [candidate(well_formed=False), candidate(), candidate(accurate=right)]
    return [[mixed, [candidate(accurate=right)] * 3][row] for row in rows]

  student = Student({})
  student.sample_hinted = sample_hinted
  # Of the first prompt, by default the second candidate of each round (two are wanted: no room for the third);
  # together, by accuracy, those of the second round.
  for rule, expected in (("accurate_and_formatted", [[1, 2], [2, 2]]), ("all_or_none_accurate", [[2, 2], [2, 2]])):
    accepted = explore(student, [0, 1], rounds=2, accept=exploration.Acceptance(rule)).accepted
    assert [[c.attempt for c in accepted[row]] for row in (0, 1)] == expected, rule


def test_a_hint_that_cannot_be_parsed_is_counted_and_asked_again_in_the_next_round():
  student = Student({0: 9, 1: 9})
  replies = {(0, 1): "<hint> </hint>", (0, 2): "none", (0, 3): "<hint> third </hint>", (1, 1): "<hint> first </hint>"}
  student.ask_hints = lambda rows, attempt: [replies[row, attempt] for row in rows]
  outcome = explore(student, [0, 1], rounds=4, hints="once")
  assert (outcome.hints_asked, outcome.hints_unparsed) == (4, 2)
  assert outcome.hints == {row: [text for (of, _), text in replies.items() if of == row] for row in (0, 1)}
  # Without a hint nothing is sampled.
  assert student.calls == [((1,), ("first",))] * 2 + [((0, 1), ("third", "first"))] * 2


def test_slots_are_distinct_and_belong_to_step_and_prompt():
  def slots_of(outcome, step):
    return [placed[:2] for placed in exploration.injections(outcome, 3, seed=(0, step))]

  outcome = explore(Student({0: 1, 3: 1}), [0, 3])
  injected = [candidate for _, _, candidate in exploration.injections(outcome, 3, seed=(0, 0))]
  assert injected == [*outcome.accepted[0], *outcome.accepted[3]]
  draws = [slots_of(outcome, step) for step in range(40)]
  assert draws == [slots_of(outcome, step) for step in range(40)] and all(len(set(placed)) == 4 for placed in draws)
  assert {slot for placed in draws for slot in placed} == {(prompt, slot) for prompt in (0, 3) for slot in range(3)}
  # Other steps and other prompts have other draws; a prompt has the slots that it has without the others.
  by_prompt = {prompt: [[slot for of, slot in placed if of == prompt] for placed in draws] for prompt in (0, 3)}
  assert len({tuple(slots) for slots in by_prompt[0]}) == 6 and by_prompt[0] != by_prompt[3]
  alone = explore(Student({3: 1}), [3])
  assert [[slot for _, slot in slots_of(alone, step)] for step in range(40)] == by_prompt[3]


def test_metrics():
  student = Student({0: 1, 1: 3, 2: 9, 3: 2}, candidates=1)
  metrics = exploration.exploration_metrics(
    explore(student, [0, 1, 2, 3], rounds=3), prompts=8, rounds=3, examples=[EXAMPLE] * 4
  )
  assert metrics["hint/trigger_rate"] == 4 / 8
  # One candidate a round, two are wanted: prompt 0 asks twice, the others three times each. The first that is accepted
  # comes in rounds 1, 3, never and 2.
  assert metrics["hint/attempts"] == 11 and metrics["hint/parse_failure_rate"] == 0
  assert [metrics[f"hint/accept_rate@{b}"] for b in (1, 2, 3)] == [1 / 4, 2 / 4, 3 / 4]


def test_rates_of_leaks_quotations_and_unparsed_hints():
  words = "one two three four five six seven eight nine ten eleven twelve"
  said = {0: [candidate(f"so {words}", hint=words), candidate("the hint says B"), candidate()], 1: [candidate()]}
  hints = {0: ["<hint> one </hint>", "none", "<hint> two </hint>"], 1: ["<hint></hint>", "<hint> three </hint>"]}
  outcome = exploration.Exploration(accepted={0: [], 1: []}, candidates=said, hints=hints)
  assert exploration.exploration_metrics(outcome, prompts=4, rounds=1, examples=[EXAMPLE] * 2) == {
    "hint/trigger_rate": 2 / 4, "hint/attempts": 5.0, "hint/parse_failure_rate": 2 / 5, "hint/answer_rate": 1 / 5,
    "hint/leak_rate": 1 / 4, "hint/quote_rate": 1 / 4, "hint/accept_rate@1": 0.0,
  }  # fmt: skip
  # Without failures there are no rates.
  nothing = exploration.exploration_metrics(explore(Student({}), []), prompts=8, rounds=5, examples=[])
  assert nothing == {"hint/trigger_rate": 0.0, "hint/attempts": 0.0}


def test_a_hint_may_name_the_answer():
  told = {"It is two.": True, "option B fits": True, "Two!": True, "b": False, "twofold": False, "A mass": False}
  assert {text: exploration.names_answer(text, EXAMPLE) for text in told} == told


@pytest.mark.parametrize("hints", exploration.HINTS)
def test_all_rounds_at_once_have_the_outcome_of_serial_rounds(hints):
  rows, rounds = [1, 2, 4, 6], 4
  texts = {(1, 1): "none", (2, 1): "<hint></hint>", (2, 3): "no", (6, 2): "none"}  # some hints cannot be parsed
  asks = []

  def text(row, attempt):
    return texts.get((row, attempt), f"<hint> round {attempt} for {row} </hint>")

  def completions(row, hint, attempt):
    right = (3 * row + attempt) % 5 < 2 and row != 6  # one prompt never succeeds
    return [candidate(accurate=right, hint=hint), candidate(accurate=right and row == 4, hint=hint)]

  def ask_all(rows, attempts):
    asks.append((list(rows), list(attempts)))
    return [[text(row, attempt) for attempt in attempts] for row in rows]

  settings = {"rounds": rounds, "replacements": 2, "hints": hints}
  serial = exploration.explore(
    rows,
    lambda rows, attempt: [text(row, attempt) for row in rows],
    lambda rows, hints, attempt: [completions(row, hint, attempt) for row, hint in zip(rows, hints, strict=True)],
    **settings,
  )
  at_once = exploration.explore_at_once(
    rows,
    ask_all,
    lambda pairs, hints: [completions(row, hint, b) for (row, b), hint in zip(pairs, hints, strict=True)],
    **settings,
  )
  assert asks == [(rows, [1, 2, 3, 4])]
  told = [
    [{row: [(c.attempt, c.hint, c.accurate) for c in tried] for row, tried in part.items()} for part in parts]
    for parts in ((outcome.accepted, outcome.candidates) for outcome in (serial, at_once))
  ]
  assert told[0] == told[1] and serial.hints == at_once.hints
  assert 0 < sum(map(len, serial.accepted.values())) < 2 * len(rows)
  assert exploration.explore_at_once([], ask_all, None, **settings).accepted == {} and len(asks) == 1
