"""Files of ids: there and back, and any change of a question or its image is seen and named."""

import dataclasses
import json
import pathlib

import pytest

from kepo_jax.data import id_files, splits
from tests.data.test_dealing import cut, pool


def drawn_pool(folder):
  """`pool`, with files for its images."""
  examples = [
    dataclasses.replace(example, images=tuple(f"{folder}{path}" for path in example.images)) for example in pool()
  ]
  for path in {pathlib.Path(path) for example in examples for path in example.images}:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"pixels of {path.parent.name} {path.name}")
  return examples


def test_ids_go_to_a_file_and_back(tmp_path):
  pool = drawn_pool(tmp_path)
  split, path = cut(pool), tmp_path / "mri600.json"
  splits.write_ids(split, path, rule="mri600", seed=1)
  record = json.loads(path.read_text())
  assert (record["rule"], record["seed"], record["sha256"]) == ("mri600", 1, split.digest)
  assert record["counts"] == {"train": 20, "validation": 15, "test": 45}
  assert record["ids"]["train"] == sorted(example.id for example in split.train)
  assert [len(one) for one in record["contents"]["train"]] == [12] * 20 and len(record["content_sha256"]) == 64
  assert splits.read_ids(path, pool[::-1]) == split
  splits.write_ids(split, path, rule="mri600", seed=1)  # the same again
  with pytest.raises(ValueError, match=r"exists and holds another split \('.*' and \d+ more are not in both\); choose"):
    splits.write_ids(cut(pool, seed=2), path, rule="mri600", seed=2)
  with pytest.raises(ValueError, match="exists and holds these questions by another rule or seed"):
    splits.write_ids(split, path, rule="mri600", seed=2)
  lacking = [example for example in pool if example.id not in record["ids"]["test"][:7]]
  with pytest.raises(ValueError, match=r"the data lack 7 of its 80 questions, such as 'CT/"):
    splits.read_ids(path, lacking)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda r: r["ids"]["train"].pop(), r"do not have the counts .* and the SHA-256"),
    (lambda r: r["ids"]["train"].reverse(), "do not have the counts"),
    (lambda r: r.update(sha256="0"), "the SHA-256 0 that it states"),
    (lambda r: r["counts"].update(test=1), "do not have the counts"),
    (lambda r: r.pop("ids"), "no list of a split's ids"),
    (lambda r: r["ids"].update(train=[1]), "no list of a split's ids"),
    (lambda r: r["ids"].update(train="abc"), "no list of a split's ids"),
    (lambda r: r.pop("contents"), "no list of a split's ids .'contents'"),  # what an early version has written
    (lambda r: r.pop("content_sha256"), "no list of a split's ids"),
    (lambda r: r["contents"]["test"].pop(), "do not have the counts"),
    (lambda r: r["contents"].update(test=[None] * 45), "no list of a split's ids"),
    (lambda r: r.update(content_sha256="0"), "its content_sha256 is another"),
  ],
)
def test_changed_ids_are_refused(change, message, tmp_path):
  path, pool = tmp_path / "ids.json", drawn_pool(tmp_path)
  splits.write_ids(cut(pool), path, rule="mri600", seed=1)
  record = json.loads(path.read_text())
  change(record)
  path.write_text(json.dumps(record))
  with pytest.raises(ValueError, match=message):
    splits.read_ids(path, pool)


def test_an_id_in_two_parts_is_refused(tmp_path):
  pool = drawn_pool(tmp_path)
  split = cut(pool)
  splits.write_ids(splits.Split(split.train, split.validation, split.train), tmp_path / "a.json", rule="x", seed=0)
  with pytest.raises(ValueError, match="20 ids stand there twice"):
    splits.read_ids(tmp_path / "a.json", pool)
  for content in ("[]", "{", "3"):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: no list of a split's ids"):
      splits.read_ids(tmp_path / "a.json", pool)


CHANGES = {
  "question": "What?",
  "options": ("a", "c"),
  "answer": "B",
  "modality": "PET",
  "question_type": "Counting",
  "dataset": "other",
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_question_is_named(field, tmp_path):
  split, path = cut(drawn_pool(tmp_path)), tmp_path / "ids.json"
  splits.write_ids(split, path, rule="mri600", seed=1)
  changed = [dataclasses.replace(split.test[0], **{field: CHANGES[field]}), *split.test[1:]]
  later = dataclasses.replace(split, test=changed)
  message = (
    f"1 of its 80 questions have changed .'{changed[0].id}'.: text, options, answer, kind or image .*restore the"
  )
  with pytest.raises(ValueError, match=message):
    splits.read_ids(path, [*later.train, *later.validation, *later.test])
  with pytest.raises(ValueError, match=f"ids.json: exists and {message}"):
    splits.write_ids(later, path, rule="mri600", seed=1)


def test_every_field_of_a_question_counts(tmp_path):
  (example, *_) = drawn_pool(tmp_path)
  fields = {field.name for field in dataclasses.fields(example)}
  assert fields == {"id", "images", *CHANGES}
  others = [dataclasses.replace(example, **{name: value}) for name, value in CHANGES.items()]
  digests = [id_files.contents([each])[example.id] for each in (example, *others)]
  assert len(set(digests)) == len(digests) and all(len(digest) == 64 for digest in digests)


def test_a_changed_image_is_noticed_and_a_moved_one_is_the_same(tmp_path):
  (tmp_path / "here").mkdir()
  (tmp_path / "there").mkdir()
  split, path = cut(drawn_pool(tmp_path / "here")), tmp_path / "ids.json"
  splits.write_ids(split, path, rule="mri600", seed=1)
  moved = drawn_pool(tmp_path / "there")
  assert splits.read_ids(path, moved).ids == split.ids
  image = pathlib.Path(cut(moved).train[0].images[0])
  image.write_bytes(image.read_bytes()[:-1] + b"?")
  asked = sorted(
    example.id for part in cut(moved).as_dict().values() for example in part if str(image) in example.images
  )
  with pytest.raises(ValueError, match=rf"{len(asked)} of its 80 questions have changed \('{asked[0]}'"):
    splits.read_ids(path, moved)
  image.unlink()
  with pytest.raises(ValueError, match=rf"question MRI/\d+: image {image}: cannot be read"):
    splits.read_ids(path, moved)


def test_the_first_of_many_changes_are_named(tmp_path):
  split, path = cut(drawn_pool(tmp_path)), tmp_path / "ids.json"
  splits.write_ids(split, path, rule="mri600", seed=1)
  later = [dataclasses.replace(example, question="Why?") for example in split.train]
  names = ", ".join(repr(example.id) for example in later[:3])
  with pytest.raises(ValueError, match=rf"20 of its 80 questions have changed \({names} and 17 more\)"):
    splits.read_ids(path, [*later, *split.validation, *split.test])


def test_a_file_of_something_else_is_not_written_over(tmp_path):
  path = tmp_path / "notes.json"
  path.write_text("{}")
  with pytest.raises(ValueError, match="notes.json: exists and holds something else; choose another name"):
    splits.write_ids(cut(drawn_pool(tmp_path)), path, rule="mri600", seed=1)
  assert path.read_text() == "{}"
