"""Where a built data set is found."""

import pytest

from kepo_jax.data.tfds import folders


def version(data_dir, config="phantom", number="1.0.0", files=("dataset_info.json", "features.json", "a.array_record")):
  folder = data_dir / "omnimedvqa" / config / number
  folder.mkdir(parents=True)
  for name in files:
    (folder / name).touch()
  return folder


def test_the_version_itself_or_the_only_one(tmp_path):
  assert folders.find(tmp_path) is None and folders.find(tmp_path / "absent") is None
  folder = version(tmp_path)
  assert folders.find(folder) == folder and folders.find(tmp_path) == folder
  assert folders.find(tmp_path, "phantom") == folder and folders.find(tmp_path, "omnimedvqa") is None
  version(tmp_path / "unfinished", files=("features.json", "a.array_record"))
  assert folders.find(tmp_path / "unfinished") is None


def test_several_are_named(tmp_path):
  version(tmp_path), version(tmp_path, "omnimedvqa")
  with pytest.raises(ValueError, match=r"several built data sets .*omnimedvqa/1\.0\.0, .*phantom/1\.0\.0\); name one"):
    folders.find(tmp_path)
  assert folders.find(tmp_path, "phantom").parent.name == "phantom"


def test_another_format_is_refused(tmp_path):
  version(tmp_path, files=("dataset_info.json", "features.json", "a.tfrecord"))
  with pytest.raises(ValueError, match="holds no array_record files; build the data set with file_format="):
    folders.find(tmp_path)
