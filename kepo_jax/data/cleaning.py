"""Rules for what the readers repair, note and drop, and a summary that counts them: nothing disappears silently.

Each reader counts in a `Summary` every rule of `RULES` that it applies. Docs: the table of docs/data.md.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kepo_jax.types import Example

IMAGE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands in a question or option for one of its images, in their order
# What is repaired or only noted, what is dropped, and what stops a strict read.
RULES: Mapping[str, str] = {
  "modality_key": "repaired: the modality stands under `modality` instead of `modality_type`",
  "modality_spelling": "repaired: another spelling of a modality's canonical name",
  "modality_unlisted": "kept: a modality that is none of the eight of the open-access part",
  "modality_unknown": "kept: neither the record nor its file's name tells the modality; it is called unknown",
  "dataset_from_file": "repaired: no `dataset`; the name of the file is used",
  "null_option": "repaired: an option that is null or empty counts as absent",
  "option_gap": "repaired: a letter between two options is absent; the following options move up",
  "options_ambiguous": "kept: the letters that begin options stand in the text more than once; the last row is used",
  "option_letters": "repaired: options of the record's list begin with their own letters, which are taken off",
  "option_letters_kept": "kept: options begin with letters that may belong to them, as in `A. baumannii`",
  "text_after_options": "repaired: what stands behind the last option, an instruction or a paragraph, is left out",
  "options_listed": "repaired: the options cut from the text differ from the record's own list, which is used",
  "answer_normalised": "repaired: the answer equals an option except for case, spaces, quotes or a final period",
  "solution_letter": "repaired: the answer names a letter in more words, as `(B)`, `b`, `B) kidney` or `Answer: B`",
  "solution_text": "repaired: the solution is the text of an option instead of its letter",
  "repeated_answer": "repaired: the right answer stood among the options more than once; one is left",
  "repeated_distractor": "kept: a wrong option stands there more than once",
  "synonym_options": "kept: two options name the same modality, so that two letters may be right and one is scored",
  "class_spelling": "kept: the right answer is an odd spelling of its class, such as `x_ray.` or `Dermoscopy.`",
  "nonsense_option": "kept: an option without meaning, such as `ABC DEF` or `123 456`",
  "leaked_label": "kept: an option repeats a folder's label, such as `Intra type of radimageNet dataset.`",
  "image_placed": "kept: the text says with `<image>` or its like where its pictures stand",
  "image_word": "kept: what looks like a place for a picture stays as a word",
  "duplicate_id": "repaired: another record has the same question id; a number is added",
  "duplicate_record": "dropped: image, question, options and answer equal an earlier record's",
  "image_unplaced": "dropped: the text has another number of places for pictures than the record has images",
  "answer_unmatched": "dropped: the answer is none of the options",
  "answer_contradicted": "dropped: the record's answer text is not the option that its letter names",
  "options_not_found": "dropped: no two options can be cut from the text: `A) x, B) y`, `A) x B) y`, `(A) x (B) y`, "
  "`A. x B. y` or `A: x, B: y` on one line, or on lines of their own `A) x`, `A. x`, `A: x`, `A - x`, `(A) x`, "
  "`[A] x`, `Option A: x`, `**A.** x` or `- A) x`, or `a) x` and its like",
  "options_unclear": "dropped: the letters that begin options have another order, or a question stands behind them",
  "too_few_options": "dropped: fewer than two different options",
  "too_many_options": "dropped: more than ten options; answers are the letters A to J",
  "file_skipped": "dropped: a file of another kind lies beside those of the format; nothing of it is read",
  "malformed_file": "error: the file cannot be read, or is not what its format asks for",
  "malformed_record": "error: a field is missing, is no text, or stands there twice",
  "question_too_long": "error: more than 10,000 characters with its options",
  "unsafe_path": "error: the image's path leaves the root",
  "missing_image": "error: the image does not exist",
  "unreadable_image": "error: the image is damaged, too large or of another format; only opening it tells",
  "image_too_narrow": "error: one side is more than 200 times the other, too much for `native`; only a run tells",
  "image_too_large": "error: its images have more patches than the largest of `data.patch_buckets`; only a run tells",
  "prompt_too_long": "error: a prompt has more tokens than the largest of `data.prompt_buckets`; only a run tells",
}
ERRORS = tuple(name for name, text in RULES.items() if text.startswith("error"))

# Letters of every spelling seen, without case, spaces and punctuation, to the canonical name.
MODALITIES: Mapping[str, str] = {
  spelling: name
  for name, spellings in {
    "MRI": ("mrmagneticresonanceimaging", "magneticresonanceimaging", "mri", "mr"),
    "CT": ("ctcomputedtomography", "computedtomography", "ct"),
    "X-Ray": ("xray",),
    "Ultrasound": ("ultrasound",),
    "Dermoscopy": ("dermoscopy",),
    "Fundus": ("fundusphotography", "fundus"),
    "OCT": ("octopticalcoherencetomography", "opticalcoherencetomography", "oct"),
    "Microscopy": ("microscopyimages", "microscopy"),
  }.items()
  for spelling in spellings
}
# Options write the short name behind the long one, and these around either.
_SHORT = re.compile(r"\((?:mri|ct|oct|us)\)", re.IGNORECASE)
_AROUND = re.compile(r"\b(?:images?|imaging|scans?)\b", re.IGNORECASE)
_LABEL = re.compile(r"radimagenet|\bdata ?set\b", re.IGNORECASE)
_ROWS = ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "QWERTYUIOP", "ASDFGHJKL", "ZXCVBNM")  # of alphabet and keyboard


class Rejected(Exception):
  """A record or file that cannot be used: a rule and what it met."""

  def __init__(self, rule: str, detail: str):
    super().__init__(detail)
    self.rule = rule


@dataclasses.dataclass
class Summary:
  """Counts of a reading, by rule of `RULES`."""

  root: str
  format: str = "OmniMedVQA layout"  # which of the formats the reader took this for
  files: int = 0
  records: int = 0
  kept: int = 0
  rules: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  first: dict[str, str] = dataclasses.field(default_factory=dict)  # first place that each rule met

  def count(self, rule: str, place: str) -> None:
    """Counts one application of a rule and keeps the first place."""
    if rule not in RULES:
      raise KeyError(rule)
    self.rules[rule] += 1
    if rule not in self.first:
      self.first[rule] = printable(place)

  @property
  def dropped(self) -> int:
    """Counts records that are not among the examples; those of unreadable files are not known."""
    return self.records - self.kept

  def to_dict(self) -> dict[str, Any]:
    """Returns the summary as JSON-able values."""
    return dataclasses.asdict(self) | {"rules": dict(self.rules), "dropped": self.dropped}

  def text(self) -> str:
    """Returns one line of totals and one per rule that applied."""
    lines = [f"{printable(self.root)}: {self.kept} of {self.records} records kept, {self.files} files ({self.format})"]
    for rule, text in RULES.items():
      if self.rules[rule]:
        lines.append(f"  {rule} {self.rules[rule]}: {text} (first: {self.first[rule]})")
    return "\n".join(lines)

  def finished(self, examples: list[Example], *, lenient: bool) -> "tuple[list[Example], Summary]":
    """Ends a reading: returns its examples and this summary. Raises as `verdict` does."""
    self.kept = len(examples)
    self.verdict(lenient=lenient)
    return examples, self

  def verdict(self, *, lenient: bool) -> None:
    """Refuses data that cannot be used.

    Raises:
      ValueError: no usable record, or, unless lenient, anything that RULES calls an error; names the first place.
    """
    errors = {rule: self.rules[rule] for rule in ERRORS if self.rules[rule]}
    if errors and not lenient:
      raise ValueError(
        f"{self.first[next(iter(errors))]} ({counted(errors)}); mend the data, or set data.lenient "
        "(--config.data.lenient, or --lenient where there is no config), which drops and counts them"
      )
    if not self.kept:
      drops = "; ".join(
        f"{count} {rule}: {RULES[rule]} (first: {self.first[rule]})" for rule, count in self.rules.items()
      )
      raise ValueError(f"{self.root}: none of {self.records} records is usable: {drops}")


def counted(rules: Mapping[str, int]) -> str:
  """Says how often each rule applied: "2 missing_image, 1 malformed_file"."""
  return ", ".join(f"{count} {rule}" for rule, count in rules.items())


def printable(text: str) -> str:
  """Replaces what would move a terminal's cursor or cannot be encoded; names of files may hold anything."""
  return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def modality_name(spelling: str) -> str | None:
  """Returns the canonical name of a modality, None for a spelling that is not listed."""
  return MODALITIES.get(re.sub(r"[^a-z]", "", spelling.lower()))


def normalised(text: str) -> str:
  """Removes the differences between answers that do not matter: case, spaces, quotes around it, a final period."""
  return " ".join(text.casefold().split()).strip("\"' ").rstrip(".").strip("\"' ")


def text_field(record: Mapping[str, Any], field: str, *, required: bool = True) -> str:
  """Returns a field of a record, stripped; "" for an absent one that is not required.

  The signs that mark pictures here are taken out; texts copied from PDF hold some.

  Raises:
    Rejected: it is missing, empty, no text or no valid Unicode.
  """
  value = record.get(field)
  if value is None and not required:
    return ""
  if not isinstance(value, str):
    raise Rejected("malformed_record", f"field {field} is {'missing' if value is None else _shown(value)}")
  text = value.replace(IMAGE, "").strip()
  if required and not text:
    raise Rejected("malformed_record", f"field {field} is empty")
  if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
    raise Rejected("malformed_record", f"field {field} holds half of a surrogate pair: {text!r}"[:120])
  return text


def _shown(value: Any) -> str:
  # A type for what may be huge or nested: the text of a deep list would overflow the stack.
  return repr(value)[:60] if isinstance(value, bool | float | bytes) else f"of type {type(value).__name__}"


def notes(options: Sequence[str], gold: int) -> list[str]:
  """Returns the rules for what is odd about options that are kept as they are.

  Args:
    options: texts in the order of their letters.
    gold: index of the right one.
  """
  rules = []
  if any(_is_nonsense(option) for option in options):
    rules.append("nonsense_option")
  if any(_LABEL.search(option) for option in options):
    rules.append("leaked_label")
  if modality_name(options[gold]) and (options[gold].endswith(".") or "_" in options[gold]):
    rules.append("class_spelling")
  # A spelling that `normalised` sees through is a repeated option and has a rule of its own.
  named = {normalised(option): _named_modality(option) for option in options}
  modalities = [name for name in named.values() if name]
  if len(set(modalities)) < len(modalities):
    rules.append("synonym_options")
  return rules


def _named_modality(option: str) -> str | None:
  alone = _SHORT.sub("", option)  # `imaging` belongs to some names, hence both
  return modality_name(alone) or modality_name(_AROUND.sub("", alone))


def _is_nonsense(option: str) -> bool:
  words = option.strip(" .").split()
  if len(words) < 2 or not all(word.isascii() and (word.isdigit() or word.isalpha()) for word in words):
    return False
  plain = all(word == word.upper() and len(word) <= 4 for word in words)
  return plain and any(len(word) >= 3 and any(word in row for row in _ROWS) for word in words)
