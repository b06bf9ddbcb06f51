"""Building: what is written, what is reused, what is refused; and that none of it needs torch or TensorFlow."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from kepo_jax.data import images, splits
from kepo_jax.data.phantom import build as phantom
from kepo_jax.data.readers import omnimedvqa
from kepo_jax.data.tfds import building, reading
from kepo_jax.data.tfds.omnimedvqa import Builder
from kepo_jax.data.tfds.omnimedvqa import omnimedvqa_dataset_builder as builder
from tests import fake_bucket
from tests.conftest import ROOT
from tests.data import cases


def written(data_dir: pathlib.Path) -> list[pathlib.Path]:
  """Files of data sets, without the note in which TFDS keeps the name of the default config."""
  return [path for path in data_dir.rglob("*") if path.is_file() and path.parent.name != ".config"]


def test_what_is_written_once(built, small):
  assert built.directory.parts[-3:] == ("omnimedvqa", "omnimedvqa-MRI-6-2-4-3", "1.0.0")
  assert built.questions == {"train": 6, "validation": 4, "test": 8} and not built.reused
  before = {path: path.stat().st_mtime_ns for path in built.directory.iterdir()}
  again = building.build(built.directory.parents[2], config=small)  # the download may be gone
  assert again.reused and again.questions == built.questions and again.directory == built.directory
  assert {path: path.stat().st_mtime_ns for path in built.directory.iterdir()} == before


def test_a_data_set_in_a_bucket_is_built_once_and_read(built, download, small, tmp_path):
  (tmp_path / "cloud" / "bucket").mkdir(parents=True)
  with fake_bucket.served(tmp_path / "cloud") as store:
    there = building.build("gs://bucket/tfds", manual_dir=download, config=small)
    folder = "tfds/omnimedvqa/omnimedvqa-MRI-6-2-4-3/1.0.0"
    assert str(there.directory) == f"gs://bucket/{folder}" and not there.reused and there.questions == built.questions
    assert store.uploads[-1] == f"bucket/{folder}/dataset_info.json"  # without it, the folder is no data set
    files = {each.name for each in built.directory.iterdir()}
    assert {name.rpartition("/")[2] for name in store.names("bucket")} == files
    written_once = list(store.uploads)
    again = building.build("gs://bucket/tfds", config=small)  # the download may be gone
    assert again.reused and again.questions == built.questions and store.uploads == written_once
    found = splits.load(cases.settings(there.directory))
    assert found == splits.load(cases.settings(built.directory))
    with pytest.raises(ValueError, match="there is no bucket gs://other"):
      building.build("gs://other/tfds", manual_dir=download, config=small)


def test_the_builder_alone_writes_what_needs_no_tensorflow(download, small, tmp_path):
  alone = Builder(data_dir=tmp_path, config=small)
  alone.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=download))
  assert len(alone.as_data_source("train")) == 6


def test_a_missing_download_is_named(tmp_path):
  (tmp_path / "empty").mkdir()
  way_out = "Download OmniMedVQA.zip from https://huggingface.co/.*QA_information"
  for settings, message in [
    ({}, f"manual_dir is not set: .*{way_out}"),
    ({"manual_dir": tmp_path / "absent"}, f"absent: no such directory. {way_out}"),
    ({"manual_dir": tmp_path / "empty"}, f"empty: is empty. {way_out}"),
    ({"manual_dir": tmp_path}, "no QA_information folder here or below"),
    ({"config": "other"}, r"config 'other'; choose from \['omnimedvqa', 'phantom'\]"),
  ]:
    with pytest.raises(ValueError, match=message):
      building.build(tmp_path, **settings)
  assert written(tmp_path) == []


def test_a_build_that_fails_leaves_nothing(download, small, tmp_path, monkeypatch):
  damaged = tmp_path / "damaged.png"
  damaged.write_bytes(b"\x89PNG")
  with monkeypatch.context() as patch:
    patch.setattr(builder.records, "encoded_image", lambda path: images.load_image(damaged))
    with pytest.raises(ValueError, match=r"damaged\.png"):
      building.build(tmp_path / "data", manual_dir=download, config=small)
  assert written(tmp_path / "data") == []
  assert not building.build(tmp_path / "data", manual_dir=download, config=small).reused


def test_of_two_builds_at_once_both_have_the_data_set(download, small, tmp_path, monkeypatch):
  prepare = Builder.download_and_prepare

  def overtaken(self, **settings):
    with monkeypatch.context() as patch:
      patch.setattr(Builder, "download_and_prepare", prepare)
      assert not building.build(tmp_path, manual_dir=download, config=small).reused
    raise OSError("Directory not empty")

  monkeypatch.setattr(Builder, "download_and_prepare", overtaken)
  second = building.build(tmp_path, manual_dir=download, config=small)
  assert second.reused and second.questions == {"train": 6, "validation": 4, "test": 8}


def test_progress_and_parts_without_questions(download, tmp_path):
  calls = []
  config = builder.split_config(train_items=2, validation_items=0, test_items=1)
  built = building.build(tmp_path, manual_dir=download, config=config, progress=lambda *done: calls.append(done))
  assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
  assert built.questions == {"train": 2, "test": 2}
  assert [len(part) for part in reading.read_splits(tmp_path).values()] == [2, 0, 2]


def test_names_of_configs():
  default, drawn = Builder.BUILDER_CONFIGS
  assert drawn.version.split(".")[0] == phantom.VERSION
  assert builder.split_config(train_items=600, split_seed=0, access="Open-access", lenient=False) is default
  other = builder.split_config(train_modality="Infrared Imaging", split_seed=3)
  assert other.name == "omnimedvqa-Infrared_Imaging-600-40-300-3"


def test_shards_hold_about_the_limit_and_keep_the_order(download, small, tmp_path, monkeypatch):
  examples, _ = omnimedvqa.read(download)
  runs = builder.shards(examples, limit=5000)
  assert [example for run in runs for example in run] == examples
  sizes = [[pathlib.Path(example.images[0]).stat().st_size for example in run] for run in runs]
  assert len(runs) > 2 and all(sum(run[:-1]) < 5000 for run in sizes) and all(sum(run) >= 5000 for run in sizes[:-1])
  monkeypatch.setattr(builder, "shards", lambda part: [part[:2], part[2:3], part[3:]])
  built = building.build(tmp_path, manual_dir=download, config=small)
  assert len(list(built.directory.glob("*-train.array_record-*-of-00003"))) == 3
  ids = [example.id for example in reading.read(tmp_path, small.name, "train")]
  assert ids == sorted(ids) and len(ids) == 6


def test_the_phantom(tmp_path, monkeypatch):
  roots = {name: tmp_path / "drawn" / name for name in splits.SPLITS}
  for name, root in roots.items():
    phantom.write_split(root, phantom.make_items(name)[-3:])
  monkeypatch.setattr(splits, "phantom_roots", lambda: roots)
  built = building.build(tmp_path / "data", config="phantom")
  assert built.questions == {"train": 3, "validation": 3, "test": 3}
  assert built.directory.parts[-2:] == ("phantom", f"{phantom.VERSION}.0.0")
  for name, root in roots.items():
    found, (expected, _) = reading.read(tmp_path / "data", "phantom", name), omnimedvqa.read(root)
    for a, b in zip(found, expected, strict=True):
      assert (a.id, a.answer_text) == (b.id, b.answer_text)
      assert np.array_equal(Image.open(a.images[0]), Image.open(b.images[0]))


ALONE = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None
from kepo_jax.data import splits
assert "tensorflow_datasets" not in sys.modules  # not until a built data set is read
from kepo_jax.data.tfds import building, reading
from kepo_jax.data.tfds.omnimedvqa import omnimedvqa_dataset_builder as builder
config = builder.split_config(train_items=6, validation_items=2, test_items=4)
building.build(sys.argv[2], manual_dir=sys.argv[1], config=config)
assert [len(part) for part in reading.read_splits(sys.argv[2]).values()] == [6, 4, 8]
import tensorflow_datasets as tfds
decoded = tfds.data_source(f"omnimedvqa/{config.name}", split="train", data_dir=sys.argv[2])
assert len(decoded) == 6 and decoded[5]["images"][0].shape[2] == 3
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
"""


@pytest.mark.slow
def test_neither_torch_nor_tensorflow_is_needed(download, tmp_path):
  command = [sys.executable, "-c", ALONE, str(download), str(tmp_path / "data")]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
