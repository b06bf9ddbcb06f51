"""gs:// on this machine: files behind Google's JSON API on loopback for TensorStore, and behind fsspec for epath.

As in a bucket there are no empty folders, an object appears when its upload is complete, and nothing is appended to.
"""

import contextlib
import datetime
import functools
import http.server
import io
import json
import os
import pathlib
import re
import tempfile
import threading
import types
import unittest.mock
import urllib.parse
from collections.abc import Iterator

from etils.epath import backend
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from orbax.checkpoint._src.path import gcs_utils


class Store:
  """Objects as files below `root/<bucket>/`; the generation of an object is the time of its upload."""

  def __init__(self):
    self.root = pathlib.Path()
    self.lock = threading.Lock()
    self.uploads: list[str] = []  # "bucket/name", in order

  def path(self, bucket: str, name: str) -> pathlib.Path:
    return self.root / bucket / name

  def names(self, bucket: str, prefix: str = "") -> list[str]:
    top = self.root / bucket
    if not bucket or not top.is_dir():
      raise FileNotFoundError(bucket)
    found = (path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())
    return sorted(name for name in found if name.startswith(prefix))

  def generation(self, bucket: str, name: str) -> int:
    path = self.path(bucket, name)
    return path.stat().st_mtime_ns if path.is_file() else 0

  def read(self, bucket: str, name: str) -> bytes:
    if not self.generation(bucket, name):
      raise FileNotFoundError(name)
    return self.path(bucket, name).read_bytes()

  def write(self, bucket: str, name: str, data: bytes, *, create: bool = False) -> None:
    if not (self.root / bucket).is_dir():
      raise FileNotFoundError(bucket)
    with self.lock:
      path = self.path(bucket, name)
      if create and path.exists():
        raise FileExistsError(name)
      path.parent.mkdir(parents=True, exist_ok=True)
      handle, partial = tempfile.mkstemp(dir=self.root)
      with os.fdopen(handle, "wb") as file:
        file.write(data)
      os.replace(partial, path)
      self.uploads.append(f"{bucket}/{name}")

  def delete(self, bucket: str, name: str) -> None:
    with self.lock:
      path = self.path(bucket, name)
      path.unlink()
      with contextlib.suppress(OSError):
        while (path := path.parent) != self.root / bucket:
          path.rmdir()


class Handler(http.server.BaseHTTPRequestHandler):
  """The part of Google's JSON API that TensorStore uses here; preconditions always hold, nobody else writes."""

  protocol_version = "HTTP/1.1"
  server: "Server"

  def log_message(self, *_):
    """Says nothing."""

  def asked(self) -> tuple[str, str, dict[str, str]]:
    """(bucket, name, query) of the address."""
    path, _, query = self.path.partition("?")
    bucket, name = map(urllib.parse.unquote, re.search(r"/b/([^/]+)/o/?(.*)$", path).groups())
    return bucket, name, dict(urllib.parse.parse_qsl(query))

  def do_GET(self):  # noqa: N802
    store, (bucket, name, query) = self.server.store, self.asked()
    try:
      data, generation = store.read(bucket, name), str(store.generation(bucket, name))
    except FileNotFoundError:
      return self.reply(404)
    if query.get("ifGenerationNotMatch") == generation:
      return self.reply(304)
    headers = {"x-goog-generation": generation}
    part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not part:
      return self.reply(200, data, headers)
    first = int(part[1] or len(data) - int(part[2]))
    found = data[first : int(part[2] or len(data)) + 1 if part[1] else len(data)]
    headers["Content-Range"] = f"bytes {first}-{first + len(found) - 1}/{len(data)}"
    return self.reply(206, found, headers)

  def do_POST(self):  # noqa: N802
    store, (bucket, _, query) = self.server.store, self.asked()
    try:
      store.write(bucket, query["name"], self.rfile.read(int(self.headers["Content-Length"])))
    except FileNotFoundError:
      return self.reply(404)
    return self.reply(200, json.dumps(self.described(bucket, query["name"])).encode())

  def described(self, bucket: str, name: str) -> dict[str, str]:
    path, generation = self.server.store.path(bucket, name), self.server.store.generation(bucket, name)
    time = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat().replace("+00:00", "Z")
    return {
      "kind": "storage#object", "bucket": bucket, "name": name, "size": str(path.stat().st_size),
      "generation": str(generation), "metageneration": "1", "updated": time, "timeCreated": time,
    }  # fmt: skip

  def reply(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
  """A store on loopback, in a thread of its own."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.store = Store()
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def handle_error(self, *_):
    """Says nothing: a client that hangs up is no news."""


class Upload(io.BytesIO):
  """An object that appears when the file is closed."""

  def __init__(self, store: Store, bucket: str, name: str):
    super().__init__()
    self._store, self._place = store, (bucket, name)

  def close(self):
    if not self.closed:
      try:
        self._store.write(*self._place, self.getvalue())
      finally:
        super().close()


class Objects(AbstractFileSystem):
  """What gcsfs does with a bucket, on a store: folders are prefixes of names, and making one does nothing."""

  protocol = ("gs", "gcs")
  cachable = False
  store: Store

  def _split(self, path) -> tuple[str, str]:
    bucket, _, name = self._strip_protocol(path).partition("/")
    return bucket, name

  def info(self, path, **_):
    bucket, name = self._split(path)
    found = {"name": self._strip_protocol(path), "size": 0, "type": "directory"}
    if name and (generation := self.store.generation(bucket, name)):
      size = self.store.path(bucket, name).stat().st_size
      return found | {"size": size, "type": "file", "generation": str(generation)}
    if self.store.names(bucket, f"{name}/" if name else "") or not name:
      return found
    raise FileNotFoundError(path)

  def ls(self, path, detail=True, **_):
    bucket, name = self._split(path)
    prefix = f"{name}/" if name else ""
    below = dict.fromkeys(each[len(prefix) :].partition("/")[0] for each in self.store.names(bucket, prefix))
    found = [self.info(f"{bucket}/{prefix}{each}") for each in below] if below or not name else [self.info(path)]
    return found if detail else [each["name"] for each in found]

  def _open(self, path, mode="rb", **_):
    if mode == "wb":
      return Upload(self.store, *self._split(path))
    return io.BytesIO(self.store.read(*self._split(path)))

  def pipe_file(self, path, value, mode="overwrite", **_):
    self.store.write(*self._split(path), value, create=mode == "create")

  def mkdir(self, path, create_parents=True, **_):
    self.store.names(self._split(path)[0], "")  # a bucket must be there

  def makedirs(self, path, exist_ok=False):
    self.mkdir(path)

  def rmdir(self, path):
    """Nothing."""

  def rm(self, path, recursive=False, maxdepth=None):
    bucket, name = self._split(path)
    names = [name] if self.store.generation(bucket, name) else self.store.names(bucket, f"{name}/") if recursive else []
    if not names:
      raise FileNotFoundError(path)
    for each in names:
      self.store.delete(bucket, each)


@functools.cache
def server() -> Server:
  """TensorStore reads its variables once per process: one server serves every test, each with a root of its own."""
  return Server()


@contextlib.contextmanager
def served(root: pathlib.Path) -> Iterator[Store]:
  """Makes gs://NAME/ the folder root/NAME inside the block, for this process."""
  store = server().store
  store.root, store.uploads = root, []
  variables = {
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server().server_port}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # else TensorStore looks for a metadata server
  }
  filesystem = type("Objects", (Objects,), {"store": store})
  flat = types.SimpleNamespace(hierarchical_namespace_enabled=False)
  with (
    unittest.mock.patch.dict(os.environ, variables),
    unittest.mock.patch.dict(_registry, {"gs": filesystem, "gcs": filesystem}),
    unittest.mock.patch.object(gcs_utils, "get_bucket", lambda name: flat),
  ):
    backend.fsspec_backend._get_filesystem.cache_clear()
    try:
      yield store
    finally:
      backend.fsspec_backend._get_filesystem.cache_clear()
