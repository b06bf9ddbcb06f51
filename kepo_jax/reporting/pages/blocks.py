"""What a page is made of: plain frozen records, which know nothing of HTML."""

import dataclasses

from kepo_jax.reporting.tables import Row


@dataclasses.dataclass(frozen=True)
class Fact:
  """A key figure, shown large: a label, its value, and what the reader should know of it."""

  label: str  # "out of domain"
  value: str  # "51.3 -> 83.6 %"
  note: str = ""  # "[49.1, 53.5] -> [81.9, 85.2], 2,100 questions"


@dataclasses.dataclass(frozen=True)
class TextBlock:
  """A paragraph; nothing in it is markup."""

  text: str
  warning: bool = False  # stands out


@dataclasses.dataclass(frozen=True)
class FigureBlock:
  """A figure, as `figure_block` makes it."""

  image: bytes
  alt: str  # what it shows, for those who do not see it
  caption: str = ""
  media: str = "image/png"  # or image/svg+xml
  wide: bool = True  # False: shares its row with neighbours that are not wide either


@dataclasses.dataclass(frozen=True)
class TableBlock:
  """Rows as kepo_jax.reporting.tables gives them, header first; figures to the right, columns sort by a click."""

  rows: tuple[Row, ...]
  caption: str = ""
  words: bool = False  # cells are words: (name, value) without a header, as they come


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model said to a question."""

  label: str  # "rollout 3", "before"
  text: str
  right: bool | None = None  # None: not judged
  values: tuple[tuple[str, str], ...] = ()  # name and value: ("accuracy", "1"), ("letter", "B")
  marks: tuple[str, ...] = ()  # "distilled", "injected", "leaks"
  hint: str = ""  # under which it was written


@dataclasses.dataclass(frozen=True)
class AnswerGroup:
  """Answers that belong together, in columns where there is room: the rollouts of a step, before and after, a round."""

  heading: str
  answers: tuple[Answer, ...]
  hint: str = ""  # shared by all


@dataclasses.dataclass(frozen=True)
class Sample:
  """One question of the browser, with all that was answered."""

  key: str  # unique on the page, and stable: "train/3/q17"; what a link to the sample names
  source: str  # filter: "steps 1-20", "test"
  outcome: str  # filter: "all wrong", "wrong -> right"
  id: str
  modality: str  # filter
  question_type: str  # filter
  question: str
  options: tuple[str, ...]
  answer: str  # gold letter
  images: tuple[str, ...] = ()  # paths, local or remote; for one that cannot be read its name is shown
  tags: tuple[str, ...] = ()  # further values of the outcome filter: "with injected rollouts"
  details: tuple[tuple[str, str], ...] = ()  # name and value: ("step", "3")
  groups: tuple[AnswerGroup, ...] = ()


@dataclasses.dataclass(frozen=True)
class BrowserBlock:
  """Questions with filters, one shown at a time; at most one on a page.

  Give it all there are: the page takes as many of each source, modality and outcome as its two limits allow.
  """

  samples: tuple[Sample, ...]
  text: str = ""  # what they are
  most: int = 240  # questions on the page
  size: int = 1_900_000  # bytes of the page for their texts and images


Block = TextBlock | FigureBlock | TableBlock | BrowserBlock


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading and what stands below it."""

  heading: str
  blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Page:
  """A page as a whole."""

  title: str
  subtitle: str = ""
  facts: tuple[Fact, ...] = ()
  sections: tuple[Section, ...] = ()
  footer: str = ""
