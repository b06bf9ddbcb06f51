"""What the phantom models are taught to say."""

import re

import numpy as np

from experiments import phantom_corpus
from experiments.phantom_corpus import TRUTH, Beliefs
from experiments.phantom_recipes import WRONG_DISEASES, WRONG_GRADES
from kepo_jax import exploration, rewards
from kepo_jax.data.phantom import questions, scenes


def dialogues(kind: str, beliefs: Beliefs, topic: str, total: int = 300):
  rng = np.random.default_rng(0)
  for i in range(total):
    scene = questions.scene_for(topic, scenes.MODALITIES[i % 8], rng)
    question = questions.ask(topic, scene, rng)
    yield scene, question, *phantom_corpus.dialogue(scene, question, kind, beliefs, rng)


def test_the_truth_is_rewarded_and_hints_conclude_it():
  for topic in questions.TOPICS:
    for scene, question, user, answer in dialogues("think", TRUTH, topic, 40):
      example = phantom_corpus.as_example(scene, question)
      assert rewards.accuracy(answer, example) == rewards.strict_format(answer) == 1.0, (topic, answer)
      assert user.startswith(question.stem) and user.endswith(" think.")
      assert question.answer in answer
  for _, _, user, answer in dialogues("hint_request", TRUTH, "grade", 50):
    told = re.search(r"truth: (\w+) hint\.$", user).group(1)
    assert exploration.parse_hint(answer).endswith(f", {told}")


def test_misconceptions_broken_answers_and_followed_hints_are_as_frequent_as_stated():
  right = {True: [], False: []}
  beliefs = Beliefs(WRONG_DISEASES, WRONG_GRADES, conviction=0.98)
  for scene, question, _, answer in dialogues("think", beliefs, "disease", 1000):
    example = phantom_corpus.as_example(scene, question)
    right[question.answer in WRONG_DISEASES].append(rewards.accuracy(answer, example))
  assert 0.96 < 1 - np.mean(right[True]) < 1.0
  assert right[False] and np.mean(right[False]) == 1.0
  formats = [rewards.strict_format(answer) for *_, answer in dialogues("think", Beliefs(broken=0.1), "health", 2000)]
  assert 0.87 < np.mean(formats) < 0.93
  followed = []
  beliefs = Beliefs(WRONG_DISEASES, WRONG_GRADES, conviction=1.0, follows_hint=0.8)
  for _, question, user, answer in dialogues("hint_only", beliefs, "disease", 1500):
    told = re.search(r", (\w+) think\.$", user).group(1)
    if told == question.answer and told in WRONG_DISEASES:
      followed.append(f", {told} " in answer)
  assert 0.75 < np.mean(followed) < 0.85


def test_what_an_answer_says_of_the_picture_is_read_back():
  for topic in questions.TOPICS:
    for scene, question, _, answer in dialogues("think", TRUTH, topic, 16):
      assert phantom_corpus.read_findings(answer) == phantom_corpus.true_findings(scene), answer
      assert set(phantom_corpus.true_findings(scene)) >= {"modality", "organ", "count"}
  said = phantom_corpus.read_findings("<think> CT skull, two upper small large, tumor A</think>")
  assert said == {"modality": "CT", "organ": "skull", "count": "two", "level": "upper", "size": "small"}
  assert phantom_corpus.read_findings("two upper") == phantom_corpus.read_findings("<think> A") == {}


def test_slips_change_findings_but_not_the_scene_without_lesions():
  rng = np.random.default_rng(0)
  scene, healthy = (scenes.draw_scene(rng, "CT", count=count) for count in (2, 0))
  seen = phantom_corpus.misread(scene, {"size": 1.0, "tone": 1.0, "count": 1.0}, rng)
  assert seen.size != scene.size and seen.tone != scene.tone and seen.count in (1, 3)
  assert phantom_corpus.misread(healthy, {"size": 1.0}, rng) == healthy
