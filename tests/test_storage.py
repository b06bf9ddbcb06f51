"""Files appear as wholes, remote folders are copied once, and half a copy is never taken for a whole."""

import pathlib

import fsspec
import pytest
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from kepo_jax import storage


def test_what_is_remote():
  assert storage.is_remote("gs://bucket/x") and storage.is_remote(epath.Path("s3://bucket/x"))
  assert not storage.is_remote("/folder/x") and not storage.is_remote(pathlib.Path("runs/x"))


def test_a_write_that_fails_leaves_the_old_bytes(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  storage.write_text(path, "old")

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match=r"config.json could not be written: No space left on device"):
    storage.write_text(path, "new")
  assert path.read_text() == "old"


def test_a_write_into_a_folder_that_is_not_there_names_the_file(tmp_path):
  with pytest.raises(OSError, match="nowhere/x could not be written: No such file"):
    storage.write_text(tmp_path / "nowhere" / "x", "text")


def test_a_write_replaces_as_a_whole(tmp_path):
  storage.write_text(tmp_path / "a", "ö" * 1000)
  storage.write_text(tmp_path / "a", "ü")
  assert (tmp_path / "a").read_text() == "ü"
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """gs://bucket as a local folder, through the same library as the real one."""
  root = tmp_path / "cloud"
  (root / "bucket").mkdir(parents=True)

  class Bucket(DirFileSystem):
    protocol = ("gcs", "gs")
    cachable = False

    def __init__(self, **_):
      super().__init__(str(root), LocalFileSystem(auto_mkdir=True))

    def _join(self, path):
      return super()._join(self._strip_protocol(path).removeprefix("gs://").removeprefix("gcs://"))

  fsspec.register_implementation("gcs", Bucket, clobber=True)
  from etils.epath import backend

  backend.fsspec_backend._get_filesystem.cache_clear()
  yield root / "bucket"
  backend.fsspec_backend._get_filesystem.cache_clear()
  fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)


def test_a_remote_folder_is_staged_once(bucket, tmp_path):
  (bucket / "model" / "sub").mkdir(parents=True)
  (bucket / "model" / "config.json").write_text("{}")
  (bucket / "model" / "sub" / "weights").write_bytes(bytes(1000))
  told = []
  local = storage.staged("gs://bucket/model", tmp_path / "cache", progress=lambda *of: told.append(of))
  assert (local / "sub" / "weights").read_bytes() == bytes(1000) and (local / "config.json").read_text() == "{}"
  assert told[-1] == (1002, 1002)
  told.clear()
  assert storage.staged("gs://bucket/model", tmp_path / "cache", progress=lambda *of: told.append(of)) == local
  assert told == []
  (bucket / "model" / "config.json").write_text("{ }")
  assert storage.staged("gs://bucket/model", tmp_path / "cache") != local


def test_a_local_folder_is_not_copied(tmp_path):
  assert storage.staged(tmp_path, tmp_path / "cache") == tmp_path
  assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_not_there_is_named(bucket, tmp_path):
  with pytest.raises(ValueError, match="gs://bucket/nothing is no folder or has no files"):
    storage.staged("gs://bucket/nothing", tmp_path / "cache")


def test_a_copy_that_breaks_off_is_not_used(bucket, tmp_path, monkeypatch):
  (bucket / "model").mkdir()
  for name in ("a", "b"):
    (bucket / "model" / name).write_bytes(bytes(10))
  copy, calls = storage.shutil.copyfileobj, []

  def breaks_off(*arguments):
    calls.append(1)
    if len(calls) == 2:
      raise OSError("the connection was reset")
    return copy(*arguments)

  monkeypatch.setattr(storage.shutil, "copyfileobj", breaks_off)
  with pytest.raises(OSError, match="reset"):
    storage.staged("gs://bucket/model", tmp_path / "cache")
  assert list((tmp_path / "cache" / "staged").iterdir()) == []


def test_what_makes_a_folder_usable_is_published_last(bucket, tmp_path, monkeypatch):
  (bucket / "model").mkdir()
  (bucket / "model" / "config.json").write_text("old")
  with storage.written_locally("gs://bucket/model", last="config.json") as local:
    local.mkdir()
    (local / "config.json").write_text("new")
    (local / "z").write_bytes(bytes(10))
    copied, copy = [], storage.shutil.copyfileobj

    def watched(source, target, *rest):
      copied.append(pathlib.Path(source.name).name)
      assert (bucket / "model" / "config.json").exists() == (copied[-1] == "config.json")
      return copy(source, target, *rest)

    monkeypatch.setattr(storage.shutil, "copyfileobj", watched)
  assert copied == ["z", "config.json"]
  assert (bucket / "model" / "config.json").read_text() == "new"


def test_a_block_that_fails_publishes_nothing(bucket):
  with pytest.raises(RuntimeError), storage.written_locally("gs://bucket/model") as local:
    local.mkdir()
    (local / "a").write_text("half")
    raise RuntimeError
  assert not (bucket / "model").exists()
