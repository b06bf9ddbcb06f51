"""Files of any content: a ValueError at the worst, and nothing outside the root is opened."""

import collections
import contextlib
import json
import os
import pathlib
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kepo_jax.data import formats, hf_folders, image_files, images
from kepo_jax.data.rules import Rejected
from tests.data import cases

FUZZ = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
OUTSIDE = "secret.png"  # beside the root, of which records try to reach it

opened: list[str] | None = None  # paths that were opened while somebody watched


def hook(event, arguments):
  if opened is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
    opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(hook)  # cannot be taken away, hence the switch


@contextlib.contextmanager
def watched(*allowed):
  """Fails if a file is opened that lies in none of some folders, nor in Python's own."""
  global opened
  opened = []
  try:
    yield
  finally:
    seen, opened = opened, None
  own = [*allowed, sys.prefix, sys.base_prefix, pathlib.Path(__file__).parents[2] / "kepo_jax", "/proc/self", "/sys"]
  real = [os.path.realpath(folder) for folder in own]
  for path in seen:
    assert any(image_files.is_inside(os.path.realpath(path), folder) for folder in real), path


@pytest.fixture(scope="module")
def place():
  """A root with one image and its parent, which holds another and is no business of a record."""
  with tempfile.TemporaryDirectory() as folder:
    top = pathlib.Path(folder)
    (top / OUTSIDE).write_bytes(cases.encoded())
    layout = cases.Layout(top / "root")
    (layout.root / "Images" / "link.png").symlink_to(top / OUTSIDE)
    (layout.root / "Images" / "up").symlink_to(top)
    yield layout


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "fuzz-cache"))


def mutated(whole):
  """Bytes of a good file with some taken out, put in, overwritten or cut off."""
  edit = st.tuples(
    st.integers(0, len(whole)),
    st.one_of(st.none(), st.integers(0, 12)),  # bytes that the text replaces; None: as many as it has
    st.one_of(st.binary(max_size=12), st.sampled_from([b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(8), b'"', b"[", b"{}"])),
  )

  def apply(edits, end):
    data = bytearray(whole[:end])
    for start, length, text in edits:
      data[start : start + (len(text) if length is None else length)] = text
    return bytes(data)

  return st.builds(apply, st.lists(edit, min_size=1, max_size=2), st.sampled_from([len(whole)] * 9 + [len(whole) // 2]))


def paths():
  """Image paths, honest and not."""
  parts = st.sampled_from(
    ["Images", "up", "..", ".", "", OUTSIDE, "link.png", "Set A", "x" * 300, "a\0b", "\ud800", "~", "etc", "hostname"]
  )
  good = st.just(cases.RECORD["image_path"])
  return st.one_of(good, good, st.text(max_size=8), st.lists(parts, max_size=5).map("/".join))


def values():
  """JSON values, deep ones too."""
  simple = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=6), st.just("Brain")
  )
  return st.recursive(
    simple,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
  )


def changed(record, path_field):
  """A record with some fields exchanged for anything, and a path."""
  fields = st.dictionaries(st.sampled_from([*record, "option_Z", "extra"]), values(), max_size=3)
  return st.builds(lambda changes, path: record | {path_field: path} | changes, fields, paths())


outcomes: collections.Counter[str] = collections.Counter()  # of the test that runs


def anything_goes(read):
  """Runs a reader, which may refuse what it reads; examples that come out are whole."""
  try:
    examples, summary = read()
  except ValueError as error:
    assert type(error) is ValueError and "fuzz" in str(error)  # no UnicodeError in disguise; the file is named
    outcomes["refused"] += 1
    return
  outcomes["read"] += 1
  assert summary.kept == len(examples) > 0 and summary.records - summary.kept == summary.dropped >= 0
  json.dumps(summary.to_dict())
  summary.text().encode()
  for example in examples:
    assert example.answer_text and example.question and len(example.options) >= 2
    for path in example.images:
      assert os.path.basename(path) not in (OUTSIDE, "link.png")


@pytest.fixture(autouse=True)
def both_happen():
  """A fuzz test that only ever meets refusals shows little."""
  outcomes.clear()
  yield
  assert not outcomes or min(outcomes["read"], outcomes["refused"]) >= 5, outcomes


RECORDS = st.one_of(changed(cases.RECORD, "image_path"), changed(cases.MEDVLM, "image"), changed(cases.MEDR1, "image"))


@settings(FUZZ, max_examples=200)
@given(found=st.one_of(st.lists(st.one_of(RECORDS, values()), max_size=4), values()), lenient=st.booleans())
def test_records_of_any_shape(place, found, lenient):
  file = place.write(name="fuzz")
  file.write_text(json.dumps(found))
  with watched(place.root):
    anything_goes(lambda: formats.read_any(file, lenient=lenient))


GOOD = json.dumps([cases.RECORD, cases.RECORD | {"question_id": "b", "question": "And?"}]).encode()


@settings(FUZZ, max_examples=150)
@given(data=st.one_of(mutated(GOOD), st.binary(max_size=60)), lenient=st.booleans())
def test_bytes_of_any_kind_as_json(place, data, lenient):
  file = place.write(name="fuzz")
  file.write_bytes(data)
  with watched(place.root):
    anything_goes(lambda: formats.read_any(file, lenient=lenient))


@pytest.mark.filterwarnings("ignore:Tag data", "ignore:Image size", "ignore:Truncated File", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
def test_images_of_any_content(place, kind, tmp_path):
  path = tmp_path / "fuzz.img"

  @settings(FUZZ, max_examples=40)
  @given(data=mutated(cases.encoded(3, kind)))
  def run(data):
    path.write_bytes(data)
    with watched(tmp_path, os.environ["XDG_CACHE_HOME"]):
      for use in (image_files.header, images.load_image, lambda path: image_files.store(path.read_bytes(), check=True)):
        with contextlib.suppress(ValueError, Rejected):
          use(path)

  run()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_any_content(kind, tmp_path, monkeypatch):
  if kind == "parquet":
    whole = cases.write_parquet(tmp_path / "good.parquet").read_bytes()
  else:
    whole = next(cases.write_saved(tmp_path / "good").glob("*.arrow")).read_bytes()
  file, batches = tmp_path / f"fuzz.{kind}", hf_folders._batches

  def noted(path):  # pyarrow opens files where no audit hook sees it
    assert path == pathlib.Path(os.path.realpath(file))
    return batches(path)

  monkeypatch.setattr(hf_folders, "_batches", noted)

  @settings(FUZZ, max_examples=150)
  @given(data=mutated(whole), lenient=st.booleans())
  def run(data, lenient):
    file.write_bytes(data)
    with watched(tmp_path, os.environ["XDG_CACHE_HOME"]):
      anything_goes(lambda: formats.read_any(file, lenient=lenient))

  run()


def test_the_watch_sees_what_leaves_the_root(place):
  with pytest.raises(AssertionError, match="link.png"):
    with watched(place.root):
      images.load_image(place.root / "Images" / "link.png")
