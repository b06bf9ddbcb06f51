"""Hugging Face data sets of image, problem and solution: parquet files, and folders saved to disk; with pyarrow.

The image is what the `Image` feature stores, `bytes` and `path`, or a path; images that come as bytes are written
once into the cache folder. No code of a data set is run, nothing is unpickled.
"""

import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from kepo_jax.data import images, records
from kepo_jax.data.cleaning import Rejected, Summary
from kepo_jax.data.readers import json_files
from kepo_jax.data.readers.split_files import examples_of, nearest_image_root, title
from kepo_jax.types import Example

NEEDED = ("problem", "solution")
# Columns that are read where they exist; others may hold anything.
COLUMNS = (
  "image", "images", *NEEDED, "question", "options", "answer", "subset", "modality", "modality_type", "question_type",
  "dataset",
)  # fmt: skip
MAX_GROUP_BYTES = 1 << 33  # of one row group, unpacked
_ROWS = 64  # that are in memory at a time
_ARROW, _PARQUET = (".arrow",), (".parquet",)
_SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")  # what the library writes beside Arrow files
_PART = re.compile(r"([a-z]+)-\*\.parquet")  # the parquet files of one part
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:-[0-9a-f]+)?$")
# What pyarrow raises on damaged files.
_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError, NotImplementedError)
# An Arrow stream that was closed ends in this; one that was cut off between two batches reads without complaint.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def saved_folder(top: pathlib.Path) -> pathlib.Path | None:
  """Finds a folder that was saved to disk: the folder itself, or the only such one in it; None for neither.

  Raises:
    ValueError: there are several.
  """

  def is_saved(folder: pathlib.Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()

  found = [top] if is_saved(top) else sorted(folder for folder in top.iterdir() if folder.is_dir() and is_saved(folder))
  if len(found) > 1:
    raise ValueError(f"{top} holds several data sets saved to disk ({', '.join(map(str, found))}); name one of them")
  return found[0] if found else None


def part_of(file: pathlib.Path) -> str:
  """Returns the first word of a file's name, in small letters: `train` of `train-00000-of-00002.parquet`."""
  return re.split(r"[^a-z]", file.stem.lower())[0]


def part_files(pattern: pathlib.Path) -> list[pathlib.Path]:
  """Lists the parquet files of one part, FOLDER/train-*.parquet, which lie in one folder with those of other parts.

  The name is a way to write what `read` takes: files belong to it whose first word is that of the pattern. Empty if the
  path is no such pattern, or there are none.
  """
  named = _PART.fullmatch(pattern.name)
  if not named or not pattern.parent.is_dir():
    return []
  files = sorted(file for file in pattern.parent.iterdir() if json_files.has_ending(file, _PARQUET))
  return [file for file in files if part_of(file) == named[1]]


def read(
  path: str | os.PathLike,
  *,
  image_root: str | os.PathLike | None = None,
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """Reads a parquet or Arrow file, a folder saved to disk, or a folder of parquet files, as `formats.read_any` does.

  Ids are the names of the folder and of the split (or of the file, without its number of shards), and the number of
  the row in the split: the same for a split that is read alone.

  Images that come as bytes are looked at and written into the cache folder only if `check_images`. Where they are
  paths, these start by default from the nearest folder above a file that holds `Images` or `images`, else its own.
  """
  top = pathlib.Path(path)
  saved = saved_folder(top) if top.is_dir() else None
  arrow = saved or json_files.has_ending(top, _ARROW)
  summary = Summary(root=str(top), format="Hugging Face, " + ("saved to disk" if arrow else "parquet"))
  folder = saved or (top.parent if part_files(top) else top)
  collector = records.Collector(summary)
  name = title(folder) if folder.is_dir() else _SHARD.sub("", top.stem)
  examples: list[Example] = []
  rows: dict[str, int] = {}  # read so far, by split
  if saved:
    listed = list(_saved_files(folder, summary))
  else:
    files = json_files.below(top, _PARQUET) if top.is_dir() else part_files(top) or [top]
    listed = [(_SHARD.sub("", file.stem), file) for file in files]
  if folder.is_dir():
    own = [folder / kept for kept in _SAVED] + [folder / split / kept for split, _ in listed for kept in _SAVED]
    beside = own if saved else json_files.below(folder, _PARQUET)
    json_files.count_skipped(folder, [*beside, *(file for _, file in listed)], summary)
  for split, file in listed:
    summary.files += 1
    paths = images.ImageFiles(image_root or nearest_image_root(file), check_images)
    stem = split if split == name or not folder.is_dir() else f"{name}/{split}"
    locate = functools.partial(_located, paths=paths, check=check_images)
    try:
      for batch in _batches(json_files.checked_file(file, folder if folder.is_dir() else None)):
        start = rows.get(split, 0)
        rows[split] = start + len(batch)
        examples += examples_of(batch, file, locate, collector, first=start, stem=stem, dataset=name.split("/")[0])
    except Rejected as rejected:
      summary.count(rejected.rule, f"{file}: {rejected}")
  if not summary.files and not summary.rules:
    raise ValueError(f"{top}: no parquet files here or below, and not saved to disk")
  return summary.finished(examples, lenient=lenient)


def _saved_files(top: pathlib.Path, summary: Summary) -> Iterator[tuple[str, pathlib.Path]]:
  """Yields (split, file) in the order of reading; counts errors in the files that list them."""
  folders = {title(top): top}
  place = top / "dataset_dict.json"
  try:
    if place.is_file():
      listed = _field(place, "splits", top)
      folders = {_plain_name(name): top / _plain_name(name) for name in listed}
    for split, folder in folders.items():
      place = folder / "state.json"
      if _field(place, "_indices_data_files", top):
        raise Rejected("malformed_file", "its rows are chosen by a list of indices; save it with flatten_indices()")
      for entry in _field(place, "_data_files", top):
        name = entry.get("filename") if isinstance(entry, dict) else entry
        yield split, folder / _plain_name(name)
  except Rejected as rejected:
    summary.count(rejected.rule, f"{place}: {rejected}")


def _field(file: pathlib.Path, field: str, root: pathlib.Path) -> list[Any]:
  """Reads a list in a JSON file; [] where it is absent."""
  content = json_files.parsed(file, root)
  value = content.get(field) if isinstance(content, dict) else content
  if not isinstance(content, dict) or not isinstance(value, list | None):
    raise Rejected("malformed_file", f"expected an object with a list {field}")
  return value or []


def _plain_name(name: Any) -> str:
  if not isinstance(name, str) or not name.isprintable() or pathlib.PurePath(name).name != name or "\\" in name:
    raise Rejected("malformed_file", f"lists {ascii(name)[:80]}, which is not the name of a file beside it")
  return name


def _batches(file: pathlib.Path) -> Iterator[list[dict[str, Any]]]:
  """Yields rows of a file as records, some at a time.

  Raises:
    Rejected: malformed_file: damaged, or without the columns.
  """
  try:
    for batch in _arrow_batches(file) if json_files.has_ending(file, _ARROW) else _parquet_batches(file):
      for start in range(0, batch.num_rows, _ROWS):
        part = batch.slice(start, _ROWS)
        part.validate(full=True)  # offsets of a damaged file may point anywhere
        yield part.to_pylist()
  except _ERRORS as error:
    raise Rejected("malformed_file", f"damaged or truncated ({' '.join(str(error).split())[:200]})") from error


def _arrow_batches(file: pathlib.Path) -> Iterator[pa.RecordBatch]:
  with file.open("rb") as source:
    source.seek(max(0, file.stat().st_size - len(_END_OF_STREAM)))
    if source.read() != _END_OF_STREAM:
      raise Rejected("malformed_file", "truncated: the end of the Arrow stream is missing")
  with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
    columns = _columns(stream.schema)
    for batch in stream:
      batch.validate(full=True)
      yield batch.select(columns)


def _parquet_batches(file: pathlib.Path) -> Iterator[pa.RecordBatch]:
  with pa.parquet.ParquetFile(file) as table:
    columns = _columns(table.schema_arrow)
    sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]
    if max(sizes, default=0) > MAX_GROUP_BYTES:
      raise Rejected("malformed_file", f"a row group of {max(sizes)} bytes, more than {MAX_GROUP_BYTES}")
    yield from table.iter_batches(batch_size=_ROWS, columns=columns)


def _columns(schema: pa.Schema) -> list[str]:
  """Returns the names of the columns to read.

  Raises:
    Rejected: malformed_file: one is missing, there twice, or of another type.
  """
  missing = [name for name in NEEDED if name not in schema.names]
  if not {"image", "images"} & set(schema.names):
    missing.append("image")
  if missing:
    raise Rejected("malformed_file", f"has columns {ascii(schema.names[:20])} but not {missing}")
  columns = [name for name in COLUMNS if name in schema.names]
  if repeated := [name for name in columns if schema.names.count(name) > 1]:
    raise Rejected("malformed_file", f"has several columns {repeated}")
  for name in NEEDED:
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
      raise Rejected("malformed_file", f"column {name} is {kind}, expected string")
  return columns


def _located(entry: Any, *, paths: images.ImageFiles, check: bool) -> str:
  if isinstance(entry, dict):
    entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
  return images.store(entry, check=check) if isinstance(entry, bytes) else paths.path(entry)
