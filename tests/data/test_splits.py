"""The published rule: exact numbers, no shared image, membership from seed and ids alone."""

import dataclasses
import json
import pathlib
import shutil

import ml_collections
import pytest
from PIL import Image

from kepo_jax import storage
from kepo_jax.data import images, same_images, splits
from kepo_jax.types import Example
from tests import fake_bucket
from tests.data.cases import MEDR1, Layout, record, write_parquet, write_records, write_saved


def question(modality, number, image, *more):
  return Example(
    id=f"{modality}/{number:04d}",
    question="?",
    options=("a", "b"),
    answer="A",
    images=(f"/{modality}/{image}.png", *more),
    modality=modality,
    dataset=modality,
  )


def pool():
  """Three modalities of 60 questions; every third image carries two questions."""
  return [question(modality, n, n - 1 if n % 3 == 2 else n) for modality in ("MRI", "CT", "OCT") for n in range(60)]


def cut(examples, **changes):
  numbers = {"train": 20, "validation_per_modality": 5, "test_per_modality": 15, "seed": 1} | changes
  return splits.split_by_modality(examples, **numbers)


def test_numbers_and_modalities():
  split = cut(pool())
  count = lambda part, modality: sum(example.modality == modality for example in part)  # noqa: E731
  assert [count(split.train, m) for m in ("MRI", "CT", "OCT")] == [20, 0, 0]
  assert [count(split.validation, m) for m in ("MRI", "CT", "OCT")] == [5, 5, 5]
  assert [count(split.test, m) for m in ("MRI", "CT", "OCT")] == [15, 15, 15]
  for part in split.as_dict().values():
    assert part == sorted(part, key=lambda example: (example.dataset, example.id))


def test_no_image_is_shared():
  examples = pool()
  # A chain: the last question shows the images of two others.
  examples.append(question("MRI", 99, 0, "/MRI/3.png", "/CT/6.png"))
  for seed in range(20):
    split = cut(examples, seed=seed)
    seen = {name: {image for example in part for image in example.images} for name, part in split.as_dict().items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def drawn(folder, examples, twins=(), broken=()):
  """The questions with their images as files in a folder: each its own picture, those of `twins` all the same one."""
  found = []
  for number, example in enumerate(examples):
    paths = []
    for image in example.images:
      path = folder / image.lstrip("/")
      if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (7, 7, 7) if image in twins else (number % 256, number // 256, 99)
        Image.new("RGB", (8, 8), colour).save(path)
        if image in broken:
          path.write_bytes(path.read_bytes()[:40])
      paths.append(str(path))
    found.append(dataclasses.replace(example, images=tuple(paths)))
  return found


def contents(part):
  return {pathlib.Path(image).read_bytes() for example in part for image in example.images}


def test_the_same_image_under_two_names(tmp_path, caplog):
  """Images of all modalities and parts are one and the same file; none of it is then in two parts."""
  examples = [question(modality, n, n) for modality in ("MRI", "CT") for n in range(60)]
  numbers = {"train": 20, "seed": 3}
  plain = cut(drawn(tmp_path / "plain", examples), **numbers)
  one = {name: part[0].images[0] for name, part in plain.as_dict().items()}
  twins = [image.removeprefix(str(tmp_path / "plain")) for image in one.values()]
  assert contents(plain.train).isdisjoint(contents(plain.test))  # as drawn, no two are the same
  with caplog.at_level("WARNING"):
    split = cut(drawn(tmp_path / "twins", examples, twins), **numbers)
  parts = list(split.as_dict().values())
  assert "2 images have the content of others" in caplog.text
  assert not any(contents(a) & contents(b) for a in parts for b in parts if a is not b)
  assert [len(part) for part in parts] == [20, 10, 30]
  assert cut(drawn(tmp_path / "twins", examples[::-1]), **numbers) == split
  # What has the same size is compared, and what only has that is left alone.
  assert len(set(map(len, contents(split.train)))) < len(contents(split.train))


def test_only_the_bytes_of_equal_sizes_are_read(tmp_path, monkeypatch):
  names = [tmp_path / f"{n}.png" for n in range(6)]
  for path, data in zip(names, (b"a", b"bb", b"bb", b"cc", b"ddd", b"bb"), strict=True):
    path.write_bytes(data)
  read = []
  whole = same_images.digest
  monkeypatch.setattr(same_images, "digest", lambda path: read.append(path) or whole(path))
  paths = [str(path) for path in names]
  assert same_images.repeats([*paths, "/absent.png"]) == {paths[2]: paths[1], paths[5]: paths[1]}
  assert read == [paths[1], paths[2], paths[3], paths[5]]


def test_a_question_of_another_modality_about_a_training_image(tmp_path):
  """Every third MRI image is asked about as CT and as X-Ray too, under the same path."""
  examples = [question("MRI", n, n) for n in range(90)] + [question("CT", n, n) for n in range(40)]
  examples += [question("X-Ray", n, n) for n in range(40)]
  for n in range(0, 90, 3):
    examples += [dataclasses.replace(question(m, 500 + n, n), images=(f"/MRI/{n}.png",)) for m in ("CT", "X-Ray")]
  for modality in ("MRI", "X-Ray"):
    split = cut(examples, train_modality=modality)
    assert len(split.train) == 20 and {example.modality for example in split.train} == {modality}
    seen = [{image for example in part for image in example.images} for part in split.as_dict().values()]
    assert not seen[0] & (seen[1] | seen[2]) and not seen[1] & seen[2]
    for found in (split.test, split.validation):
      assert len({sum(example.modality == m for example in found) for m in ("MRI", "CT", "X-Ray")}) == 1
  # If other modalities have all its images, a modality is too small, not silently empty.
  shared = [dataclasses.replace(example, modality=m) for example in examples[:90] for m in ("CT", "MRI")]
  named = [dataclasses.replace(example, id=f"{example.modality} {example.id}") for example in shared]
  with pytest.raises(
    ValueError, match="MRI has 90 questions, too few .* .90 are about images that a modality before it has"
  ):
    cut(named)


def test_unreadable_images_are_replaced(tmp_path, caplog, monkeypatch):
  examples = [question(modality, n, n) for modality in ("MRI", "CT") for n in range(60)]
  broken = [f"/{modality}/{n}.png" for modality in ("MRI", "CT") for n in range(0, 60, 4)]
  found = drawn(tmp_path, examples, broken=broken)
  opened = []
  load = images.load_image
  monkeypatch.setattr(images, "load_image", lambda path: opened.append(path) or load(path))
  plain = cut(found, train=20)
  assert not opened
  with caplog.at_level("WARNING"):
    split = cut(found, train=20, lenient=True)
  bad = {str(tmp_path / image.lstrip("/")) for image in broken}
  assert [len(part) for part in split.as_dict().values()] == [20, 10, 30]
  chosen = {image for part in split.as_dict().values() for example in part for image in example.images}
  lost = [e for part in plain.as_dict().values() for e in part if bad & set(e.images)]
  assert lost and not chosen & bad and "left out: image " in caplog.text and "questions with unreadable" in caplog.text
  # No image is decoded twice, and the whole pool is not.
  assert len(opened) == len(set(opened)) < len(examples) and chosen <= set(opened)
  assert cut([each for each in found if not bad & set(each.images)], train=20) == split
  given = splits.limited(found, 30, 5, lenient=True)
  assert len(given) == 60 and not any(bad & set(each.images) for each in given)
  assert given == splits.limited([each for each in found if not bad & set(each.images)], 30, 5)
  assert len(splits.limited(found, 60, 5, lenient=True)) == 90  # all that there are


def test_membership_depends_on_seed_and_ids_alone():
  split = cut(pool())
  assert cut(pool()[::-1]) == split and cut(pool()[::-1]).digest == split.digest
  other = cut(pool(), seed=2)
  assert other.digest != split.digest and other.test != split.test


def test_too_few_questions():
  with pytest.raises(ValueError, match=r"MRI has 60 questions, too few .*train would get \d+; lower data.train_items"):
    cut(pool(), train=50)
  with pytest.raises(ValueError, match=r"no question of modality 'PET'; the data have \['CT', 'MRI', 'OCT'\]"):
    cut(pool(), train_modality="PET")
  short = [example for example in pool() if example.modality == "MRI" or example.id < "CT/0010"]
  split = cut(short)
  assert sum(example.modality == "CT" for example in split.test) == 10  # all that there are


def settings(directory, **changes):
  values = {"directory": str(directory), "split_files": "", "lenient": False, "train_modality": "MRI", "split_seed": 0}
  return ml_collections.ConfigDict(values | {"train_items": 6, "validation_items": 2, "test_items": 3} | changes)


def test_load_from_the_mini_set(shared_directory):
  found = splits.load(settings(shared_directory / "omnimedvqa-mini", train_items=4))
  assert {name: len(part) for name, part in found.items()} == {"train": 4, "validation": 16, "test": 24}
  assert {example.modality for example in found["train"]} == {"MRI"}


def test_load_the_phantom(tmp_path_factory, monkeypatch, caplog):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "phantom-cache"))
  found = splits.load(settings(""))
  assert {name: len(part) for name, part in found.items()} == {"train": 6, "validation": 16, "test": 24}
  assert splits.load(settings("")) == found
  assert splits.load(settings("", split_seed=1))["test"] != found["test"]
  root = next(iter(splits.phantom_roots().values())).parent
  assert splits.load(settings(root)) == found  # the same as a directory
  caplog.clear()
  told = []
  with caplog.at_level("WARNING"):
    splits.load(settings(""), report=told.append)
  assert caplog.records == []  # its spellings are those of OmniMedVQA on purpose
  assert [dict(each.rules) for each in told] == [{"modality_spelling": n} for n in (600, 240, 1800)]
  for example in found["test"]:
    assert Image.open(example.images[0]).size == (64, 64)
  whole = splits.load(settings("", train_items=600, validation_items=40, test_items=300))
  assert {name: len(part) for name, part in whole.items()} == {"train": 600, "validation": 320, "test": 2400}
  ids = [example.id for part in whole.values() for example in part]
  assert len(set(ids)) == len(ids)


@pytest.fixture
def published(tmp_path):
  """Images below `data`; a split in Med-R1's form beside them, two of whose test images are training images too."""

  def records(numbers, modality):
    for number in numbers:
      path = tmp_path / "data" / "Images" / modality / f"{number}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("L", (8, 8), number).save(path)
    return [
      MEDR1 | {"image": f"Images/{modality}/{number}.png", "problem": f"Which organ is no. {number}? A)Chest, B)Brain"}
      for number in numbers
    ]

  for modality in ("MRI", "CT"):
    write_records(tmp_path / "split" / "train" / f"{modality}_train.json", *records(range(20), modality))
    write_records(tmp_path / "split" / "test" / f"{modality}_test.json", *records(range(18, 30), modality))
  return tmp_path


def test_a_published_split_is_taken_verbatim(published, caplog):
  wanted = settings(published / "data", split_files=str(published / "split"), train_items=20, test_items=12)
  with caplog.at_level("WARNING"):
    found = splits.load(wanted)
  # 20 MRI questions for training; its images 18 and 19 are among the 12 of the MRI test, of 24 test images in all.
  used = "20 of 40 training and 24 of 24 test questions"
  assert f"as used: 2 test images (8.3 %) are training images too; {used}" in caplog.text
  # The CT questions that are not trained on share two images with the test as well.
  assert "as published: 4 test images (16.7 %) are training images too; 40 of 40 training and" in caplog.text
  assert [example.id for example in found["train"]] == sorted(f"MRI_train/{n}" for n in range(20))
  assert {example.id for example in found["test"]} == {f"{m}_test/{n}" for m in ("MRI", "CT") for n in range(12)}
  # Validation questions come from what is left of the training part: no MRI, and no image of train or test.
  assert [example.modality for example in found["validation"]] == ["CT", "CT"]
  taken = {image for name in ("train", "test") for example in found[name] for image in example.images}
  assert not taken.intersection(image for example in found["validation"] for image in example.images)


def test_a_published_split_lacks_a_part(published):
  (published / "split" / "test").rename(published / "split" / "later")
  with pytest.raises(ValueError, match=r"has no test part; split_files is a folder with train/ and test/"):
    splits.load(settings(published / "data", split_files=str(published / "split")))


def test_a_published_split_is_not_mixed(published, tmp_path):
  with pytest.raises(ValueError, match="holds a published split, .* name it as split_files"):
    splits.load(settings(published / "split"))
  for name in ("train-00000-of-00001", "test-00000-of-00001"):
    write_parquet(tmp_path / "hub" / f"{name}.parquet")
  with pytest.raises(ValueError, match="holds a published split"):
    splits.load(settings(tmp_path / "hub"))
  write_saved(tmp_path / "saved" / "train")
  (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
  with pytest.raises(ValueError, match="holds a published split"):
    splits.load(settings(tmp_path / "saved"))


def hub(top):
  """Six training and four test questions in parquet files of one folder; records do not tell their modality."""
  for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 3), ("test-00000-of-00001", 4)):
    write_parquet(top / f"{name}.parquet", count=count, problem=[f"{name}, {i}?\nA: a\nB: b" for i in range(count)])
  return top


@pytest.mark.parametrize("all_items", [0, None])
def test_published_tables_are_read_part_by_part(all_items, tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  hub(tmp_path / "hub" / "KEPO_modality_MRI_train_600" / "data")
  saved = tmp_path / "saved" / "modality_MRI_train_600"
  write_saved(saved / "train", count=6, problem=[f"train {i}?\nA: a\nB: b" for i in range(6)])
  write_saved(saved / "test", count=4, problem=[f"test {i}?\nA: a\nB: b" for i in range(4)])
  (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  for folder in (tmp_path / "hub" / "KEPO_modality_MRI_train_600", saved.parent):
    with pytest.raises(ValueError, match="holds a published split"):
      splits.load(settings(folder))
    wanted = settings("", split_files=str(folder), validation_items=0)
    wanted.train_items = wanted.test_items = all_items
    with caplog.at_level("WARNING"):
      found = splits.load(wanted)
    assert {name: len(part) for name, part in found.items()} == {"train": 6, "test": 4, "validation": 0}
    for name in ("train", "test"):
      assert all(each.question.startswith(name) and f"/{name}/" in each.id for each in found[name])
      assert {each.modality for each in found[name]} == {"MRI"}
    caplog.clear()
    wanted = settings("", split_files=str(folder), train_items=3, test_items=2)
    with caplog.at_level("WARNING"):
      found = splits.load(wanted)
    assert (len(found["train"]), len(found["test"])) == (3, 2)
    assert "3 of 6 training and 2 of 4 test questions" in caplog.text


@pytest.mark.parametrize("kind", ["layout", "parts", "published", "parquet", "saved"])
def test_a_bucket_is_read_like_a_disk(published, tmp_path, monkeypatch, kind):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  bucket = tmp_path / "cloud" / "bucket"
  if kind == "published":
    for name in ("data", "split"):
      shutil.copytree(published / name, bucket / name)
  elif kind == "parquet":
    write_parquet(bucket / "data" / "modality_MRI_train_600.parquet", count=12)
  elif kind == "saved":
    write_saved(bucket / "data" / "modality_MRI_train_600", count=12)
  else:
    for part in splits.SPLITS if kind == "parts" else ("",):
      layout = Layout(bucket / "data" / part)
      layout.write(*(record(n, modality_type="MR (Mag-netic Resonance Imaging)") for n in range(12)))
  changes = {"split_files": f"{bucket}/split"} if kind == "published" else {}
  changes |= {"train_items": 1, "validation_items": 0, "test_items": 0}
  here = splits.load(settings(bucket / "data", **changes))
  assert here["train"]
  told, summaries = [], []
  with fake_bucket.served(tmp_path / "cloud"):
    remote = settings("gs://bucket/data", **changes)
    remote.split_files = remote.split_files.replace(str(bucket), "gs://bucket")
    there = splits.load(remote, report=summaries.append, progress=lambda *of: told.append(of))
  assert told[-1][0] == told[-1][1] > 0
  # Images that are bytes inside other files lie in the cache in both cases.
  origin = lambda image: storage.origin(image).replace("gs://bucket", str(bucket))  # noqa: E731
  assert here == {
    name: [dataclasses.replace(each, images=tuple(map(origin, each.images))) for each in part]
    for name, part in there.items()
  }
  assert all(summary.root.startswith("gs://bucket/") for summary in summaries)


def test_any_format_is_cut_by_the_rule(tmp_path):
  write_parquet(tmp_path / "modality_MRI_train.parquet", count=12)
  found = splits.load(settings(tmp_path, train_items=5))
  assert {name: len(part) for name, part in found.items()} == {"train": 5, "validation": 2, "test": 3}


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
  layout = Layout(tmp_path)
  paths = [f"Images/Set A/{number}.png" for number in range(12)]
  for grey, path in enumerate(paths):
    layout.image(path, grey)  # the same picture under two names would be one
  found = []
  for answer, rules in (("Brain", {}), ("brain.", {"answer_normalised": 12})):
    layout.write(*(record(n, modality_type="MRI", gt_answer=answer, image_path=path) for n, path in enumerate(paths)))
    caplog.clear()
    with caplog.at_level("INFO"):
      assert len(splits.load(settings(tmp_path), report=found.append)["train"]) == 6
    assert (found[-1].records, found[-1].kept, dict(found[-1].rules)) == (12, 12, rules)
    (said,) = [entry for entry in caplog.records if "records kept" in entry.message]
    assert said.levelname == ("WARNING" if rules else "INFO")
  assert "answer_normalised 12: repaired" in said.message


def test_the_parts_of_a_split_are_told_one_by_one(published):
  found = []
  splits.load(settings(published / "data", split_files=str(published / "split")), report=found.append)
  assert [(each.root.rpartition("/")[2], each.records) for each in found] == [("train", 40), ("test", 24)]


def test_a_missing_split_is_named(tmp_path):
  (tmp_path / "train" / "QA_information").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"has \['train'\] but not \['validation', 'test'\]"):
    splits.load(settings(tmp_path))


def test_overlap():
  a, b, c = (question("MRI", n, n) for n in range(3))
  both = question("MRI", 9, 1, "/MRI/7.png")
  assert splits.overlap([a, b], [c]) == (0, 0.0)
  assert splits.overlap([a, b], [b, both, c]) == (1, 1 / 3)  # images 1, 2 and 7
  assert splits.overlap([a], []) == (0, 0.0)
