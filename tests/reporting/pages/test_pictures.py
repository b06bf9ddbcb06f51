import base64
import io

import numpy as np
import pytest
from PIL import Image

from kepo_jax import storage
from kepo_jax.reporting.pages import pictures
from tests import fake_bucket


def decoded(uri):
  return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_small_image_keeps_its_pixels_and_a_large_one_becomes_small(tmp_path, rng):
  pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  uri = pictures.Thumbnails()(str(tmp_path / "a.png"))
  assert uri.startswith("data:image/png;base64,")
  np.testing.assert_array_equal(np.asarray(decoded(uri)), pixels)
  Image.fromarray(rng.integers(0, 256, (600, 1200, 3), np.uint8)).save(tmp_path / "large.png")
  uri = pictures.Thumbnails()(str(tmp_path / "large.png"))
  assert decoded(uri).size == (256, 128) and len(uri) < 40_000
  assert uri.startswith("data:image/jpeg")  # noise: a PNG would be twice as large
  grey = np.arange(256).reshape(16, 16)
  Image.fromarray(np.uint16(257 * grey)).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(decoded(pictures.Thumbnails()(str(tmp_path / "deep.png"))), grey)


def test_what_is_no_image_gives_nothing(tmp_path, monkeypatch):
  for data in (b"\x89PNG\r\n\x1a\nbroken", b"%!PS-Adobe"):
    (tmp_path / "a.png").write_bytes(data)
    assert pictures.Thumbnails()(str(tmp_path / "a.png")) == "", data
  for path in (str(tmp_path / "none.png"), str(tmp_path), "\0"):
    assert pictures.Thumbnails()(path) == "", path
  monkeypatch.setattr(pictures.epath, "Path", pytest.fail)  # other servers are not asked
  for path in ("https://example.org/a.png", "file:///a.png", "a b://c", ""):
    assert pictures.Thumbnails()(path) == "", path


def test_an_image_in_a_bucket_is_read(tmp_path, monkeypatch):
  folder = tmp_path / "cloud" / "bucket" / "images"
  folder.mkdir(parents=True)
  Image.new("L", (4, 4), 7).save(folder / "a.png")
  thumbnails = pictures.Thumbnails()
  with fake_bucket.served(tmp_path / "cloud"):
    assert thumbnails("gs://bucket/images/missing.png") == ""
    first = thumbnails("gs://bucket/images/a.png")
    assert first == thumbnails(str(folder / "a.png")) != ""
  (folder / "a.png").unlink()
  assert thumbnails(str(folder / "a.png")) == first  # a file is read once
  # The copy that was trained on is used.
  Image.new("L", (4, 4)).save(tmp_path / "a.png")
  monkeypatch.setattr(storage, "_ORIGINS", {str(tmp_path): "gs://nowhere/images"})
  assert pictures.Thumbnails()("gs://nowhere/images/a.png") != ""


def test_a_storage_that_does_not_answer_is_asked_once(monkeypatch):
  asked = []

  def refuse(path):
    asked.append(str(path))
    raise PermissionError("no")

  monkeypatch.setattr(pictures.epath, "Path", refuse)
  thumbnails = pictures.Thumbnails()
  assert [thumbnails(f"gs://one/{n}.png") for n in range(5)] == [""] * 5
  assert thumbnails("gs://two/0.png") == "" and asked == ["gs://one/0.png", "gs://two/0.png"]
