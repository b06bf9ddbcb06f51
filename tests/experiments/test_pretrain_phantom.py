"""The pretraining loop, end to end at two steps a stage."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import pretrain_phantom
from experiments.phantom_recipes import RECIPES, Phase
from kepo_jax.models.qwen3_vl import checkpoint


def test_picks_are_epochs_over_permutations():
  rows = np.concatenate([pretrain_phantom.picks(1, 10, 40, step) for step in range(4)])
  assert sorted(rows) == list(range(40))
  assert not np.array_equal(pretrain_phantom.picks(1, 10, 40, 5), pretrain_phantom.picks(1, 10, 40, 1))


def test_progress_returns_as_it_was(tmp_path):
  state = ({"a": np.arange(3.0)}, np.ones((2, 2)))
  path = tmp_path / "x.npz"
  assert pretrain_phantom.load_progress(path, state)[0] == 0
  pretrain_phantom.save_progress(path, 7, 1.5, state)
  step, seconds, loaded = pretrain_phantom.load_progress(path, jax.tree.map(np.zeros_like, state))
  assert (step, seconds) == (7, 1.5)
  jax.tree.map(np.testing.assert_array_equal, loaded, state)


@pytest.mark.slow
def test_a_model_is_trained_written_and_continued(program, tmp_path):
  pretrain_phantom = program("experiments.pretrain_phantom")  # with its flags, whatever ran in this process before
  recipe = dataclasses.replace(RECIPES["student_words"], phases=(Phase(2, 500, batch=4, group=2),), sight=4)
  config, params, seconds = pretrain_phantom.train("first", recipe, tmp_path)
  pretrain_phantom.write_model("first", recipe, config, params, seconds, tmp_path)
  assert json.loads((tmp_path / "first" / "record.json").read_text())["parameters"] > 1e6
  loaded_config, loaded = checkpoint.load_pretrained(tmp_path / "first")
  assert loaded_config == config
  # Stored as bfloat16: half a unit in the last of 8 bits.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), loaded, params)
  child = dataclasses.replace(recipe, parent="first", sight=0, seed=9)
  _, grown, _ = pretrain_phantom.train("second", child, tmp_path)
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), grown, loaded)
  assert all(value > 0 for value in jax.tree.leaves(moved["language_model"]["layers"]["mlp"]))
