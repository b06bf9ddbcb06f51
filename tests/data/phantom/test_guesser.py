"""A guesser that sees the text alone stays at chance: the picture is needed."""

import collections
import math

import numpy as np
import pytest

from kepo_jax import evaluation
from kepo_jax.data.phantom import build, questions, scenes

pytestmark = pytest.mark.slow  # the items are frozen


def drawn_questions(total, seed):
  rng = np.random.default_rng(seed)
  topics = questions.shuffled_topics(total, rng)
  places = questions.balanced_places(topics, rng)
  scene = lambda topic, i: questions.scene_for(topic, scenes.MODALITIES[i % 8], rng)  # noqa: E731
  return [questions.ask(t, scene(t, i), rng, p) for i, (t, p) in enumerate(zip(topics, places, strict=True))]


def clues(question, option):
  """What the text says of an option: the wording that offers it, beside which others, and under which letter."""
  number = question.options.index(option)
  return (question.stem, option), (question.stem, option, frozenset(question.options)), (question.stem, number)


class Guesser:
  """Takes the option whose clues were right most often."""

  def __init__(self, items):
    self.offered, self.right = collections.Counter(), collections.Counter()
    for item in items:
      for option in item.options:
        self.offered.update(clues(item, option))
      self.right.update(clues(item, item.answer))

  def score(self, item, option):
    return sum(math.log((self.right[clue] + 1) / (self.offered[clue] + 2)) for clue in clues(item, option))

  def accuracy(self, items):
    guesses = [max(item.options, key=lambda option, item=item: self.score(item, option)) for item in items]
    return np.mean([guess == item.answer for guess, item in zip(guesses, items, strict=True)])


def test_text_alone_stays_at_chance():
  test = [item.question for item in build.make_items("test")]
  chance, low, high = evaluation.guessing({"": np.array([1 / len(question.options) for question in test])})
  accuracy = Guesser(drawn_questions(5000, seed=7)).accuracy(test)
  assert low <= accuracy <= high, (accuracy, chance, low, high)  # where 95 % of guessers fall
