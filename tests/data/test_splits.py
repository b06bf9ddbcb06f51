"""The published rule: exact numbers, no shared image, membership from seed and ids alone."""

import ml_collections
import pytest
from PIL import Image

from kepo_jax.data import splits
from kepo_jax.types import Example


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
  values = {"directory": str(directory), "train_modality": "MRI", "split_seed": 0}
  return ml_collections.ConfigDict(values | {"train_items": 6, "validation_items": 2, "test_items": 3} | changes)


def test_load_from_the_mini_set(shared_directory):
  found = splits.load(settings(shared_directory / "omnimedvqa-mini", train_items=4))
  assert {name: len(part) for name, part in found.items()} == {"train": 4, "validation": 16, "test": 24}
  assert {example.modality for example in found["train"]} == {"MRI"}


def test_load_the_phantom(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "phantom-cache"))
  found = splits.load(settings(""))
  assert {name: len(part) for name, part in found.items()} == {"train": 6, "validation": 16, "test": 24}
  assert splits.load(settings("")) == found
  assert splits.load(settings("", split_seed=1))["test"] != found["test"]
  root = next(iter(splits.phantom_roots().values())).parent
  assert splits.load(settings(root)) == found  # the same as a directory
  for example in found["test"]:
    assert Image.open(example.images[0]).size == (64, 64)
  whole = splits.load(settings("", train_items=600, validation_items=40, test_items=300))
  assert {name: len(part) for name, part in whole.items()} == {"train": 600, "validation": 320, "test": 2400}
  ids = [example.id for part in whole.values() for example in part]
  assert len(set(ids)) == len(ids)


def test_a_missing_split_is_named(tmp_path):
  (tmp_path / "train" / "QA_information").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"has \['train'\] but not \['validation', 'test'\]"):
    splits.load(settings(tmp_path))
