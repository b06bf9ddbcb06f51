"""Files of ids: any change of a question or its image is seen and named."""

import dataclasses
import json
import pathlib

import pytest

from kepo_jax.data import id_files
from tests.data.test_splitting import pool, split


def drawn_pool(folder):
  """Returns `pool`, with files for its images."""
  examples = [dataclasses.replace(each, images=tuple(f"{folder}{path}" for path in each.images)) for each in pool()]
  for path in {pathlib.Path(path) for example in examples for path in example.images}:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"pixels of {path.parent.name} {path.name}")
  return examples


def write(parts, path, seed=1):
  return id_files.write(parts, path, rule="mri600", seed=seed)


@pytest.fixture
def parts(tmp_path):
  return split(drawn_pool(tmp_path))


def test_a_file_is_written_once_and_never_replaced(parts, tmp_path):
  path = tmp_path / "mri600.json"
  digest = write(parts, path)
  record = json.loads(path.read_text())
  assert (record["rule"], record["seed"], record["content_sha256"]) == ("mri600", 1, digest)
  assert id_files.content_digest(parts) == digest
  assert record["counts"] == {"train": 20, "validation": 15, "test": 45}
  assert record["ids"]["train"] == sorted(example.id for example in parts["train"])
  assert [len(one) for one in record["contents"]["train"]] == [12] * 20
  before = path.read_text()
  assert write(parts, path) == digest
  with pytest.raises(ValueError, match=r"exists and holds another split \('.*' and \d+ more are not in both\); choose"):
    write(split(drawn_pool(tmp_path), split_seed=2), path)
  with pytest.raises(ValueError, match="exists and holds these questions by another rule or seed"):
    write(parts, path, seed=2)
  assert path.read_text() == before
  for damaged in ("{", "[]", '{"ids": 3}', '{"ids": {"train": [1]}, "contents": {}}'):
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"mri600\.json: exists and holds something else; choose another name"):
      write(parts, path)
    assert path.read_text() == damaged


CHANGES = {"question": "What?", "options": ("a", "c"), "answer": "B", "modality": "PET"}
CHANGES |= {"question_type": "Counting", "dataset": "other"}


def test_a_changed_question_is_named(parts, tmp_path):
  write(parts, tmp_path / "ids.json")
  first, *others = parts["test"]
  assert {field.name for field in dataclasses.fields(first)} == {"id", "images", *CHANGES}
  for field, value in CHANGES.items():
    later = parts | {"test": [dataclasses.replace(first, **{field: value}), *others]}
    with pytest.raises(ValueError, match=f"1 of its 80 questions have changed .'{first.id}'.: .* restore the data"):
      write(later, tmp_path / "ids.json")


def test_a_changed_image_is_noticed_and_a_moved_one_is_the_same(parts, tmp_path):
  path, moved = tmp_path / "ids.json", split(drawn_pool(tmp_path / "there"))
  assert write(parts, path) == write(moved, path)
  image = pathlib.Path(moved["train"][0].images[0])
  image.write_bytes(image.read_bytes()[:-1] + b"?")
  changed = sorted(each.id for part in moved.values() for each in part if str(image) in each.images)
  with pytest.raises(ValueError, match=rf"{len(changed)} of its 80 questions have changed \('{changed[0]}'"):
    write(moved, path)
  image.unlink()
  with pytest.raises(ValueError, match=rf"question MRI/\d+: image {image}: cannot be read"):
    write(moved, path)
