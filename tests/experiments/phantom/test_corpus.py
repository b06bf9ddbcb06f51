import dataclasses
import re

import numpy as np
from PIL import Image

from experiments.phantom import corpus, folder
from experiments.phantom.corpus import TRUTH, Beliefs
from experiments.phantom.recipes import WRONG_DISEASES, WRONG_GRADES
from kepo_jax import exploration, rewards
from kepo_jax.data import prompts
from kepo_jax.data.phantom import drawing, questions, scenes
from kepo_jax.data.processor import Processor
from tests.experiments.phantom.test_folder import ASSETS


def dialogues(kind: str, beliefs: Beliefs, topic: str, total: int = 300):
  rng = np.random.default_rng(0)
  for i in range(total):
    scene = questions.scene_for(topic, scenes.MODALITIES[i % 8], rng)
    question = questions.ask(topic, scene, rng)
    yield scene, question, *corpus.dialogue(scene, question, kind, beliefs, rng)


def test_the_truth_is_rewarded_and_hints_conclude_it():
  for topic in questions.TOPICS:
    for scene, question, user, answer in dialogues("think", TRUTH, topic, 40):
      example = corpus.as_example(scene, question)
      assert rewards.accuracy(answer, example) == rewards.strict_format(answer) == 1.0, (topic, answer)
      assert user.startswith(question.stem) and user.endswith(" think.") and question.answer in answer
  for _, _, user, answer in dialogues("hint_request", TRUTH, "grade", 50):
    told = re.search(r"truth: (\w+) hint\.$", user).group(1)
    assert exploration.parse_hint(answer).endswith(f", {told}")


def test_misconceptions_broken_answers_and_followed_hints_are_as_frequent_as_stated():
  right = {True: [], False: []}
  beliefs = Beliefs(WRONG_DISEASES, WRONG_GRADES, conviction=0.98)
  for scene, question, _, answer in dialogues("think", beliefs, "disease", 1000):
    example = corpus.as_example(scene, question)
    right[question.answer in WRONG_DISEASES].append(rewards.accuracy(answer, example))
  assert 0.96 < 1 - np.mean(right[True]) < 1.0 and right[False] and np.mean(right[False]) == 1.0
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
      assert corpus.read_findings(answer) == corpus.true_findings(scene), answer
      assert set(corpus.true_findings(scene)) >= {"modality", "organ", "count"}
  said = corpus.read_findings("<think> CT skull, two upper small large, tumor A</think>")
  assert said == {"modality": "CT", "organ": "skull", "count": "two", "level": "upper", "size": "small"}
  assert corpus.read_findings("two upper") == corpus.read_findings("<think> A") == {}


def test_slips_change_findings_but_not_the_scene_without_lesions():
  rng = np.random.default_rng(0)
  scene, healthy = (scenes.draw_scene(rng, "CT", count=count) for count in (2, 0))
  seen = corpus.misread(scene, {"size": 1.0, "tone": 1.0, "count": 1.0}, rng)
  assert seen.size != scene.size and seen.tone != scene.tone and seen.count in (1, 3)
  assert corpus.misread(healthy, {"size": 1.0}, rng) == healthy


def make_pool():
  options = {"size": 500, "group": 2, "drills": 0, "kinds": {"think": 1.0}, "beliefs": corpus.TRUTH}
  return corpus.make_pool(folder.make_tokenizer(), seed=1, **options)


def test_training_and_use_see_the_same_prompt(tmp_path, rng):
  processor = Processor.from_directory(ASSETS / "confused", templates=prompts.BRIEF)
  assert {corpus.draw_training_scene(rng).modality for _ in range(200)} == {*corpus.SEEN} - {"fundus"}
  scene = corpus.draw_training_scene(rng)
  picture = drawing.draw(scene)
  Image.fromarray(picture).save(tmp_path / "a.png")
  question = questions.ask("health", scene, rng)
  user, _ = corpus.dialogue(scene, question, "think", corpus.TRUTH, rng)
  example = corpus.as_example(scene, question)
  example = dataclasses.replace(example, images=(str(tmp_path / "a.png"),), id="x")
  batch = processor.prompts([example], "think")
  tokenizer = folder.make_tokenizer()
  ours = tokenizer.encode(corpus.prefix_text()).ids + tokenizer.encode(user + corpus.TURN_END).ids
  assert batch.tokens[0][batch.mask[0]].tolist() == ours
  np.testing.assert_array_equal(batch.vision.patches[0], corpus.patches(picture[None])[0])


def test_answers_are_where_the_index_says():
  tokenizer, pool, again = folder.make_tokenizer(), make_pool(), make_pool()
  np.testing.assert_array_equal(pool.images, again.images)
  np.testing.assert_array_equal(pool.tokens, again.tokens)
  for row in range(20):
    used = pool.weights[row, 0] > 0
    ids = pool.tokens[row, 0, pool.answer_index[row, 0]][used]
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text.startswith("<think>") and text.endswith("</answer><|im_end|>")
    kinds = pool.kinds[row, 0][used].tolist()
    assert kinds.count(1) == kinds.count(2) == kinds.count(3) == 1  # conclusion, letter, the letter again
    assert kinds.index(2) == kinds.index(1) + 1
