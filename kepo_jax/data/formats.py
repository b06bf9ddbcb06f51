"""One reader for all formats: recognises what a folder or file is and says which reader it took."""

import os
import pathlib

from kepo_jax.data import hf_folders, json_files, omnimedvqa, split_files
from kepo_jax.data.rules import Rejected, Summary
from kepo_jax.types import Example


def read_any(
  path: str | os.PathLike,
  *,
  image_root: str | os.PathLike | None = None,
  access: str = "Open-access",
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """Every usable record of a download, whichever of the known formats it has.

  A folder is OmniMedVQA's layout (it or a folder up to two levels below holds QA_information), saved to disk by
  Hugging Face's library (dataset_dict.json or state.json), a folder of parquet files, or a folder of JSON files in
  Med-R1's or MedVLM-R1's form; the first of these that fits is taken. A file is parquet, Arrow, or a JSON list, of
  OmniMedVQA's records where the first one has `gt_answer`, else of the others' form.

  Args:
    path: folder or file.
    image_root: folder that image paths start from; None: the format's own rule.
    access: folder below QA_information, for that layout alone.
    lenient: drop and count records that stop a strict read.
    check_images: whether image files must exist.

  Returns:
    the examples, and what was repaired and dropped; `format` of the summary names the format.

  Raises:
    ValueError: no known format, no usable record, or, unless lenient, anything that RULES calls an error; names the
      first file and record.
    OSError: images that come as bytes cannot be written into the cache folder.
  """
  top = pathlib.Path(path)
  if not os.path.lexists(top):
    raise ValueError(f"{top}: no such file or directory")
  settings = {"image_root": image_root, "lenient": lenient, "check_images": check_images}
  reader = _reader_of_folder(top) if top.is_dir() else _reader_of_file(top)
  if reader is omnimedvqa.read:
    return omnimedvqa.read(top, access=access, **settings)
  return reader(top, **settings)


def _reader_of_folder(top: pathlib.Path):
  if omnimedvqa.roots(top):
    return omnimedvqa.read
  if hf_folders.is_saved(top) or next(top.rglob("*.parquet"), None):
    return hf_folders.read
  if next(top.rglob("*.json"), None):
    return split_files.read
  raise ValueError(
    f"{top}: of no known format: no QA_information folder up to two levels below, no dataset_dict.json, and no parquet "
    "or JSON files; see docs/data.md"
  )


def _reader_of_file(file: pathlib.Path):
  if file.suffix in (".parquet", ".arrow"):
    return hf_folders.read
  if file.suffix != ".json":
    raise ValueError(f"{file}: of no known format; .json, .parquet and .arrow files are read")
  try:
    first = next(iter(json_files.records_of(file)), None)
  except Rejected as rejected:
    raise ValueError(f"{file}: {rejected}") from rejected
  return omnimedvqa.read_file if isinstance(first, dict) and "gt_answer" in first else split_files.read
