import json

import jax
import pytest
from absl import flags

from experiments.configs import grpo
from kepo_jax.models.qwen3_vl import model


@pytest.fixture
def measure(program):
  return program("experiments.measure_checkpoints")


def test_the_student_has_about_the_parameters_that_are_asked_for(measure):
  config = measure.sized_config(40e6)
  assert measure.size(config) == pytest.approx(40e6, rel=0.05)
  leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_params(config, jax.random.key(0))))
  assert sum(leaf.size for leaf in leaves) == measure.size(config)


def test_the_figures(measure):
  seconds = {"step": [3.0, 1.0, 2.0], "blocked": [0.1, 0.4, 0.2], "save": [4.0, 2.0], "save alone": [1.0]}
  seconds |= {"plain write": [0.5], "step alone": []}
  found = measure.figures(seconds, every=5, parameters=10, state_bytes=6 * 10**6, disk_bytes=7)
  assert found["blocked_share"] == pytest.approx(0.2 / (5 * 2.0))
  assert found["longest_blocked_share"] == pytest.approx(0.4 / (5 * 2.0))
  assert found["megabytes_per_second"] == {"save": 2.0, "save alone": 6.0, "plain write": 12.0}


@pytest.mark.slow
def test_it_measures_a_run_and_leaves_nothing(measure, tmp_path, monkeypatch):
  config = grpo.get_config()
  config.mesh.data, config.train.compile_ahead = 1, False  # of the virtual devices here, and of all sizes of prompts
  monkeypatch.setattr(measure.grpo, "get_config", lambda: config)
  chosen = {"parameters": 0.0, "every": 1, "steps": 2, "prompts": 2, "rollouts": 2, "repeats": 1}
  chosen |= {"workdir": str(tmp_path / "disk"), "json": str(tmp_path / "found.json")}
  for name, value in chosen.items():
    setattr(flags.FLAGS, name, value)
  measure.main([])
  found = json.loads((tmp_path / "found.json").read_text())
  assert found["state_bytes"] == pytest.approx(12 * found["parameters"], rel=1e-3)  # float32, and two moments
  assert found["disk_bytes"] > found["state_bytes"]  # nothing is compressed
  counts = {name: len(each) for name, each in found["seconds"].items()}
  beside, alone = ("step", "step beside a save", "blocked", "save"), ("blocked alone", "save alone", "plain write")
  assert counts == dict.fromkeys(beside, 2) | dict.fromkeys(alone, 1) | {"step alone": 0}
  assert all(value > 0 for values in found["seconds"].values() for value in values)
  assert list((tmp_path / "disk").iterdir()) == []
