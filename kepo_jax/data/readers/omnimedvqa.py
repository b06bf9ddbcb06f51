"""Reader of the OmniMedVQA layout: nothing disappears silently, and no path leaves the root.

A root holds `Images/<dataset>/...` and `QA_information/<access>/<dataset>.json`, each a list of flat records.
Every repair and every drop has a name in `cleaning.RULES` and is counted in the `Summary`.
"""

import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from kepo_jax.data import cleaning, lettering, records
from kepo_jax.data.cleaning import Summary
from kepo_jax.data.images import ImageFiles
from kepo_jax.data.readers import json_files
from kepo_jax.types import Example

_NESTING = 2  # folders above the root that an unpacked archive may add


def roots(top: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders that hold a QA_information, of the first level that has any, up to two levels below."""
  for depth in range(_NESTING + 1):
    found = sorted(path.parent for path in top.glob("*/" * depth + "QA_information") if path.is_dir())
    if found:
      return found
  return []


def read(
  path: str | os.PathLike,
  *,
  access: str = "Open-access",
  image_root: str | os.PathLike | None = None,
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """Reads every usable record of a folder in OmniMedVQA's layout, or of one of its files.

  Args:
    path: root, a folder around it, or a JSON file.
    access: folder below QA_information; has no effect on a file.
    image_root: folder that the image paths start from; by default the root, or the folder of a file that lies in none.
    lenient: drop and count records that stop a strict read: malformed, without image, leaving the root.
    check_images: whether image files must exist; paths are checked in any case.

  Returns:
    the examples, their images as absolute paths, and what was repaired and dropped.

  Raises:
    ValueError: no such layout, no usable record, or, unless lenient, anything that RULES calls an error; names
      the first file and record.
  """
  top, root = pathlib.Path(path), None
  if top.is_file():
    above = pathlib.Path(os.path.realpath(top)).parents
    images = image_root or next((folder.parent for folder in above if folder.name == "QA_information"), above[0])
    files, summary = [top], Summary(root=str(top), files=1)
  else:
    root = _find_root(top)
    folder = root / "QA_information" / access
    files, images = [file for file in json_files.below(folder, json_files.ENDINGS) if file.parent == folder], root
    if not files:
      raise ValueError(f"{folder}: no JSON files; QA_information has {sorted(os.listdir(folder.parent))}")
    summary = Summary(root=str(root), files=len(files))
    json_files.count_skipped(folder, files, summary)
  collector, paths = records.Collector(summary), ImageFiles(image_root or images, check_images)
  examples: list[Example] = []
  for file, entries in json_files.files_of(files, root, summary):
    convert = functools.partial(_example, stem=file.stem, paths=paths, collector=collector)
    examples += json_files.converted(entries, file, summary, convert)
  return summary.finished(examples, lenient=lenient)


def _find_root(top: pathlib.Path) -> pathlib.Path:
  """Returns the folder that holds QA_information: this one, or the only such one up to two levels below."""
  if not top.is_dir():
    raise ValueError(f"{top}: no such directory; pass the folder that holds QA_information and Images")
  found = roots(top)
  if not found:
    raise ValueError(f"{top}: no QA_information folder here or below; pass the root of the OmniMedVQA download")
  if len(found) > 1:
    raise ValueError(f"{top} holds several data sets ({', '.join(map(str, found))}); name one of them")
  return found[0]


def _example(
  record: Mapping[str, Any], number: int, place: str, *, stem: str, paths: ImageFiles, collector: records.Collector
) -> Example:
  del number
  question, answer = cleaning.text_field(record, "question"), cleaning.text_field(record, "gt_answer")
  question_id, relative = cleaning.text_field(record, "question_id"), cleaning.text_field(record, "image_path")
  modality = _modality(record, place, collector)
  dataset = cleaning.text_field(record, "dataset", required=False)
  if not dataset:
    collector.summary.count("dataset_from_file", place)
    dataset = stem
  options = _options(record, place, collector.summary)
  bare, rule = lettering.own_letters(options, [answer])
  if rule:
    collector.summary.count(rule, place)
    answer, options = bare[options.index(answer)] if answer in options else answer, bare
  gold = collector.gold(answer, options, place)
  return collector.example(
    place,
    Example(
      id=f"{dataset}/{question_id}",
      question=question,
      options=tuple(options),
      answer="",
      images=(paths.path(relative),),
      modality=modality,
      question_type=cleaning.text_field(record, "question_type", required=False),
      dataset=dataset,
    ),
    gold,
  )


def _modality(record: Mapping[str, Any], place: str, collector: records.Collector) -> str:
  key = "modality_type" if record.get("modality_type") else "modality"
  if key == "modality" and "modality" in record:
    collector.summary.count("modality_key", place)
  return collector.modality(cleaning.text_field(record, key if key in record else "modality_type"), place)


def _options(record: Mapping[str, Any], place: str, summary: Summary) -> list[str]:
  """Returns options by the place of their letters, absent ones empty."""
  texts = {
    key: cleaning.text_field(record, key, required=False) for key in record if re.fullmatch(r"option_[A-Z]", key)
  }
  if not all(texts.values()):
    summary.count("null_option", place)
  last = max((ord(key[-1]) for key, text in texts.items() if text), default=0)
  return [texts.get(f"option_{chr(code)}", "") for code in range(ord("A"), last + 1)]
