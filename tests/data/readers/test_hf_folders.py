"""Parquet and saved folders, written here with pyarrow alone, and by the library itself where it is installed."""

import hashlib
import io
import json
import os
import pathlib

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image

from kepo_jax.data import images
from kepo_jax.data.readers import hf_folders
from tests.data.cases import IMAGE, bomb, encoded, rows, table, write_parquet, write_saved


def checked(examples, summary, count=3):
  """The questions of `rows`, as any format must give them."""
  assert (len(examples), summary.records, summary.kept) == (count, count, count)
  for i, example in enumerate(examples):
    assert example.question == f"What is number {i}?" and example.answer == "B"
    assert example.options == ("a brain", "a chest, (or two)")
    assert images.load_image(example.images[0]).size == (10 + i, 8)


def test_parquet(tmp_path, cache):
  file = write_parquet(tmp_path / "hf" / "MRI_train_600" / "train-00000-of-00001.parquet", unused=[{"a": [1]}] * 3)
  examples, summary = hf_folders.read(file)
  checked(examples, summary)
  assert [example.id for example in examples] == ["train/0", "train/1", "train/2"]
  assert {example.modality for example in examples} == {"MRI"}  # told by the folder
  assert not summary.rules and summary.format == "Hugging Face, parquet"
  assert {path.name for path in cache.iterdir()} == {f"{hashlib.sha256(encoded(i)).hexdigest()}.png" for i in range(3)}


def test_images_are_written_once(tmp_path, cache):
  file = write_parquet(tmp_path / "a.parquet")
  hf_folders.read(file, check_images=False)
  assert not cache.exists()
  examples, _ = hf_folders.read(file)
  path = pathlib.Path(examples[0].images[0])
  before = path.stat().st_mtime_ns
  assert hf_folders.read(file)[0] == examples and path.stat().st_mtime_ns == before
  path.write_bytes(b"cut off")
  assert hf_folders.read(file)[0] == examples and path.read_bytes() == encoded(0)


def test_the_number_of_shards_does_not_change_ids(tmp_path):
  write_parquet(tmp_path / "one" / "x" / "train-00000-of-00001.parquet", count=200)  # more rows than are held at a time
  for i in range(2):
    part = {key: column[100 * i : 100 * (i + 1)] for key, column in rows(200).items()}
    (tmp_path / "two" / "x").mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table(part), tmp_path / "two" / "x" / f"train-{i:05d}-of-00002.parquet")
  whole, halves = (hf_folders.read(tmp_path / name / "x")[0] for name in ("one", "two"))
  assert whole == halves and [example.id for example in whole] == [f"x/train/{i}" for i in range(200)]


def two_parts(top):
  """Training and test questions in one folder saved to disk."""
  write_saved(top / "train")
  write_saved(top / "test", problem=[f"{i}?\nA: x\nB: y" for i in range(3)])
  (top / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  return top


def test_saved_to_disk(tmp_path):
  examples, summary = hf_folders.read(write_saved(tmp_path / "CT_train_5", shards=2, count=5))
  checked(examples, summary, 5)
  assert [example.id for example in examples] == [f"CT_train_5/{i}" for i in range(5)]
  assert {example.modality for example in examples} == {"CT"} and not summary.rules
  assert (summary.files, summary.format) == (2, "Hugging Face, saved to disk")


def test_a_part_alone_has_the_ids_of_the_whole(tmp_path):
  top = tmp_path / "modality_MRI_train_600"
  for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
    write_parquet(top / "data" / f"{name}.PARQUET", problem=[f"{number}/{i}?\nA: x\nB: y" for i in range(3)])
  saved = two_parts(tmp_path / "CT_600")
  for modality, whole, train, test in (
    ("MRI", top, top / "data" / "train-*.parquet", top / "data" / "test-*.parquet"),
    ("CT", saved, saved / "train", saved / "test"),
  ):
    parts = {name: hf_folders.read(place) for name, place in (("train", train), ("test", test))}
    together = [example for examples, _ in parts.values() for example in examples]
    assert sorted(together, key=lambda each: each.id) == sorted(hf_folders.read(whole)[0], key=lambda each: each.id)
    for name, (examples, summary) in parts.items():
      assert [each.id for each in examples] == [f"{whole.name}/{name}/{i}" for i in range(len(examples))]
      assert {(each.modality, each.dataset) for each in examples} == {(modality, whole.name)} and not summary.rules


def test_what_lies_beside(tmp_path):
  write_parquet(tmp_path / "x" / "a.parquet")
  for name in ("a.json", "b.csv", "c.png", ".gitattributes"):
    (tmp_path / "x" / name).write_text("[]")
  (write_saved(tmp_path / "MRI_saved") / "cache-1.arrow").write_bytes(b"")
  for folder, count, names in (("x", 2, "a.json, b.csv"), ("MRI_saved", 1, "cache-1.arrow")):
    _, summary = hf_folders.read(tmp_path / folder)
    assert dict(summary.rules) == {"file_skipped": count} | ({"modality_unknown": 3} if folder == "x" else {})
    assert summary.first["file_skipped"] == f"{tmp_path / folder}: {names}"


def test_paths_instead_of_bytes(tmp_path):
  (tmp_path / "Images" / "set").mkdir(parents=True)
  (tmp_path / "Images" / "set" / "a.png").write_bytes(encoded())
  inside = os.path.realpath(tmp_path / "Images" / "set" / "a.png")
  for column in ("Images/set/a.png", {"bytes": None, "path": "Images/set/a.png"}):
    (example,), _ = hf_folders.read(write_parquet(tmp_path / "data" / "a.parquet", count=1, image=[column]))
    assert example.images == (inside,) and example.dataset == "set"
  two = [[{"bytes": encoded(), "path": None}] * 2]
  (example,), _ = hf_folders.read(write_parquet(tmp_path / "data" / "a.parquet", count=1, image=[None], images=two))
  assert len(example.images) == 2
  bad = ["/etc/hostname", "../x.png", "Images/b.png", ""]
  write_parquet(tmp_path / "data" / "a.parquet", count=4, image=[{"bytes": None, "path": path} for path in bad])
  with pytest.raises(ValueError, match=r"a\.parquet, record 0.*3 unsafe_path, 1 missing_image"):
    hf_folders.read(tmp_path / "data" / "a.parquet")


def test_bytes_that_are_no_image(tmp_path, cache):
  bad = [b"", b"text", encoded()[:20], b"%!PS-Adobe", bomb(60_000), bomb(10_000)]
  file = write_parquet(tmp_path / "a.parquet", count=6, image=[{"bytes": data, "path": None} for data in bad])
  with pytest.raises(ValueError, match=r"a\.parquet, record 0.*6 unreadable_image"):
    hf_folders.read(file)
  assert not cache.exists()


def test_rows_that_lack_something(tmp_path):
  changes = {"image": [None, {"bytes": None, "path": None}, {"bytes": encoded(), "path": None}] + [None] * 2}
  changes |= {"problem": ["x?\nA: x\nB: y"] * 3 + [None, ""], "solution": ["A"] * 5}
  kinds = {"image": IMAGE, "problem": pa.string(), "solution": pa.string()}
  columns = {name: pa.array(column, type=kinds[name]) for name, column in changes.items()}
  pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
  examples, summary = hf_folders.read(tmp_path / "a.parquet", lenient=True)
  assert [example.id for example in examples] == ["a/2"] and summary.rules["malformed_record"] == 4


def test_other_columns(tmp_path):
  for columns, message in [
    ({"image": [encoded()], "problem": ["x"]}, r"has columns \['image', 'problem'\] but not \['solution'\]"),
    ({"problem": ["x"], "solution": ["x"]}, r"but not \['image'\]"),
    ({"image": [encoded()], "problem": [3], "solution": ["x"]}, "column problem is int64, expected string"),
    ({"image": [encoded()], "problem": [b"x"], "solution": ["x"]}, "column problem is binary"),
  ]:
    pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet: .*{message}.*malformed_file"):
      hf_folders.read(tmp_path / "a.parquet")


def test_damaged_and_cut_off_files(tmp_path):
  file = write_parquet(tmp_path / "x" / "b.parquet")
  write_parquet(tmp_path / "x" / "a.parquet", problem=[f"{i}?\nA: x\nB: y" for i in range(3)])
  good = file.read_bytes()
  for number, data in enumerate((b"", good[: len(good) // 2], b"x" * 100)):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"b\.parquet: .*1 malformed_file"):
      hf_folders.read(tmp_path / "x")
    examples, summary = hf_folders.read(tmp_path / "x", lenient=True)
    assert len(examples) == 3 and summary.rules["malformed_file"] == 1, number
  file = write_saved(tmp_path / "whole") / "data-00000-of-00001.arrow"
  data = file.read_bytes()
  for size in (0, 4, 8, 100, len(data) // 2, len(data) - 8, len(data) - 1):
    file.write_bytes(data[:size])
    message = "truncated: the end of the Arrow stream is missing" if size == len(data) - 8 else "1 malformed_file"
    with pytest.raises(ValueError, match=rf"\.arrow: .*{message}"):
      hf_folders.read(file.parent)


def test_what_a_saved_folder_may_list(tmp_path):
  folder = write_saved(tmp_path / "saved")
  for state, message in [
    ({"_data_files": [{"filename": "../x/data.arrow"}]}, "not the name of a file beside it"),
    ({"_data_files": ["absent.arrow"]}, "cannot be opened"),
    ({"_data_files": 3}, "expected an object with a list _data_files"),
    ({"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]}, "flatten_indices"),
  ]:
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
      hf_folders.read(folder)
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["../saved"]}')
  with pytest.raises(ValueError, match="not the name of a file"):
    hf_folders.read(tmp_path)


def test_links_out_of_the_folder(tmp_path):
  outside = write_parquet(tmp_path / "outside" / "a.parquet")
  (tmp_path / "x").mkdir()
  (tmp_path / "x" / "a.parquet").symlink_to(outside)
  with pytest.raises(ValueError, match="symbolic link out of"):
    hf_folders.read(tmp_path / "x")
  # The library's own cache is made of links into the folder of the repository.
  snapshot = tmp_path / "repository" / "snapshots" / "1234"
  snapshot.mkdir(parents=True)
  (tmp_path / "repository" / "blobs").mkdir()
  os.rename(outside, tmp_path / "repository" / "blobs" / "5678")
  (snapshot / "a.parquet").symlink_to("../../blobs/5678")
  checked(*hf_folders.read(snapshot))


def test_what_the_library_writes(tmp_path):
  datasets = pytest.importorskip("datasets")
  text = datasets.Value("string")
  kinds = datasets.Features({"image": datasets.Image(), "problem": text, "solution": text})
  columns = rows() | {"image": [Image.open(io.BytesIO(encoded(i))) for i in range(3)]}
  written = datasets.Dataset.from_dict(columns, features=kinds)
  written.to_parquet(str(tmp_path / "a.parquet"))
  checked(*hf_folders.read(tmp_path / "a.parquet"))
  datasets.DatasetDict({"train": written}).save_to_disk(str(tmp_path / "dict"))
  checked(*hf_folders.read(tmp_path / "dict"))
