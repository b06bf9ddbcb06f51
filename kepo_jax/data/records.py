"""From the fields of a record to an `Example`: options, answer, duplicates and ids, alike for every format."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from kepo_jax.data import rules
from kepo_jax.data.rules import Rejected, Summary
from kepo_jax.types import Example

LETTERS = "ABCDEFGHIJ"  # of answers
LONGEST = 10_000  # characters of a question with its options; the longest real one has about 1,200
IMAGE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands in a question or option for one of its images, in their order
_PLACEHOLDER = re.compile(r"<image(?:[ _]?(\d+))?>", re.IGNORECASE)
UNKNOWN = "unknown"  # modality of a record that does not tell


def check_length(question: str, options: Sequence[str]) -> None:
  """Refuses a text that no question has.

  Raises:
    Rejected: stem and options have more than LONGEST characters.
  """
  if (length := len(question) + sum(map(len, options))) > LONGEST:
    raise Rejected("question_too_long", f"a question of {length} characters with its options, more than {LONGEST}")


class Collector:
  """Turns fields into examples and counts in a summary what it does; one per reading."""

  def __init__(self, summary: Summary):
    self.summary = summary
    self._contents: set[int] = set()
    self._ids: set[str] = set()

  def example(
    self,
    place: str,
    *,
    name: str,
    question: str,
    options: Sequence[str],
    gold: int,
    images: tuple[str, ...],
    modality: str,
    question_type: str,
    dataset: str,
  ) -> Example:
    """The example of one record.

    Args:
      place: file and record, for messages.
      name: id of the question, made unique here.
      question: the stem.
      options: all options, the empty ones left out.
      gold: index of the right option.
      images: absolute paths.
      modality: canonical name.
      question_type: as the data spell it.
      dataset: source of the record.

    Raises:
      Rejected: nothing to choose, too long, or the same as an earlier record.
    """
    check_length(question, options)
    question, options, images = self._with_images_in_place(question, options, images, place)
    kept, letter = self._different(options, gold, place)
    # Eight bytes instead of all texts again; two records of 100,000 collide by chance once in 10^9 readings.
    content = hash((images, question, kept, letter))
    if content in self._contents:
      raise Rejected("duplicate_record", f"repeats an earlier record about {', '.join(images)!r}")
    self._contents.add(content)
    return Example(
      id=self._unique(name, place),
      question=question,
      options=kept,
      answer=letter,
      images=images,
      modality=modality,
      question_type=question_type,
      dataset=dataset,
    )

  def gold(self, answer: str, options: Sequence[str], place: str) -> int:
    """Index of the option whose text is the answer.

    Raises:
      Rejected: there is none.
    """
    if answer in options:
      return list(options).index(answer)
    plain = [rules.normalised(option) for option in options]
    if (wanted := rules.normalised(answer)) not in plain:
      raise Rejected("answer_unmatched", f"the answer {answer!r} is none of {list(options)}"[:400])
    self.summary.count("answer_normalised", place)
    return plain.index(wanted)

  def modality(self, spelling: str, place: str) -> str:
    """Canonical name of a spelling; another one is kept, "" is called unknown."""
    name = rules.modality_name(spelling)
    if not spelling:
      self.summary.count("modality_unknown", place)
    elif name is None:
      self.summary.count("modality_unlisted", place)
    elif name != spelling:
      self.summary.count("modality_spelling", place)
    return name or spelling or UNKNOWN

  def _with_images_in_place(
    self, question: str, options: Sequence[str], images: tuple[str, ...], place: str
  ) -> tuple[str, list[str], tuple[str, ...]]:
    """Texts with IMAGE in place of `<image>` or `<image 1>`, and the images in the order in which they stand there.

    A single one at the beginning goes: that is where images stand anyway.
    """
    texts = [question, *options]
    named = [found[1] for text in texts for found in _PLACEHOLDER.finditer(text)]
    if not named:
      return question, list(options), images
    order = list(dict.fromkeys(int(number) - 1 if number else i for i, number in enumerate(named)))
    if sorted(order) != list(range(len(images))):
      raise Rejected("image_unplaced", f"{len(set(order))} places for {len(images)} images in {question[:200]!r}")
    self.summary.count("image_placed", place)
    seen: set[str] = set()

    def mark(found: re.Match[str]) -> str:
      again = found[1] in seen
      seen.update({found[1]} - {None})
      return f"image {found[1]}" if again else IMAGE  # a picture is shown once

    question, *options = (_PLACEHOLDER.sub(mark, text).strip() for text in texts)
    if len(images) == 1 and question.startswith(IMAGE):
      question = question.removeprefix(IMAGE).lstrip()
    if not question.strip(IMAGE + " \n"):
      raise Rejected("malformed_record", "the question is empty but for its images")
    return question, options, tuple(images[i] for i in order)

  def _different(self, options: Sequence[str], gold: int, place: str) -> tuple[tuple[str, ...], str]:
    if len(options) > len(LETTERS):
      raise Rejected("too_many_options", f"{len(options)} options, more than {len(LETTERS)}")
    plain = [rules.normalised(option) for option in options]
    kept = [i for i in range(len(options)) if i == gold or plain[i] != plain[gold]]
    different = len({plain[i] for i in kept})
    if len(kept) < len(options):
      self.summary.count("repeated_answer", place)
    if different < 2:
      raise Rejected("too_few_options", f"{list(options)} leave nothing to choose"[:400])
    if different < len(kept):
      self.summary.count("repeated_distractor", place)
    texts, gold = tuple(options[i] for i in kept), kept.index(gold)
    for rule in rules.notes(texts, gold):
      self.summary.count(rule, place)
    return texts, LETTERS[gold]

  def _unique(self, name: str, place: str) -> str:
    unique, number = name, 1
    while unique in self._ids:
      number += 1
      unique = f"{name}#{number}"
    if number > 1:
      self.summary.count("duplicate_id", place)
    self._ids.add(unique)
    return unique


def _on_lines(opening: str, closing: str, first: str = "A", further: str = "B-Z"):
  line = rf"\r?\n[ \t]*{opening}"
  return re.compile(f"{line}({first}){closing}"), re.compile(f"{line}([{further}]){closing}"), False


# How options are written. `first` begins the row, `further` marks each next one by its letter.
# On one line a letter in brackets may also be part of the text, `type (A), `: see `_markers`.
_INLINE = r"(?:^|(?<=[\s?:.]))(A)\)"
_SYNTAXES = (
  _on_lines("", r"\)"),
  _on_lines("", ":"),
  (re.compile(_INLINE), re.compile(r",\s*([B-Z])\)"), True),
  _on_lines("", r"\.(?=\s)"),
  _on_lines(r"\(", r"\)"),
  _on_lines("", r"\)", "a", "b-z"),
  (re.compile(_INLINE), re.compile(r"\s([B-Z])\)"), True),
)


def without_letters(options: Sequence[str]) -> list[str] | None:
  """Options without the letters that they begin with, `A. x`, `(B) y`; None unless each begins with its own."""
  found = [re.fullmatch(r"\(?([A-Za-z])\s?[).:、]\s*(.*)", option.strip(), re.DOTALL) for option in options]
  if not found or any(each is None or each[1].upper() != LETTERS[i : i + 1] for i, each in enumerate(found)):
    return None
  return [each[2] for each in found if each]


class _Marker(NamedTuple):
  """What may begin an option."""

  letter: str
  start: int  # of the separator
  end: int  # where the option's text begins
  opened: int  # place of the innermost bracket that is open here, -1 for none

  def fits(self, begin: int) -> bool:
    """Whether it stands in no bracket that was opened from a place on."""
    return self.opened < begin


def cut(problem: str) -> tuple[str, list[str], bool]:
  """A question text taken apart: (stem, options in the order of their letters, whether it could be read otherwise).

  Known are `stem A)x, B)y` on one line, with commas or without, and on lines of their own `A) x`, `A: x`, `A. x`,
  `(A) x` and `a) x`. Each option ends
  where the next expected letter stands behind the syntax's separator; options may contain commas, brackets and other
  letters, stems anything that looks like an option. The row that begins last is used.

  The time is proportional to the length of the text, whatever it holds.

  Raises:
    Rejected: no two options.
  """
  if len(problem) > LONGEST:
    raise Rejected("malformed_record", f"a question of {len(problem)} characters, more than {LONGEST}")
  rows: list[tuple[int, int, _Marker, list[_Marker]]] = []  # of each place where one begins
  for rank, (first, further, inline) in enumerate(_SYNTAXES):
    beginnings = _markers(problem, first, inline)
    markers = _markers(problem, further, inline) if beginnings else []
    rows += [(begin.end, -rank, begin, markers) for begin in _beginnings(beginnings, markers)]
  if not rows:
    raise Rejected("options_not_found", f"no options in {problem[-200:]!r}")
  *_, begin, markers = max(rows, key=lambda found: found[:2])
  row = _row(begin, markers)
  ends = [marker.start for marker in row[1:]] + [len(problem)]
  options = [problem[marker.end : end].strip() for marker, end in zip(row, ends, strict=True)]
  # One letter may begin a row in two syntaxes; two letters are two readings.
  return problem[: begin.start].strip(), options, len({place for place, *_ in rows}) > 1


def _markers(problem: str, pattern: re.Pattern[str], inline: bool) -> list[_Marker]:
  """What a pattern finds, in the order of the text.

  On one line a letter with a bracket may also end something like `type (A)` or `(A, B)`: there it is a marker only
  outside the brackets, unless the option's text follows at once.
  """
  brackets = re.finditer(r"[()]", problem) if inline else iter(())
  bracket = next(brackets, None)
  opened: list[int] = []
  found = []
  for match in pattern.finditer(problem):
    while bracket and bracket.start() < match.start():
      if bracket[0] == "(":
        opened.append(bracket.start())
      elif opened:  # the bracket of `A)` closes nothing
        opened.pop()
      bracket = next(brackets, None)
    free = re.match(r"[^\W_]", problem[match.end() : match.end() + 1])
    found.append(_Marker(match[1].upper(), match.start(), match.end(), -1 if free or not opened else opened[-1]))
  return found


def _beginnings(candidates: list[_Marker], markers: list[_Marker]) -> list[_Marker]:
  """The markers of an A behind which a B can be found."""
  found = []
  seconds = [marker for marker in markers if marker.letter == "B"]
  earliest: float = math.inf
  for begin in reversed(candidates):
    while seconds and seconds[-1].start >= begin.end:
      earliest = min(earliest, seconds.pop().opened)  # if any fits, then the one whose bracket was opened first
    if begin.fits(0) and earliest < begin.end:
      found.append(begin)
  return found


def _row(begin: _Marker, markers: list[_Marker]) -> list[_Marker]:
  """The marker that begins a row, and for each next letter the first that fits behind the one before it."""
  row = [begin]
  for marker in markers:
    expected = chr(ord(row[-1].letter) + 1)
    if marker.letter == expected and marker.start >= row[-1].end and marker.fits(row[-1].end):
      row.append(marker)
  return row
