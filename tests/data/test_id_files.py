"""Files of ids: there and back, and any change of a question or its image is seen and named."""

import dataclasses
import json
import pathlib

import pytest

from kepo_jax.data import splits
from tests.data.test_splitting import cut, pool


def drawn_pool(folder):
  """`pool`, with files for its images."""
  examples = [dataclasses.replace(each, images=tuple(f"{folder}{path}" for path in each.images)) for each in pool()]
  for path in {pathlib.Path(path) for example in examples for path in example.images}:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"pixels of {path.parent.name} {path.name}")
  return examples


@pytest.fixture
def split(tmp_path):
  return cut(drawn_pool(tmp_path))


def write(split, path, seed=1):
  splits.write_ids(split, path, rule="mri600", seed=seed)
  return path


def everything(split):
  return [example for part in split.as_dict().values() for example in part]


def test_ids_go_to_a_file_and_back(split, tmp_path):
  pool, path = drawn_pool(tmp_path), write(split, tmp_path / "mri600.json")
  record = json.loads(path.read_text())
  assert (record["rule"], record["seed"], record["sha256"]) == ("mri600", 1, split.digest)
  assert record["counts"] == {"train": 20, "validation": 15, "test": 45}
  assert record["ids"]["train"] == sorted(example.id for example in split.train)
  assert [len(one) for one in record["contents"]["train"]] == [12] * 20 and len(record["content_sha256"]) == 64
  assert splits.read_ids(path, pool[::-1]) == split
  write(split, path)  # the same again
  with pytest.raises(ValueError, match=r"exists and holds another split \('.*' and \d+ more are not in both\); choose"):
    write(cut(pool, seed=2), path, seed=2)
  with pytest.raises(ValueError, match="exists and holds these questions by another rule or seed"):
    write(split, path, seed=2)
  lacking = [example for example in pool if example.id not in record["ids"]["test"][:7]]
  with pytest.raises(ValueError, match=r"the data lack 7 of its 80 questions, such as 'CT/"):
    splits.read_ids(path, lacking)


def test_changed_ids_are_refused(split, tmp_path):
  stored = write(split, tmp_path / "ids.json").read_text()
  for number, (change, message) in enumerate([
    (lambda r: r["ids"]["train"].pop(), r"do not have the counts .* and the SHA-256"),
    (lambda r: r["ids"]["train"].reverse(), "do not have the counts"),
    (lambda r: r.update(sha256="0"), "the SHA-256 0 that it states"),
    (lambda r: r["counts"].update(test=1), "do not have the counts"),
    (lambda r: r.pop("ids"), "no list of a split's ids"),
    (lambda r: r["ids"].update(train=[1]), "no list of a split's ids"),
    (lambda r: r.pop("content_sha256"), "no list of a split's ids"),
    (lambda r: r["contents"]["test"].pop(), "do not have the counts"),
    (lambda r: r.update(content_sha256="0"), "its content_sha256 is another"),
  ]):  # fmt: skip
    record = json.loads(stored)
    change(record)
    (tmp_path / f"{number}.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"{number}\.json: .*{message}"):
      splits.read_ids(tmp_path / f"{number}.json", everything(split))
  (tmp_path / "a.json").write_text("{")
  with pytest.raises(ValueError, match=r"a\.json: no list of a split's ids"):
    splits.read_ids(tmp_path / "a.json", everything(split))
  with pytest.raises(ValueError, match=r"a\.json: exists and holds something else; choose another name"):
    write(split, tmp_path / "a.json")
  assert (tmp_path / "a.json").read_text() == "{"
  twice = splits.Split(split.train, split.validation, split.train)
  with pytest.raises(ValueError, match="20 ids stand there twice"):
    splits.read_ids(write(twice, tmp_path / "twice.json"), everything(split))


CHANGES = {"question": "What?", "options": ("a", "c"), "answer": "B", "modality": "PET"}
CHANGES |= {"question_type": "Counting", "dataset": "other"}


def test_a_changed_question_is_named(split, tmp_path):
  path = write(split, tmp_path / "ids.json")
  assert {field.name for field in dataclasses.fields(split.test[0])} == {"id", "images", *CHANGES}
  for field, value in CHANGES.items():
    changed = dataclasses.replace(split.test[0], **{field: value})
    later = dataclasses.replace(split, test=[changed, *split.test[1:]])
    message = f"1 of its 80 questions have changed .'{changed.id}'.: text, options, answer, kind or image .*restore the"
    with pytest.raises(ValueError, match=message):
      splits.read_ids(path, everything(later))
    with pytest.raises(ValueError, match=f"ids.json: exists and {message}"):
      write(later, path)


def test_a_changed_image_is_noticed_and_a_moved_one_is_the_same(split, tmp_path):
  path, moved = write(split, tmp_path / "ids.json"), drawn_pool(tmp_path / "there")
  assert splits.read_ids(path, moved).ids == split.ids
  image = pathlib.Path(cut(moved).train[0].images[0])
  image.write_bytes(image.read_bytes()[:-1] + b"?")
  asked = sorted(example.id for example in everything(cut(moved)) if str(image) in example.images)
  with pytest.raises(ValueError, match=rf"{len(asked)} of its 80 questions have changed \('{asked[0]}'"):
    splits.read_ids(path, moved)
  image.unlink()
  with pytest.raises(ValueError, match=rf"question MRI/\d+: image {image}: cannot be read"):
    splits.read_ids(path, moved)
