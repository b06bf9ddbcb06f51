"""gs:// on this machine: a folder of objects behind Google's JSON API on loopback, and behind fsspec.

TensorStore, which Orbax writes arrays with, speaks HTTP; epath goes through fsspec, by `Objects` below. Both see the
same objects: one file each under `root/<bucket>/`. As in a bucket, and unlike in a folder, there are no empty folders,
an object appears when its upload is complete, and nothing is appended to or renamed in place.
"""

import contextlib
import http.server
import io
import json
import os
import pathlib
import re
import tempfile
import threading
import types
import urllib.parse
from collections.abc import Iterator

import fsspec
from etils.epath import backend
from fsspec.registry import _registry, known_implementations
from fsspec.spec import AbstractFileSystem
from orbax.checkpoint._src.path import gcs_utils

# TensorStore reads its variables once per process: one server serves every test, each with a root of its own.
_SERVER: "Server | None" = None


class Missing(Exception):
  """There is no such object or bucket."""


class Refused(Exception):
  """A precondition on the generation does not hold."""


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
      raise Missing(bucket)
    found = (path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())
    return sorted(name for name in found if name.startswith(prefix))

  def generation(self, bucket: str, name: str) -> int:
    path = self.path(bucket, name)
    return path.stat().st_mtime_ns if path.is_file() else 0

  def read(self, bucket: str, name: str) -> bytes:
    if not self.generation(bucket, name):
      raise Missing(name)
    return self.path(bucket, name).read_bytes()

  def write(self, bucket: str, name: str, data: bytes, match: str | None = None) -> None:
    if not (self.root / bucket).is_dir():
      raise Missing(bucket)
    with self.lock:
      self.check(bucket, name, match)
      path = self.path(bucket, name)
      path.parent.mkdir(parents=True, exist_ok=True)
      handle, partial = tempfile.mkstemp(dir=self.root)
      with os.fdopen(handle, "wb") as file:
        file.write(data)
      os.replace(partial, path)
      self.uploads.append(f"{bucket}/{name}")

  def delete(self, bucket: str, name: str) -> None:
    with self.lock:
      path = self.path(bucket, name)
      if not path.is_file():
        raise Missing(name)
      path.unlink()
      with contextlib.suppress(OSError):
        while (path := path.parent) != self.root / bucket:
          path.rmdir()

  def check(self, bucket: str, name: str, match: str | None) -> None:
    if match is not None and int(match) != self.generation(bucket, name):
      raise Refused(name)


class Handler(http.server.BaseHTTPRequestHandler):
  """The part of Google's JSON API that TensorStore uses here."""

  protocol_version = "HTTP/1.1"
  server: "Server"

  def log_message(self, *_):
    """Says nothing."""

  def do_GET(self):  # noqa: N802
    self.answered(self.get)

  def do_POST(self):  # noqa: N802
    self.answered(self.post)

  def answered(self, act) -> None:
    self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    path, _, query = self.path.partition("?")
    found = re.search(r"/b/([^/]+)/o/?(.*)$", path)
    try:
      act(*map(urllib.parse.unquote, found.groups()), dict(urllib.parse.parse_qsl(query, keep_blank_values=True)))
    except Missing as error:
      self.reply(404, {"error": {"code": 404, "message": f"No such object: {error}"}})
    except Refused as error:
      self.reply(412, {"error": {"code": 412, "message": f"conditionNotMet {error}"}})

  def get(self, bucket: str, name: str, query: dict[str, str]) -> None:
    store = self.server.store
    data, generation = store.read(bucket, name), str(store.generation(bucket, name))
    store.check(bucket, name, query.get("ifGenerationMatch"))
    if query.get("ifGenerationNotMatch") == generation:
      return self.reply(304, b"")
    headers = {"x-goog-generation": generation}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not asked:
      return self.reply(200, data, headers)
    first = int(asked[1] or len(data) - int(asked[2]))
    last = int(asked[2] or len(data)) if asked[1] else len(data)
    part = data[first : last + 1]
    headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
    return self.reply(206, part, headers)

  def post(self, bucket: str, _: str, query: dict[str, str]) -> None:
    store, name = self.server.store, query["name"]
    store.write(bucket, name, self.body, query.get("ifGenerationMatch"))
    self.reply(200, {"bucket": bucket, "name": name, "generation": str(store.generation(bucket, name))})

  def reply(self, status: int, content: bytes | dict, headers: dict[str, str] | None = None) -> None:
    data = json.dumps(content).encode() if isinstance(content, dict) else content
    self.send_response(status)
    kind = "application/json" if isinstance(content, dict) else "application/octet-stream"
    for name, value in ({"Content-Type": kind} | (headers or {})).items():
      self.send_header(name, value)
    if status != 304:
      self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if status != 304:
      self.wfile.write(data)


class Server(http.server.ThreadingHTTPServer):
  """A store on loopback, in a thread of its own."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, store: Store):
    super().__init__(("127.0.0.1", 0), Handler)
    self.store = store
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def handle_error(self, *_):
    """Says nothing: a client that hangs up is no news."""

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def not_found(path: str) -> Iterator[None]:
  """Tells what is missing as a file system does."""
  try:
    yield
  except Missing as error:
    raise FileNotFoundError(f"{path}: no such object or bucket: {error}") from error


class Upload(io.BytesIO):
  """An object that appears when the file is closed."""

  def __init__(self, store: Store, bucket: str, name: str):
    super().__init__()
    self._store, self._place = store, (bucket, name)

  def close(self):
    if not self.closed:
      try:
        with not_found(self._place[0]):
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

  def _names(self, bucket: str, prefix: str) -> list[str]:
    with not_found(bucket):
      return self.store.names(bucket, prefix)

  def info(self, path, **_):
    bucket, name = self._split(path)
    found = {"name": self._strip_protocol(path), "size": 0, "type": "directory"}
    if name and (generation := self.store.generation(bucket, name)):
      size = self.store.path(bucket, name).stat().st_size
      return found | {"size": size, "type": "file", "generation": str(generation)}
    if self._names(bucket, f"{name}/" if name else "") or not name:
      return found
    raise FileNotFoundError(path)

  def ls(self, path, detail=True, **_):
    bucket, name = self._split(path)
    prefix = f"{name}/" if name else ""
    below = dict.fromkeys(each[len(prefix) :].partition("/")[0] for each in self._names(bucket, prefix))
    found = [self.info(f"{bucket}/{prefix}{each}") for each in below] if below or not name else [self.info(path)]
    return found if detail else [each["name"] for each in found]

  def _open(self, path, mode="rb", **_):
    if mode == "wb":
      return Upload(self.store, *self._split(path))
    with not_found(path):
      return io.BytesIO(self.store.read(*self._split(path)))

  def mkdir(self, path, create_parents=True, **_):
    self._names(self._split(path)[0], "")  # a bucket must be there

  def makedirs(self, path, exist_ok=False):
    self.mkdir(path)

  def rmdir(self, path):
    """Nothing."""

  def rm(self, path, recursive=False, maxdepth=None):
    bucket, name = self._split(path)
    names = [name] if self.store.generation(bucket, name) else self._names(bucket, f"{name}/") if recursive else []
    if not names:
      raise FileNotFoundError(path)
    for each in names:
      self.store.delete(bucket, each)


@contextlib.contextmanager
def served(root: pathlib.Path) -> Iterator[Store]:
  """Makes gs://NAME/ the folder root/NAME inside the block, for this process.

  Args:
    root: holds one folder per bucket.
  """
  global _SERVER
  _SERVER = _SERVER or Server(Store())
  store = _SERVER.store
  store.root, store.uploads = root, []
  variables = {
    "TENSORSTORE_GCS_HTTP_URL": _SERVER.url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # else TensorStore looks for a metadata server
  }
  kept = {name: os.environ.get(name) for name in variables}
  names = ("gs", "gcs")
  known = {name: known_implementations[name] for name in names}
  filesystem = type("Objects", (Objects,), {"store": store})
  get_bucket = gcs_utils.get_bucket
  os.environ.update(variables)
  for name in names:
    fsspec.register_implementation(name, filesystem, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  gcs_utils.get_bucket = lambda name: types.SimpleNamespace(hierarchical_namespace_enabled=False)
  try:
    yield store
  finally:
    gcs_utils.get_bucket = get_bucket
    for name in names:
      _registry.pop(name, None)
    known_implementations.update(known)
    backend.fsspec_backend._get_filesystem.cache_clear()
    for name, value in kept.items():
      os.environ.pop(name) if value is None else os.environ.update({name: value})
