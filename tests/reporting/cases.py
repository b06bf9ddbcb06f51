"""Texts that want to be more than text, samples, and a page read as a browser reads it."""

import html.parser
import json
from typing import Any

from kepo_jax import types
from kepo_jax.reporting import pages

HOSTILE = (
  "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", '"><svg onload=alert(3)>',
  "' onmouseover='alert(4)", "<!--<script>", "]]></noscript></style></title><script>alert(5)</script>",
  "{{ 7 * 7 }}{% raw %}", "&lt;b&gt;&amp;", "line\u2028paragraph\u2029next\x85",
  "https://example.org/x.png url(https://example.org) @import 'https://example.org'",
)  # fmt: skip


class Document(html.parser.HTMLParser):
  """What a page consists of; style, script and noscript are read as a browser with JavaScript reads them."""

  CDATA_CONTENT_ELEMENTS = ("script", "style", "noscript")

  def __init__(self, text: str):
    super().__init__(convert_charrefs=True)
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.texts: list[tuple[str, str]] = []  # (innermost open element, text)
    self._open: list[str] = []
    self.feed(text)
    self.close()
    assert self._open == [], f"never closed: {self._open}"

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ("meta", "link", "img", "br", "input"):
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
    self._open.pop()

  def handle_data(self, data):
    self.texts.append((self._open[-1] if self._open else "", data))

  def all(self, tag: str) -> list[dict[str, str | None]]:
    """Attributes of every element of a name."""
    return [attributes for name, attributes in self.tags if name == tag]

  def inside(self, tag: str) -> list[str]:
    """Texts of every element of a name."""
    return [text for name, text in self.texts if name == tag]

  def data(self) -> dict[str, Any]:
    """What the browser of questions shows."""
    (number,) = [n for n, each in enumerate(self.all("script")) if each.get("type") == "application/json"]
    return json.loads(self.inside("script")[number])


def sample(key="q1", *, text="<answer>A</answer>", **fields):
  group = pages.AnswerGroup("Rollouts", (pages.Answer("rollout 1", text, right=True, values=(("total", "2"),)),))
  given = {"source": "test", "outcome": "right", "id": key, "modality": "MRI", "question_type": "Lesion Grading",
           "question": "How many?", "options": ("one", "two"), "answer": "A", "groups": (group,)} | fields  # fmt: skip
  return pages.Sample(key=key, **given)


def page_of(*blocks, **fields):
  return pages.Page(title="Run", sections=(pages.Section("Questions", blocks),), **fields)


def rollout(step=1, name="q1", number=0, *, accuracy=0.0, **fields):
  """A record of samples.jsonl."""
  return {"step": step, "kind": "rollout", "id": name, "modality": "MRI", "question_type": "Lesion Grading",
          "images": [], "prompt": "", "question": "How many?", "options": ["one", "two"], "answer": "A",
          "rollout": number, "completion": f"said {number}", "rewards": {"accuracy": accuracy, "format": 1.0},
          "reward": accuracy + 1, "gate": False, "injected": False, "supervised": False,
          "hint": ""} | fields  # fmt: skip


def run_plan(config, **fields):
  same = {"workdir": "runs/one", "models": {}, "mesh": {"data": 2, "fsdp": 4, "tensor": 1}, "start_step": 0}
  same |= {"questions": {"train": 600, "test": 2400}, "programs": ("rollout", "update")}
  return types.RunPlan(config=config, **same | fields)
