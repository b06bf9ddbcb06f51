"""A run on a built data set is the run on the data that it was built from."""

import pytest

from kepo_jax.data import splits
from kepo_jax.data.phantom import build as phantom
from kepo_jax.data.tfds import building
from tests.training.runs import Recorder, small, train


@pytest.mark.slow
def test_two_steps(tmp_path, monkeypatch):
  roots = {name: tmp_path / "drawn" / name for name in splits.SPLITS}
  for name, root in roots.items():
    # Four training questions, and one of each modality to evaluate.
    items = phantom.make_items(name)
    phantom.write_split(root, items[:: len(items) // (4 if name == "train" else 8)])
  monkeypatch.setattr(splits, "phantom_roots", lambda: roots)
  built = building.build(tmp_path / "data", config="phantom")
  metrics = []
  for directory in (built.directory, tmp_path / "drawn"):
    recorder = Recorder()
    sizes = {"data__train_items": 4, "train__steps": 2, "eval__every": 0, "eval__before": False}
    train(small(**sizes, data__directory=str(directory)), hooks=[recorder])
    metrics.append([report.metrics for report in recorder.reports])
  assert len(metrics[0]) == 2 and metrics[0] == metrics[1]
