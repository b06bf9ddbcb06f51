"""Where the parts of a published split are found, and where a folder is refused as a pool."""

import pytest

from kepo_jax.data import splits
from tests.data import cases


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
