import dataclasses
import sys

import numpy as np
import pytest

from kepo_jax import rewards
from tests.test_rewards import BRAIN, RIGHT


@pytest.fixture
def own_module(tmp_path, monkeypatch):
  """A package of the user's, with a reward in a module of it."""
  (tmp_path / "my_rewards").mkdir()
  for name, text in {
    "__init__": "LIMIT = 3\n",
    "lengths": "def brevity(completion, example):\n  return 1 / (1 + len(completion.split()) + len(example.options))\n",
    "broken": "import a_module_that_nobody_has\n",
  }.items():
    (tmp_path / "my_rewards" / f"{name}.py").write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  yield
  for name in [name for name in sys.modules if name.split(".")[0] == "my_rewards"]:
    del sys.modules[name]


def test_a_reward_of_ones_own_by_its_dotted_path(own_module):
  brevity = rewards.named_reward("my_rewards.lengths.brevity")
  assert brevity("two words", BRAIN) == 1 / 6  # 1 + 2 words + 3 options
  found = rewards.parsed_rewards("my_rewards.lengths.brevity:0.5")
  assert found == {"brevity": (brevity, 0.5)}


def test_a_reward_that_cannot_be_found_is_named(own_module):
  for name, message in (
    ("accurate", r"'accurate' is neither one of \['accuracy', .*nor a dotted path"),
    ("", "neither one of"),
    ("..lengths.brevity", "neither one of"),  # relative to what?
    ("nowhere.brevity", r"'nowhere.brevity' cannot be imported \(No module named 'nowhere'\).*PYTHONPATH"),
    ("my_rewards.broken.brevity", "No module named 'a_module_that_nobody_has'"),
    ("my_rewards.lengths.clarity", "has no attribute 'clarity'"),
    ("my_rewards.LIMIT", "'my_rewards.LIMIT' is no function"),
  ):
    with pytest.raises(ValueError, match=message):
      rewards.named_reward(name)


def test_parsed_rewards_keep_their_order_and_weights():
  found = rewards.parsed_rewards(" lenient_accuracy:0.5,medvlm_accuracy: -1e-2 , ")
  assert list(found.items()) == [
    ("lenient_accuracy", (rewards.lenient_accuracy, 0.5)),
    ("medvlm_accuracy", (rewards.medvlm_accuracy, -0.01)),
  ]
  assert rewards.parsed_rewards("") == rewards.parsed_rewards(" , ") == {}


def test_rewards_that_do_not_read_are_refused():
  unreadable = ("accuracy", "accuracy:much", ":0.5", "accuracy:nan", "accuracy:inf")
  for text, message in (
    *((text, f"'{text}' does not read as name:weight") for text in unreadable),
    ("format:1, unheard_of:1", "'unheard_of' is neither"),
    ("accuracy:1, kepo_jax.rewards.accuracy:1", "two rewards are called 'accuracy'"),
  ):
    with pytest.raises(ValueError, match=message):
      rewards.parsed_rewards(text)


TEXTS = [[RIGHT, "B"], ["<answer>A</answer>", "<think></think><answer></answer>"]]


def length(completion, _):
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
  assert {values.shape for values in scorer()([], []).values()} == {(0, 0)}
  # 2 a + 0 f - 0.25 length: RIGHT is 34 characters long, "B" one.
  total = scorer(2.0, 0.0, length=(length, -0.25))([[RIGHT, "B"]], [BRAIN])["total"]
  assert total.tolist() == [[2 - 8.5, 2 - 0.25]]
  # Each group with its own question: the gold letters are B and A.
  chest = dataclasses.replace(BRAIN, answer="A")
  assert scorer()([["B", "A"], ["B", "A"]], [BRAIN, chest])["accuracy"].tolist() == [[1, 0], [0, 1]]


def test_the_product_stands_in_place_of_accuracy_and_format():
  # 3 a f + 0.25 length; the weight of format is idle.
  scores = scorer(3.0, 7.0, "product", length=(length, 0.25))(TEXTS, [BRAIN, BRAIN])
  lengths = np.array([[len(text) for text in group] for group in TEXTS])
  assert scores["total"].tolist() == (0.25 * lengths + [[3, 0], [0, 0]]).tolist()
  assert scores["accuracy"].tolist() == [[1, 1], [0, 0]] and scores["format"].tolist() == [[1, 0], [0, 1]]
  # A graded accuracy stays graded.
  graded = rewards.Scorer(scorer().rewards | {"accuracy": (rewards.medvlm_accuracy, 1.0)}, "product")
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


def test_a_scorer_that_cannot_score_is_refused():
  good = (rewards.accuracy, 1.0)
  for names in (("accuracy",), ("format", "mine"), ("accuracy", "format", "total")):
    with pytest.raises(ValueError, match="must hold accuracy and format, and none called 'total'"):
      rewards.Scorer(dict.fromkeys(names, good))
  for entry in (rewards.accuracy, (1.0, rewards.accuracy)):
    with pytest.raises(ValueError, match=r"reward 'mine' .* pair of function and weight"):
      rewards.Scorer({"accuracy": good, "format": good, "mine": entry})
  with pytest.raises(ValueError, match=r"combination 'maximum' is unknown; use one of \('sum', 'product'\)"):
    scorer(combination="maximum")


def test_a_reward_is_a_finite_number():
  def mine(value):
    return scorer(0.0, 0.0, mine=(lambda text, example: value, 2.0))([["B"]], [BRAIN])

  for value in (1, True, np.float16(1), np.int64(1), np.bool_(True), np.array(1.0)):
    scores = mine(value)
    assert (scores["mine"].tolist(), scores["total"].tolist()) == ([[1.0]], [[2.0]]), repr(value)
  # 1e39 is finite, but not as float32.
  for value in (float("nan"), -np.inf, 10**400, 1e39, None, "1", b"1", np.array([1.0, 2.0])):
    with pytest.raises(ValueError, match=r"reward 'mine' gave .* for question x/1; it must return a finite number"):
      mine(value)
