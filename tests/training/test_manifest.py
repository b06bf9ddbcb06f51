"""Every kind of damage to a checkpoint's files is seen and named."""

import json

import pytest

from kepo_jax.training import manifest
from tests import fake_bucket


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "20"
  (root / "state" / "d").mkdir(parents=True)
  (root / "state" / "d" / "a").write_bytes(bytes(range(256)) * 20)
  (root / "state" / "b").write_bytes(b"")
  (root / "record").write_text("{}")
  manifest.write(root)
  return root


def test_an_untouched_checkpoint_is_intact(folder):
  assert manifest.faults(folder) == []
  written = json.loads((folder / manifest.NAME).read_text())["files"]
  assert sorted(written) == ["record", "state/b", "state/d/a"]
  # sha256sum of the empty file
  assert written["state/b"] == {
    "bytes": 0,
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
  }


def test_damage_is_named(folder):
  place, large = folder / manifest.NAME, folder / "state" / "d" / "a"
  whole = place.read_text()
  for text in ('{"files": ', "[]", '{"files": []}', '{"files": {"a": 1}}'):
    place.write_text(text)
    (fault,) = manifest.faults(folder)
    assert "cannot be read" in fault, text
  place.write_text(whole)
  large.write_bytes(bytes(range(256)) * 19 + bytes(256))
  assert ["state/d/a has other bytes" in each for each in manifest.faults(folder)] == [True]
  large.write_bytes(b"x" * 10)
  (folder / "state" / "b").unlink()
  assert manifest.faults(folder) == ["state/b is missing", "state/d/a has 10 of 5120 bytes"]


def test_a_flipped_bit_of_the_manifest_is_damage_or_changes_nothing(folder):
  data = (folder / manifest.NAME).read_bytes()
  for position in range(len(data)):
    flipped = bytearray(data)
    flipped[position] ^= 1 << position % 7
    (folder / manifest.NAME).write_bytes(flipped)
    try:
      same = json.loads(flipped) == json.loads(data)
    except ValueError:
      same = False
    assert same or manifest.faults(folder), position


def test_the_manifest_appears_as_a_whole(folder, monkeypatch):
  def full(descriptor):
    raise OSError(28, "No space left on device")

  (folder / manifest.NAME).unlink()
  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match=r"manifest.json could not be written: No space left on device"):
    manifest.write(folder)
  assert not manifest.is_complete(folder)


def test_a_bucket_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
  (tmp_path / "bucket").mkdir()
  with fake_bucket.served(tmp_path) as store:
    store.write("bucket", "run/5/array", b"numbers")
    manifest.write("gs://bucket/run/5")
    assert manifest.faults("gs://bucket/run/5") == []

    def silent(bucket, name, read=store.read):
      if name.endswith("array"):
        raise TimeoutError("no answer")
      return read(bucket, name)

    monkeypatch.setattr(store, "read", silent)
    with pytest.raises(TimeoutError):  # what is intact must not be set aside
      manifest.faults("gs://bucket/run/5")
