"""Pools of training data: the same sequences and pixels that a prompt per dialogue would give."""

import dataclasses

import numpy as np
from PIL import Image

from experiments import phantom_corpus, phantom_folder, phantom_pool, phantom_tower
from kepo_jax.data import prompts
from kepo_jax.data.phantom import drawing, questions, scenes
from kepo_jax.data.processor import Processor
from tests.experiments.test_phantom_assets import ASSETS


def make_pool():
  options = {"size": 500, "group": 2, "drills": 0, "kinds": {"think": 1.0}, "beliefs": phantom_corpus.TRUTH}
  return phantom_pool.make_pool(phantom_folder.make_tokenizer(), seed=1, **options)


def test_training_and_use_see_the_same_prompt(tmp_path, rng):
  processor = Processor.from_directory(ASSETS / "confused", templates=prompts.BRIEF)
  scene = phantom_pool.draw_training_scene(rng)
  picture = phantom_pool.drawing.draw(scene)
  Image.fromarray(picture).save(tmp_path / "a.png")
  question = questions.ask("health", scene, rng)
  user, _ = phantom_corpus.dialogue(scene, question, "think", phantom_corpus.TRUTH, rng)
  example = phantom_corpus.as_example(scene, question)
  example = dataclasses.replace(example, images=(str(tmp_path / "a.png"),), id="x")
  batch = processor.prompts([example], "think")
  tokenizer = phantom_folder.make_tokenizer()
  ours = tokenizer.encode(phantom_pool.prefix_text()).ids + tokenizer.encode(user + phantom_pool.TURN_END).ids
  assert batch.tokens[0][batch.mask[0]].tolist() == ours
  np.testing.assert_array_equal(batch.vision.patches[0], phantom_pool.patches(picture[None])[0])


def test_answers_are_where_the_index_says():
  tokenizer, pool, again = phantom_folder.make_tokenizer(), make_pool(), make_pool()
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


def test_fundus_is_never_drawn_for_training(rng):
  drawn = {phantom_pool.draw_training_scene(rng).modality for _ in range(200)}
  assert drawn == set(phantom_pool.SEEN) and "fundus" not in drawn


def test_labels_for_the_tower_are_where_the_lesions_are(rng):
  for count in (*range(4), *range(4), *range(4)):
    scene = scenes.draw_scene(rng, "MRI", count=count)
    labels = phantom_tower.cell_labels(scene).reshape(4, 4, 4)
    assert labels[..., 1].sum() == scene.count and (labels[..., 3] == scene.count).all()
    assert ((labels[..., 0] > 0) == (labels[..., 1] > 0)).all()
    kinds = set(labels[..., 0][labels[..., 0] > 0])
    assert len(kinds) == min(count, 1) and kinds <= set(range(1, phantom_tower.KINDS))  # one kind per scene
    mask = drawing.lesion_mask(scene).reshape(4, 16, 4, 16).max(axis=(1, 3))
    assert (mask[labels[..., 1] > 0] > 0.5).all()
