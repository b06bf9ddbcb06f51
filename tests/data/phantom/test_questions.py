"""Questions: rules, balanced letters, options that do not depend on the answer."""

import collections

import numpy as np
import pytest

from kepo_jax.data.phantom import questions, scenes
from kepo_jax.data.phantom.questions import TOPICS


@pytest.mark.parametrize("name", TOPICS)
def test_options_and_their_order_do_not_depend_on_the_answer(name):
  rng = np.random.default_rng(0)
  seen, letters = collections.defaultdict(collections.Counter), collections.Counter()
  for i in range(800):
    modality = scenes.MODALITIES[i % 8]
    question = questions.ask(name, questions.scene_for(name, modality, rng), rng)
    assert question.options[ord(question.letter) - ord("A")] == question.answer
    assert len(set(question.options)) == len(question.options) == questions.option_count(name)
    seen[frozenset(question.options)][question.answer] += 1
    letters[question.letter] += 1
  if TOPICS[name].classes:
    assert set(seen) == {frozenset(TOPICS[name].classes)}
  for options, found in [*seen.items(), ("ABCD"[: questions.option_count(name)], letters)]:
    expected = found.total() / len(options)
    # Five standard deviations of a fair draw.
    assert all(abs(found[option] - expected) < 5 * expected**0.5 + 1 for option in options), (options, found)


def test_both_wordings_are_used_equally_whatever_the_answer():
  rng = np.random.default_rng(0)
  counts = collections.Counter()
  for _ in range(1000):
    question = questions.ask("health", questions.scene_for("health", "MRI", rng), rng)
    counts[question.stem, question.answer] += 1
  assert len(counts) == 4 and all(abs(count - 250) < 78 for count in counts.values())
