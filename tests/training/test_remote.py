"""A run whose folder, models and data lie in a bucket is the run on a local disk, whatever happens to it."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.configs import kepo
from kepo_jax import training
from kepo_jax.data.phantom import build as phantom
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.reporting import RunReporter
from kepo_jax.training import lock
from kepo_jax.training.checkpoints import steps_in
from kepo_jax.types import Hook
from tests import fake_bucket
from tests.conftest import ROOT
from tests.training.runs import shrunk

SAME = ("metrics.jsonl", "samples.jsonl", "evaluation.json")


@pytest.fixture(params=["fake", "gcsfs"])
def bucket(tmp_path, request, monkeypatch):
  """gs://bucket with models and data in it, and the cache of this test alone."""
  if request.param == "gcsfs":
    pytest.importorskip("gcsfs", exc_type=ImportError)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(lock, "_SETTLE", 0.1)
  top = tmp_path / "cloud" / "bucket"
  config = shrunk(kepo.get_config())
  for role in ("student", "teacher"):
    shutil.copytree(config.model[role], top / "models" / role)
  for name, every in (("train", 12), ("validation", 10), ("test", 50)):
    phantom.write_split(top / "data" / name, phantom.make_items(name)[::every])
  with fake_bucket.served(tmp_path / "cloud", gcsfs=request.param == "gcsfs") as store:
    yield store


def small(place):
  """Three steps with a validation after the second, on models and data below a place."""
  config = shrunk(kepo.get_config(), train__steps=3, eval__every=2, eval__prompts=8, checkpoint__every=1)
  config.model.student, config.model.teacher = f"{place}/models/student", f"{place}/models/teacher"
  config.data.directory = f"{place}/data"
  config.log.tensorboard = True
  return config


class Follower(Hook):
  """Keeps what is said about progress; acts after a step."""

  def __init__(self, after=None, act=lambda: None):
    self.progressed, self._after, self._act = {}, after, act

  def progress(self, what, done, total):
    self.progressed.setdefault(what, []).append((done, total))

  def step(self, report):
    if report.step == self._after:
      self._act()


def train(place, workdir, *hooks, **settings):
  return training.train(small(place), workdir=workdir, hooks=[RunReporter(), *hooks], **settings)


SECOND = """
import pathlib, sys
from experiments.configs import kepo
from kepo_jax.training.files import RunFiles
from tests import fake_bucket
with fake_bucket.served(pathlib.Path(sys.argv[1])):
  try:
    RunFiles("gs://bucket/run", kepo.get_config(), auto_resume=True).__enter__()
  except ValueError as error:
    sys.exit(str(error))
"""


def refused(root):
  """What a second process says that wants the same workdir."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", SECOND, str(root)], capture_output=True, text=True, timeout=100, env=environment
  )
  return done.stderr.splitlines()[-1] if done.returncode == 1 else f"not refused: {done}"


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, tmp_path):
  local = train(bucket.root / "bucket", tmp_path / "run")

  interruption, said = training.Interruption(), []

  def stop():
    said.append(refused(bucket.root))
    interruption._asked = True

  first = Follower(after=2, act=stop)
  with pytest.raises(training.Interrupted) as caught:
    train("gs://bucket", "gs://bucket/run", first, interruption=interruption)
  assert said[0].startswith(f"gs://bucket/run is in use by process {os.getpid()}")
  assert (caught.value.step, caught.value.saved) == (2, "gs://bucket/run/checkpoints/2")
  for what in ("copying student, bytes", "copying teacher, bytes", "copying data, bytes"):
    done, total = first.progressed[what][-1]
    assert done == total > 1000, what
  assert "run/lock.json" not in bucket.names("bucket")

  folder = bucket.root / "bucket" / "run"
  damaged = max((folder / "checkpoints" / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
  data = bytearray(damaged.read_bytes())
  data[len(data) // 2] ^= 1
  damaged.write_bytes(data)
  again = Follower()
  remote = train("gs://bucket", "gs://bucket/run", again, resume=True)
  assert not any(what.startswith("copying") for what in again.progressed)  # what was staged is used again

  same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), remote.state, local.state)
  assert all(jax.tree.leaves(same))
  for name in SAME:
    here = (tmp_path / "run" / name).read_text().replace(str(bucket.root / "bucket"), "gs://bucket")
    assert (folder / name).read_text() == here, name
  asked = [json.loads((root / "questions.json").read_text())["content_sha256"] for root in (folder, tmp_path / "run")]
  assert asked[0] == asked[1]
  assert steps_in("gs://bucket/run/broken") == [2] and steps_in("gs://bucket/run/checkpoints") == [2, 3]
  names = {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()}
  there = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
  for part in ("model", "report"):
    assert {name for name in names if name.parts[0] == part} == {name for name in there if name.parts[0] == part}
  assert any(name.parts[0] == "tensorboard" for name in there) and "run/lock.json" not in bucket.names("bucket")
  for name in ("model.safetensors", "tokenizer.json"):
    assert (folder / "model" / name).read_bytes() == (tmp_path / "run" / "model" / name).read_bytes()
  _, exported = conversion.load_pretrained("gs://bucket/run/model")
  assert jax.tree.structure(exported) == jax.tree.structure(remote.state.params)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"workdir": "gs://other/run"}, "gs://other/run: there is no bucket gs://other"),
    ({"student": "gs://bucket/models/nobody"}, "gs://bucket/models/nobody: no such folder or file"),
    ({"data": "gs://bucket/nothing"}, "gs://bucket/nothing: no such folder or file"),
  ],
)
def test_what_is_not_there_is_refused_in_one_line_and_leaves_nothing(bucket, change, match):
  config = small("gs://bucket")
  config.model.student = change.get("student", config.model.student)
  config.data.directory = change.get("data", config.data.directory)
  with pytest.raises(ValueError, match=match) as caught:
    training.train(config, workdir=change.get("workdir", "gs://bucket/run"))
  assert "\n" not in str(caught.value)
  assert not any(name.startswith("run/") for name in bucket.names("bucket"))
  assert not (bucket.root / "other").exists()
