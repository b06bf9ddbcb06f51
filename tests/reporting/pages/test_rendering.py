import base64
import collections
import configparser
import hashlib
import pathlib
import re

import numpy as np
from PIL import Image

from kepo_jax.reporting import pages
from kepo_jax.reporting.pages import rendering
from tests.conftest import ROOT
from tests.reporting.pages.cases import HOSTILE, Document, page_of, sample

EVERYWHERE = " ".join(HOSTILE)


def hostile_page():
  """A page whose every text wants to run."""
  text = EVERYWHERE
  answer = pages.Answer(text, text, right=False, values=((text, text),), marks=(text,), hint=text)
  shown = sample(text, source=text, outcome=text, modality=text, question_type=text, question=text,
                 options=(text, text), answer=text, images=(text,), tags=(text,), details=((text, text),),
                 groups=(pages.AnswerGroup(text, (answer,), hint=text),))  # fmt: skip
  blocks = (
    pages.TextBlock(text, warning=True),
    pages.FigureBlock(b"png", alt=text, caption=text),
    pages.TableBlock(((text, text), (text, text)), caption=text),
    pages.TableBlock(((text, text),), words=True),
    pages.BrowserBlock((shown,), text),
  )
  return pages.Page(text, text, (pages.Fact(text, text, text),), (pages.Section(text, blocks),), text)


def test_no_text_becomes_markup():
  harmless = pages.rendered(hostile_page()).replace(EVERYWHERE, "")
  document = Document(pages.rendered(hostile_page()))
  assert [each.get("type") for each in document.all("script")] == ["application/json", None]
  assert len(document.all("img")) == 1 and not document.all("svg") and "alert(1)" in harmless
  assert not [name for _, attributes in document.tags for name in attributes if name.startswith("on")]
  # What a reader without JavaScript sees is parsed by another rule.
  (plain,) = document.inside("noscript")
  assert {tag for tag, _ in Document(plain).tags} == {"p", "article", "h3", "ul", "li", "strong", "bdi"}


def test_questions_travel_unchanged():
  shown = sample("\ud800", text=EVERYWHERE, question=HOSTILE[0], options=HOSTILE)
  text = pages.rendered(page_of(pages.BrowserBlock((shown,)), footer="\udfff"))
  (record,) = Document(text).data()["samples"]
  assert record["key"] == "?" and text.encode()  # half a surrogate pair can be written
  assert record["groups"][0]["answers"][0]["text"] == EVERYWHERE
  assert record["question"] == HOSTILE[0] and tuple(record["options"]) == HOSTILE
  (data,) = re.findall(r'id="browser-data">(.*?)</script>', text, re.S)
  assert not re.search("[<>&\u2028\u2029]", data)
  long = rendering.clipped("a" * 2000 + "b" * 5000 + "c" * 1000)  # long texts lose their middle
  assert long == f"{'a' * 2000} [ … 5,000 characters left out … ] {'c' * 1000}"


def test_the_policy_names_style_and_script_by_their_hashes_and_nothing_is_fetched():
  document = Document(pages.rendered(hostile_page()))
  (policy,) = [each["content"] for each in document.all("meta") if "http-equiv" in each]
  rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
  assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "unsafe" not in policy
  for rule, text in (("style-src", document.inside("style")[0]), ("script-src", document.inside("script")[-1])):
    assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
  assert not [1 for _, attributes in document.tags if "style" in attributes]  # the policy would ignore them
  # Nothing is fetched.
  pairs = [pair for _, attributes in document.tags for pair in attributes.items()]
  links = [value for name, value in pairs if name in ("src", "href", "srcset")]
  assert links and all(value.startswith(("data:", "#")) for value in links)


def test_blocks_have_their_elements():
  blocks = (
    pages.TextBlock("Plain."),
    pages.FigureBlock(b"<svg/>", alt="curves", caption="Below.", media="image/svg+xml", wide=False),
    pages.TableBlock((("", "n"), ("CT", "300")), caption="Counts"),
    pages.TableBlock((("seed", "0"),), words=True),
  )
  sections = (pages.Section("One & two", blocks), pages.Section("B", ()))
  document = Document(pages.rendered(pages.Page("T", "S", (pages.Fact("a", "1", "n"),), sections)))
  assert document.inside("h1") == ["T"] and document.inside("h2") == ["One & two", "B"]
  assert document.inside("dt") == ["a"] and document.inside("dd") == ["1", "n"]
  assert [each["href"].strip("#") for each in document.all("a")] == [each["id"] for each in document.all("section")]
  (image,) = document.all("img")
  assert base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")) == b"<svg/>"
  assert document.inside("figcaption") == ["Below."] and document.inside("caption") == ["Counts"]
  assert document.inside("th") == ["n", "CT", "seed"] and document.inside("td") == ["300", "0"]


def test_images_are_stored_once_and_missing_ones_named(tmp_path):
  for name, value in (("a", 10), ("b", 10), ("c", 200)):
    Image.new("L", (8, 8), value).save(tmp_path / f"{name}.png")
  (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
  names = ("a.png", "b.png", "c.png", "damaged.png", "missing <b>.png")
  samples = [sample(name, images=(str(tmp_path / name),)) for name in names]
  data = Document(pages.rendered(page_of(pages.BrowserBlock(tuple(samples))))).data()
  found = {record["key"]: record["images"] for record in data["samples"]}
  assert found["a.png"][0][0] == found["b.png"][0][0] != found["c.png"][0][0]
  assert found["damaged.png"] == [[-1, "damaged.png"]] and found["missing <b>.png"] == [[-1, "missing <b>.png"]]


def test_a_page_has_a_size(tmp_path, rng):
  for number in range(8):
    Image.fromarray(rng.integers(0, 256, (120, 160, 3), np.uint8)).save(tmp_path / f"{number}.png")
  # Long answers and noisy images, of four modalities and two outcomes.
  samples = tuple(
    sample(f"q{n}", text="<think>" * 800, modality=f"m{n % 4}", outcome=("right", "wrong")[n // 4 % 2],
           images=(str(tmp_path / f"{n % 8}.png"),))
    for n in range(400)
  )  # fmt: skip
  text = pages.rendered(page_of(pages.BrowserBlock(samples, size=600_000)))
  document = Document(text)
  assert len(text.encode()) < 750_000
  data = document.data()
  assert 20 < len(data["samples"]) < 400 and f"Shown are {len(data['samples'])} of 400" in text
  counts = collections.Counter((record["modality"], record["outcome"]) for record in data["samples"])
  assert len(counts) == 8 and max(counts.values()) - min(counts.values()) <= 1
  keys = [record["key"] for record in data["samples"]]
  assert keys == [each.key for each in samples if each.key in keys]  # in the order in which they came
  assert pages.rendered(page_of(pages.BrowserBlock(samples, size=600_000))) == text  # always the same bytes


def test_what_is_no_python_is_installed():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  patterns = setup["options.package_data"]["kepo_jax.reporting.pages"].split(", ")
  folder = pathlib.Path(rendering.__file__).parent
  matched = {path.name for pattern in patterns for path in folder.glob(pattern)}
  assert {path.name for path in folder.iterdir() if path.suffix in (".css", ".j2", ".js")} <= matched
