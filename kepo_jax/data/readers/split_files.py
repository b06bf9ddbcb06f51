"""Records of `image`, `problem` and `solution`: Med-R1's split files, MedVLM-R1's test set, R1-V's columns.

A record's `problem` holds stem and options in one text, see `lettering.cut`; its `solution` is a letter, bare or
inside answer tags, or the text of an option, as released code writes where it finds no letter. MedVLM-R1 adds
`question`, `options`, `answer` and `subset`, which are checked against the text.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kepo_jax.data import cleaning, lettering, records
from kepo_jax.data.cleaning import Rejected, Summary
from kepo_jax.data.images import ImageFiles
from kepo_jax.data.readers import json_files
from kepo_jax.types import Example

QUESTION_TYPES = (
  "Anatomy Identification",
  "Disease Diagnosis",
  "Lesion Grading",
  "Modality Recognition",
  "Other Biological Attributes",
)
# Words that name a part of a split, in the names of files and folders.
PARTS = {
  "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
  "dev": "validation", "test": "test",
}  # fmt: skip
_ENDING = re.compile(r"(?:_filtered)?_(?:train|test|val|validation|eval)(?:_\d+)?$", re.IGNORECASE)
_TAGS = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_CLIMB = 5  # folders above a file that are searched for its images


def read(
  path: str | os.PathLike,
  *,
  image_root: str | os.PathLike | None = None,
  lenient: bool = False,
  check_images: bool = True,
) -> tuple[list[Example], Summary]:
  """Reads a split file, or all JSON files (.json, .jsonl) in a folder and below, as `formats.read_any` does.

  Ids are the file's name without ending, and the number of the record in it. The modality comes from the record, else
  from the file's name as Med-R1 gives it (`CT(Computed Tomography)_train.json`, `MRI_test.json`), else from the name
  of the folder, as of `..._modality_MRI_train_600`.

  By default image paths start from the nearest folder above a file that holds `Images` or `images`, else its own.
  """
  top = pathlib.Path(path)
  files = json_files.below(top, json_files.ENDINGS) if top.is_dir() else [top]
  if not files:
    raise ValueError(f"{top}: no JSON files here or below")
  summary = Summary(root=str(top), format="split files", files=len(files))
  if top.is_dir():
    json_files.count_skipped(top, files, summary)
  collector, examples = records.Collector(summary), list[Example]()
  for file, entries in json_files.files_of(files, top if top.is_dir() else None, summary):
    images = ImageFiles(image_root or nearest_image_root(file), check_images)
    examples += examples_of(entries, file, images.path, collector)
  return summary.finished(examples, lenient=lenient)


def nearest_image_root(file: pathlib.Path) -> pathlib.Path:
  """Finds the nearest folder above a file that holds `Images` or `images`, else the file's own folder."""
  above = list(pathlib.Path(os.path.realpath(file)).parents)[:_CLIMB]
  return next((folder for folder in above if any((folder / name).is_dir() for name in ("Images", "images"))), above[0])


def described(stem: str) -> tuple[str, str]:
  """Reads (spelling of the modality, question type) from a file's name without ending; "" for what it does not tell."""
  name = _ENDING.sub("", stem).strip()
  topics = {cleaning.normalised(topic): topic for topic in QUESTION_TYPES}
  topic = topics.get(cleaning.normalised(name.replace("_", " ")), "")
  words = [word for word in re.split(r"[_/]", name) if cleaning.modality_name(word)]
  if not cleaning.modality_name(name):
    name = words[0] if len(words) == 1 else ""  # `modality_MRI`, but not `MRI_CT_XRAY`
  return name, topic


def title(place: pathlib.Path) -> str:
  """Returns the name of a folder or file, with that of the folder around it where it only names a part, or `data`."""
  path = pathlib.Path(os.path.abspath(place))
  own = [] if path.name.lower() == "data" else [path.name]
  if path.name.lower() in (*PARTS, "data") and path.parent.name:
    return "/".join([title(path.parent), *own])
  return path.name


def _named(stem: str, folder: pathlib.Path) -> tuple[str, str]:
  """Returns `described` of the beginning of the ids; the folder's name gives what that lacks."""
  (modality, topic), (above, topic_above) = described(stem), described(title(folder).partition("/")[0])
  return modality or above, topic or topic_above


def examples_of(
  entries: Sequence[Any],
  file: pathlib.Path,
  locate: Callable[[Any], str],
  collector: records.Collector,
  *,
  first: int = 0,
  stem: str = "",
  dataset: str = "",
) -> Iterator[Example]:
  """Yields the usable records of one file as examples.

  Args:
    entries: records.
    file: where they come from.
    locate: from what a record has for an image to the absolute path; raises Rejected.
    collector: of the reading.
    first: number of the first record.
    stem: begins the ids and may tell the modality, as the folder's name may where it does not; by default the
      file's name without ending.
    dataset: source of records that do not tell theirs; by default the stem.
  """
  stem = stem or file.stem
  named = _named(stem, file.parent)

  def convert(record: Mapping[str, Any], number: int, place: str) -> Example:
    return _example(record, f"{stem}/{number}", named, locate, place, dataset or stem, collector)

  return json_files.converted(entries, file, collector.summary, convert, first=first)


def _example(
  record: Mapping[str, Any],
  name: str,
  named: tuple[str, str],
  locate: Callable[[Any], str],
  place: str,
  dataset: str,
  collector: records.Collector,
) -> Example:
  problem, solution = cleaning.text_field(record, "problem"), cleaning.text_field(record, "solution")
  question, options = _question(record, problem, place, collector.summary)
  gold = _gold(record, solution, options, place, collector)
  entries = _image_entries(record)
  images = tuple(locate(entry) for entry in entries)
  if "" in options:
    collector.summary.count("null_option", place)
  spelling, topic = named
  for field in ("modality_type", "subset", "modality"):
    spelling = cleaning.text_field(record, field, required=False) or spelling
  return collector.example(
    place,
    Example(
      id=name,
      question=question,
      options=tuple(options),
      answer="",
      images=images,
      modality=collector.modality(spelling, place),
      question_type=cleaning.text_field(record, "question_type", required=False) or topic,
      dataset=_folder_of(entries[0]) or cleaning.text_field(record, "dataset", required=False) or dataset,
    ),
    gold,
  )


def _question(record: Mapping[str, Any], problem: str, place: str, summary: Summary) -> tuple[str, list[str]]:
  listed, stem = _listed(record, place, summary), cleaning.text_field(record, "question", required=False)
  try:
    question, options, applied = lettering.cut(problem)
  except Rejected as rejected:
    if not listed or rejected.rule not in ("options_not_found", stem and "options_unclear"):
      raise
    question, options, applied = stem or problem, [], []
  if listed and listed != options:
    listed, rule = lettering.own_letters(listed, options)
    applied += [rule] if rule else []
  if listed and listed != options:
    applied.append("options_listed")
    question, options = stem or question, listed
  if not (question or stem):
    raise Rejected("malformed_record", "field problem has no question before its options")
  for rule in applied:
    summary.count(rule, place)
  return question or stem, options


def _listed(record: Mapping[str, Any], place: str, summary: Summary) -> list[str]:
  """Returns the record's own options, by letter; absent ones between others are empty."""
  listed = record.get("options")
  if isinstance(listed, dict):
    letters = {str(key).strip().upper(): text for key, text in listed.items()}
    listed = [letters.pop(letter, None) for letter in lettering.LETTERS[: len(listed)]]
    listed = None if letters else listed
  elif listed is None:
    return []
  if not isinstance(listed, list) or not all(isinstance(text, str | None) for text in listed):
    raise Rejected("malformed_record", "field options is no list of texts, and no object of texts by letter")
  texts = [cleaning.text_field({"options": text}, "options", required=False) for text in listed]
  while texts and not texts[-1]:
    texts.pop()
  if len(texts) < len(listed) and "" not in texts:  # else it is counted with the ones between
    summary.count("null_option", place)
  return texts


def _gold(
  record: Mapping[str, Any], solution: str, options: Sequence[str], place: str, collector: records.Collector
) -> int:
  tagged = _TAGS.search(solution)
  content = (tagged.group(1) if tagged else solution).strip()
  if content in list(lettering.LETTERS[: len(options)]):
    gold = lettering.LETTERS.index(content)
    if not options[gold]:
      raise Rejected("answer_unmatched", f"the solution names {content}, an empty option")
  else:
    gold = collector.gold(content, options, place)
    if cleaning.normalised(content) in map(cleaning.normalised, options):
      collector.summary.count("solution_text", place)
  answer = cleaning.text_field(record, "answer", required=False)
  texts = {cleaning.normalised(options[gold]), content.casefold()}
  if answer and cleaning.normalised(answer) not in texts and records.named(answer, options) != gold:
    raise Rejected("answer_contradicted", f"answer {answer!r}, but solution {content!r} is {options[gold]!r}"[:400])
  return gold


def _image_entries(record: Mapping[str, Any]) -> list[Any]:
  """Returns the images of a record, one or several, under `image` or `images`.

  Raises:
    Rejected: malformed_record: nothing.
  """
  value = record.get("image")
  value = record.get("images") if value is None else value
  entries = value if isinstance(value, list) else [value]
  if not entries or any(entry is None for entry in entries):
    raise Rejected("malformed_record", "field image is missing or empty")
  return entries


def _folder_of(entry: Any) -> str:
  """Returns `X` of `Images/X/...`: the source of the record in OmniMedVQA's own paths."""
  path = entry.get("path") if isinstance(entry, dict) else entry
  parts = pathlib.PurePosixPath(path).parts if isinstance(path, str) else ()
  return parts[1] if len(parts) > 2 and parts[0] == "Images" else ""
