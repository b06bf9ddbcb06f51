"""One door for all formats: what a folder or file is taken for."""

import json
import os

import pytest

from kepo_jax.data import formats
from tests.data import cases

SPLIT = cases.MEDR1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def layout(folder):
  cases.Layout(folder / "OmniMedVQA").write(cases.RECORD)


def split_folder(folder):
  cases.write_records(folder / "test" / "MRI_test.json", SPLIT)


def dict_folder(folder):
  cases.write_saved(folder / "train")
  (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')


def test_folders(tmp_path):
  for kind, make, first in [
    ("OmniMedVQA layout", layout, "Set A/Set A_0000"),
    ("split files", split_folder, "MRI_test/0"),
    ("Hugging Face, parquet", lambda folder: cases.write_parquet(folder / "data" / "a.parquet"), "here/a/0"),
    ("Hugging Face, saved to disk", dict_folder, "here/train/0"),
  ]:
    folder = tmp_path / kind / "here"
    folder.mkdir(parents=True)
    make(folder)
    examples, summary = formats.read_any(folder, check_images=kind != "split files")
    assert summary.format == kind and f"({kind})" in summary.text() and examples[0].id == first


def test_files(tmp_path):
  layout(tmp_path)
  root = tmp_path / "OmniMedVQA"
  (example,), summary = formats.read_any(root / "QA_information" / "Open-access" / "Set A.json")
  assert summary.format == "OmniMedVQA layout" and example.images[0].startswith(os.path.realpath(root))
  split = cases.write_records(tmp_path / "MRI_test.json", SPLIT)
  assert formats.read_any(split, check_images=False)[1].format == "split files"
  parquet = cases.write_parquet(tmp_path / "a.parquet")
  assert formats.read_any(parquet)[1].format == "Hugging Face, parquet"
  arrow = next(cases.write_saved(tmp_path / "saved").glob("*.arrow"))
  assert formats.read_any(arrow)[0][1].id == "data/1"


def test_endings_in_capitals_and_lines(tmp_path):
  root = tmp_path / "OmniMedVQA"
  file = cases.Layout(root).write(cases.RECORD)
  (file.parent / "more.JSONL").write_text(json.dumps(cases.record(1)) + "\n" + json.dumps(cases.record(2)) + "\n")
  os.rename(file, file.with_suffix(".JSON"))
  (file.parent / "deep").mkdir()
  (file.parent / "deep" / "b.json").write_text("[]")
  for place, number in ((root, 3), (file.with_suffix(".JSON"), 1), (file.parent / "more.JSONL", 2)):
    examples, summary = formats.read_any(place)
    assert len(examples) == number and summary.format == "OmniMedVQA layout"
    assert summary.rules["file_skipped"] == (place == root) and summary.first.get("file_skipped", "").endswith(
      "deep/b.json" * (place == root)
    )
  os.rename(cases.write_parquet(tmp_path / "a.parquet"), tmp_path / "A.PARQUET")
  assert formats.read_any(tmp_path / "A.PARQUET")[1].format == "Hugging Face, parquet"
  arrow = next(cases.write_saved(tmp_path / "saved").glob("*.arrow"))
  assert formats.read_any(arrow.rename(tmp_path / "A.ARROW"))[1].format == "Hugging Face, saved to disk"


def test_a_saved_folder_one_level_down(tmp_path):
  dict_folder(tmp_path / "download" / "MRI_train_600")
  examples, summary = formats.read_any(tmp_path / "download")
  assert examples[0].id == "MRI_train_600/train/0" and summary.format == "Hugging Face, saved to disk"
  cases.write_saved(tmp_path / "download" / "other")
  with pytest.raises(ValueError, match="download holds several data sets saved to disk .*MRI_train_600, .*other"):
    formats.read_any(tmp_path / "download")


def test_arguments_reach_the_reader(tmp_path):
  layout(tmp_path)
  with pytest.raises(ValueError, match="Restricted-access: no JSON files"):
    formats.read_any(tmp_path, access="Restricted-access")
  os.rename(tmp_path / "OmniMedVQA" / "Images", tmp_path / "Images")
  with pytest.raises(ValueError, match="missing_image"):
    formats.read_any(tmp_path)
  assert len(formats.read_any(tmp_path, image_root=tmp_path)[0]) == 1
  assert len(formats.read_any(tmp_path, check_images=False)[0]) == 1
  with pytest.raises(ValueError, match="none of 1 records is usable"):
    formats.read_any(tmp_path, lenient=True)


def test_what_is_of_no_format(tmp_path):
  with pytest.raises(ValueError, match="absent: no such file or directory"):
    formats.read_any(tmp_path / "absent")
  with pytest.raises(ValueError, match="of no known format: no QA_information"):
    formats.read_any(tmp_path)
  (tmp_path / "a.csv").write_text("a,b")
  with pytest.raises(ValueError, match=r"a\.csv: of no known format; \.json"):
    formats.read_any(tmp_path / "a.csv")
  for content in ("{}", "[", ""):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: "):
      formats.read_any(tmp_path / "a.json")
  (tmp_path / "a.json").write_text(json.dumps([]))
  with pytest.raises(ValueError, match="none of 0 records is usable"):
    formats.read_any(tmp_path / "a.json")
  for name in ("a.parquet", "a.arrow", "b.json"):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*is not a regular file"):
      formats.read_any(tmp_path / name)
