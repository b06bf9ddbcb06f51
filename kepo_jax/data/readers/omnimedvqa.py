"""Reader of the OmniMedVQA layout: nothing disappears silently, and no path leaves the root.

A root holds `Images/<dataset>/...` and `QA_information/<access>/<dataset>.json`, each a list of flat records.
Every repair and every drop has a name in `rules.RULES` and is counted in the `Summary`.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kepo_jax.data import cleaning, lettering, records
from kepo_jax.data.cleaning import MODALITIES, Rejected, Summary, modality_name
from kepo_jax.data.images import ImageFiles
from kepo_jax.data.readers import json_files
from kepo_jax.types import Example

__all__ = ["MODALITIES", "Summary", "find_root", "modality_name", "read", "read_file"]

_NESTING = 2  # folders above the root that an unpacked archive may add


def find_root(directory: str | os.PathLike) -> pathlib.Path:
  """The folder that holds QA_information: the directory itself, or the only such one up to two levels below.

  Raises:
    ValueError: there is none, or more than one.
  """
  top = pathlib.Path(directory)
  if not top.is_dir():
    raise ValueError(f"{top}: no such directory; pass the folder that holds QA_information and Images")
  found = roots(top)
  if not found:
    raise ValueError(f"{top}: no QA_information folder here or below; pass the root of the OmniMedVQA download")
  if len(found) > 1:
    raise ValueError(f"{top} holds several data sets ({', '.join(map(str, found))}); name one of them")
  return found[0]


def roots(top: pathlib.Path) -> list[pathlib.Path]:
  """The folders that hold a QA_information, of the first level that has any, up to two levels below."""
  for depth in range(_NESTING + 1):
    found = sorted(path.parent for path in top.glob("*/" * depth + "QA_information") if path.is_dir())
    if found:
      return found
  return []


def read(
  directory: str | os.PathLike,
  *,
  access: str = "Open-access",
  image_root: str | os.PathLike | None = None,
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """Every usable record of a folder in OmniMedVQA's layout, in the order of files and records.

  Args:
    directory: root, or a folder around it.
    access: folder below QA_information.
    image_root: folder that the image paths start from, where that is not the root.
    lenient: drop and count records that stop a strict read: malformed, without image, leaving the root.
    check_images: whether image files must exist; paths are checked in any case.

  Returns:
    the examples, their images as absolute paths, and what was repaired and dropped.

  Raises:
    ValueError: no such layout, no usable record, or, unless lenient, anything that RULES calls an error; names
      the first file and record.
  """
  root = find_root(directory)
  folder = root / "QA_information" / access
  files = [file for file in json_files.below(folder, json_files.ENDINGS) if file.parent == folder]
  if not files:
    raise ValueError(f"{folder}: no JSON files; QA_information has {sorted(os.listdir(folder.parent))}")
  summary = Summary(root=str(root), files=len(files))
  json_files.count_skipped(folder, files, summary)
  reader = _Reader(summary, ImageFiles(image_root or root, check_images), root)
  return reader.read(files, lenient)


def read_file(
  file: str | os.PathLike,
  *,
  image_root: str | os.PathLike | None = None,
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """One JSON file of the layout, as `read` would read it; its root is the folder above QA_information, or its own.

  Raises:
    ValueError: as for `read`.
  """
  path = pathlib.Path(file)
  above = pathlib.Path(os.path.realpath(path)).parents
  root = image_root or next((folder.parent for folder in above if folder.name == "QA_information"), above[0])
  return _Reader(Summary(root=str(path), files=1), ImageFiles(root, check_images), None).read([path], lenient)


class _Reader:
  """Turns the records of files into examples and counts what it does."""

  def __init__(self, summary: Summary, images: ImageFiles, root: pathlib.Path | None):
    self._summary = summary
    self._images = images
    self._root = root  # that no JSON file may leave
    self._collector = records.Collector(summary)

  def read(self, files: Sequence[pathlib.Path], lenient: bool) -> tuple[list[Example], Summary]:
    """Usable records of some files and the summary, after its verdict."""
    examples = [example for file in files for example in self._examples(file)]
    self._summary.kept = len(examples)
    self._summary.verdict(lenient=lenient)
    return examples, self._summary

  def _examples(self, file: pathlib.Path) -> Iterator[Example]:
    try:
      found = json_files.records_of(file, self._root)
    except Rejected as rejected:
      self._summary.count(rejected.rule, f"{file}: {rejected}")
      return
    for number, record in enumerate(found):
      self._summary.records += 1
      name = record.get("question_id", "") if isinstance(record, dict) else ""
      place = f"{file}, record {number} {ascii(name)[:80] if isinstance(name, str) and name else ''}".rstrip()
      try:
        yield self._example(json_files.checked_record(record), file.stem, place)
      except Rejected as rejected:
        self._summary.count(rejected.rule, f"{place}: {rejected}")

  def _example(self, record: Mapping[str, Any], stem: str, place: str) -> Example:
    question, answer = cleaning.text_field(record, "question"), cleaning.text_field(record, "gt_answer")
    question_id, relative = cleaning.text_field(record, "question_id"), cleaning.text_field(record, "image_path")
    modality = self._modality(record, place)
    dataset = cleaning.text_field(record, "dataset", required=False)
    if not dataset:
      self._summary.count("dataset_from_file", place)
      dataset = stem
    options = self._options(record, place)
    bare, rule = lettering.own_letters(options, [answer])
    if rule:
      self._summary.count(rule, place)
      answer, options = bare[options.index(answer)] if answer in options else answer, bare
    gold = self._collector.gold(answer, options, place)
    return self._collector.example(
      place,
      name=f"{dataset}/{question_id}",
      question=question,
      options=[option for option in options if option],
      gold=gold - options[:gold].count(""),
      images=(self._images.path(relative),),
      modality=modality,
      question_type=cleaning.text_field(record, "question_type", required=False),
      dataset=dataset,
    )

  def _modality(self, record: Mapping[str, Any], place: str) -> str:
    key = "modality_type" if record.get("modality_type") else "modality"
    if key == "modality" and "modality" in record:
      self._summary.count("modality_key", place)
    return self._collector.modality(cleaning.text_field(record, key if key in record else "modality_type"), place)

  def _options(self, record: Mapping[str, Any], place: str) -> list[str]:
    """Options by the place of their letters, absent ones empty."""
    texts = {
      key: cleaning.text_field(record, key, required=False) for key in record if re.fullmatch(r"option_[A-Z]", key)
    }
    if not all(texts.values()):
      self._summary.count("null_option", place)
    last = max((ord(key[-1]) for key, text in texts.items() if text), default=0)
    options = [texts.get(f"option_{chr(code)}", "") for code in range(ord("A"), last + 1)]
    if "" in options:
      self._summary.count("option_gap", place)
    return options
