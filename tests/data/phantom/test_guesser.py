"""A guesser that sees the text alone stays at chance: the picture is needed."""

import numpy as np
import pytest

from kepo_jax import evaluation
from kepo_jax.data.phantom import build, questions, scenes
from kepo_jax.data.phantom.questions import Question

pytestmark = pytest.mark.slow  # the items are frozen

STEPS, RATE, DECAY = 150, 4.0, 1e-4


def drawn_questions(total: int, seed: int) -> list[Question]:
  rng = np.random.default_rng(seed)
  topics = questions.deal_topics(total, rng)
  places = questions.deal_places(topics, rng)
  scene = lambda topic, i: questions.scene_for(topic, scenes.MODALITIES[i % 8], rng)  # noqa: E731
  return [questions.ask(t, scene(t, i), rng, p) for i, (t, p) in enumerate(zip(topics, places, strict=True))]


def grams(question: Question) -> set[str]:
  """Words and pairs of words of the question with its lettered options."""
  letters = [f"{letter}: {option}" for letter, option in zip("ABCD", question.options, strict=False)]
  words = " ".join([question.stem, *letters]).split()
  return {*words, *map(" ".join, zip(words, words[1:], strict=False))}


class Guesser:
  """Multinomial logistic regression on letters from n-grams, plus a weight per (question, option)."""

  def __init__(self, items: list[Question]):
    self.columns = {gram: i for i, gram in enumerate(sorted({gram for item in items for gram in grams(item)}))}
    self.pairs = {pair: i for i, pair in enumerate(sorted({p for item in items for p in self._pairs(item)}))}
    features, pairs, real, gold = self._arrays(items)
    self.weights, self.biases = np.zeros((4, features.shape[1]), np.float32), np.zeros(len(self.pairs) + 1)
    for _ in range(STEPS):
      error = ((self._shares(features, pairs, real) - gold) / len(items)).astype(np.float32)
      self.weights -= RATE * (error.T @ features + DECAY * self.weights)
      gradient = np.bincount(pairs.ravel(), error.ravel(), len(self.biases))
      self.biases -= 10 * RATE * (gradient + DECAY * self.biases)

  def _pairs(self, item: Question) -> list[tuple[str, str]]:
    return [(item.stem, option) for option in item.options]

  def _arrays(self, items):
    features = np.zeros((len(items), len(self.columns)), np.float32)
    pairs = np.full((len(items), 4), len(self.pairs))
    real, gold = np.zeros((len(items), 4), bool), np.zeros((len(items), 4))
    for row, item in enumerate(items):
      features[row, [self.columns[gram] for gram in grams(item) if gram in self.columns]] = 1
      known = [self.pairs.get(pair, len(self.pairs)) for pair in self._pairs(item)]
      pairs[row, : len(known)], real[row, : len(known)] = known, True
      gold[row, item.options.index(item.answer)] = 1
    return features, pairs, real, gold

  def _shares(self, features, pairs, real):
    scores = np.where(real, features @ self.weights.T + self.biases[pairs], -np.inf)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)

  def accuracy(self, items: list[Question]) -> float:
    features, pairs, real, gold = self._arrays(items)
    return float((self._shares(features, pairs, real).argmax(axis=1) == gold.argmax(axis=1)).mean())


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
