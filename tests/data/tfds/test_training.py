"""A run on a built data set is the run on the data that it was built from."""

import pytest

from experiments.configs import kepo
from kepo_jax import training
from kepo_jax.data import splits
from kepo_jax.data.phantom import build as phantom
from kepo_jax.data.tfds import building
from kepo_jax.types import Hook
from tests.conftest import ROOT

ASSETS = ROOT / "experiments" / "assets" / "phantom"


class Recorder(Hook):
  """Keeps the metrics of every step."""

  def __init__(self):
    self.metrics = []

  def step(self, report):
    self.metrics.append(report.metrics)


def short_run(directory) -> tuple[int, list[dict[str, float]]]:
  config = kepo.get_config()
  config.model.student, config.model.teacher = str(ASSETS / "confused"), str(ASSETS / "weak")
  config.mesh.data = 1
  config.batch.prompts, config.batch.rollouts = 2, 4
  config.data.directory = str(directory)
  config.data.train_items, config.data.validation_items, config.data.test_items = 4, 1, 1
  config.exploration.rounds = 1
  config.train.steps, config.eval.every, config.eval.prompts = 2, 0, 2
  recorder = Recorder()
  result = training.train(config, hooks=[recorder])
  return int(result.state.step), recorder.metrics


@pytest.mark.slow
def test_two_steps(tmp_path, monkeypatch):
  roots = {name: tmp_path / "drawn" / name for name in splits.SPLITS}
  for name, root in roots.items():
    # Four training questions, and one of each modality to evaluate.
    items = phantom.make_items(name)
    phantom.write_split(root, items[:: len(items) // (4 if name == "train" else 8)])
  monkeypatch.setattr(splits, "phantom_roots", lambda: roots)
  built = building.build(tmp_path / "data", config="phantom")
  step, metrics = short_run(built.directory)
  assert step == 2 and len(metrics) == 2
  assert short_run(tmp_path / "drawn") == (2, metrics)
