"""Splitting one pool: the numbers of the config, one image in one part, whatever its name, modality or state."""

import dataclasses
import itertools
import pathlib

import pytest
from PIL import Image

from kepo_jax.data import images, splits
from tests.data.cases import question, settings


def pool():
  """Three modalities of 60 questions; every third image carries two questions."""
  return [question(modality, n, n - 1 if n % 3 == 2 else n) for modality in ("MRI", "CT", "OCT") for n in range(60)]


def split(examples, **changes):
  numbers = {"train_items": 20, "validation_items": 5, "test_items": 15, "split_seed": 1} | changes
  return splits.split_by_modality(examples, settings("", **numbers))


def test_numbers_and_modalities():
  parts = split(pool())
  for part, numbers in ((parts["train"], [20, 0, 0]), (parts["validation"], [5, 5, 5]), (parts["test"], [15, 15, 15])):
    assert [sum(example.modality == modality for example in part) for modality in ("MRI", "CT", "OCT")] == numbers
    assert part == sorted(part, key=lambda example: (example.dataset, example.id))


def test_no_image_is_shared():
  examples = pool()
  # A chain: the last question shows the images of two others.
  examples.append(question("MRI", 99, 0, "/MRI/3.png", "/CT/6.png"))
  for seed in range(20):
    parts = split(examples, split_seed=seed)
    seen = [{image for example in part for image in example.images} for part in parts.values()]
    assert not any(a & b for a, b in itertools.combinations(seen, 2)), seed


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
  plain = split(drawn(tmp_path / "plain", examples), split_seed=3)
  twins = [part[0].images[0].removeprefix(str(tmp_path / "plain")) for part in plain.values()]
  with caplog.at_level("WARNING"):
    parts = split(drawn(tmp_path / "twins", examples, twins), split_seed=3)
  assert "2 images have the content of others" in caplog.text
  assert not any(contents(a) & contents(b) for a, b in itertools.combinations(parts.values(), 2))
  assert [len(part) for part in parts.values()] == [20, 10, 30]
  assert split(drawn(tmp_path / "twins", examples[::-1]), split_seed=3) == parts


def test_a_question_of_another_modality_about_a_training_image(tmp_path):
  """Every third MRI image is asked about as CT and as X-Ray too, under the same path."""
  examples = [question("MRI", n, n) for n in range(90)] + [question("CT", n, n) for n in range(40)]
  examples += [question("X-Ray", n, n) for n in range(40)]
  for n in range(0, 90, 3):
    examples += [dataclasses.replace(question(m, 500 + n, n), images=(f"/MRI/{n}.png",)) for m in ("CT", "X-Ray")]
  # By names of modalities, not of data sets, the first has a group that several ask about.
  examples = [dataclasses.replace(each, dataset="b" if each.modality == "CT" else "a") for each in examples]
  for modality in ("MRI", "X-Ray"):
    parts = split(examples, train_modality=modality)
    used = {each.id for part in parts.values() for each in part}
    assert not {f"MRI/{n:04d}" for n in range(0, 90, 3)} & used
    assert len(parts["train"]) == 20 and {example.modality for example in parts["train"]} == {modality}
    seen = [{image for example in part for image in example.images} for part in parts.values()]
    assert not seen[0] & (seen[1] | seen[2]) and not seen[1] & seen[2]
    for found in (parts["test"], parts["validation"]):
      assert len({sum(example.modality == m for example in found) for m in ("MRI", "CT", "X-Ray")}) == 1
  # If other modalities have all its images, a modality is too small, not silently empty.
  shared = [dataclasses.replace(e, modality=m, id=f"{m} {e.id}") for e in examples[:90] for m in ("CT", "MRI")]
  with pytest.raises(ValueError, match=r"MRI has 90 questions, too few .* \(90 are about images that a modality"):
    split(shared)


def test_unreadable_images_are_replaced(tmp_path, caplog, monkeypatch):
  examples = [question(modality, n, n) for modality in ("MRI", "CT") for n in range(60)]
  broken = [f"/{modality}/{n}.png" for modality in ("MRI", "CT") for n in range(0, 60, 4)]
  found = drawn(tmp_path, examples, broken=broken)
  opened = []
  load = images.load_image
  monkeypatch.setattr(images, "load_image", lambda path: opened.append(path) or load(path))
  plain = split(found, train_items=20)
  assert not opened
  with caplog.at_level("WARNING"):
    parts = split(found, train_items=20, lenient=True)
  bad = {str(tmp_path / image.lstrip("/")) for image in broken}
  assert [len(part) for part in parts.values()] == [20, 10, 30]
  chosen = {image for part in parts.values() for example in part for image in example.images}
  lost = [e for part in plain.values() for e in part if bad & set(e.images)]
  assert lost and not chosen & bad and "left out: image " in caplog.text and "questions with unreadable" in caplog.text
  # No image is decoded twice, and the whole pool is not.
  assert len(opened) == len(set(opened)) < len(examples) and chosen <= set(opened)
  assert split([each for each in found if not bad & set(each.images)], train_items=20) == parts
  given = splits.limited(found, 30, 5, lenient=True)
  assert len(given) == 60 and not any(bad & set(each.images) for each in given)
  assert given == splits.limited([each for each in found if not bad & set(each.images)], 30, 5)
  assert len(splits.limited(found, 60, 5, lenient=True)) == 90  # all that there are


def test_too_few_questions():
  with pytest.raises(ValueError, match=r"MRI has 60 questions, too few .*train would get \d+; lower data.train_items"):
    split(pool(), train_items=50)
  with pytest.raises(ValueError, match=r"no question of modality 'PET'; the data have \['CT', 'MRI', 'OCT'\]"):
    split(pool(), train_modality="PET")
  short = [example for example in pool() if example.modality == "MRI" or example.id < "CT/0010"]
  parts = split(short)
  assert sum(example.modality == "CT" for example in parts["test"]) == 10  # all that there are


def test_only_the_bytes_of_equal_sizes_are_read(tmp_path, monkeypatch):
  names = [tmp_path / f"{n}.png" for n in range(6)]
  for path, data in zip(names, (b"a", b"bb", b"bb", b"cc", b"ddd", b"bb"), strict=True):
    path.write_bytes(data)
  read = []
  whole = images.fingerprint
  monkeypatch.setattr(images, "fingerprint", lambda path: read.append(path) or whole(path))
  paths = [str(path) for path in names]
  assert images.repeats([*paths, "/absent.png"]) == {paths[2]: paths[1], paths[5]: paths[1]}
  assert read == [paths[1], paths[2], paths[3], paths[5]]
