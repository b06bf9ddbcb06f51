import dataclasses

import numpy as np
import pytest

from kepo_jax import rewards
from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts
from kepo_jax.objectives import gate
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.types import Rollouts
from tests.conftest import ROOT
from tests.training import cases
from tests.training.cases import BARE, END, NOTHING, RIGHT, SCORER, WRONG

ARRAYS = ("tokens", "mask", "logps", "texts", "injected", "supervised", "hints")
LENGTH = 16  # tokens of a completion in the phantom's vocabulary


@pytest.fixture(scope="module")
def processor():
  folder = ROOT / "experiments" / "assets" / "phantom" / "confused"
  return processor_lib.Processor.from_directory(folder, templates=prompts.TEMPLATES["brief"])


def rollouts_of(processor, texts):
  """Rollouts [P, G, T] that say `texts`."""
  tokens, mask = processor.completions([text for group in texts for text in group], LENGTH)
  shape = (len(texts), len(texts[0]), LENGTH)
  logps = -np.arange(tokens.size, dtype=np.float32).reshape(shape)
  return Rollouts(tokens=tokens.reshape(shape), mask=mask.reshape(shape), logps=logps)


def assert_equal(a, b):
  """Every field of two groups is equal."""
  assert list(a.examples) == list(b.examples)
  for name in ARRAYS:
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
  assert a.scores.keys() == b.scores.keys()
  for name, values in a.scores.items():
    np.testing.assert_array_equal(values, b.scores[name], err_msg=name)


def test_scored_groups_are_the_rollouts_decoded_and_scored(processor):
  texts, examples = [[RIGHT, WRONG], [BARE, NOTHING]], [cases.example("a"), cases.example("b")]
  rollouts = rollouts_of(processor, texts)
  found = rollouts_lib.scored_groups(processor, SCORER, examples, rollouts)
  for name in ("tokens", "mask", "logps"):
    np.testing.assert_array_equal(getattr(found, name), rollouts[name])
  assert found.texts.tolist() == texts and found.texts.dtype == object
  # The weights are 1 and 0.5.
  assert {name: values.tolist() for name, values in found.scores.items()} == {
    "accuracy": [[1, 0], [1, 0]], "format": [[1, 1], [0, 0]], "total": [[1.5, 0.5], [1, 0]],
  }  # fmt: skip
  assert not found.injected.any() and not found.supervised.any() and found.hints.tolist() == [["", ""], ["", ""]]
  # They are copies: injection writes into them.
  assert not np.shares_memory(found.tokens, rollouts.tokens) and found.tokens.flags.writeable


def test_what_lies_behind_the_mask_is_not_read(processor):
  rollouts = rollouts_of(processor, [["<answer>B</answer>"]])
  (word, *_), _ = processor.completions(["A"], 2)
  rollouts = rollouts.replace(tokens=np.where(rollouts.mask, rollouts.tokens, word[0]))
  found = rollouts_lib.scored_groups(processor, SCORER, [cases.example("a")], rollouts)
  # One text stays one: NumPy makes an array of another shape of some lists of texts.
  assert found.texts.tolist() == [["<answer>B</answer>"]] and found.scores["accuracy"].tolist() == [[1]]


def test_given_rollouts_repeat_what_was_written_and_are_not_cut(processor):
  texts = ["<answer> A</answer>", "<answer> B</answer>"]
  given = rollouts_lib.given_rollouts(processor, texts, 3, 6)
  assert (given.tokens == given.tokens[:, :1]).all()
  assert [processor.decode(given.tokens[:, g], given.mask[:, g]) for g in range(3)] == [texts] * 3
  # Tag, letter, tag and end token; the rest is padding.
  assert (given.mask == (np.arange(6) < 4)).all() and given.mask.shape == (2, 3, 6)
  assert (given.tokens[..., 3] == processor.end_ids[0]).all() and (given.tokens[..., 4:] == processor.pad_id).all()
  assert given.logps.dtype == np.float32 and given.logps.shape == (2, 3, 6) and not given.logps.any()


def test_candidates_are_judged_by_the_scorer(processor):
  texts = [[RIGHT, BARE, "the hint says <think></think><answer>B</answer>"], [WRONG, NOTHING, RIGHT], [RIGHT] * 3]
  rollouts = rollouts_of(processor, texts)
  examples = [cases.example("a"), cases.example("b", answer="A")]
  found = rollouts_lib.to_candidates(
    rollouts_lib.scored_groups(processor, SCORER, examples, rollouts), ["left", "right"]
  )
  assert [len(each) for each in found] == [3, 3]  # the third row is padding
  judged = [[(c.accurate, c.well_formed, c.leaks) for c in each] for each in found]
  assert judged == [
    [(True, True, False), (True, False, False), (True, False, True)],
    [(True, True, False), (False, False, False), (False, True, False)],  # the gold letter is A
  ]
  assert [[c.text for c in each] for each in found] == texts[:2]
  assert [c.scores["total"] for c in found[0]] == [1.5, 1.0, 1.0]
  assert [{c.hint for c in each} for each in found] == [{"left"}, {"right"}]
  for name in ("tokens", "mask", "logps"):
    np.testing.assert_array_equal(getattr(found[1][2], name), rollouts[name][1, 2])


def test_a_half_right_candidate_is_not_accurate(processor):
  graded = rewards.Scorer({"accuracy": (rewards.medvlm_accuracy, 1.0), "format": (rewards.strict_format, 1.0)})
  rollouts = rollouts_of(processor, [["<answer>B) two</answer>", "<answer>B</answer>"]])
  groups = rollouts_lib.scored_groups(processor, graded, [cases.example("a")], rollouts)
  (found,) = rollouts_lib.to_candidates(groups, ["left"])
  assert [c.accurate for c in found] == [False, True]


def test_supervised_rows_that_are_not_accepted_become_empty():
  groups = cases.mixed()
  whole = rollouts_lib.supervised_groups(groups)
  assert_equal(dataclasses.replace(whole, supervised=groups.supervised), groups)
  accepted = np.array([[True, False, True], [False, False, False]])
  found = rollouts_lib.supervised_groups(groups, accepted=accepted)
  assert found.mask.sum(axis=2).tolist() == [[4, 0, 1], [0, 0, 0]] and found.supervised.all()
  assert groups.mask.sum(axis=2).tolist() == [[4, 3, 1], [4, 2, 3]]  # as it was
  assert_equal(dataclasses.replace(found, mask=groups.mask, supervised=groups.supervised), groups)


def test_joined_and_selected():
  first = cases.mixed()
  second = cases.groups([[BARE, BARE, RIGHT], [RIGHT, RIGHT, RIGHT]], [[1, 1, 4], [4, 3, 2]], name="r")
  second = rollouts_lib.supervised_groups(second)
  first.hints[0, 1] = "left"
  first.injected[0, 1] = True
  for axis in (0, 1):
    found = rollouts_lib.joined(first, second, axis=axis)
    # More rollouts belong to the questions of the first; more prompts bring their own.
    ids = [each.id for each in found.examples]
    assert ids == ["set/q0", "set/q1", *(["set/r0", "set/r1"] if axis == 0 else [])]
    for name in ARRAYS:
      expected = np.concatenate([getattr(first, name), getattr(second, name)], axis)
      np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)
      assert getattr(found, name).dtype == getattr(first, name).dtype
    for name, values in found.scores.items():
      np.testing.assert_array_equal(values, np.concatenate([first.scores[name], second.scores[name]], axis), name)
  both = rollouts_lib.joined(first, second, axis=0)
  assert_equal(rollouts_lib.selected(both, [0, 1]), first)
  turned = rollouts_lib.selected(both, np.array([3, 0]))
  assert [each.id for each in turned.examples] == ["set/r1", "set/q0"]
  np.testing.assert_array_equal(turned.tokens, both.tokens[[3, 0]])
  np.testing.assert_array_equal(turned.scores["total"], both.scores["total"][[3, 0]])


def test_a_signal_is_any_difference_however_small():
  groups = cases.groups([[RIGHT] * 7] * 4, [[4] * 7] * 4)
  total = np.full((4, 7), 0.1, np.float32)
  assert total.std(axis=1).all()  # the mean of seven times 0.1 is rounded; 0.1 equals 0.1
  total[1, 6] = np.nextafter(np.float32(0.1), np.float32(1))  # the last of a group, by one bit
  total[2, 0] = 0.0
  groups.scores["total"] = total
  assert rollouts_lib.has_signal(groups).tolist() == [False, True, True, False]


def test_inject_replaces_a_row_and_its_scores():
  groups, before = cases.mixed(), cases.mixed()
  placed = [(1, 2, cases.candidate()), (1, 0, cases.candidate(BARE, "up", 60))]
  rollouts_lib.inject(groups, placed)
  assert groups.injected.tolist() == [[False] * 3, [True, False, True]]
  assert groups.tokens[1, 2].tolist() == [50, END, 0, 0] and groups.tokens[1, 0].tolist() == [60, END, 0, 0]
  assert groups.mask[1].sum(axis=1).tolist() == [2, 2, 2] and groups.logps[1, 0].tolist() == [-2, -2, 0, 0]
  assert groups.texts[1].tolist() == [BARE, WRONG, RIGHT] and groups.hints[1].tolist() == ["up", "", "look left"]
  # Bare: 1 + 0; wrong in the right format: 0 + 0.5; right: 1 + 0.5.
  assert groups.scores["total"][1].tolist() == [1, 0.5, 1.5]
  assert groups.scores["accuracy"][1].tolist() == [1, 0, 1] and groups.scores["format"][1].tolist() == [0, 1, 1]
  assert_equal(rollouts_lib.selected(groups, [0]), rollouts_lib.selected(before, [0]))
  np.testing.assert_array_equal(groups.tokens[1, 1], before.tokens[1, 1])


def test_gate_signals():
  # Accuracies 1 0 1 and 0 0 0, formats 1 1 0 and 0 1 1.
  for signal, expected in {
    "accuracy": [[1, 0, 1], [0, 0, 0]],
    "mean": [[1, 0.5, 0.5], [0, 0.5, 0.5]],
    "sum": [[2, 1, 1], [0, 1, 1]],
    "product": [[1, 0, 0], [0, 0, 0]],
  }.items():
    assert gate.SIGNALS[signal](cases.mixed().scores).tolist() == expected, signal


def test_truncated_rows_are_the_students_without_an_end_token():
  groups = cases.mixed()
  assert rollouts_lib.truncated(groups, (END,)).tolist() == [[False] * 3, [True, False, False]]
  # Any end id ends: this is the first token of the row that was cut off.
  assert not rollouts_lib.truncated(groups, (END, groups.tokens[1, 0, 0])).any()
  groups.supervised[1] = True
  assert not rollouts_lib.truncated(groups, (END,)).any()
  # An end token behind the mask ends nothing, though padding is often an end id as well.
  groups.mask[0, 0, 3] = False  # where its end token is
  groups.tokens[~groups.mask] = END
  assert rollouts_lib.truncated(groups, (END,)).tolist() == [[True, False, False], [False] * 3]
