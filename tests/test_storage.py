import os
import pathlib
import sys
import types

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.registry import _registry

from kepo_jax import storage


def test_a_write_replaces_as_a_whole_or_names_the_file(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  storage.write_text(path, "ö" * 1000)
  storage.write_text(path, "ü")
  assert path.read_text() == "ü" and [path.name for path in tmp_path.iterdir()] == ["config.json"]
  with pytest.raises(OSError, match="nowhere/x could not be written: No such file"):
    storage.write_text(tmp_path / "nowhere" / "x", "text")

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match=r"config.json could not be written: No space left on device"):
    storage.write_text(path, "new")
  assert path.read_text() == "ü"


def put(store, **files):
  for name, data in files.items():
    store.write("bucket", name.replace("__", "/"), data)


def test_a_remote_folder_is_staged_once(bucket, tmp_path, monkeypatch):
  monkeypatch.setattr(storage, "_BLOCK", 100)
  put(bucket, model__config=b"{}", model__sub__weights=bytes(1000), model2__config=b"another")
  told = []
  local = storage.staged("gs://bucket/model", tmp_path / "cache", progress=lambda *of: told.append(of))
  assert sorted(path.name for path in local.rglob("*")) == ["config", "sub", "weights"]
  assert (local / "sub" / "weights").read_bytes() == bytes(1000) and (local / "config").read_text() == "{}"
  assert told[-1] == (1002, 1002) and told == sorted(told)
  told.clear()
  assert storage.staged("gs://bucket/model/", tmp_path / "cache", progress=lambda *of: told.append(of)) == local
  assert told == []


def test_an_object_whose_name_leads_out_of_the_copy_is_refused(bucket, tmp_path, monkeypatch):
  system, _ = fsspec.url_to_fs("gs://bucket/model")
  monkeypatch.setattr(system, "find", lambda *_, **__: {"bucket/model/../../../x": {"size": 1}})
  monkeypatch.setattr(fsspec, "url_to_fs", lambda path: (system, path))
  with pytest.raises(ValueError, match=r"model/../../../x would lead out of the folder that gs://bucket/model is"):
    storage.staged("gs://bucket/model", tmp_path / "cache")
  assert not (tmp_path / "cache").exists()


def test_by_default_copies_lie_in_the_cache_of_the_project(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  put(bucket, model__config=b"{}")
  local = storage.staged("gs://bucket/model")
  assert local.parts[-2:] == ("bucket", "model") and local.parents[2] == tmp_path / "xdg" / "kepo_jax" / "staged"
  assert storage.origin(local / "config") == "gs://bucket/model/config" and storage.origin(f"{local}2") == f"{local}2"
  assert storage.copy_of("gs://bucket/model/config") == str(local / "config")
  assert storage.copy_of("gs://bucket/model2") == "gs://bucket/model2" and storage.copy_of("model") == "model"
  put(bucket, model__config=b"[]")  # what is written again is staged again, though its size is the same
  newer = storage.staged("gs://bucket/model")
  assert (newer / "config").read_text() == "[]" and storage.copy_of("gs://bucket/model/config") == str(newer / "config")
  assert (local / "config").read_text() == "{}"  # a process that reads it is not disturbed


def test_a_folder_or_bucket_that_is_not_there_is_named(bucket, tmp_path):
  assert storage.staged(tmp_path / "local", tmp_path / "cache") == tmp_path / "local"  # what is local is not copied
  put(bucket, model2__config=b"{}")
  with pytest.raises(ValueError, match="gs://bucket/model: no such folder or file"):
    storage.staged("gs://bucket/model", tmp_path / "cache")
  with pytest.raises(ValueError, match="gs://buckets/model: there is no bucket gs://buckets; check the name"):
    storage.staged("gs://buckets/model", tmp_path / "cache")
  with pytest.raises(ValueError, match="there is no bucket gs://buckets"):
    storage.check_bucket("gs://buckets/run")
  assert not (bucket.root / "buckets").exists()
  storage.check_bucket("gs://bucket/run")  # empty, and there
  storage.check_bucket("/nowhere")


def test_a_name_that_is_a_pattern_reaches_orbax_by_a_link(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert storage.orbax_path(tmp_path / "plain") == epath.Path(tmp_path.resolve() / "plain")
  link, other = (storage.orbax_path(tmp_path / name) for name in ("a[1]", "a[2]"))
  assert os.path.realpath(link) == str(tmp_path.resolve() / "a[1]") and link != other
  assert storage.orbax_path(tmp_path / "a[1]") == link and not set("[]*?") & set(str(link))
  with pytest.raises(ValueError, match=r"with \[ \] cannot be restored; choose another name"):
    storage.orbax_path("gs://bucket/a[1]")


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  for protocol in ("gs", "gcs"):
    monkeypatch.delitem(_registry, protocol, raising=False)
  backend.fsspec_backend._get_filesystem.cache_clear()
  with pytest.raises(ValueError, match=r"gs://bucket/model needs a package .*; run `pip install gcsfs`"):
    storage.staged("gs://bucket/model", tmp_path / "cache")


class ForeignError(Exception):
  """As libraries of a cloud raise them, neither OSError nor ValueError."""


def test_errors_of_other_libraries_become_ours(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs.retry", types.SimpleNamespace(HttpError=ForeignError))
  for raised, error, match in (
    (ForeignError("default credentials were not found"), ValueError, "without credentials .*gcloud auth application-d"),
    (ForeignError("backend error,\n 503"), OSError, "gs://bucket/x cannot be reached: backend error, 503"),
    (OSError("Forbidden: a\nno access"), PermissionError, "gs://bucket/x may not be used .*Forbidden: a no access"),
    (FileNotFoundError("x"), FileNotFoundError, "^x$"),
  ):
    with pytest.raises(error, match=match), storage.reaching("gs://bucket/x"):
      raise raised


def test_what_another_process_writes_is_seen_at_once(bucket):
  put(bucket, run__a=b"1")
  assert fsspec.url_to_fs("gs://bucket/run")[0].storage_options["use_listings_cache"] is False
  folder = epath.Path("gs://bucket/run")
  assert [path.name for path in folder.iterdir()] == ["a"] and not (folder / "lock").exists()
  put(bucket, run__lock=b"long", run__a=b"another length")
  assert (folder / "lock").exists() and (folder / "a").read_text() == "another length"
  assert storage.files_under(folder) == [folder / "a", folder / "lock"]


def test_a_copy_that_breaks_off_is_not_used(bucket, tmp_path, monkeypatch):
  put(bucket, model__a=bytes(10), model__b=bytes(10))
  system, _ = fsspec.url_to_fs("gs://bucket/model")
  plain = system.cat_file

  def breaks_off(path):
    if path.endswith("b"):
      raise OSError("the connection was reset")
    return plain(path)

  monkeypatch.setattr(fsspec, "url_to_fs", lambda path: (system, system._strip_protocol(path)))
  for read, match in (
    (breaks_off, "reset"),
    (lambda path: plain(path)[:7], "gs://bucket/model/. has 10 bytes, 7 of them arrived"),
  ):
    monkeypatch.setattr(system, "cat_file", read)
    with pytest.raises(OSError, match=match):
      storage.staged("gs://bucket/model", tmp_path / "cache")
    assert list((tmp_path / "cache" / "staged").iterdir()) == []


def test_what_makes_a_folder_usable_is_published_last_and_old_files_go(bucket):
  put(bucket, model__config=b"old", model__stale=b"old", model2__config=b"another", model__sub__stale=b"old")
  with storage.written_locally("gs://bucket/model", last="config") as local:
    (local / "sub").mkdir(parents=True)
    for path in (local / "config", local / "sub" / "config", local / "z"):
      path.write_text("new")
    assert bucket.read("bucket", "model/config") == b"old"
    bucket.uploads.clear()
  assert bucket.uploads == ["bucket/model/sub/config", "bucket/model/z", "bucket/model/config"]
  assert bucket.names("bucket") == ["model/config", "model/sub/config", "model/z", "model2/config"]
  assert bucket.read("bucket", "model/config") == bucket.read("bucket", "model/sub/config") == b"new"


def test_a_publication_that_breaks_off_does_not_look_complete(bucket, monkeypatch):
  put(bucket, model__config=b"old")
  plain = storage.shutil.copyfileobj

  def full(source, target, length):
    if pathlib.Path(source.name).name == "weights":
      raise OSError("out of room")
    return plain(source, target, length)

  place = storage.written_locally("gs://bucket/model", last="config")
  with pytest.raises(OSError, match="out of room"), place as local:
    local.mkdir()
    for name in ("config", "weights"):
      (local / name).write_text("new")
    monkeypatch.setattr(storage.shutil, "copyfileobj", full)
  assert "model/config" not in bucket.names("bucket")
  with pytest.raises(RuntimeError), storage.written_locally("gs://bucket/other") as local:
    local.mkdir()
    (local / "a").write_text("half")
    raise RuntimeError
  assert not bucket.names("bucket", "other")


def test_a_folder_moves_with_all_that_is_below_it(bucket, tmp_path):
  put(bucket, run__5__state__a=b"a", run__5__b=b"b", run__50__b=b"stays")
  storage.move("gs://bucket/run/5", "gs://bucket/broken/5")
  storage.move("gs://bucket/run/50/b", "gs://bucket/run/50/c")
  assert bucket.names("bucket") == ["broken/5/b", "broken/5/state/a", "run/50/c"]
  (tmp_path / "x" / "y").mkdir(parents=True)
  storage.move(tmp_path / "x", tmp_path / "new" / "x")
  assert (tmp_path / "new" / "x" / "y").is_dir() and not (tmp_path / "x").exists()
