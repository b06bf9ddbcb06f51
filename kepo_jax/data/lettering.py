"""One grammar of lettered options, for lists that bring letters and for texts that are split into options."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from kepo_jax.data.cleaning import Rejected

LETTERS = "ABCDEFGHIJ"  # of answers
LONGEST = 10_000  # characters of a question with its options; the longest real one has about 1,200


def _mark(label: str, more: str = r"|[ \t]?[:、]|[ \t][-–—](?=\s)") -> str:
  """Builds the pattern of `A)`, `A.)`, `A.`, `(A)`, `[A]` and `more`, `A:` and `A -`, in bold or behind "Option"."""
  bold = "[*_]{0,3}"
  bare = rf"{bold}[ \t]?(?:\.?[)\]][.:]?|\.(?!\w\.|\d){more})"  # `A.B. x` and `1.5 cm` have none
  bracket = r"(?P<open>[(\[])"
  return rf"{bold}(?:(?i:option|choice)[ \t]+)?{bold}{bracket}?(?P<label>{label})(?(open)[)\]][.:]?|{bare}){bold}"


# Of a text in a list. `1: 10` and `1 - 2 cm` are a ratio and a range.
_OWN = [re.compile(rf"{mark}\s*(?P<text>.+)", re.DOTALL) for mark in (_mark("[A-Za-z]"), _mark(r"\d\d?", ""))]
_SPECIES = re.compile(r"[A-Z]\.\s?[a-z]+(?:i|us|um|is|a|ae|ans|ens)\b")  # `A. baumannii`, which looks lettered

_LINE = r"(?:\A|\r?\n)[ \t]*(?:[-+*•][ \t]+)?"
_SENTENCE = r"(?:\A|\n|(?<=[?:.!]))[ \t]*"


def _syntax(first: str, further: str, mark: str = "", inline: bool = True):
  """Patterns of the mark that begins a row and of those that may follow, and whether all stand on one line."""
  a, later = (mark % f"(?P<label>{letters})" if mark else _mark(letters) for letters in ("A", "[A-Z]"))
  return re.compile(first + a), re.compile(further + later), inline


# How options are written, the strongest first. On one line a letter in brackets may also be part of the text,
# `type (A), `: see `_markers`. RULES["options_not_found"] names them.
_SYNTAXES = (
  _syntax(_LINE, _LINE, inline=False),
  _syntax(r"(?:^|(?<=[\s?:.]))", r",\s*(?:(?:or|and)\s+)?", r"%s\)"),
  (re.compile(_LINE + _mark("a")), re.compile(_LINE + _mark("[a-z]")), False),
  _syntax(r"(?:^|(?<=[\s?:.]))", r"\s", r"%s\)"),
  _syntax(_SENTENCE, r"\s", r"\(%s\)"),
  _syntax(_SENTENCE, r"\s", r"%s\.(?=\s+\S)"),
  _syntax(_SENTENCE, r"\s", r"%s:(?=\s+\S)"),
)
_BETWEEN = re.compile(r"(?:\s*[;,]\s*(?:or|and)?|\s(?:or|and))$", re.IGNORECASE)  # `x; B) y`, `x or B) y`
# What no longer belongs to the last option: another paragraph, an instruction, the answer.
_AFTER = re.compile(
  r"\n[ \t\r]*\n|\n\s*(?:the\s+)?(?:correct\s+)?answer\s*(?:is\s*)?:|(?:\n\s*|[.;]\s+|\s(?=(?-i:[A-Z])))(?:please\s+)?"
  r"(?:answer|respond|reply|select|choose|pick|give|provide|output|return|write|think)\s[^\n]{0,200}?"
  r"\b(?:letters?|options?|choices?|answer|step|tags?)\b|\s*请[^\n]{0,100}(?:选项|字母|答案)",
  re.IGNORECASE,
)


def own_letters(options: Sequence[str], known: Sequence[str] = ()) -> tuple[list[str], str]:
  """Takes off the letters or numbers that options begin with, `A. x`; also returns the rule that applied, or "".

  Nothing is taken off unless each option begins with its own. Names such as `A. baumannii` stay.

  Args:
    options: texts by place; empty ones have no letter.
    known: texts of which one without a letter shows that letters are no part of the names.
  """
  texts = [text.strip() for text in options]
  for pattern in _OWN:
    marks = {i: mark for i, text in enumerate(texts) if (mark := pattern.fullmatch(_levelled(text)))}
    labels = {i: mark["label"].upper() for i, mark in marks.items()}
    if len(marks) > 1 and all(
      labels.get(i) in (LETTERS[i : i + 1], str(i + 1)) for i, text in enumerate(texts) if text
    ):
      bare = [_bare(text, marks[i]["text"]) if text else "" for i, text in enumerate(texts)]
      names = all(_SPECIES.match(text) for text in texts if text) and not {*known} & {*bare}
      return (list(options), "option_letters_kept") if names else (bare, "option_letters")
  return list(options), ""


def _bare(text: str, end: str) -> str:
  """Returns the end of a text, as long as `end`, without the closing stars of `**A. x**`."""
  mark, text = text[: -len(end)], text[len(text) - len(end) :]
  return text.removesuffix("**").strip() if "**" in mark and text.count("**") % 2 else text.strip()


def _levelled(text: str) -> str:
  """Replaces full-width signs by plain ones, each in its place."""
  if text.isascii():
    return text
  signs = ((sign, unicodedata.normalize("NFKC", sign)) for sign in text)
  return "".join(plain if len(plain) == 1 else sign for sign, plain in signs)


class _Marker(NamedTuple):
  """What may begin an option."""

  at: int  # of the letter
  start: int  # of the separator
  end: int  # where the option's text begins
  opened: int  # place of the innermost bracket that is open here, -1 for none
  letter: str

  def fits(self, begin: int) -> bool:
    """Tells whether no bracket is open around it that was opened from a place on."""
    return self.opened < begin


def cut(problem: str) -> tuple[str, list[str], list[str]]:
  """Splits a question text into (stem, options in the order of their letters, rules that applied).

  Known are the notations of `_SYNTAXES`. Each option ends where the next expected letter stands behind the syntax's
  separator; options may contain commas, brackets and other letters, stems anything that looks like an option. The row
  that begins last is used.

  Where all but the last end in `;`, `,` or "or", that goes; the last ends before another paragraph or an instruction.

  Raises:
    Rejected: no two options, or more than one way to read them.
  """
  if len(problem) > LONGEST:
    raise Rejected("malformed_record", f"a question of {len(problem)} characters, more than {LONGEST}")
  row, ambiguous = _best_row(_levelled(problem))
  ends = [marker.start for marker in row[1:]] + [len(problem)]
  texts = [problem[marker.end : end].strip() for marker, end in zip(row, ends, strict=True)]
  notes = ["options_ambiguous"] if ambiguous else []
  if all(_BETWEEN.search(text) for text in texts[:-1]):
    texts = [_BETWEEN.sub("", text) for text in texts]
  if (after := _AFTER.search(texts[-1])) and after.start():
    texts[-1], left = texts[-1][: after.start()].strip(), texts[-1][after.start() :]
    if "?" in left:
      raise Rejected("options_unclear", f"a question behind the options: {left.strip()[:300]!r}")
    notes.append("text_after_options")
  texts = [_bare(problem[mark.start : mark.end] + text, text) for mark, text in zip(row, texts, strict=True)]
  return problem[: row[0].start].strip(), texts, notes


def _best_row(problem: str) -> tuple[list[_Marker], bool]:
  """Finds the row that begins last, in the strongest syntax, and whether another begins elsewhere.

  Raises:
    Rejected: there is none, or another one goes on behind where it begins.
  """
  marks = [
    (_markers(problem, first, inline), _markers(problem, further, inline)) for first, further, inline in _SYNTAXES
  ]
  beginnings = [_beginnings(first, further) for first, further in marks]
  places = {begin.at for begins in beginnings for begin in begins}
  if not places:
    raise Rejected("options_not_found", f"no options in {problem[-200:]!r}")
  last = max(places)
  begin, further = next(
    (begin, further)
    for begins, (_, further) in zip(beginnings, marks, strict=True)
    for begin in begins
    if begin.at == last
  )
  row, strays = _row(begin, further)
  for begins, (_, further) in zip(beginnings, marks, strict=True):
    # No letter may be needed by another row, or go on with this one in another notation.
    earlier = max((begin for begin in begins if begin.at < last), default=None)
    strays += _row(earlier, further)[0] if earlier else []
    strays += [mark for mark in further if mark.at > row[-1].at and mark.fits(row[-1].end) and _follows(mark, row[-1])]
  own = {marker.at for marker in row}
  if any(stray.at > last and stray.at not in own for stray in strays):
    raise Rejected("options_unclear", f"several ways to read the options of {problem[max(0, last - 20) :][:300]!r}")
  return row, len(places) > 1  # one letter may begin a row in two syntaxes; two letters are two readings


def _follows(marker: _Marker, before: _Marker) -> bool:
  return ord(marker.letter) == ord(before.letter) + 1


def _markers(problem: str, pattern: re.Pattern[str], inline: bool) -> list[_Marker]:
  """Finds the markers of a pattern, in the order of the text.

  On one line a letter with a bracket may also end something like `type (A)` or `(A, B)`: there it is a marker only
  outside the brackets, unless the option's text follows at once.
  """
  brackets = re.finditer(r"[()]", problem) if inline else iter(())
  bracket = next(brackets, None)
  opened: list[int] = []
  markers = []
  for match in pattern.finditer(problem):
    while bracket and bracket.start() < match.start():
      if bracket[0] == "(":
        opened.append(bracket.start())
      elif opened:  # the bracket of `A)` closes nothing
        opened.pop()
      bracket = next(brackets, None)
    free = re.match(r"[^\W_]", problem[match.end() : match.end() + 1])
    inside = -1 if free or not opened else opened[-1]
    markers.append(_Marker(match.start("label"), match.start(), match.end(), inside, match["label"].upper()))
  return markers


def _beginnings(candidates: list[_Marker], markers: list[_Marker]) -> list[_Marker]:
  """Returns the markers of an A that a B follows."""
  seconds = [marker for marker in markers if marker.letter == "B"]
  return [a for a in candidates if a.fits(0) and any(b.start >= a.end and b.fits(a.end) for b in seconds)]


def _row(begin: _Marker, markers: list[_Marker]) -> tuple[list[_Marker], list[_Marker]]:
  """Returns the row that a marker begins, for each next letter the first that fits, and all other markers."""
  row: list[_Marker] = [begin]
  others: list[_Marker] = []
  for marker in markers:
    if marker.start >= row[-1].end and marker.fits(row[-1].end):
      (row if _follows(marker, row[-1]) else others).append(marker)
  return row, others
