"""Where a built data set is found."""

import pytest

from kepo_jax.data.tfds import folders


def version(data_dir, config="phantom", files=("dataset_info.json", "features.json", "a.array_record")):
  folder = data_dir / "omnimedvqa" / config / "1.0.0"
  folder.mkdir(parents=True)
  for name in files:
    (folder / name).touch()
  return folder


def test_the_version_itself_or_the_only_one_that_is_finished(tmp_path):
  version(tmp_path, files=("features.json", "a.array_record"))
  assert folders.find(tmp_path) is None and folders.find(tmp_path / "absent") is None
  (tmp_path / "omnimedvqa" / "phantom" / "1.0.0" / "dataset_info.json").touch()
  (folder,) = tmp_path.glob("*/*/*")
  assert folders.find(folder) == folders.find(tmp_path) == folders.find(tmp_path, "phantom") == folder
  assert folders.find(tmp_path, "omnimedvqa") is None
  version(tmp_path, "omnimedvqa")
  with pytest.raises(ValueError, match=r"several built data sets .*omnimedvqa/1\.0\.0, .*phantom/1\.0\.0\); name one"):
    folders.find(tmp_path)
  assert folders.find(tmp_path, "phantom") == folder


def test_another_format_is_refused(tmp_path):
  version(tmp_path, files=("dataset_info.json", "features.json", "a.tfrecord"))
  with pytest.raises(ValueError, match="holds no array_record files; build the data set with file_format="):
    folders.find(tmp_path)
