"""A run whose folder, models and data lie in a bucket is the run on a local disk, whatever happens to it."""

import json
import os
import shutil

import jax
import pytest

from kepo_jax import training
from kepo_jax.data.phantom import build as phantom
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.training import lock
from kepo_jax.training.checkpoints import steps_in
from kepo_jax.training.files import RunFiles
from tests import fake_bucket
from tests.training.runs import SAME, Signal, equal, flip_a_bit, small, train


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """A folder with models and data in it."""
  top, config = tmp_path_factory.mktemp("local"), small()
  for role in ("student", "teacher"):
    shutil.copytree(config.model[role], top / "models" / role)
  for name, every in (("train", 12), ("validation", 10), ("test", 50)):
    phantom.write_split(top / "data" / name, phantom.make_items(name)[::every])
  return top


@pytest.fixture
def bucket(local, tmp_path, monkeypatch):
  """gs://bucket with what `local` holds, and the cache of this test alone."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(lock, "_SETTLE", 0.1)
  shutil.copytree(local, tmp_path / "cloud" / "bucket")
  with fake_bucket.served(tmp_path / "cloud") as store:
    yield store


def placed(place):
  """A run on models and data below a place."""
  config = small(train__steps=3, data__directory=f"{place}/data", log__tensorboard=True)
  config.model.student, config.model.teacher = f"{place}/models/student", f"{place}/models/teacher"
  return config


class Follower(Signal):
  """Keeps what is said about progress; asks the run to stop after a step, and does something else then."""

  def __init__(self, step=None, act=lambda: None):
    super().__init__(step=step)
    self.progressed, self._act = {}, act

  def progress(self, what, done, total):
    self.progressed.setdefault(what, []).append((done, total))

  def step(self, report):
    super().step(report)
    if self._asked:
      self._act()


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, local, tmp_path):
  here = train(placed(local), tmp_path / "run")

  def refused():
    with pytest.raises(ValueError, match=f"gs://bucket/run is in use by process {os.getpid()}"):
      RunFiles("gs://bucket/run", small(), auto_resume=True).__enter__()

  first = Follower(2, refused)
  with pytest.raises(training.Interrupted) as caught:
    train(placed("gs://bucket"), "gs://bucket/run", hooks=[first], interruption=first)
  assert (caught.value.step, caught.value.saved) == (2, "gs://bucket/run/checkpoints/2")
  for what in ("copying student, bytes", "copying teacher, bytes", "copying data, bytes"):
    done, total = first.progressed[what][-1]
    assert done == total > 1000, what
  assert "run/lock.json" not in bucket.names("bucket")

  folder = bucket.root / "bucket" / "run"
  flip_a_bit(folder / "checkpoints" / "2")
  again = Follower()
  remote = train(placed("gs://bucket"), "gs://bucket/run", hooks=[again], resume=True)
  assert not any(what.startswith("copying") for what in again.progressed)  # what was staged is used again

  assert equal(remote.state, here.state)
  for name in SAME[:3]:
    assert (folder / name).read_text() == (tmp_path / "run" / name).read_text().replace(str(local), "gs://bucket"), name
  asked = [json.loads((root / "questions.json").read_text())["content_sha256"] for root in (folder, tmp_path / "run")]
  assert asked[0] == asked[1]
  assert steps_in("gs://bucket/run/broken") == [2] and steps_in("gs://bucket/run/checkpoints") == [1, 2, 3]
  names = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()}
  there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
  for part in ("model", "report"):
    assert {name for name in names if name.parts[0] == part} == {name for name in there if name.parts[0] == part}
  assert any(name.parts[0] == "tensorboard" for name in there) and "run/lock.json" not in bucket.names("bucket")
  for name in ("model.safetensors", "tokenizer.json"):
    assert (folder / "model" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()
  _, exported = conversion.load_pretrained("gs://bucket/run/model")
  assert jax.tree.structure(exported) == jax.tree.structure(remote.state.params)


def test_what_is_not_there_is_refused_in_one_line_and_leaves_nothing(bucket):
  for change, match in (
    ({"workdir": "gs://other/run"}, "gs://other/run: there is no bucket gs://other"),
    ({"student": "gs://bucket/models/nobody"}, "gs://bucket/models/nobody: no such folder or file"),
    ({"data": "gs://bucket/nothing"}, "gs://bucket/nothing: no such folder or file"),
  ):
    config = placed("gs://bucket")
    config.model.student = change.get("student", config.model.student)
    config.data.directory = change.get("data", config.data.directory)
    with pytest.raises(ValueError, match=match) as caught:
      training.train(config, workdir=change.get("workdir", "gs://bucket/run"))
    assert "\n" not in str(caught.value)
    assert not any(name.startswith("run/") for name in bucket.names("bucket"))
    assert not (bucket.root / "other").exists()
