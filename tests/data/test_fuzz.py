"""Files of any content: a ValueError at the worst, and no image from outside the root."""

import collections
import contextlib
import json
import math
import os
import random
import warnings

import pytest

from kepo_jax.data import images
from kepo_jax.data.cleaning import Rejected
from kepo_jax.data.readers import formats
from tests.data import cases

OUTSIDE = "secret.png"  # beside the root, of which records try to reach it
LETTERS = 'aZ 0.,:)(~/\n\t\0\x1b\ud800é影"\\{['


@pytest.fixture
def place(tmp_path):
  """A root with one image and its parent, which holds another and is no business of a record."""
  (tmp_path / OUTSIDE).write_bytes(cases.encoded())
  layout = cases.Layout(tmp_path / "root")
  (layout.root / "Images" / "link.png").symlink_to(tmp_path / OUTSIDE)
  (layout.root / "Images" / "up").symlink_to(tmp_path)
  return layout


def for_many_seeds(count, run):
  """run(random numbers) for each seed; a failure tells its seed."""
  for seed in range(count):
    try:
      run(random.Random(seed))
    except Exception as error:
      error.add_note(f"with random.Random({seed})")
      raise


def mutated(draw, whole):
  """Bytes of a good file with some taken out, put in, overwritten or cut off."""
  data = bytearray(whole[: len(whole) // draw.choice([1] * 9 + [2])])
  odd = [draw.randbytes(draw.randrange(13)), b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(8), b'"', b"[", b"{}"]
  for _ in range(draw.randint(1, 2)):
    start, text = draw.randint(0, len(whole)), draw.choice(odd)
    data[start : start + draw.choice([len(text), draw.randrange(13)])] = text
  return bytes(data)


def text(draw):
  return "".join(draw.choices(LETTERS, k=draw.randrange(7)))


def value(draw, depth=3):
  """A JSON value, maybe a deep one."""
  if depth and draw.random() < 0.4:
    inner = {text(draw): value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return draw.choice([inner, list(inner.values())])
  number = draw.choice([draw.randint(-(10**30), 10**30), draw.gauss(0, 1e9), math.nan, math.inf])
  return draw.choice([None, draw.random() < 0.5, number, text(draw), "Brain"])


def image_path(draw):
  """An honest path or another one."""
  parts = ["Images", "up", "..", ".", "", OUTSIDE, "link.png", "Set A", "x" * 300, "a\0b", "\ud800", "~", "hostname"]
  good = cases.RECORD["image_path"]
  return draw.choice([good] * 6 + [text(draw), "/".join(draw.choices(parts, k=draw.randrange(6)))])


def record(draw):
  """A record of one of the formats with another path, and some fields exchanged for anything."""
  known = draw.choice([cases.RECORD, cases.MEDVLM, cases.MEDR1])
  changed = draw.sample([*known, "option_Z", "extra"], draw.choice([0, 0, 1, 3]))
  path = {"image_path" if "image_path" in known else "image": image_path(draw)}
  return known | path | {field: value(draw) for field in changed}


def anything_goes(outcomes, read):
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


def test_json_of_any_shape(place):
  file, outcomes = place.write(name="fuzz"), collections.Counter()
  good = json.dumps([cases.RECORD, cases.RECORD | {"question_id": "b", "question": "And?"}]).encode()

  def run(draw):
    records = [record(draw) if draw.random() < 0.9 else value(draw) for _ in range(draw.randrange(4))]
    shaped = json.dumps(draw.choice([records] * 9 + [value(draw)])).encode()
    file.write_bytes(draw.choice([shaped, shaped, mutated(draw, good), draw.randbytes(draw.randrange(60))]))
    anything_goes(outcomes, lambda: formats.read_any(file, lenient=draw.random() < 0.5))

  for_many_seeds(400, run)
  assert min(outcomes["read"], outcomes["refused"]) >= 40, outcomes


def test_images_of_any_content(tmp_path):
  path = tmp_path / "fuzz.img"
  good = [cases.encoded(3, kind) for kind in images.FORMATS]

  def run(draw):
    path.write_bytes(mutated(draw, draw.choice(good)))
    with warnings.catch_warnings(action="ignore"):
      with contextlib.suppress(Rejected):
        images.store(path.read_bytes(), check=True)
      try:
        assert images.load_image(path).width > 0
      except ValueError as error:
        assert str(path) in str(error)

  for_many_seeds(450, run)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_any_content(kind, tmp_path):
  cases.write_parquet(tmp_path / "good.parquet")
  cases.write_saved(tmp_path)
  whole = next(tmp_path.glob(f"*.{kind}")).read_bytes()
  file, outcomes = tmp_path / f"fuzz.{kind}", collections.Counter()

  def run(draw):
    file.write_bytes(mutated(draw, whole))
    anything_goes(outcomes, lambda: formats.read_any(file, lenient=draw.random() < 0.5))

  for_many_seeds(150, run)
  assert min(outcomes["read"], outcomes["refused"]) >= 5, outcomes
