"""A page as one HTML file that asks for nothing: style, script, figures, images and questions lie in it.

Everything that is shown comes from models and data sets, so nothing of it is trusted: the template escapes, questions
travel as JSON of which the script makes text nodes, and the policy of the page runs no script but that of this package.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
from importlib import resources
from typing import Any

import jinja2

from kepo_jax.reporting.pages import choice
from kepo_jax.reporting.pages.blocks import AnswerGroup, BrowserBlock, FigureBlock, Page, Sample
from kepo_jax.reporting.pages.pictures import Thumbnails

_HEAD, _TAIL = 2000, 1000  # characters shown of a longer text, whose answer stands at the end
_MISSES = 40  # questions that do not fit after which the page counts as full
_PLAIN = 40  # questions that a reader without JavaScript sees
_SHORT = 300  # characters of each of their answers
# What ends a script element or begins a comment inside one; the last two end a line in older JavaScript.
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def rendered(page: Page) -> str:
  """The page as HTML; the same page gives the same text.

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
  """A value as JSON that can stand inside a script element, whatever its texts are."""
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
  return text.translate(_ESCAPES)


def _browser(block: BrowserBlock) -> dict[str, Any]:
  """What the template needs of a browser: the chosen questions as JSON, and some of them in plain words."""
  thumbnails = Thumbnails()
  uris: dict[str, int] = {}
  taken: dict[str, dict[str, Any]] = {}
  left, missed = block.size, 0
  for sample in choice.balanced(block.samples):
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
  """A text without the middle of it, where it is long; says how much is missing."""
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
