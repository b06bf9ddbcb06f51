"""From the fields of a record to an `Example`: options, answer, duplicates and ids, alike for every format."""

import re
from collections.abc import Sequence

from kepo_jax.data import rules
from kepo_jax.data.rules import Rejected, Summary
from kepo_jax.types import Example

LETTERS = "ABCDEFGHIJ"  # of answers
LONGEST = 10_000  # characters of a question with its options; the longest real one has about 1,200
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


# How the three families write options. `first` begins the row, `next` each further one; {} is the expected letter.
# On one line a letter in brackets may also be part of the text, `type (A), `: see `_is_marker`.
_SYNTAXES = (
  (re.compile(r"\r?\n[ \t]*A\)"), r"\r?\n[ \t]*{}\)", False),
  (re.compile(r"\r?\n[ \t]*A:"), r"\r?\n[ \t]*{}:", False),
  (re.compile(r"(?:^|(?<=[\s?:.]))A\)"), r",\s*{}\)", True),
)


def cut(problem: str) -> tuple[str, list[str], bool]:
  """A question text taken apart: (stem, options in the order of their letters, whether it could be read otherwise).

  Three syntaxes are known: `stem A)x, B)y` on one line, and `A) x` or `A: x` on lines of their own. Each option ends
  where the next expected letter stands behind the syntax's separator; options may contain commas, brackets and other
  letters, stems anything that looks like an option. The row that begins last is used.

  Raises:
    Rejected: no two options.
  """
  if len(problem) > LONGEST:
    raise Rejected("malformed_record", f"a question of {len(problem)} characters, more than {LONGEST}")
  rows = [
    (first.end(), -rank, row)
    for rank, (begin, further, inline) in enumerate(_SYNTAXES)
    for first in begin.finditer(problem)
    if (row := _row(problem, first, further, inline))
  ]
  if not rows:
    raise Rejected("options_not_found", f"no options in {problem[-200:]!r}")
  *_, row = max(rows, key=lambda found: found[:2])
  ends = [start for start, _ in row[1:]] + [len(problem)]
  options = [problem[begin:end].strip() for (_, begin), end in zip(row, ends, strict=True)]
  # One letter may begin a row in two syntaxes; two letters are two readings.
  return problem[: row[0][0]].strip(), options, len({letter for letter, *_ in rows}) > 1


def _row(problem: str, first: re.Match, further: str, inline: bool) -> list[tuple[int, int]]:
  """(start of the separator, start of the text) of each option of one row; empty if there are not two."""
  if inline and not _is_marker(problem, 0, first):
    return []
  row = [(first.start(), first.end())]
  for letter in "BCDEFGHIJKLMNOPQRSTUVWXYZ":
    matches = re.compile(further.format(letter)).finditer(problem, row[-1][1])
    found = next((match for match in matches if not inline or _is_marker(problem, row[-1][1], match)), None)
    if found is None:
      break
    row.append((found.start(), found.end()))
  return row if len(row) > 1 else []


def _is_marker(problem: str, begin: int, match: re.Match) -> bool:
  """Whether a letter with a bracket begins an option, and does not end something like `type (A)` or `(A, B)`."""
  if re.match(r"[^\W_]", problem[match.end() : match.end() + 1]):
    return True  # the text follows at once
  depth = 0
  for bracket in re.findall(r"[()]", problem[begin : match.start()]):
    depth = depth + 1 if bracket == "(" else max(0, depth - 1)  # `A)` closes nothing
  return depth == 0
