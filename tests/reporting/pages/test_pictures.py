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


def test_a_small_image_keeps_its_pixels(tmp_path, rng):
  pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  uri = pictures.Thumbnails()(str(tmp_path / "a.png"))
  assert uri.startswith("data:image/png;base64,")
  np.testing.assert_array_equal(np.asarray(decoded(uri)), pixels)


def test_a_large_image_becomes_small(tmp_path, rng):
  Image.fromarray(rng.integers(0, 256, (600, 1200, 3), np.uint8)).save(tmp_path / "a.png")
  uri = pictures.Thumbnails()(str(tmp_path / "a.png"))
  assert decoded(uri).size == (256, 128) and len(uri) < 40_000
  assert uri.startswith("data:image/jpeg")  # noise: a PNG would be twice as large


def test_grey_in_colour_and_sixteen_bits_are_stored_as_grey(tmp_path):
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
  Image.fromarray(grey).convert("RGB").save(tmp_path / "a.png")
  Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b.png")
  first, second = (pictures.Thumbnails()(str(tmp_path / name)) for name in ("a.png", "b.png"))
  assert first == second and decoded(first).mode == "L"


@pytest.mark.parametrize("data", [None, b"", b"\x89PNG\r\n\x1a\nbroken", b"%!PS-Adobe"])
def test_what_is_no_image_gives_nothing(tmp_path, data):
  if data is not None:
    (tmp_path / "a.png").write_bytes(data)
  assert pictures.Thumbnails()(str(tmp_path / "a.png")) == ""
  assert pictures.Thumbnails()(str(tmp_path)) == "" and pictures.Thumbnails()("\0") == ""


@pytest.mark.parametrize("path", ["https://example.org/a.png", "file:///a.png", "a b://c", "://", ""])
def test_other_servers_are_not_asked(path, monkeypatch):
  monkeypatch.setattr(pictures.epath, "Path", pytest.fail)
  assert pictures.Thumbnails()(path) == ""


def test_a_file_is_read_once(tmp_path):
  Image.new("L", (4, 4)).save(tmp_path / "a.png")
  thumbnails = pictures.Thumbnails()
  first = thumbnails(str(tmp_path / "a.png"))
  (tmp_path / "a.png").unlink()
  assert thumbnails(str(tmp_path / "a.png")) == first != ""


def test_an_image_in_a_bucket_is_read(tmp_path):
  folder = tmp_path / "cloud" / "bucket" / "images"
  folder.mkdir(parents=True)
  Image.new("L", (4, 4), 7).save(folder / "a.png")
  thumbnails = pictures.Thumbnails()
  with fake_bucket.served(tmp_path / "cloud"):
    assert thumbnails("gs://bucket/images/missing.png") == ""
    assert thumbnails("gs://bucket/images/a.png") == thumbnails(str(folder / "a.png")) != ""


def test_the_copy_that_was_trained_on_is_used(tmp_path, monkeypatch):
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
