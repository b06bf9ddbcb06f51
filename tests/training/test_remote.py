import json
import os
import shutil

import jax
import pytest

from kepo_jax import training
from kepo_jax.data.phantom import build as phantom
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.training.checkpoints import steps_in
from kepo_jax.training.workdir import RunFiles
from kepo_jax.types import Hook
from tests import fake_bucket
from tests.training.runs import SAME, Signal, equal, flip_a_bit, small, train


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """A folder with models and data in it."""
  top, config = tmp_path_factory.mktemp("local"), small()
  for role in ("student", "teacher"):
    shutil.copytree(getattr(config.model, role), top / "models" / role)
  for name, every in (("train", 12), ("validation", 10), ("test", 50)):
    phantom.write_split(top / "data" / name, phantom.make_items(name)[::every])
  return top


@pytest.fixture
def bucket(local, tmp_path, monkeypatch):
  """gs://bucket with what `local` holds, and the cache of this test alone."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  shutil.copytree(local, tmp_path / "cloud" / "bucket")
  with fake_bucket.served(tmp_path / "cloud") as store:
    yield store


def placed(place, **changes):
  """A run on models and data below a place."""
  fields = {"train__steps": 3, "log__tensorboard": True, "data__directory": f"{place}/data"}
  fields |= {"model__student": f"{place}/models/student", "model__teacher": f"{place}/models/teacher"}
  return small(**fields | changes)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, local, tmp_path):
  here = train(placed(local), tmp_path / "run")

  class Refused(Hook):
    def step(self, report):
      with pytest.raises(ValueError, match=f"gs://bucket/run is in use by process {os.getpid()}"):
        RunFiles("gs://bucket/run", small(), auto_resume=True).__enter__()

  signal = Signal(step=2)
  with pytest.raises(training.Interrupted) as caught:
    train(placed("gs://bucket"), "gs://bucket/run", hooks=[Refused(), signal], interruption=signal)
  assert (caught.value.step, caught.value.saved) == (2, "gs://bucket/run/checkpoints/2")
  assert "run/lock.json" not in bucket.names("bucket")

  folder = bucket.root / "bucket" / "run"
  flip_a_bit(folder / "checkpoints" / "2")
  remote = train(placed("gs://bucket"), "gs://bucket/run", resume=True)

  assert equal(remote.state, here.state)
  for name in SAME[:3]:
    assert (folder / name).read_text() == (tmp_path / "run" / name).read_text().replace(str(local), "gs://bucket"), name
  asked = [json.loads((root / "questions.json").read_text())["content_sha256"] for root in (folder, tmp_path / "run")]
  assert asked[0] == asked[1]
  assert steps_in("gs://bucket/run/broken") == [2] and steps_in("gs://bucket/run/checkpoints") == [1, 2, 3]
  parts = [
    {path.relative_to(root).as_posix() for name in ("model", "report") for path in (root / name).rglob("*")}
    for root in (tmp_path / "run", folder)
  ]
  assert parts[0] == parts[1] >= {"model/model.safetensors", "model/tokenizer.json"}
  assert any((folder / "tensorboard").iterdir()) and "run/lock.json" not in bucket.names("bucket")
  for name in ("model.safetensors", "tokenizer.json"):
    assert (folder / "model" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()
  _, exported = checkpoint.load_pretrained("gs://bucket/run/model")
  assert jax.tree.structure(exported) == jax.tree.structure(remote.state.params)
