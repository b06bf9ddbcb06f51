import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.phantom import pretrain
from experiments.phantom.recipes import RECIPES, Phase
from kepo_jax.data.phantom import drawing, scenes
from kepo_jax.models.qwen3_vl import checkpoint


def test_picks_are_epochs_over_permutations():
  rows = np.concatenate([pretrain.picks(1, 10, 40, step) for step in range(4)])
  assert sorted(rows) == list(range(40))
  assert not np.array_equal(pretrain.picks(1, 10, 40, 5), pretrain.picks(1, 10, 40, 1))


def test_progress_returns_as_it_was(tmp_path):
  state = ({"a": np.arange(3.0)}, np.ones((2, 2)))
  path = tmp_path / "x.npz"
  assert pretrain.load_progress(path, state)[0] == 0
  pretrain.save_progress(path, 7, 1.5, state)
  step, seconds, loaded = pretrain.load_progress(path, jax.tree.map(np.zeros_like, state))
  assert (step, seconds) == (7, 1.5)
  jax.tree.map(np.testing.assert_array_equal, loaded, state)


@pytest.mark.slow
def test_a_model_is_trained_written_and_continued(program, tmp_path):
  pretrain = program("experiments.phantom.pretrain")  # with its flags, whatever ran in this process before
  recipe = dataclasses.replace(RECIPES["student_words"], phases=(Phase(2, 500, batch=4, group=2),), sight=4)
  config, params, seconds = pretrain.train("first", recipe, tmp_path)
  pretrain.write_model("first", recipe, config, params, seconds, tmp_path)
  assert json.loads((tmp_path / "first" / "record.json").read_text())["parameters"] > 1e6
  loaded_config, loaded = checkpoint.load_pretrained(tmp_path / "first")
  assert loaded_config == config
  # Stored as bfloat16: half a unit in the last of 8 bits.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, params)
  child = dataclasses.replace(recipe, parent="first", sight=0, seed=9)
  _, grown, _ = pretrain.train("second", child, tmp_path)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), grown, loaded)
  assert all(value > 0 for value in jax.tree.leaves(moved["language_model"]["layers"]["mlp"]))


def test_labels_for_the_tower_are_where_the_lesions_are(rng):
  for count in (*range(4), *range(4), *range(4)):
    scene = scenes.draw_scene(rng, "MRI", count=count)
    labels = pretrain.cell_labels(scene).reshape(4, 4, 4)
    assert labels[..., 1].sum() == scene.count and (labels[..., 3] == scene.count).all()
    assert ((labels[..., 0] > 0) == (labels[..., 1] > 0)).all()
    kinds = set(labels[..., 0][labels[..., 0] > 0])
    assert len(kinds) == min(count, 1) and kinds <= set(range(1, pretrain.KINDS))  # one kind per scene
    mask = drawing.lesion_mask(scene).reshape(4, 16, 4, 16).max(axis=(1, 3))
    assert (mask[labels[..., 1] > 0] > 0.5).all()
