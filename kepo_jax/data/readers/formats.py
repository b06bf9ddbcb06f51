"""One reader for all formats: recognises what a folder or file is and says which reader it took."""

import os
import pathlib
from typing import Any

from kepo_jax.data.cleaning import Rejected, Summary
from kepo_jax.data.readers import hf_folders, json_files, omnimedvqa, split_files
from kepo_jax.types import Example


def read_any(
  path: str | os.PathLike,
  *,
  image_root: str | os.PathLike | None = None,
  access: str = "Open-access",
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """Reads every usable record of a download in any of the known formats.

  A folder is OmniMedVQA's layout (it or a folder up to two levels below holds QA_information), saved to disk by
  Hugging Face's library (it or the only such folder in it holds dataset_dict.json or state.json), a folder of parquet
  files, or a folder of JSON files in Med-R1's or MedVLM-R1's form; the first of these that fits is taken. A file is
  parquet, Arrow, or JSON, a list or one record per line (.jsonl), of OmniMedVQA's records where one has `gt_answer`,
  else of the others' form. Endings may be in capitals. Files of other kinds are counted, and named in the summary.

  Args:
    path: folder or file, or FOLDER/train-*.parquet for the parquet files of one part, see `hf_folders.part_files`.
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
  if not os.path.lexists(top) and not hf_folders.part_files(top):
    raise ValueError(f"{top}: no such file or directory")
  settings: dict[str, Any] = {"image_root": image_root, "lenient": lenient, "check_images": check_images}
  if top.is_dir():
    if omnimedvqa.roots(top):
      return omnimedvqa.read(top, access=access, **settings)
    if hf_folders.saved_folder(top) or json_files.below(top, (".parquet",)):
      return hf_folders.read(top, **settings)
    if json_files.below(top, json_files.ENDINGS):
      return split_files.read(top, **settings)
    raise ValueError(
      f"{top}: of no known format: no QA_information folder up to two levels below, no dataset_dict.json, and no "
      "parquet or JSON files; see docs/data.md"
    )
  if json_files.has_ending(top, (".parquet", ".arrow")):
    return hf_folders.read(top, **settings)
  if not json_files.has_ending(top, json_files.ENDINGS):
    raise ValueError(f"{top}: of no known format; .json, .jsonl, .parquet and .arrow files are read")
  try:
    records = json_files.records_of(top)
  except Rejected as rejected:
    raise ValueError(f"{top}: {rejected}") from rejected
  layout = any(isinstance(record, dict) and "gt_answer" in record for record in records)
  return omnimedvqa.read(top, **settings) if layout else split_files.read(top, **settings)
