import base64
import collections
import configparser
import hashlib
import io
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kepo_jax import storage
from kepo_jax.reporting import pages
from tests.conftest import ROOT
from tests.evaluation.scripted import output
from tests.reporting.cases import HOSTILE, Document, page_of, rollout, sample

EVERYWHERE = " ".join(HOSTILE)


def hostile_page():
  """A page whose every text wants to run."""
  text = EVERYWHERE
  answer = pages.Answer(text, text, right=False, values=((text, text),), marks=(text,), hint=text)
  shown = sample(text, source=text, outcome=text, modality=text, question_type=text, question=text,
                 options=(text, text), answer=text, images=(text,), tags=(text,), details=((text, text),),
                 groups=(pages.AnswerGroup(text, (answer,), hint=text),))  # fmt: skip
  blocks = (
    pages.TextBlock(text, warning=True), pages.FigureBlock(b"png", alt=text, caption=text),
    pages.TableBlock(((text, text), (text, text)), caption=text), pages.TableBlock(((text, text),), words=True),
    pages.BrowserBlock((shown,), text),
  )  # fmt: skip
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
  long = pages.clipped("a" * 2000 + "b" * 5000 + "c" * 1000)  # long texts lose their middle
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
  figure = pages.FigureBlock(b"<svg/>", alt="curves", caption="Below.", media="image/svg+xml", wide=False)
  table = pages.TableBlock((("", "n"), ("CT", "300")), caption="Counts")
  sections = (pages.Section("One & two", (figure, table)), pages.Section("B", ()))
  document = Document(pages.rendered(pages.Page("T", "S", (), sections)))
  assert [each["href"].strip("#") for each in document.all("a")] == [each["id"] for each in document.all("section")]
  (image,) = document.all("img")
  assert base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")) == b"<svg/>"
  assert document.inside("figcaption") == ["Below."] and document.inside("caption") == ["Counts"]
  assert document.inside("th") == ["n", "CT"] and document.inside("td") == ["300"]


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
  patterns = setup["options.package_data"]["kepo_jax.reporting"].split(", ")
  folder = pathlib.Path(pages.__file__).parent
  matched = {path.name for pattern in patterns for path in folder.glob(pattern)}
  assert {path.name for path in folder.iterdir() if path.suffix in (".css", ".j2", ".js")} <= matched


def group(accuracies, **fields):
  return [rollout(number=n, accuracy=value, **fields) for n, value in enumerate(accuracies)]


def test_outcome_of_a_group():
  for number, (records, outcome) in enumerate((
    (group([0.0, 0.0]), pages.ALL_WRONG),
    (group([0.0, 1.0]), pages.MIXED),
    (group([1.0, 1.0]), pages.ALL_RIGHT),
    # What a hint or another model wrote is not the student's.
    ([rollout(accuracy=0.0), rollout(number=1, accuracy=1.0, injected=True, hint="look left")], pages.ALL_WRONG),
    ([rollout(accuracy=1.0), rollout(number=1, accuracy=0.0, supervised=True)], pages.ALL_RIGHT),
  )):  # fmt: skip
    (sample,) = pages.training_samples(records)
    assert sample.outcome == outcome, number


def test_a_group_has_its_rollouts_with_all_that_is_known():
  records = [
    rollout(accuracy=1.0, gate=True),
    rollout(number=1, accuracy=1.0, gate=True, injected=True, hint="look left"),
    rollout(number=2, supervised=True, images=["x.png"]),
  ]
  records[0]["images"] = ["x.png", "gs://bucket/y.png"]
  (sample,) = pages.training_samples(records)
  assert sample.images == ("x.png", "gs://bucket/y.png") and sample.options == ("one", "two") and sample.answer == "A"
  assert sample.tags == (pages.INJECTED, pages.GATED) and sample.details == (("step", "1"),)
  (rollouts,) = sample.groups
  first, second, third = rollouts.answers
  assert first.values == (("accuracy", "1"), ("format", "1"), ("total", "2")) and first.right
  assert [each.marks for each in rollouts.answers] == [("distilled",), ("distilled", "injected"), ("supervised",)]
  assert second.hint == "look left" and first.hint == "" and not third.right


def candidate(number, hint, **fields):
  return {"step": 1, "id": "q1", "kind": "candidate", "round": number, "hint": hint, "completion": "said",
          "accurate": True, "well_formed": True, "leaks": False, "accepted": True} | fields  # fmt: skip


def test_hints_stand_with_their_candidates():
  records = group([0.0, 0.0]) + [
    {"step": 1, "id": "q1", "kind": "hint", "text": "<hint> look left </hint>"},
    {"step": 1, "id": "q1", "kind": "hint", "text": "no block"},
    candidate(1, "look left"),
    candidate(1, "look left", accurate=False, well_formed=False, leaks=True, accepted=False),
    candidate(2, "look up"),
    candidate(2, "elsewhere", id="q9"),  # of a question whose rollouts were not stored
  ]
  (sample,) = pages.training_samples(records)
  _, first, second, lost = sample.groups
  assert (first.heading, first.hint) == ("Candidates of round 1", "look left") and second.hint == "look up"
  assert [(each.label, each.right, each.marks) for each in first.answers] == [
    ("candidate 1", True, ("accepted", "well formed")),
    ("candidate 2", False, ("not accepted", "not well formed", "talks about the hint")),
  ]
  assert (lost.heading, lost.hint, lost.answers) == ("Hint that was not used", "no block", ())


def test_evaluations_stand_side_by_side():
  before = [output("t1", correct=False, format=False, truncated=True), output("t2"), output("t3", files=["x.png"])]
  after = [output("t1"), output("t2", correct=False), output("t1", correct=False, sample=1), output("t4")]
  samples = {each.id: each for each in pages.evaluated_samples({"before": before, "after": after})}
  assert {name: each.outcome for name, each in samples.items()} == {
    "t1": "wrong → right", "t2": "right → wrong", "t3": "right → not asked", "t4": "not asked → right",
  }  # fmt: skip
  (answers,) = samples["t1"].groups
  assert [(a.label, a.right, a.values, a.marks) for a in answers.answers] == [
    ("before", False, (("letter", "none"),), ("not well formed", "truncated")),
    ("after", True, (("letter", "A"),), ()),
  ]
  assert samples["t3"].images == ("x.png",) and len(samples["t3"].groups[0].answers) == 1


def test_samples_are_told_apart_by_run_and_part_of_the_training():
  samples = pages.training_samples([rollout(step=step, name=f"q{step % 9}") for step in range(1, 11)])
  parts = ["steps 1-3"] * 3 + ["steps 4-6"] * 3 + ["steps 7-9"] * 3 + ["step 10"]  # in quarters
  assert [each.source for each in samples] == [f"training, {part}" for part in parts]
  assert samples[0].id == samples[9].id and len({each.key for each in samples}) == 10
  (one,), (two,) = (pages.evaluated_samples({"after": [output()]}, prefix=f"kepo, seed {seed}") for seed in (0, 1))
  assert one.key != two.key and (one.source, one.outcome) == ("kepo, seed 0: test", "right")


def figure(points):
  made = Figure(figsize=(3, 2))
  made.subplots().scatter(*np.random.default_rng(0).random((2, points)), c=np.linspace(0, 1, points))
  return made


def test_a_figure_is_drawn_in_vectors_and_always_the_same():
  first, second = (pages.figure_block(figure(5), alt="points") for _ in range(2))
  assert first == second and first.media == "image/svg+xml"
  assert first.image.startswith(b"<?xml") and b"<dc:date>" not in first.image and b"Matplotlib v" not in first.image


def test_what_is_large_in_vectors_is_drawn_in_pixels(monkeypatch):
  monkeypatch.setattr(pages, "_LARGEST", 1000)
  first, second = (pages.figure_block(figure(5), alt="points") for _ in range(2))
  assert first == second and first.media == "image/png"
  asked = pages.figure_block(figure(5), alt="points", vectors=False)
  image = Image.open(io.BytesIO(asked.image))
  assert asked.media == "image/png" and image.mode == "P"
  assert image.convert("RGBA").getpixel((0, 0))[3] == 0  # a dark page shows through


def decoded(uri):
  return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_small_image_keeps_its_pixels_and_a_large_one_becomes_small(tmp_path, rng):
  pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  uri = pages.Thumbnails()(str(tmp_path / "a.png"))
  assert uri.startswith("data:image/png;base64,")
  np.testing.assert_array_equal(np.asarray(decoded(uri)), pixels)
  Image.fromarray(rng.integers(0, 256, (600, 1200, 3), np.uint8)).save(tmp_path / "large.png")
  uri = pages.Thumbnails()(str(tmp_path / "large.png"))
  assert decoded(uri).size == (256, 128) and len(uri) < 40_000
  assert uri.startswith("data:image/jpeg")  # noise: a PNG would be twice as large
  grey = np.arange(256).reshape(16, 16)
  Image.fromarray(np.uint16(257 * grey)).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(decoded(pages.Thumbnails()(str(tmp_path / "deep.png"))), grey)


def test_what_is_no_image_gives_nothing(tmp_path, monkeypatch):
  for data in (b"\x89PNG\r\n\x1a\nbroken", b"%!PS-Adobe"):
    (tmp_path / "a.png").write_bytes(data)
    assert pages.Thumbnails()(str(tmp_path / "a.png")) == "", data
  for path in (str(tmp_path / "none.png"), str(tmp_path), "\0"):
    assert pages.Thumbnails()(path) == "", path
  monkeypatch.setattr(pages.epath, "Path", pytest.fail)  # other servers are not asked
  for path in ("https://example.org/a.png", "file:///a.png", "a b://c", ""):
    assert pages.Thumbnails()(path) == "", path


def test_an_image_in_a_bucket_is_read(bucket, tmp_path, monkeypatch):
  folder = bucket.root / "bucket" / "images"
  folder.mkdir()
  Image.new("L", (4, 4), 7).save(folder / "a.png")
  thumbnails = pages.Thumbnails()
  assert thumbnails("gs://bucket/images/missing.png") == ""
  first = thumbnails("gs://bucket/images/a.png")
  assert first == thumbnails(str(folder / "a.png")) != ""
  (folder / "a.png").unlink()
  assert thumbnails(str(folder / "a.png")) == first  # a file is read once
  # The copy that was trained on is used.
  Image.new("L", (4, 4)).save(tmp_path / "a.png")
  monkeypatch.setattr(storage, "_ORIGINS", {str(tmp_path): "gs://nowhere/images"})
  assert pages.Thumbnails()("gs://nowhere/images/a.png") != ""


def test_a_storage_that_does_not_answer_is_asked_once(monkeypatch):
  asked = []

  def refuse(path):
    asked.append(str(path))
    raise PermissionError("no")

  monkeypatch.setattr(pages.epath, "Path", refuse)
  thumbnails = pages.Thumbnails()
  assert [thumbnails(f"gs://one/{n}.png") for n in range(5)] == [""] * 5
  assert thumbnails("gs://two/0.png") == "" and asked == ["gs://one/0.png", "gs://two/0.png"]
