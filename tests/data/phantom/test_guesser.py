"""A guesser that sees the text alone stays at chance: the picture is needed."""

import numpy as np
import pytest

from kepo_jax import evaluation
from kepo_jax.data.phantom import build, questions, scenes
from kepo_jax.data.phantom.questions import Question

pytestmark = pytest.mark.slow  # the items are frozen


def drawn_questions(total: int, seed: int) -> list[Question]:
  rng = np.random.default_rng(seed)
  topics = questions.deal_topics(total, rng)
  places = questions.deal_places(topics, rng)
  scene = lambda topic, i: questions.scene_for(topic, scenes.MODALITIES[i % 8], rng)  # noqa: E731
  return [questions.ask(t, scene(t, i), rng, p) for i, (t, p) in enumerate(zip(topics, places, strict=True))]


def clues(item: Question, place: int) -> set:
  """What the text says for an option: its place and words, the question, and what else is on offer."""
  option, letter = item.options[place], "ABCD"[place]
  others = [(option, other, i) for i, other in enumerate(item.options)]
  return {
    letter,
    option,
    (letter, option),
    (item.stem, option),
    (item.stem, letter),
    (item.stem, letter, option),
    *others,
  }


class Guesser:
  """Ridge regression of being right on the clues for an option."""

  def __init__(self, items: list[Question]):
    pairs = [(item, place) for item in items for place in range(len(item.options))]
    self.columns = {clue: i for i, clue in enumerate(dict.fromkeys(c for pair in pairs for c in clues(*pair)))}
    features = np.stack([self.features(*pair) for pair in pairs])
    right = np.array([item.options[place] == item.answer for item, place in pairs], np.float32)
    chance = np.array([1 / len(item.options) for item, _ in pairs], np.float32)
    penalty = 5 * np.eye(len(self.columns), dtype=np.float32)
    self.weights = np.linalg.solve(features.T @ features + penalty, features.T @ (right - chance))

  def features(self, item: Question, place: int) -> np.ndarray:
    row = np.zeros(len(self.columns), np.float32)
    row[[self.columns[clue] for clue in clues(item, place) if clue in self.columns]] = 1
    return row

  def accuracy(self, items: list[Question]) -> float:
    guesses = [np.argmax([self.features(i, place) @ self.weights for place in range(len(i.options))]) for i in items]
    return float(np.mean([item.options[guess] == item.answer for item, guess in zip(items, guesses, strict=True)]))


def test_text_alone_stays_at_chance():
  test = [item.question for item in build.make_items("test")]
  chance, low, high = evaluation.guessing({"": np.array([1 / len(question.options) for question in test])})
  accuracy = Guesser(drawn_questions(5000, seed=7)).accuracy(test)
  assert low <= accuracy <= high, (accuracy, chance, low, high)  # where 95 % of guessers fall


def test_the_guesser_would_find_a_leak():
  rng = np.random.default_rng(0)
  leaky = [
    questions.ask(item.topic, scenes.draw_scene(rng, "MRI", count=1, tone="dark", size="large"), rng)
    for item in drawn_questions(1500, seed=8)
  ]
  chance = float(np.mean([1 / len(question.options) for question in leaky]))
  assert Guesser(leaky[:1000]).accuracy(leaky[1000:]) > chance + 0.2
