"""Hugging Face data sets of image, problem and solution: parquet files, and folders saved to disk; with pyarrow.

The image is what the `Image` feature stores, `bytes` and `path`, or a path; images that come as bytes are written
once into the cache folder. No code of a data set is run, nothing is unpickled.
"""

import functools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from kepo_jax.data import image_files, json_files
from kepo_jax.data.rules import Rejected, Summary
from kepo_jax.data.split_files import RecordReader, nearest_image_root
from kepo_jax.types import Example

NEEDED = ("problem", "solution")
# Columns that are read where they exist; others may hold anything.
COLUMNS = (
  "image", "images", *NEEDED, "question", "options", "answer", "subset", "modality", "modality_type", "question_type",
  "dataset",
)  # fmt: skip
MAX_GROUP_BYTES = 1 << 33  # of one row group, unpacked
_ROWS = 64  # that are in memory at a time
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:-[0-9a-f]+)?$")
# What pyarrow raises on damaged files.
_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError, NotImplementedError)
# An Arrow stream that was closed ends in this; one that was cut off between two batches reads without complaint.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def is_saved(folder: pathlib.Path) -> bool:
  """Whether a folder was saved to disk: one split, or several with a list of them."""
  return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read(
  path: str | os.PathLike,
  *,
  image_root: str | os.PathLike | None = None,
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """Every usable record of a parquet or Arrow file, a folder saved to disk, or a folder of parquet files.

  Ids are the names of the folder and of the split (or of the file, without its number of shards), and the number of
  the row in the split.

  Args:
    path: file or folder.
    image_root: folder that image paths start from, where images are paths; by default the nearest one above a file
      that holds the folder `Images` or `images`, else the file's own.
    lenient: drop and count records that stop a strict read.
    check_images: whether image files must exist, and images that come as bytes are looked at and written.

  Raises:
    ValueError: no such files, no usable record, or, unless lenient, anything that RULES calls an error; names the
      first file and row.
    OSError: the cache folder cannot be written.
  """
  top = pathlib.Path(path)
  summary = Summary(root=str(top), format="Hugging Face, " + ("saved to disk" if _arrow(top) else "parquet"))
  reader = RecordReader(summary)
  name = _name(top)
  examples: list[Example] = []
  rows: dict[str, int] = {}  # read so far, by split
  for split, file in _files(top, summary):
    summary.files += 1
    files = image_files.ImageFiles(image_root or nearest_image_root(file), check_images)
    stem = split if split == name or not top.is_dir() else f"{name}/{split}"
    locate = functools.partial(_located, files=files, check=check_images)
    try:
      for batch in _batches(json_files.checked_file(file, top if top.is_dir() else None)):
        start = rows.get(split, 0)
        rows[split] = start + len(batch)
        examples += reader.examples(batch, file, locate, first=start, stem=stem, dataset=name)
    except Rejected as rejected:
      summary.count(rejected.rule, f"{file}: {rejected}")
  if not summary.files and not summary.rules:
    raise ValueError(f"{top}: no parquet files here or below, and not saved to disk")
  summary.kept = len(examples)
  summary.verdict(lenient=lenient)
  return examples, summary


def _name(top: pathlib.Path) -> str:
  """Name of a folder, or of a file without its ending and number."""
  top = pathlib.Path(os.path.abspath(top))
  return top.name if top.is_dir() else _SHARD.sub("", top.stem)


def _arrow(top: pathlib.Path) -> bool:
  return is_saved(top) if top.is_dir() else top.suffix == ".arrow"


def _files(top: pathlib.Path, summary: Summary) -> Iterator[tuple[str, pathlib.Path]]:
  """(split, file) in the order of reading; what is wrong with the files that list them is counted."""
  if not top.is_dir():
    yield _SHARD.sub("", top.stem), top
    return
  if not is_saved(top):
    for file in sorted(top.rglob("*.parquet")):
      yield _SHARD.sub("", file.stem), file
    return
  folders = {_name(top): top}
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
  """A list in a JSON file; [] where it is absent."""
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
  """Rows of a file as records, some at a time.

  Raises:
    Rejected: malformed_file: damaged, or without the columns.
  """
  try:
    for batch in _arrow_batches(file) if file.suffix == ".arrow" else _parquet_batches(file):
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
  """Names of the columns to read.

  Raises:
    Rejected: malformed_file: one is missing, there twice, or of another type.
  """
  missing = [name for name in NEEDED if name not in schema.names]
  if not {"image", "images"} & set(schema.names):
    missing.append("image")
  if missing:
    raise Rejected("malformed_file", f"has columns {_shown(schema.names)} but not {missing}")
  columns = [name for name in COLUMNS if name in schema.names]
  if repeated := [name for name in columns if schema.names.count(name) > 1]:
    raise Rejected("malformed_file", f"has several columns {repeated}")
  for name in NEEDED:
    kind = schema.field(name).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
      raise Rejected("malformed_file", f"column {name} is {kind}, expected string")
  return columns


def _shown(names: Sequence[str]) -> str:
  return ascii(names[:20])


def _located(entry: Any, *, files: image_files.ImageFiles, check: bool) -> str:
  if isinstance(entry, dict):
    entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
  return image_files.store(entry, check=check) if isinstance(entry, bytes) else files.path(entry)
