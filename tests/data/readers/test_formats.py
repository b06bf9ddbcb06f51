"""One door for all formats: what a folder or file is taken for."""

import json
import os

import pytest

from kepo_jax.data.readers import formats
from tests.data import cases


def layout(folder):
  cases.Layout(folder / "OmniMedVQA").write(cases.RECORD)


def dict_folder(folder):
  cases.write_saved(folder / "train")
  (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')


def test_folders(tmp_path):
  for kind, make, first in [
    ("OmniMedVQA layout", layout, "Set A/Set A_0000"),
    ("split files", lambda f: cases.write_records(f / "test" / "MRI_test.json", cases.MEDR1), "MRI_test/0"),
    ("Hugging Face, parquet", lambda f: cases.write_parquet(f / "data" / "a.parquet"), "here/a/0"),
    ("Hugging Face, saved to disk", dict_folder, "here/train/0"),
  ]:
    folder = tmp_path / kind / "here"
    folder.mkdir(parents=True)
    make(folder)
    examples, summary = formats.read_any(folder, check_images=kind != "split files")
    assert summary.format == kind and f"({kind})" in summary.text() and examples[0].id == first


def test_files_with_endings_in_capitals_or_not(tmp_path):
  root = tmp_path / "OmniMedVQA"
  file = cases.Layout(root).write(cases.RECORD)
  (example,), summary = formats.read_any(file)
  assert summary.format == "OmniMedVQA layout" and example.images[0].startswith(os.path.realpath(root))
  (file.parent / "more.JSONL").write_text(json.dumps(cases.record(1)) + "\n" + json.dumps(cases.record(2)) + "\n")
  os.rename(file, file.with_suffix(".JSON"))
  (file.parent / "deep").mkdir()
  (file.parent / "deep" / "b.json").write_text("[]")
  for place, number in ((file.with_suffix(".JSON"), 1), (file.parent / "more.JSONL", 2), (root, 3)):
    examples, summary = formats.read_any(place)
    assert len(examples) == number and summary.format == "OmniMedVQA layout"
  assert summary.rules["file_skipped"] == 1 and summary.first["file_skipped"].endswith("deep/b.json")
  split = cases.write_records(tmp_path / "MRI_test.json", cases.MEDR1)
  (example,), summary = formats.read_any(split, check_images=False)
  assert summary.format == "split files" and example.images == (f"{os.path.realpath(tmp_path)}/{cases.MEDR1['image']}",)
  for name in ("a.parquet", "A.PARQUET"):
    assert formats.read_any(cases.write_parquet(tmp_path / name))[1].format == "Hugging Face, parquet"
  arrow = next(cases.write_saved(tmp_path / "saved").glob("*.arrow"))
  assert formats.read_any(arrow)[0][1].id == "data/1"
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
  (tmp_path / "a.csv").write_text("a,b")
  for place, message in [
    (tmp_path / "absent", "absent: no such file or directory"),
    (tmp_path, "of no known format: no QA_information"),
    (tmp_path / "a.csv", r"a\.csv: of no known format; \.json"),
  ]:
    with pytest.raises(ValueError, match=message):
      formats.read_any(place)
  for content, message in (("{}", r"a\.json: "), ("", r"a\.json: "), ("[]", "none of 0 records is")):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
      formats.read_any(tmp_path / "a.json")
  for name in ("a.parquet", "a.arrow", "b.json"):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*is not a regular file"):
      formats.read_any(tmp_path / name)
