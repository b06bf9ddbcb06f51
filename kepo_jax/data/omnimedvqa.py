"""Reader of the OmniMedVQA layout: nothing disappears silently, and no path leaves the root.

A root holds `Images/<dataset>/...` and `QA_information/<access>/<dataset>.json`, each a list of flat records.
Every repair and every drop has a name in `RULES` and is counted in the `Summary`.
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kepo_jax.types import Example

# What is repaired or only noted, what is dropped, and what stops a strict read.
RULES: Mapping[str, str] = {
  "modality_key": "repaired: the modality stands under `modality` instead of `modality_type`",
  "modality_spelling": "repaired: another spelling of a modality's canonical name",
  "modality_unlisted": "kept: a modality that is none of the eight of the open-access part",
  "dataset_from_file": "repaired: no `dataset`; the name of the file is used",
  "null_option": "repaired: an option that is null or empty counts as absent",
  "option_gap": "repaired: a letter between two options is absent; the following options move up",
  "answer_normalised": "repaired: the answer equals an option except for case, spaces, quotes or a final period",
  "repeated_answer": "repaired: the right answer stood among the options more than once; one is left",
  "repeated_distractor": "kept: a wrong option stands there more than once",
  "duplicate_id": "repaired: another record has the same question id; a number is added",
  "duplicate_record": "dropped: image, question, options and answer equal an earlier record's",
  "answer_unmatched": "dropped: the answer is none of the options",
  "too_few_options": "dropped: fewer than two different options",
  "malformed_file": "error: the file is not a list of records in UTF-8 JSON",
  "malformed_record": "error: a field is missing or is no text",
  "unsafe_path": "error: the image's path leaves the root",
  "missing_image": "error: the image does not exist",
}
ERRORS = tuple(name for name, text in RULES.items() if text.startswith("error"))

# Letters of every spelling seen, without case, spaces and punctuation, to the canonical name.
MODALITIES: Mapping[str, str] = {
  "mrmagneticresonanceimaging": "MRI",
  "magneticresonanceimaging": "MRI",
  "mri": "MRI",
  "mr": "MRI",
  "ctcomputedtomography": "CT",
  "computedtomography": "CT",
  "ct": "CT",
  "xray": "X-Ray",
  "ultrasound": "Ultrasound",
  "dermoscopy": "Dermoscopy",
  "fundusphotography": "Fundus",
  "fundus": "Fundus",
  "octopticalcoherencetomography": "OCT",
  "opticalcoherencetomography": "OCT",
  "oct": "OCT",
  "microscopyimages": "Microscopy",
  "microscopy": "Microscopy",
}
_NESTING = 2  # folders above the root that an unpacked archive may add


class _Rejected(Exception):
  """A record that cannot be used: a rule and what it met."""

  def __init__(self, rule: str, detail: str):
    super().__init__(detail)
    self.rule = rule


@dataclasses.dataclass
class Summary:
  """What a reader found, by rule of `RULES`."""

  root: str
  files: int = 0
  records: int = 0
  kept: int = 0
  rules: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  first: dict[str, str] = dataclasses.field(default_factory=dict)  # first place that each rule met

  def count(self, rule: str, place: str) -> None:
    """Notes one application of a rule."""
    self.rules[rule] += 1
    self.first.setdefault(rule, place)

  @property
  def dropped(self) -> int:
    """Records that are not among the examples; those of unreadable files are not known."""
    return self.records - self.kept

  def to_dict(self) -> dict[str, Any]:
    """The summary as JSON-able values."""
    return dataclasses.asdict(self) | {"rules": dict(self.rules), "dropped": self.dropped}

  def text(self) -> str:
    """One line of totals and one per rule that applied."""
    lines = [f"{self.root}: {self.kept} of {self.records} records kept, {self.files} files"]
    for rule, text in RULES.items():
      if self.rules[rule]:
        lines.append(f"  {rule} {self.rules[rule]}: {text} (first: {self.first[rule]})")
    return "\n".join(lines)


def modality_name(spelling: str) -> str | None:
  """Canonical name of a modality, None for a spelling that is not listed."""
  return MODALITIES.get(re.sub(r"[^a-z]", "", spelling.lower()))


def find_root(directory: str | os.PathLike) -> pathlib.Path:
  """The folder that holds QA_information: the directory itself, or the only such one up to two levels below.

  Raises:
    ValueError: there is none, or more than one.
  """
  top = pathlib.Path(directory)
  if not top.is_dir():
    raise ValueError(f"{top}: no such directory; pass the folder that holds QA_information and Images")
  for depth in range(_NESTING + 1):
    found = sorted(path.parent for path in top.glob("*/" * depth + "QA_information") if path.is_dir())
    if len(found) == 1:
      return found[0]
    if found:
      raise ValueError(f"{top} holds several data sets ({', '.join(map(str, found))}); name one of them")
  raise ValueError(f"{top}: no QA_information folder here or below; pass the root of the OmniMedVQA download")


def read(
  directory: str | os.PathLike, *, access: str = "Open-access", lenient: bool = False, check_images: bool = True
) -> tuple[list[Example], Summary]:
  """Every usable record of a folder in OmniMedVQA's layout, in the order of files and records.

  Args:
    directory: root, or a folder around it.
    access: folder below QA_information.
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
  files = sorted(folder.glob("*.json"))
  if not files:
    raise ValueError(f"{folder}: no JSON files; QA_information has {sorted(os.listdir(folder.parent))}")
  summary = Summary(root=str(root), files=len(files))
  reader = _Reader(summary, _ImageFiles(root, check_images))
  examples = [example for file in files for example in reader.examples(file)]
  summary.kept = len(examples)
  errors = {rule: summary.rules[rule] for rule in ERRORS if summary.rules[rule]}
  if errors and not lenient:
    rule = next(iter(errors))
    raise ValueError(
      f"{summary.first[rule]} ({sum(errors.values())} such errors: {errors}); mend the data, or read it with "
      "lenient=True, which drops and counts them"
    )
  if not examples:
    raise ValueError(f"{root}: none of {summary.records} records is usable: {dict(summary.rules)}")
  return examples, summary


class _ImageFiles:
  """Image paths of records, resolved inside a root; folders are resolved once."""

  def __init__(self, root: pathlib.Path, check: bool):
    self._root = os.path.realpath(root)
    self._check = check
    self._folders: dict[str, str] = {}

  def _inside(self, real: str) -> bool:
    return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)

  def path(self, relative: str) -> str:
    """Absolute path without symbolic links; rejects what leaves the root or does not exist."""
    pure = pathlib.PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or "\0" in relative or not pure.name:
      raise _Rejected("unsafe_path", f"image_path {relative!r} is not a path below the root")
    try:
      return self._resolved(str(pure.parent), pure.name, relative)
    except (OSError, UnicodeEncodeError) as error:
      raise _Rejected("missing_image", f"image {relative!r} cannot be found ({error})") from error

  def _resolved(self, parent: str, name: str, relative: str) -> str:
    if parent not in self._folders:
      self._folders[parent] = os.path.realpath(os.path.join(self._root, parent))
    path = os.path.join(self._folders[parent], name)
    mode = os.lstat(path).st_mode if self._check or os.path.lexists(path) else None
    if mode is not None and stat.S_ISLNK(mode):
      path = os.path.realpath(path)
      mode = os.stat(path).st_mode if self._inside(path) else mode
    if not self._inside(path):
      raise _Rejected("unsafe_path", f"image_path {relative!r} leads out of {self._root} by a symbolic link")
    if mode is not None and not stat.S_ISREG(mode):
      raise _Rejected("missing_image", f"image {relative!r} is not a file")
    return path


class _Reader:
  """Turns records into examples and counts what it does."""

  def __init__(self, summary: Summary, images: _ImageFiles):
    self._summary = summary
    self._images = images
    self._contents: set[tuple] = set()
    self._ids: set[str] = set()

  def examples(self, file: pathlib.Path) -> Iterator[Example]:
    """Usable records of one file."""
    try:
      records = _parsed(file)
    except _Rejected as rejected:
      self._summary.count(rejected.rule, f"{file}: {rejected}")
      return
    for number, record in enumerate(records):
      self._summary.records += 1
      name = record.get("question_id", "") if isinstance(record, dict) else ""
      place = f"{file}, record {number} {ascii(name) if name else ''}".rstrip()
      try:
        yield self._example(record, file.stem, place)
      except _Rejected as rejected:
        self._summary.count(rejected.rule, f"{place}: {rejected}")

  def _example(self, record: Any, stem: str, place: str) -> Example:
    if not isinstance(record, dict):
      raise _Rejected("malformed_record", f"a record is a JSON object, this is {type(record).__name__}")
    question, answer = _text(record, "question"), _text(record, "gt_answer")
    question_id, relative = _text(record, "question_id"), _text(record, "image_path")
    modality = self._modality(record, place)
    dataset = _text(record, "dataset", required=False)
    if not dataset:
      self._summary.count("dataset_from_file", place)
      dataset = stem
    options, letter = self._options(record, answer, place)
    image = self._images.path(relative)
    content = (image, question, options, letter)
    if content in self._contents:
      raise _Rejected("duplicate_record", f"repeats an earlier record about {relative!r}")
    self._contents.add(content)
    return Example(
      id=self._unique(f"{dataset}/{question_id}", place),
      question=question,
      options=options,
      answer=letter,
      images=(image,),
      modality=modality,
      question_type=_text(record, "question_type", required=False),
      dataset=dataset,
    )

  def _unique(self, name: str, place: str) -> str:
    unique, number = name, 1
    while unique in self._ids:
      number += 1
      unique = f"{name}#{number}"
    if number > 1:
      self._summary.count("duplicate_id", place)
    self._ids.add(unique)
    return unique

  def _modality(self, record: Mapping[str, Any], place: str) -> str:
    key = "modality_type" if record.get("modality_type") else "modality"
    if key == "modality" and "modality" in record:
      self._summary.count("modality_key", place)
    spelling = _text(record, key if key in record else "modality_type")
    name = modality_name(spelling)
    if name is None:
      self._summary.count("modality_unlisted", place)
    elif name != spelling:
      self._summary.count("modality_spelling", place)
    return name or spelling

  def _options(self, record: Mapping[str, Any], answer: str, place: str) -> tuple[tuple[str, ...], str]:
    keys = sorted(key for key in record if re.fullmatch(r"option_[A-J]", key))
    present = [key for key in keys if _text(record, key, required=False)]
    if len(present) < len(keys):
      self._summary.count("null_option", place)
    if any(key != f"option_{chr(ord('A') + i)}" for i, key in enumerate(present)):
      self._summary.count("option_gap", place)
    options = [_text(record, key) for key in present]
    plain = [normalised(option) for option in options]
    if answer in options:
      gold = options.index(answer)
    elif normalised(answer) in plain:
      gold = plain.index(normalised(answer))
      self._summary.count("answer_normalised", place)
    else:
      raise _Rejected("answer_unmatched", f"gt_answer {answer!r} is none of {options}")
    kept = [i for i in range(len(options)) if i == gold or plain[i] != plain[gold]]
    different = len({plain[i] for i in kept})
    if len(kept) < len(options):
      self._summary.count("repeated_answer", place)
    if different < 2:
      raise _Rejected("too_few_options", f"{options} leave nothing to choose")
    if different < len(kept):
      self._summary.count("repeated_distractor", place)
    return tuple(options[i] for i in kept), chr(ord("A") + kept.index(gold))


def normalised(text: str) -> str:
  """An answer without the differences that do not matter: case, spaces, quotes around it, a final period."""
  return " ".join(text.casefold().split()).strip("\"' ").rstrip(".").strip("\"' ")


def _text(record: Mapping[str, Any], field: str, *, required: bool = True) -> str:
  value = record.get(field)
  if value is None and not required:
    return ""
  if not isinstance(value, str):
    raise _Rejected("malformed_record", f"field {field} is {'missing' if value is None else repr(value)[:60]}")
  if required and not value.strip():
    raise _Rejected("malformed_record", f"field {field} is empty")
  if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
    raise _Rejected("malformed_record", f"field {field} holds half of a surrogate pair: {value!r}"[:120])
  return value.strip()


def _parsed(file: pathlib.Path) -> Sequence[Any]:
  try:
    records = json.loads(file.read_bytes().decode("utf-8-sig"))
  except (OSError, ValueError, RecursionError) as error:
    raise _Rejected("malformed_file", f"not readable as JSON in UTF-8 ({error})") from error
  if not isinstance(records, list):
    raise _Rejected("malformed_file", f"holds a {type(records).__name__}, expected a list of records")
  return records
