"""Rewards by name, and the scorer that weighs and adds them."""

import dataclasses
import sys

import numpy as np
import pytest

from kepo_jax import rewards
from tests.test_rewards import BRAIN, RIGHT


@pytest.fixture
def own_module(tmp_path, monkeypatch):
  """A package of the user's, with a reward in a module of it."""
  folder = tmp_path / "my_rewards"
  folder.mkdir()
  (folder / "__init__.py").write_text("LIMIT = 3\n")
  (folder / "lengths.py").write_text(
    "def brevity(completion, example):\n  return 1 / (1 + len(completion.split()) + len(example.options))\n"
  )
  (folder / "broken.py").write_text("import a_module_that_nobody_has\n")
  monkeypatch.syspath_prepend(tmp_path)
  yield
  for name in [name for name in sys.modules if name.split(".")[0] == "my_rewards"]:
    del sys.modules[name]


def test_a_reward_of_ones_own_by_its_dotted_path(own_module):
  brevity = rewards.named_reward("my_rewards.lengths.brevity")
  assert brevity("two words", BRAIN) == 1 / 6  # 1 + 2 words + 3 options
  found = rewards.parsed_rewards("my_rewards.lengths.brevity:0.5")
  assert found == {"brevity": (brevity, 0.5)}


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("accurate", r"reward 'accurate' is neither one of \['accuracy', .*nor a dotted path"),
    ("", "reward '' is neither"),
    (".brevity", "reward '.brevity' is neither"),
    ("..lengths.brevity", "reward '..lengths.brevity' is neither"),  # relative to what?
    ("nowhere.brevity", r"reward 'nowhere.brevity' cannot be imported \(No module named 'nowhere'\).*PYTHONPATH"),
    ("my_rewards.nothing.brevity", "No module named 'my_rewards.nothing'"),
    ("my_rewards.broken.brevity", "No module named 'a_module_that_nobody_has'"),
    ("my_rewards.lengths.clarity", "has no attribute 'clarity'"),
    ("my_rewards.LIMIT", "reward 'my_rewards.LIMIT' is no function"),
  ],
)
def test_a_reward_that_cannot_be_found_is_named(own_module, name, message):
  with pytest.raises(ValueError, match=message):
    rewards.named_reward(name)


def test_parsed_rewards_keep_their_order_and_weights():
  found = rewards.parsed_rewards(" lenient_accuracy:0.5,medvlm_accuracy: -1e-2 , ")
  assert list(found.items()) == [
    ("lenient_accuracy", (rewards.lenient_accuracy, 0.5)),
    ("medvlm_accuracy", (rewards.medvlm_accuracy, -0.01)),
  ]
  assert rewards.parsed_rewards("") == rewards.parsed_rewards(" , ") == {}


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("lenient_accuracy", "reward 'lenient_accuracy' does not read as name:weight"),
    ("lenient_accuracy:", "does not read as name:weight"),
    ("lenient_accuracy:much", "does not read as name:weight"),
    (":0.5", "reward ':0.5' does not read"),
    ("lenient_accuracy:nan", "does not read as name:weight"),
    ("lenient_accuracy:inf", "does not read as name:weight"),
    ("lenient_accuracy=0.5", "does not read as name:weight"),
    ("format:1, unheard_of:1", "reward 'unheard_of' is neither"),
    ("format:1, format:2", "two rewards are called 'format'"),
    ("lenient_accuracy:1, kepo_jax.rewards.lenient_accuracy:1", "two rewards are called 'lenient_accuracy'"),
  ],
)
def test_rewards_that_do_not_read_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    rewards.parsed_rewards(text)


# ---- the scorer ----

TEXTS = [[RIGHT, "B"], ["<answer>A</answer>", "<think></think><answer></answer>"]]


def length(completion, example):
  """Characters of a completion."""
  del example
  return len(completion)


def scorer(accuracy=1.0, form=1.0, combination="sum", **more):
  pair = {"accuracy": (rewards.accuracy, accuracy), "format": (rewards.strict_format, form)}
  return rewards.Scorer(pair | more, combination)


def test_the_scorer_weighs_and_adds():
  scores = scorer(form=0.5)(TEXTS, [BRAIN, BRAIN])
  # Accurate and well formed; accurate; neither; well formed alone.
  expected = {"accuracy": [[1, 1], [0, 0]], "format": [[1, 0], [0, 1]], "total": [[1.5, 1.0], [0.0, 0.5]]}
  assert {name: values.tolist() for name, values in scores.items()} == expected
  assert {(values.dtype.name, values.shape) for values in scores.values()} == {("float32", (2, 2))}


def test_each_group_is_scored_with_its_own_question():
  # The gold letters are B and A.
  chest = dataclasses.replace(BRAIN, answer="A")
  assert scorer()([["B", "A"], ["B", "A"]], [BRAIN, chest])["accuracy"].tolist() == [[1, 0], [0, 1]]


def test_more_rewards_are_added():
  # 2 a + 0 f - 0.25 length: RIGHT is 34 characters long, "B" one.
  total = scorer(2.0, 0.0, length=(length, -0.25))([[RIGHT, "B"]], [BRAIN])["total"]
  assert total.tolist() == [[2 - 8.5, 2 - 0.25]]


def test_the_product_stands_in_place_of_accuracy_and_format():
  # 3 a f + 0.25 length; the weight of format is idle.
  scores = scorer(3.0, 7.0, "product", length=(length, 0.25))(TEXTS, [BRAIN, BRAIN])
  lengths = np.array([[len(text) for text in group] for group in TEXTS])
  assert scores["total"].tolist() == (0.25 * lengths + [[3, 0], [0, 0]]).tolist()
  assert scores["accuracy"].tolist() == [[1, 1], [0, 0]] and scores["format"].tolist() == [[1, 0], [0, 1]]


def test_a_product_of_a_graded_accuracy():
  graded = rewards.Scorer(
    {"accuracy": (rewards.medvlm_accuracy, 1.0), "format": (rewards.strict_format, 1.0)}, "product"
  )
  texts = [[RIGHT, "<think>a</think><answer>B) Brain</answer>", "<answer>B) Brain</answer>"]]
  assert graded(texts, [BRAIN])["total"].tolist() == [[1, 0.5, 0]]


@pytest.mark.parametrize("combination", rewards.COMBINATIONS)
def test_equal_rewards_give_bitwise_equal_totals(combination):
  # 0.1 and 0.7 are no binary fractions, so every order of additions would round in its own way; groups without a
  # signal are told by exact equality.
  fraction = (lambda text, example: 1 / 3, 0.7)
  weighted = scorer(0.1, 0.3, combination, third=fraction)
  for text in (RIGHT, "B", "<answer>A</answer>"):
    total = weighted([[text] * 8], [BRAIN])["total"]
    assert (total == total[:, :1]).all()
    # A row that is scored alone, as an injected one is, has the bits that it has in its group.
    assert weighted([[text]], [BRAIN])["total"][0, 0] == total[0, 3]
    mixed = weighted([["C", text, RIGHT], [text, "<think>", text]], [BRAIN, BRAIN])["total"]
    assert {mixed[0, 1], mixed[1, 0], mixed[1, 2]} == {total[0, 0]}


def test_nothing_to_score():
  assert {name: values.shape for name, values in scorer()([], []).items()} == {
    "accuracy": (0, 0),
    "format": (0, 0),
    "total": (0, 0),
  }


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("accuracy",), r"rewards \['accuracy'\] must hold accuracy and format"),
    (("format", "mine"), "must hold accuracy and format"),
    ((), r"rewards \[\] must hold"),
    (("accuracy", "format", "total"), "none called 'total'"),
  ],
)
def test_the_scorer_needs_accuracy_and_format_and_keeps_the_total(names, message):
  with pytest.raises(ValueError, match=message):
    rewards.Scorer({name: (rewards.accuracy, 1.0) for name in names})


def test_an_unknown_combination_is_refused():
  with pytest.raises(ValueError, match=r"combination 'maximum' is unknown; use one of \('sum', 'product'\)"):
    scorer(combination="maximum")


@pytest.mark.parametrize(
  "value", [float("nan"), None, "1", b"1", 1j, np.float32("inf"), -np.inf, np.array([1.0, 2.0]), 10**400, 1e39]
)
def test_a_reward_that_is_no_finite_number_is_refused(value):
  # 1e39 is finite, but not as float32.
  with pytest.raises(ValueError, match=r"reward 'mine' gave .* for question x/1; it must return a finite number"):
    scorer(mine=(lambda text, example: value, 1.0))([["B"]], [BRAIN])


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.float16(1), np.int64(1), np.bool_(True), np.array(1.0)])
def test_every_finite_number_is_taken(value):
  scores = scorer(0.0, 0.0, mine=(lambda text, example: value, 2.0))([["B"]], [BRAIN])
  assert (scores["mine"].tolist(), scores["total"].tolist()) == ([[1.0]], [[2.0]])


@pytest.mark.parametrize("entry", [rewards.accuracy, (rewards.accuracy,), (1.0, rewards.accuracy)])
def test_a_reward_without_its_weight_is_refused(entry):
  pair = {"accuracy": (rewards.accuracy, 1.0), "format": (rewards.strict_format, 1.0)}
  with pytest.raises(ValueError, match=r"reward 'mine' .* pair of function and weight"):
    rewards.Scorer(pair | {"mine": entry})
