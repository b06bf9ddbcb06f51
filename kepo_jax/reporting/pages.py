"""Pages of one HTML file each, which need no network: blocks, questions of a run, figures, thumbnails, rendering.

Everything that a page shows comes from models and data sets, so nothing of it is trusted: the template escapes,
questions are embedded as JSON of which the script makes text nodes, and the policy of the page runs no other script.
"""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import zip_longest
from typing import Any

import jinja2
import matplotlib
from etils import epath
from matplotlib.figure import Figure
from PIL import Image, ImageChops

from kepo_jax import exploration, storage
from kepo_jax.data import images as images_lib
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


Record = Mapping[str, Any]

# Outcomes of a group of rollouts, and what else the same filter finds.
ALL_WRONG, MIXED, ALL_RIGHT = "all wrong (cliff)", "mixed", "all right"
INJECTED, GATED = "with injected rollouts", "with distilled rollouts"

_RANGES = 4  # parts of the training by which its questions are filtered


def training_samples(records: Sequence[Record], *, prefix: str = "") -> tuple[Sample, ...]:
  """Returns the questions of samples.jsonl, each with the rollouts of its group, hints and candidates.

  Args:
    records: of samples.jsonl, in order.
    prefix: tells several runs of one page apart: "kepo, seed 0".
  """
  found: dict[tuple[int, str], list[Record]] = {}
  for record in records:
    found.setdefault((record["step"], record["id"]), []).append(record)
  last = max((step for step, _ in found), default=0)
  samples = []
  for (step, name), group in found.items():
    rollouts = [record for record in group if record["kind"] == "rollout"]
    if rollouts:  # hints are stored for more questions than rollouts are
      source = f"training, {_range(step, last)}"
      samples.append(_training_sample(step, name, rollouts, group, source, prefix))
  return tuple(samples)


def evaluated_samples(
  evaluations: Mapping[str, Sequence[Record]], *, source: str = "test", prefix: str = ""
) -> tuple[Sample, ...]:
  """Returns evaluated questions, with one answer per evaluation and the outcome "wrong → right" or the like.

  Args:
    evaluations: name ("before", "after", or that of a model) -> records as kepo_jax.evaluation writes them, with
      `files`, the paths of the images. Of several completions of a question the first one counts.
    source: a value of the filter.
    prefix: tells several runs of one page apart.
  """
  first = {name: _first(records) for name, records in evaluations.items()}
  names = dict.fromkeys(name for records in first.values() for name in records)
  return tuple(
    _evaluated_sample(name, {which: records.get(name) for which, records in first.items()}, source, prefix)
    for name in names
  )


def _training_sample(
  step: int, name: str, rollouts: Sequence[Record], group: Sequence[Record], source: str, prefix: str
) -> Sample:
  first = rollouts[0]
  groups = [AnswerGroup(heading="Rollouts", answers=tuple(_rollout(record) for record in rollouts))]
  tags = [tag for key, tag in (("injected", INJECTED), ("gate", GATED)) if any(r[key] for r in rollouts)]
  return Sample(
    key="/".join(filter(None, (prefix, "train", str(step), name))),
    source=_labelled(source, prefix),
    outcome=_group_outcome(rollouts),
    tags=tuple(tags),
    details=(("step", str(step)),),
    groups=(*groups, *_hinted(group)),
    **_identity(first, first.get("images", ())),
  )


def _group_outcome(rollouts: Sequence[Record]) -> str:
  """What the student itself did: neither what hints replaced nor what another model wrote counts."""
  own = [
    record["rewards"].get("accuracy", 0) > 0 for record in rollouts if not (record["injected"] or record["supervised"])
  ]
  if not own:
    return "no own rollout"
  return ALL_RIGHT if all(own) else MIXED if any(own) else ALL_WRONG


def _rollout(record: Record) -> Answer:
  marks = [
    word for key, word in (("gate", "distilled"), ("injected", "injected"), ("supervised", "supervised")) if record[key]
  ]
  values = [*record["rewards"].items(), ("total", record.get("reward"))]
  return Answer(
    label=f"rollout {record.get('rollout', 0) + 1}",
    text=record["completion"],
    right=record["rewards"].get("accuracy", 0) > 0,
    values=tuple((name, f"{value:g}") for name, value in values if value is not None),
    marks=tuple(marks),
    hint=record.get("hint", ""),
  )


def _hinted(group: Iterable[Record]) -> list[AnswerGroup]:
  """One group of candidates for each round, and the hints of which no candidate came."""
  rounds: dict[tuple[int, str], list[Answer]] = {}
  unused: list[str] = []
  for record in group:
    if record["kind"] == "candidate":
      answers = rounds.setdefault((record["round"], record["hint"]), [])
      answers.append(_candidate(record, len(answers) + 1))
    elif record["kind"] == "hint":
      unused.append(record["text"])
  used = {hint for _, hint in rounds}
  groups = [
    AnswerGroup(heading=f"Candidates of round {number}", hint=hint, answers=tuple(candidates))
    for (number, hint), candidates in rounds.items()
  ]
  lost = [text for text in unused if exploration.parse_hint(text) not in used]
  return groups + [AnswerGroup(heading="Hint that was not used", hint=text, answers=()) for text in lost]


def _candidate(record: Record, number: int) -> Answer:
  marks = ["accepted" if record["accepted"] else "not accepted"]
  marks.append("well formed" if record["well_formed"] else "not well formed")
  return Answer(
    label=f"candidate {number}",
    text=record["completion"],
    right=bool(record["accurate"]),
    marks=(*marks, *(["talks about the hint"] if record["leaks"] else [])),
  )


def _evaluated_sample(name: str, records: Mapping[str, Record | None], source: str, prefix: str) -> Sample:
  known = next(record for record in records.values() if record)
  return Sample(
    key="/".join(filter(None, (prefix, source, name))),
    source=_labelled(source, prefix),
    outcome=" → ".join(
      "not asked" if not record else "right" if record["correct"] else "wrong" for record in records.values()
    ),
    groups=(
      AnswerGroup(
        heading="Answers", answers=tuple(_asked(which, record) for which, record in records.items() if record)
      ),
    ),
    **_identity(known, known.get("files", ())),
  )


def _asked(which: str, record: Record) -> Answer:
  marks = [] if record.get("format", True) else ["not well formed"]
  return Answer(
    label=which,
    text=record["completion"],
    right=bool(record["correct"]),
    values=(("letter", record["parsed"] or "none"),),
    marks=(*marks, *(["truncated"] if record.get("truncated") else [])),
  )


def _identity(record: Record, images: Iterable[str]) -> dict[str, Any]:
  return {
    "id": record["id"],
    "modality": record.get("modality", ""),
    "question_type": record.get("question_type", ""),
    "question": record["question"],
    "options": tuple(record["options"]),
    "answer": record["answer"],
    "images": tuple(images),
  }


def _first(records: Iterable[Record]) -> dict[str, Record]:
  found: dict[str, Record] = {}
  for record in records:
    found.setdefault(record["id"], record)
  return found


def _range(step: int, last: int) -> str:
  """The quarter of the training in which a step lies, "steps 21-40"."""
  length = max(1, math.ceil(last / _RANGES))
  start = (step - 1) // length * length + 1
  end = min(start + length - 1, last)
  return f"steps {start}-{end}" if end > start else f"step {start}"


def _labelled(source: str, prefix: str) -> str:
  return f"{prefix}: {source}" if prefix else source


_LARGEST = 300_000  # bytes of a vector figure; curves over thousands of steps are smaller in pixels


def figure_block(
  figure: Figure, *, alt: str, caption: str = "", wide: bool = True, vectors: bool = True
) -> FigureBlock:
  """Draws a figure as vectors where these are small, else in pixels; the same figure gives the same bytes.

  Its ground is transparent, so that a dark page can turn its colours over.

  Args:
    figure: of Matplotlib.
    alt: what it shows, for those who do not see it.
    caption: below it.
    wide: whether it has a row of its own.
    vectors: False: pixels in any case, for pages that are kept in a repository.
  """
  if vectors and len(drawn := _vectors(figure)) <= _LARGEST:
    return FigureBlock(image=drawn, alt=alt, caption=caption, media="image/svg+xml", wide=wide)
  return FigureBlock(image=_pixels(figure), alt=alt, caption=caption, wide=wide)


def _vectors(figure: Figure) -> bytes:
  target = io.BytesIO()
  # Without a salt Matplotlib draws random ids, and without an explicit None it writes the date.
  with matplotlib.rc_context({"svg.hashsalt": "kepo_jax", "svg.fonttype": "path"}):
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  return target.getvalue()


def _pixels(figure: Figure) -> bytes:
  drawn, target = io.BytesIO(), io.BytesIO()
  figure.savefig(drawn, format="png", dpi=130, transparent=True, metadata={"Software": None})
  # Lines and letters in few colours: a palette is enough, and a third of the size.
  Image.open(drawn).quantize(256, method=Image.Quantize.FASTOCTREE).save(target, format="png", optimize=True)
  return target.getvalue()


def balanced(samples: Iterable[Sample]) -> list[Sample]:
  """Orders samples so that any first part of them is balanced over the cells.

  Cells are source, modality and outcome; within one, tags take turns. Hashes of the keys decide the rest, so that the
  same samples are taken in whatever order they come.
  """
  ordered = sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode("utf-8", "replace")).digest())
  cells = _grouped(ordered, lambda sample: (sample.source, sample.modality, sample.outcome))
  return _in_turns([_in_turns(_grouped(cell, lambda sample: sample.tags)) for cell in cells])


def _grouped(samples: Iterable[Sample], key: Callable[[Sample], Hashable]) -> list[list[Sample]]:
  found: dict[Hashable, list[Sample]] = {}
  for sample in samples:
    found.setdefault(key(sample), []).append(sample)
  return list(found.values())


def _in_turns(lists: Sequence[Sequence[Sample]]) -> list[Sample]:
  return [sample for turn in zip_longest(*lists) for sample in turn if sample is not None]


SIDE = 256  # pixels of the longest side of a thumbnail
_BUCKETS = ("gs://", "s3://", "az://")  # what is read; no file of a run makes this process ask any other server
_LOSSLESS = 24_000  # bytes up to which a thumbnail stays a PNG; noisy photographs are several times larger as such


class Thumbnails:
  """Makes data URIs of image files; reads each file once."""

  def __init__(self) -> None:
    """Reads nothing."""
    self._found: dict[str, str] = {}
    self._unreachable: set[str] = set()

  def __call__(self, path: str) -> str:
    """Returns the image as a data URI, "" where it cannot be read; the same pixels give the same text."""
    if path not in self._found:
      self._found[path] = self._made(path)
    return self._found[path]

  def _made(self, path: str) -> str:
    bucket = "/".join(path.split("/")[:3]) if storage.is_remote(path) else ""
    if bucket in self._unreachable:
      return ""
    try:
      with _local(path) as file:
        return thumbnail(images_lib.rgb(images_lib.load_image(file)))
    except _Unreachable:
      # Asking once is enough: a storage that does not answer costs seconds of retries for every image.
      self._unreachable.add(bucket)
    except (OSError, ValueError):
      pass  # missing, damaged or of another format: its name is shown
    return ""


def thumbnail(image: Image.Image) -> str:
  """Encodes an RGB image as a data URI: as it is if it is small, else with a longest side of 256 pixels."""
  image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
  grey = image.convert("L")
  if ImageChops.difference(image, grey.convert("RGB")).getbbox() is None:
    image = grey
  media, data = "image/png", _encoded(image, "PNG")
  if len(data) > _LOSSLESS:
    media, data = "image/jpeg", _encoded(image, "JPEG", quality=85)
  return f"data:{media};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format=kind, optimize=True, **options)
  return buffer.getvalue()


class _Unreachable(Exception):
  """The storage of an image does not answer."""


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
  """A local file with the content of a path: itself, the copy that this process trained on, or a temporary one."""
  copy = storage.copy_of(path)
  if not storage.is_remote(copy):
    yield copy
    return
  if not path.startswith(_BUCKETS):
    raise ValueError(f"{path} lies in no bucket")
  try:
    with storage.reaching(path):
      data = epath.Path(path).read_bytes()
  except FileNotFoundError:
    raise
  except (OSError, ValueError) as error:
    raise _Unreachable(path) from error
  with tempfile.NamedTemporaryFile(suffix=pathlib.PurePosixPath(path).suffix) as file:
    file.write(data)
    file.flush()
    yield file.name


_HEAD, _TAIL = 2000, 1000  # characters shown of a longer text, whose answer stands at the end
_MISSES = 40  # questions that do not fit after which the page counts as full
_PLAIN = 40  # questions that a reader without JavaScript sees
_SHORT = 300  # characters of each of their answers
# What ends a script element or begins a comment inside one; the last two end a line in older JavaScript.
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def rendered(page: Page) -> str:
  """Renders a page as HTML; the same page gives the same text.

  Raises:
    ValueError: more than one browser of questions on the page.
  """
  browsers = [b for section in page.sections for b in section.blocks if isinstance(b, BrowserBlock)]
  if len(browsers) > 1:
    raise ValueError(f"{page.title}: a page has room for one browser of questions, not for {len(browsers)}.")
  style, script = (_resource(f"page.{suffix}") for suffix in ("css", "js"))
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
  )
  environment.filters |= {"data_uri": _data_uri, "kind": lambda block: type(block).__name__, "anchor": _anchor}
  text = environment.from_string(_resource("page.html.j2")).render(
    page=page,
    style=style,
    script=script,
    style_hash=_integrity(style),
    script_hash=_integrity(script),
    browser=_browser(browsers[0]) if browsers else None,
  )
  # A model may write half of a surrogate pair, which no encoding of a file takes.
  return text.encode("utf-8", "replace").decode()


def embedded(value: Any) -> str:
  """Encodes a value as JSON that can stand inside a script element, whatever its texts are."""
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
  return text.translate(_ESCAPES)


def _browser(block: BrowserBlock) -> dict[str, Any]:
  """What the template needs of a browser: the chosen questions as JSON, and some of them in plain words."""
  thumbnails = Thumbnails()
  uris: dict[str, int] = {}
  taken: dict[str, dict[str, Any]] = {}
  left, missed = block.size, 0
  for sample in balanced(block.samples):
    if len(taken) == block.most or missed == _MISSES:
      break
    record = _record(sample)
    pictures = {uri: None for path in sample.images if (uri := thumbnails(path))}
    new = [uri for uri in pictures if uri not in uris]
    size = len(embedded(record).encode("utf-8", "replace")) + sum(map(len, new))
    if size > left:
      missed += 1
      continue
    left -= size
    uris |= {uri: len(uris) + number for number, uri in enumerate(new)}
    record["images"] = [[uris.get(thumbnails(path), -1), _name(path)] for path in sample.images]
    taken[sample.key] = record
  chosen = [taken[sample.key] for sample in block.samples if sample.key in taken]
  return {
    "data": embedded({"images": list(uris), "samples": chosen}),
    "count": len(chosen),
    "total": len(block.samples),
    "plain": [_plain(record) for record in chosen[:: max(1, -(-len(chosen) // _PLAIN))]],
  }


def _record(sample: Sample) -> dict[str, Any]:
  record = dataclasses.asdict(sample)
  record["groups"] = [_clipped_group(group) for group in sample.groups]
  return record | {"question": clipped(sample.question), "images": [[-1, _name(path)] for path in sample.images]}


def _clipped_group(group: AnswerGroup) -> dict[str, Any]:
  record = dataclasses.asdict(group) | {"hint": clipped(group.hint)}
  for answer in record["answers"]:
    answer |= {"text": clipped(answer["text"]), "hint": clipped(answer["hint"])}
  return record


def clipped(text: str, head: int = _HEAD, tail: int = _TAIL) -> str:
  """Cuts the middle out of a long text; says how much is missing."""
  missing = len(text) - head - tail
  if missing <= 100:  # what tells it would take as much room
    return text
  return f"{text[:head]} [ … {missing:,} characters left out … ] {text[len(text) - tail :]}"


def _plain(record: dict[str, Any]) -> dict[str, Any]:
  answers = [answer for group in record["groups"] for answer in group["answers"]]
  return record | {"answers": [a | {"text": clipped(a["text"], _SHORT // 2, _SHORT // 2)} for a in answers[:8]]}


def _name(path: str) -> str:
  return pathlib.PurePosixPath(path.replace("\\", "/")).name


def _data_uri(block: FigureBlock) -> str:
  # Vectors too stand in an img element: there their own styles work in spite of the policy, and scripts never run.
  return f"data:{block.media};base64,{base64.b64encode(block.image).decode()}"


def _anchor(heading: str) -> str:
  return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def _resource(name: str) -> str:
  return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _integrity(text: str) -> str:
  return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
