"""What was built comes back: the same questions in the same order, with the same pixels."""

import dataclasses
import io
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from kepo_jax.data import images, splits
from kepo_jax.data.readers import omnimedvqa
from kepo_jax.data.tfds import building, folders, reading, records
from kepo_jax.data.tfds.omnimedvqa import omnimedvqa_dataset_builder as builder
from kepo_jax.types import Example
from tests.data import cases


def pixels(path):
  return np.asarray(images.rgb(images.load_image(path)))


def assert_equal(found: list[Example], expected: list[Example]):
  """Equal but for where their images lie."""
  for a, b in zip(found, expected, strict=True):
    assert dataclasses.replace(a, images=b.images) == b
    for stored, original in zip(a.images, b.images, strict=True):
      np.testing.assert_array_equal(pixels(stored), pixels(original), err_msg=original)


def test_any_number_of_images(download, tmp_path, monkeypatch):
  folder = download / "Images" / "Set M"
  paths = [str(folder / name) for name in ("grey.png", "old.bmp", "a (1).jpg")]
  expected = [
    Example(f"set/{i}", "?", ("a", "b"), "AB"[i % 2], tuple(paths[:i]), "MRI", dataset="set") for i in range(4)
  ]
  monkeypatch.setattr(builder, "_read", lambda root, **settings: expected)
  config = builder.split_config(train_items=4, validation_items=0, test_items=0)
  building.build(tmp_path, manual_dir=download, config=config)
  assert_equal(reading.read(tmp_path, config.name), expected)


def test_what_is_no_image_is_named(download, small, tmp_path, monkeypatch):
  monkeypatch.setattr(builder.records, "encoded_image", lambda path: b"text")
  building.build(tmp_path, manual_dir=download, config=small)
  with pytest.raises(ValueError, match="1.0.0, train: cannot be read .damaged, .*build the data set again"):
    reading.read_splits(tmp_path)


def test_a_damaged_file_is_named(built, tmp_path):
  copy = shutil.copytree(built.directory, tmp_path / "copy")
  file = next(copy.glob("*-test.array_record-*"))
  data = file.read_bytes()
  one_byte = data[:300] + bytes([data[300] ^ 255]) + data[301:]
  for damaged in (bytes(len(data)), bytes(len(data) // 2) + data[len(data) // 2 :], data[: len(data) // 2], one_byte):
    file.unlink()  # the reader has the old one mapped into memory
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="copy.*, test: .*delete the folder and build the data set again"):
      reading.read(copy, split="test")
  assert len(reading.read(copy, split="train")) == 6


def test_what_is_not_there_is_named(built, tmp_path):
  with pytest.raises(ValueError, match="no built config 'omnimedvqa'; run python -m experiments.build_tfds"):
    reading.read(tmp_path)
  with pytest.raises(ValueError, match=r"no split 'dev', it has \['test', 'train', 'validation'\]"):
    reading.read(built.directory, split="dev")
  copy = shutil.copytree(built.directory, tmp_path / "copy")
  next(copy.glob("*-train.array_record-*")).unlink()
  with pytest.raises(ValueError, match=r"copy: omnimedvqa-train\.array_record-00000-of-00001 is missing \(1 in all\)"):
    reading.read(copy)
  assert len(reading.read(copy, split="test")) == 8


def test_damaged_descriptions_are_named(built, tmp_path):
  nested = '{"featuresDict": {"features": {"a": ' * 50_000
  for name, texts in {
    "dataset_info.json": ("", "[]", '{"name": ', '{"splits": 3}', '{"unknown": 1}'),
    "features.json": ("", "[]", "{}", nested, '{"pythonClassName": "x", "sequence": 3}'),
  }.items():
    for number, text in enumerate(texts):
      folder = shutil.copytree(built.directory, tmp_path / name / str(number) / "1.0.0")
      (folder / name).write_text(text)
      with pytest.raises(ValueError, match=name) as caught:
        reading.read_splits(folder)
      assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000, text[:40]


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda info: info.update(splits=None), "leave out 'omnimedvqa-test.array_record-00000-of-00001', 3 files"),
    (lambda info: info["splits"].pop(), "1 files"),
    (lambda info: info["splits"][0].update(shardLengths=["5"]), r"train: .*shardLengths .*\[5\], .* hold \[6\]"),
    (lambda info: info["splits"][0].update(shardLengths=["3", "3"]), "leave out"),
    (lambda info: info["splits"][0].update(filepathTemplate="../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"), "out"),
  ],
)
def test_a_description_that_does_not_fit_its_files_is_refused(change, said, built, tmp_path):
  copy = shutil.copytree(built.directory, tmp_path / "1.0.0")
  info = json.loads((copy / "dataset_info.json").read_text())
  change(info)
  (copy / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match=f"{copy}.*dataset_info.json.*delete the folder and build") as caught:
    reading.read_splits(copy)
  assert re.search(said, str(caught.value)) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_records_of_another_kind_are_refused(built, tmp_path, monkeypatch):
  copy = shutil.copytree(built.directory, tmp_path / "copy")
  description = json.loads((copy / "features.json").read_text())
  for content in ("[]", "{", '{"featuresDict": 3}', '{"pythonClassName": "antigravity.Feature"}'):
    (copy / "features.json").write_text(content)
    with pytest.raises(ValueError, match=r"features\.json: (not the description|describes)"):
      reading.read(copy)
  # A class from elsewhere is not imported.
  description["featuresDict"]["features"]["images"]["sequence"]["feature"]["pythonClassName"] = "intruder.Image"
  (copy / "features.json").write_text(json.dumps(description))
  (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match=r"features\.json: describes .*intruder\.Image"):
    reading.read(copy)


def test_the_loader_of_a_run_reads_it(built, download):
  numbers = cases.settings("", test_items=4, split_seed=3)
  expected = splits.split_by_modality(omnimedvqa.read(download)[0], numbers)
  kinds = {pathlib.Path(each.images[0]).suffix for part in expected.values() for each in part}
  assert {".tif", ".bmp", ".png", ".jpg"} <= kinds
  for directory in (built.directory, built.directory.parents[2]):
    for name, part in splits.load(cases.settings(directory, test_items=4)).items():
      assert_equal(part, expected[name])
  told = []
  fewer = splits.load(cases.settings(built.directory, test_items=1, train_items=3), report=told.append)
  (summary,) = told
  assert (summary.format, summary.records) == ("TFDS", sum(map(len, expected.values()))) and not summary.rules
  assert {name: len(part) for name, part in fewer.items()} == {"train": 3, "validation": 4, "test": 2}
  assert splits.load(cases.settings(built.directory, train_modality="CT"))["train"] == []


def test_a_record_has_the_fields_of_an_example():
  assert set(records.features()) == {field.name for field in dataclasses.fields(Example)}


def test_images_keep_their_bytes_or_their_pixels(download):
  paths = sorted((download / "Images" / "Set M").iterdir())
  kept = {"grey.png", "colour.png", "a (1).jpg", "LOUD.JPG"}
  for path in paths:
    data = records.encoded_image(path)
    assert (data == path.read_bytes()) == (path.name in kept), path.name
    with Image.open(io.BytesIO(data)) as stored:
      assert stored.format == ("JPEG" if path.suffix.lower() == ".jpg" else "PNG"), path.name
      assert stored.mode in ("L", "RGB"), path.name
    # What the rest of the project sees of the file, and what plain TFDS makes of the bytes.
    expected = np.asarray(images.rgb(images.load_image(path)))
    decoded = tfds.features.Image(shape=(None, None, 3)).decode_example_np(data)
    np.testing.assert_array_equal(decoded, expected, err_msg=path.name)


def version(data_dir, config, files=("features.json", "a.array_record", "dataset_info.json")):
  folder = data_dir / "omnimedvqa" / config / "1.0.0"
  folder.mkdir(parents=True)
  for name in files:
    (folder / name).touch()
  return folder


def test_the_version_itself_or_the_only_one_that_is_finished(tmp_path):
  folder = version(tmp_path, "phantom", files=("features.json", "a.array_record"))
  assert folders.find(tmp_path) is None and folders.find(tmp_path / "absent") is None
  (folder / "dataset_info.json").touch()
  assert folders.find(folder) == folders.find(tmp_path) == folders.find(tmp_path, "phantom") == folder
  assert folders.find(tmp_path, "omnimedvqa") is None
  version(tmp_path, "omnimedvqa")
  with pytest.raises(ValueError, match=r"several built data sets .*omnimedvqa/1\.0\.0, .*phantom/1\.0\.0\); name one"):
    folders.find(tmp_path)
  assert folders.find(tmp_path, "phantom") == folder
  (folder / "a.array_record").rename(folder / "a.tfrecord")
  with pytest.raises(ValueError, match="holds no array_record files; build the data set with file_format="):
    folders.find(tmp_path, "phantom")
