"""From the fields of a record to an `Example`: options, answer, duplicates and ids, alike for every format."""

import dataclasses
import re
from collections.abc import Sequence

from kepo_jax import answers
from kepo_jax.data import cleaning
from kepo_jax.data.cleaning import IMAGE, Rejected, Summary
from kepo_jax.data.lettering import LETTERS, LONGEST
from kepo_jax.types import Example

# What data sets write for a picture; in angle brackets it is nothing else, in others only where no angle ones are.
# Some wrap it in tokens of their own, some write its number inside or between two tags.
_NAME = r"(?:start_of_)?(?:image|img)(?:[ _]?(?:here|placeholder|pad|token|soft_token|context))?[ _-]?(\d*)"
_PLACEHOLDERS = tuple(
  re.compile(pattern, re.IGNORECASE)
  for pattern in (
    r"(?:<\|(?:vision_start|begin_of_image)\|>)?(?:<\|image_pad\|>)*"
    rf"<\s?\|?\s?{_NAME}\s?\|?\s?/?\s?>(?:\s?(\d*)\s?</\s?(?:image|img)\s?>)?(?:<\|?(?:vision_end|end_of_image)\|?>)?",
    rf"(?:\[{_NAME}\]|\{{{_NAME}\}})",
  )
)
_LIKE = re.compile(
  r"[<\[{][^\s<>\[\]{}]{0,30}(?:image|img|picture|figure|vision|video)[^<>\[\]{}]{0,60}[>\]}]", re.IGNORECASE
)
UNKNOWN = "unknown"  # modality of a record that does not tell


def check_length(question: str, options: Sequence[str]) -> None:
  """Refuses a text that no question has.

  Raises:
    Rejected: stem and options have more than LONGEST characters.
  """
  if (length := len(question) + sum(map(len, options))) > LONGEST:
    raise Rejected("question_too_long", f"a question of {length} characters with its options, more than {LONGEST}")


def named(answer: str, options: Sequence[str]) -> int | None:
  """Returns the index of the option that an answer names beyond doubt, as completions are read forgivingly."""
  letter = answers.option_letter(answer, options)
  return LETTERS.index(letter) if letter and options[LETTERS.index(letter)] else None


class Collector:
  """Makes examples of records and counts repairs in a summary; one per reading."""

  def __init__(self, summary: Summary):
    self.summary = summary
    self._contents: set[int] = set()
    self._ids: set[str] = set()

  def example(self, place: str, draft: Example, gold: int) -> Example:
    """Completes the example of one record: a unique id, images in their places, different options, the gold letter.

    Args:
      place: file and record, for messages.
      draft: as the record has it, without an answer; absent options are empty.
      gold: index of the right option.

    Raises:
      Rejected: nothing to choose, too long, or the same as an earlier record.
    """
    check_length(draft.question, draft.options)
    present = [i for i, option in enumerate(draft.options) if option]
    if present != list(range(len(present))):
      self.summary.count("option_gap", place)
    question, options, images = self._with_images_in_place(
      draft.question, [draft.options[i] for i in present], draft.images, place
    )
    kept, letter = self._different(options, present.index(gold), place)
    # Eight bytes instead of all texts again; two records of 100,000 collide by chance once in 10^9 readings.
    content = hash((images, question, kept, letter))
    if content in self._contents:
      raise Rejected("duplicate_record", f"repeats an earlier record about {', '.join(images)!r}")
    self._contents.add(content)
    example_id = self._unique(draft.id, place)
    return dataclasses.replace(draft, id=example_id, question=question, options=kept, answer=letter, images=images)

  def gold(self, answer: str, options: Sequence[str], place: str) -> int:
    """Returns the index of the option that an answer names: by its text, its letter, or both.

    Args:
      answer: of the record.
      options: by the place of their letter; absent ones are empty.
      place: file and record, for messages.

    Raises:
      Rejected: there is none, or it is empty.
    """
    plain = [cleaning.normalised(option) for option in options]
    wanted = cleaning.normalised(answer)
    holds_image = any(pattern.search(answer) for pattern in _PLACEHOLDERS)
    pictures = options.count(answer) if holds_image else 0
    if answer in options and answer and pictures < 2:
      return list(options).index(answer)
    if wanted in plain and wanted and not pictures:
      self.summary.count("answer_normalised", place)
      return plain.index(wanted)
    index = named(answer, options)
    if index is None:
      raise Rejected("answer_unmatched", f"the answer {answer!r} is none of {list(options)}"[:400])
    self.summary.count("solution_letter", place)
    return index

  def modality(self, spelling: str, place: str) -> str:
    """Returns the canonical name of a spelling; another one is kept, "" is called unknown."""
    name = cleaning.modality_name(spelling)
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
    """Returns texts with IMAGE in place of placeholders, and the images in their order.

    A single one at the beginning is removed: that is where images stand anyway.
    """
    texts = [question, *options]
    pattern = next((pattern for pattern in _PLACEHOLDERS if any(map(pattern.search, texts))), _PLACEHOLDERS[0])
    named = ["".join(filter(None, match.groups())) for text in texts for match in pattern.finditer(text)]
    if any(_LIKE.search(pattern.sub("", text)) for text in texts):
      self.summary.count("image_word", place)
    if not named:
      return question, list(options), images
    first = 0 if any(number and not int(number) for number in named) else 1
    order = list(dict.fromkeys(int(number) - first if number else i for i, number in enumerate(named)))
    if sorted(order) != list(range(len(images))):
      places = ", ".join(number or "one without number" for number in named)
      raise Rejected("image_unplaced", f"places ({places}) for {len(images)} images in {question[:200]!r}"[:400])
    self.summary.count("image_placed", place)
    seen: set[str] = set()

    def mark(match: re.Match[str]) -> str:
      number = "".join(filter(None, match.groups()))
      again = number in seen
      seen.update({number} - {""})
      return f"image {number}" if again else IMAGE  # a picture is shown once

    question, *options = (pattern.sub(mark, text).strip() for text in texts)
    if len(images) == 1 and question.startswith(IMAGE):
      question = question.removeprefix(IMAGE).lstrip()
    if not question.strip(IMAGE + " \n"):
      raise Rejected("malformed_record", "the question is empty but for its images")
    return question, options, tuple(images[i] for i in order)

  def _different(self, options: Sequence[str], gold: int, place: str) -> tuple[tuple[str, ...], str]:
    if len(options) > len(LETTERS):
      raise Rejected("too_many_options", f"{len(options)} options, more than {len(LETTERS)}")
    # Two pictures are two options, though their texts are the same.
    plain = [
      f"{cleaning.normalised(text)} {i}" if IMAGE in text else cleaning.normalised(text)
      for i, text in enumerate(options)
    ]
    kept = [i for i in range(len(options)) if i == gold or plain[i] != plain[gold]]
    different = len({plain[i] for i in kept})
    if len(kept) < len(options):
      self.summary.count("repeated_answer", place)
    if different < 2:
      raise Rejected("too_few_options", f"{list(options)} leave nothing to choose"[:400])
    if different < len(kept):
      self.summary.count("repeated_distractor", place)
    texts, gold = tuple(options[i] for i in kept), kept.index(gold)
    for rule in cleaning.notes(texts, gold):
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
