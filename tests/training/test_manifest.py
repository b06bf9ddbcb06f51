import pytest

from kepo_jax.training import manifest


@pytest.fixture
def folder(tmp_path):
  root = tmp_path / "20"
  (root / "state" / "d").mkdir(parents=True)
  (root / "state" / "d" / "a").write_bytes(bytes(range(256)) * 20)
  (root / "state" / "b").write_bytes(b"")
  (root / "record").write_text("{}")
  manifest.write(root)
  return root


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


def test_a_bucket_that_does_not_answer_is_no_damage(bucket, monkeypatch):
  bucket.write("bucket", "run/5/array", b"numbers")
  manifest.write("gs://bucket/run/5")
  assert manifest.faults("gs://bucket/run/5") == []

  def silent(place, name, read=bucket.read):
    if name.endswith("array"):
      raise TimeoutError("no answer")
    return read(place, name)

  monkeypatch.setattr(bucket, "read", silent)
  with pytest.raises(TimeoutError):  # what is intact must not be set aside
    manifest.faults("gs://bucket/run/5")
