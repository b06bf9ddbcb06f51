"""Where the parts of a published split are found, and where a folder is refused as a pool."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from PIL import Image

from kepo_jax import storage
from kepo_jax.data import splits
from kepo_jax.data.readers import omnimedvqa
from kepo_jax.data.tfds import folders, reading
from tests import fake_bucket
from tests.data import cases
from tests.data.cases import MEDR1, Layout, question, record, settings, write_parquet, write_records


def touch(top, *names):
  for name in names:
    (top / name).parent.mkdir(parents=True, exist_ok=True)
    (top / name).touch()
  return top


FOUND = {
  "Med-R1": (("train/MRI_train.json", "test/MRI_test.json"), "train test"),
  "saved": (("train/state.json", "test/state.json", "val/state.json", "dataset_dict.json"), "train test val"),
  "parquet": (
    ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-0.parquet", "README.md"),
    "train-*.parquet test-*.parquet",
  ),
  "three parts": (
    ("Train.PARQUET", "test.parquet", "validation-0.parquet"), "train-*.parquet test-*.parquet validation-*.parquet",
  ),
  "saved, one level down": (("MRI_600/train/state.json", "MRI_600/test/state.json"), "MRI_600/train MRI_600/test"),
  "JSON": (("train.json", "test.JSONL"), "train.json test.JSONL"),
  "folders before files": (("train/a.json", "test/a.json", "train-0.parquet", "test-0.parquet"), "train test"),
}  # fmt: skip


def test_parts(tmp_path):
  for case, (names, expected) in FOUND.items():
    top = touch(tmp_path / case, *names)
    places = [top / name for name in expected.split()]
    assert splits.published_parts(top) == dict(zip(("train", "test", "validation"), places, strict=False)), case
    with pytest.raises(ValueError, match="holds a published split"):
      splits.refuse_published(top)


LACKING = {
  "has no test and no train part": (),
  "has no test part; split_files is a folder with train/ and test/": ("train/a.json", "below/test/a.json"),
  "has no train part": ("test-0.parquet",),
  "holds several published splits": ("a/train/x", "a/test/x", "b/train/x", "b/test/x"),
  "any of .*val.*, .*validation could be the validation part": ("train/x", "test/x", "val/x", "validation/x"),
}


def test_parts_that_are_not_clear(tmp_path):
  for number, (message, names) in enumerate(LACKING.items()):
    (tmp_path / f"{number}").mkdir()
    with pytest.raises(ValueError, match=message):
      splits.published_parts(touch(tmp_path / f"{number}", *names))


def test_a_pool_that_holds_both_and_one_that_does_not(tmp_path):
  for number, names in enumerate([
    ("MRI_train.json", "MRI_test.json"),
    ("Splits/modality/train/CT.json", "Splits/modality/test/CT.json"),
    ("modality_MRI_train_600.parquet", "x/test-0.parquet"),
    ("below/dataset_dict.json", "below/train/state.json"),
  ]):  # fmt: skip
    with pytest.raises(ValueError, match="holds a published split, whose training and test questions would be mixed"):
      splits.refuse_published(touch(tmp_path / f"both {number}", *names))
  for number, names in enumerate([("MRI_train.json", "CT_train.json"), ("latest.json", "trainer.json"), ()]):
    splits.refuse_published(touch(tmp_path / f"pool {number}", *names))


def test_names_of_data_sets_are_no_parts(tmp_path):
  cases.Layout(tmp_path / "OmniMedVQA").write(cases.RECORD, name="Set train")
  cases.Layout.write(cases.Layout(tmp_path / "b" / "c"), cases.RECORD, name="Set test")
  splits.refuse_published(tmp_path)


def test_load_from_the_mini_set(shared_directory):
  found = splits.load(settings(shared_directory / "omnimedvqa-mini", train_items=4))
  assert {name: len(part) for name, part in found.items()} == {"train": 4, "validation": 16, "test": 24}
  assert {example.modality for example in found["train"]} == {"MRI"}


def test_load_the_phantom(tmp_path_factory, monkeypatch, caplog):
  # A folder in which the phantom is drawn once for all test processes.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "phantom-cache"))
  told = []
  with caplog.at_level("WARNING"):
    found = splits.load(settings(""), report=told.append)
  assert caplog.records == []  # its spellings are those of OmniMedVQA on purpose
  assert [dict(each.rules) for each in told] == [{"modality_spelling": n} for n in (600, 240, 1800)]
  assert {name: len(part) for name, part in found.items()} == {"train": 6, "validation": 16, "test": 24}
  assert Image.open(found["test"][0].images[0]).size == (64, 64)
  root = next(iter(splits.phantom_roots().values())).parent
  assert splits.load(settings(root)) == found  # the same as a directory
  assert splits.load(settings("", split_seed=1))["test"] != found["test"]
  whole = splits.load(settings("", train_items=600, validation_items=40, test_items=300))
  assert {name: len(part) for name, part in whole.items()} == {"train": 600, "validation": 320, "test": 2400}
  images = {example.id: example.images for part in whole.values() for example in part}
  # No picture is drawn twice.
  assert len(images) == 3320 == len({pathlib.Path(path).read_bytes() for (path,) in images.values()})


@pytest.fixture
def published(tmp_path):
  """Images below `data`; a split in Med-R1's form beside them, two of whose test images are training images too."""

  def records(numbers, modality):
    for number in numbers:
      path = tmp_path / "data" / "Images" / modality / f"{number}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("L", (8, 8), number + 100 * (modality == "CT")).save(path)
    problem = "Which organ is no. {}? A)Chest, B)Brain"
    return [MEDR1 | {"image": f"Images/{modality}/{n}.png", "problem": problem.format(n)} for n in numbers]

  for modality in ("MRI", "CT"):
    write_records(tmp_path / "split" / "train" / f"{modality}_train.json", *records(range(20), modality))
    write_records(tmp_path / "split" / "test" / f"{modality}_test.json", *records(range(18, 30), modality))
  return tmp_path


def test_a_published_split_is_taken_verbatim(published, caplog):
  wanted = settings(published / "data", split_files=str(published / "split"), train_items=20, test_items=12)
  images, told = published / "data" / "Images" / "MRI", []
  shutil.copy(images / "3.png", images / "25.png")  # a training image under another name
  with caplog.at_level("WARNING"):
    found = splits.load(wanted, report=told.append)
  assert [(each.root.rpartition("/")[2], each.records) for each in told] == [("train", 40), ("test", 24)]
  # 20 MRI questions for training; their images 18, 19 and 3 are among the 24 test images.
  used = "20 of 40 training and 24 of 24 test questions"
  assert f"as used: 3 test images (12.5 %) are training images too, by path or content; {used}" in caplog.text
  # The CT questions that are not trained on share two images with the test as well.
  assert "as published: 4 test images (16.7 %) are training images too, by path; 40 of 40 training and" in caplog.text
  assert [example.id for example in found["train"]] == sorted(f"MRI_train/{n}" for n in range(20))
  assert {example.id for example in found["test"]} == {f"{m}_test/{n}" for m in ("MRI", "CT") for n in range(12)}
  # Validation questions come from what is left of the training part: no MRI, and no image of train or test.
  assert [example.modality for example in found["validation"]] == ["CT", "CT"]
  taken = {image for name in ("train", "test") for example in found[name] for image in example.images}
  assert not taken.intersection(image for example in found["validation"] for image in example.images)


def write_parts(top, images):
  """Folders that are already split; part -> names of its images, which hold what the number in the name says."""
  for part, names in images.items():
    layout = Layout(top / part)
    paths = [f"Images/Set A/{name}.png" for name in names]
    for name, path in zip(names, paths, strict=True):
      layout.image(path, int(name.strip("ab")))
    layout.write(*(record(n, modality_type="MRI", image_path=path) for n, path in enumerate(paths)))
  return top


@pytest.mark.parametrize("kind", ["folders", "TFDS"])
def test_images_in_two_parts_of_folders_are_warned_of(tmp_path, caplog, monkeypatch, kind):
  for number, (validation, test, warned) in enumerate([
    (["7"], ["8", "9"], ""),
    (["7", "8"], ["9", "3a", "2b"], "2 test images (66.7 %)"),
    (["1b", "7"], ["8", "9"], "1 validation images (50.0 %)"),
    (["7", "9b"], ["9"], ""),  # not with training images
  ]):  # fmt: skip
    parts = {"train": [str(n) for n in range(6)], "validation": validation, "test": test}
    top = write_parts(tmp_path / f"{number}", parts)
    if kind == "TFDS":
      read = {name: omnimedvqa.read(root)[0] for name, root in splits.split_roots(top).items()}
      monkeypatch.setattr(folders, "find", lambda directory, top=top: top)
      monkeypatch.setattr(reading, "read_splits", lambda folder, read=read: read)
    caplog.clear()
    with caplog.at_level("WARNING"):
      splits.load(settings(top))
    said = [entry.getMessage() for entry in caplog.records if "training images too" in entry.getMessage()]
    assert len(said) == bool(warned) and all(warned in line for line in said), number


def test_published_tables_are_read_part_by_part(tmp_path, caplog):
  for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 3), ("test-00000-of-00001", 4)):
    problems = [f"{name}, {i}?\nA: a\nB: b" for i in range(count)]
    write_parquet(tmp_path / "MRI_600" / "data" / f"{name}.parquet", count=count, problem=problems)
  with pytest.raises(ValueError, match="holds a published split, .* name it as split_files"):
    splits.load(settings(tmp_path / "MRI_600"))
  for items, sizes in ((0, (6, 4)), (2, (2, 2))):  # 0 is all
    wanted = settings(
      "", split_files=str(tmp_path / "MRI_600"), train_items=items, test_items=items, validation_items=0
    )
    with caplog.at_level("WARNING"):
      found = splits.load(wanted)
    assert (len(found["train"]), len(found["test"]), found["validation"]) == (*sizes, [])
    assert all(each.question.startswith(name) for name in ("train", "test") for each in found[name])
  assert "2 of 6 training and 2 of 4 test questions" in caplog.text


def test_a_bucket_is_read_like_a_disk(published, tmp_path):
  bucket = tmp_path / "cloud" / "bucket"
  for name in ("data", "split"):
    shutil.copytree(published / name, bucket / name)
  here = settings(bucket / "data", split_files=f"{bucket}/split", train_items=1, validation_items=0, test_items=0)
  found, told, summaries = splits.load(here), [], []
  assert found["train"]
  for name in ("directory", "split_files"):
    here[name] = here[name].replace(str(bucket), "gs://bucket")
  with fake_bucket.served(tmp_path / "cloud"):
    there = splits.load(here, report=summaries.append, progress=lambda *of: told.append(of))
  assert told[-1][0] == told[-1][1] > 0
  for name, part in there.items():
    for each, expected in zip(part, found[name], strict=True):
      images = (storage.origin(image).replace("gs://bucket", str(bucket)) for image in each.images)
      assert dataclasses.replace(each, images=tuple(images)) == expected
  assert all(summary.root.startswith("gs://bucket/") for summary in summaries)


def test_unusable_records_stop_a_run_unless_it_is_lenient(published):
  file = published / "split" / "train" / "MRI_train.json"
  records = json.loads(file.read_text())
  write_records(file, *records, MEDR1 | {"image": "Images/MRI/none.png", "problem": "Where? A)Chest, B)Brain"})
  wanted = settings(published / "data", split_files=str(published / "split"), train_items=20)
  with pytest.raises(ValueError, match="none.png"):
    splits.load(wanted)
  wanted.lenient = True
  assert len(splits.load(wanted)["train"]) == 20
  # A damaged image is found by decoding alone, and another question takes its place.
  bad = published / "data" / "Images" / "CT" / "20.png"
  bad.write_bytes(bad.read_bytes()[:40])
  wanted.test_items = 11
  found = splits.load(wanted)
  assert len(found["test"]) == 22 and not any(str(bad) in example.images for example in found["test"])


def test_every_repair_is_warned_of_and_told(tmp_path, caplog):
  """A repair alone, without a dropped record, must not go unseen."""
  layout, found = Layout(tmp_path), []
  for n in range(12):
    layout.image(f"Images/{n}.png", n)  # the same picture under two names would be one
  for answer, rules in (("Brain", {}), ("brain.", {"answer_normalised": 12})):
    layout.write(*(record(n, modality_type="MRI", gt_answer=answer, image_path=f"Images/{n}.png") for n in range(12)))
    caplog.clear()
    with caplog.at_level("INFO", logger="absl"):  # entry points in other tests set how much is logged
      assert len(splits.load(settings(tmp_path), report=found.append)["train"]) == 6
    assert (found[-1].records, found[-1].kept, dict(found[-1].rules)) == (12, 12, rules)
    (said,) = [entry for entry in caplog.records if "records kept" in entry.message]
    assert said.levelname == ("WARNING" if rules else "INFO")
  assert "answer_normalised 12: repaired" in said.message


def test_a_missing_split_is_named(tmp_path):
  (tmp_path / "train" / "QA_information").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"has \['train'\] but not \['validation', 'test'\]"):
    splits.load(settings(tmp_path))


def test_overlap():
  a, b, c = (question("MRI", n, n) for n in range(3))
  both = question("MRI", 9, 1, "/MRI/7.png")
  assert splits.overlap([a, b], [b, both, c]) == (1, 1 / 3)  # images 1, 2 and 7
  assert splits.overlap([a], []) == (0, 0.0)
