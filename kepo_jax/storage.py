"""Paths on a disk or in a bucket: atomic writes, staging of remote folders, publishing of local ones."""

import collections
import concurrent.futures
import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec
from etils import epath

Progress = Callable[[int, int], None]

_BLOCK = 1 << 24  # bytes that are read at a time
_ORIGINS: dict[str, str] = {}  # what this process staged: local path -> remote path
_COPIES = 16  # files that are staged at a time
_REPORT = 0.5  # seconds between reports of progress
# What makes a scheme readable, beside what is installed anyway.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
# Errors of those packages that are no OSError, by module; looked up only once the module is there.
_FOREIGN = {
  "gcsfs.retry": "HttpError",
  "google.auth.exceptions": "GoogleAuthError",
  "google.api_core.exceptions": "GoogleAPIError",
  "aiohttp": "ClientError",
  "botocore.exceptions": "BotoCoreError",
  "azure.core.exceptions": "AzureError",
}
# It logs with a traceback what it then raises, and what `reaching` tells in one line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
# Listings that a file system remembers would hide what another process has written: a lock, a newer checkpoint.
for _protocol in ("gcs", *_PACKAGES):
  fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def cache_directory() -> pathlib.Path:
  """Returns the folder for what can be made again: $XDG_CACHE_HOME/kepo_jax or ~/.cache/kepo_jax."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kepo_jax"


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path has a scheme, such as gs://: no rename, no append, no memory map."""
  return "://" in os.fspath(path)


@contextlib.contextmanager
def reaching(path: epath.PathLike) -> Iterator[None]:
  """Turns what the libraries behind a scheme raise into errors that name the path and the way out.

  Raises:
    ValueError: a package is missing, or credentials are.
    OSError: the storage did not answer, or refused.
  """
  try:
    yield
  except ImportError as error:
    scheme = os.fspath(path).partition("://")[0]
    if not is_remote(path) or scheme not in _PACKAGES:
      raise
    raise ValueError(
      f"{path} needs a package that is not installed ({error}); run `pip install {_PACKAGES[scheme]}`."
    ) from error
  except _foreign_errors() as error:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "redentials" in reason or getattr(error, "code", None) in (401, "401"):
      raise ValueError(
        f"{path} cannot be reached without credentials ({reason}); for gs:// run `gcloud auth application-default "
        f"login`, or set GOOGLE_APPLICATION_CREDENTIALS."
      ) from error
    raise OSError(f"{path} cannot be reached: {reason}") from error
  except OSError as error:
    if not (is_remote(path) and str(error).startswith("Forbidden")):
      raise
    reason = " ".join(str(error).split())[:300]
    raise PermissionError(f"{path} may not be used with these credentials, or with none ({reason}).") from error


def _foreign_errors() -> tuple[type[Exception], ...]:
  return tuple(getattr(sys.modules[module], name) for module, name in _FOREIGN.items() if module in sys.modules)


def check_bucket(path: epath.PathLike) -> None:
  """Refuses a remote path whose bucket is not there; libraries would try to make it.

  Raises:
    ValueError: there is none of that name, or no package or credentials to reach it.
    OSError: the storage did not answer, or refused.
  """
  if not is_remote(path):
    return
  scheme, _, rest = os.fspath(path).partition("://")
  bucket = epath.Path(f"{scheme}://{rest.partition('/')[0]}")
  with reaching(path):
    try:
      # Who may use the objects of a bucket need not be allowed to look at the bucket itself.
      bucket.exists() or next(bucket.iterdir(), None)
    except FileNotFoundError as error:
      raise ValueError(f"{path}: there is no bucket {bucket}; check the name, or make it.") from error


def orbax_path(path: epath.PathLike) -> epath.Path:
  """Returns the name of a folder for Orbax; it need not exist yet.

  Orbax finds its own files by pattern, so a local name with `[ ] * ?` gets a link without; it is the same on all hosts.

  Raises:
    ValueError: the path is remote and has such a character.
    OSError: the link cannot be made.
  """
  name = os.fspath(path) if is_remote(path) else os.path.realpath(path)
  if not (special := sorted(set(name) & set("[]*?"))):
    return epath.Path(name)
  if is_remote(path):
    raise ValueError(
      f"{path}: a checkpoint below a path with {' '.join(special)} cannot be restored; choose another name."
    )
  cache = cache_directory() if not set(str(cache_directory())) & set("[]*?") else pathlib.Path(tempfile.gettempdir())
  link = cache / "links" / hashlib.sha256(name.encode()).hexdigest()[:16]
  link.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.suppress(FileExistsError):
    link.symlink_to(name)
  return epath.Path(link)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a file atomically: after a crash it holds the old bytes or the new ones, never a part.

  Raises:
    OSError: it cannot be written; names the file.
  """
  path = epath.Path(path)
  try:
    if is_remote(path):
      with reaching(path):
        path.write_bytes(data)  # an object appears when its upload is complete
      return
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    with partial.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError as error:
    raise OSError(f"{path} could not be written: {str(error.strerror or error).rstrip('.')}.") from error


def write_text(path: epath.PathLike, text: str) -> None:
  """`write_bytes` of UTF-8."""
  write_bytes(path, text.encode())


def files_under(folder: epath.PathLike) -> list[epath.Path]:
  """Returns every file below a folder, sorted; none where a remote folder does not exist."""
  if is_remote(folder):
    return [epath.Path(path) for path in _listed(folder)]
  return sorted((epath.Path(path) for path in pathlib.Path(folder).rglob("*") if path.is_file()), key=os.fspath)


def _listed(path: epath.PathLike) -> dict[str, dict[str, Any]]:
  """Returns every file below a remote folder, or the one file -> its metadata, sorted; listed in bulk."""
  system, root = fsspec.url_to_fs(os.fspath(path))
  try:
    files = system.find(root, detail=True)
  except FileNotFoundError:
    return {}
  scheme = os.fspath(path).partition("://")[0]
  # An object whose name ends with a slash stands for a folder in some tools.
  return {f"{scheme}://{name}": info for name, info in sorted(files.items()) if not name.endswith("/")}


def move(source: epath.PathLike, target: epath.PathLike) -> None:
  """Renames a file or folder; in a bucket by copies, which may take a while.

  Raises:
    OSError: it cannot be moved; then it is still there, whole or, in a bucket, in part.
  """
  source, target = epath.Path(source), epath.Path(target)
  target.parent.mkdir(parents=True, exist_ok=True)
  if not is_remote(source):
    source.rename(target)
    return
  # Not rename: it wants a parent folder, and a bucket has none without objects in it.
  files = files_under(source) if source.is_dir() else [source]
  for path in files:
    place = epath.Path(f"{target}{os.fspath(path).removeprefix(os.fspath(source))}")
    path.copy(place)
  for path in files:
    path.unlink()


def below(path: epath.Path, folder: epath.PathLike) -> str:
  """Returns the part of a path behind a folder, with slashes; schemes survive, unlike in `relative_to`."""
  return os.fspath(path).removeprefix(os.fspath(epath.Path(folder))).lstrip("/")


def staged(
  source: epath.PathLike, cache: pathlib.Path | None = None, *, progress: Progress | None = None
) -> pathlib.Path:
  """Returns a local path with the content of `source`: itself where it is local, else a copy in the cache.

  A copy that is complete is used again as long as names, sizes and generations of the objects are those of the source.
  On several hosts each calls it for itself.

  Args:
    source: folder or file, local or remote.
    cache: where copies are kept; None: below `cache_directory()`.
    progress: receives (bytes copied, bytes in all).

  Raises:
    ValueError: a remote path that is not there or has no files, or no package or credentials to read it.
    OSError: it cannot be read, or the copy not be written.
  """
  if not is_remote(source):
    return pathlib.Path(source)
  check_bucket(source)
  source = os.fspath(epath.Path(source))
  with reaching(source):
    files = _listed(source)
    if not files:
      raise ValueError(f"{source}: no such folder or file, or a folder without files; check the name.")
    if unsafe := [path for path in files if ".." in path.split("/")]:
      raise ValueError(f"{unsafe[0]} would lead out of the folder that {source} is copied to; rename the object.")
    stamps = [f"{path} {info['size']} {_stamp(info)}" for path, info in files.items()]
    digest = hashlib.sha256("\n".join([source, *stamps]).encode()).hexdigest()[:16]
    target = (cache or cache_directory()).resolve() / "staged" / digest
    if not target.is_dir():
      _copy_down(source, {path: info["size"] for path, info in files.items()}, target, progress)
  # Under its whole path: names of folders become parts of ids, and tell the modality, in some formats.
  local = target / source.partition("://")[2]
  _ORIGINS[os.fspath(local)] = source
  return local


def origin(path: str | os.PathLike[str]) -> str:
  """Returns the remote path of a copy that `staged` made; other paths as they are."""
  path = os.fspath(path)
  for local, source in _ORIGINS.items():
    if path == local or path.startswith(local + os.sep):
      return source + path.removeprefix(local)
  return path


def copy_of(path: str | os.PathLike[str]) -> str:
  """Returns the last local copy of a remote path that `staged` made in this process; other paths as they are."""
  path = os.fspath(path)
  for local, source in reversed(_ORIGINS.items()):
    if path == source or path.startswith(source.rstrip("/") + "/"):
      return local + path.removeprefix(source.rstrip("/"))
  return path


def _stamp(info: Mapping[str, Any]) -> str:
  """Returns what changes when an object is written again: a model trained further has the sizes that it had."""
  return str(next((info[name] for name in ("generation", "ETag", "etag", "mtime") if info.get(name)), ""))


def _copy_down(source: str, sizes: Mapping[str, int], target: pathlib.Path, progress: Progress | None) -> None:
  """Copies a remote folder or file under its path into a local folder, which appears once it is complete."""
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
  system, _ = fsspec.url_to_fs(source)
  counts = {path: fsspec.Callback() for path in sizes}

  def copy(path: str) -> None:
    place = partial / path.partition("://")[2]
    place.parent.mkdir(parents=True, exist_ok=True)
    if sizes[path] <= _BLOCK:
      place.write_bytes(system.cat_file(path))  # one request, where the other way asks for the size again
    else:
      system.get_file(path, os.fspath(place), callback=counts[path])
    if place.stat().st_size != sizes[path]:
      raise OSError(f"{path} has {sizes[path]} bytes, {place.stat().st_size} of them arrived; try again.")
    counts[path].absolute_update(sizes[path])

  try:
    # Many at a time: a data set is a hundred thousand images, and each costs the way to the storage and back.
    with concurrent.futures.ThreadPoolExecutor(_COPIES) as pool:
      waiting = collections.deque(pool.submit(copy, path) for path in sizes)
      reported = time.monotonic()
      try:
        while waiting:
          if concurrent.futures.wait([waiting[0]], _REPORT).done:
            waiting.popleft().result()
          if progress and (not waiting or time.monotonic() - reported >= _REPORT):
            progress(sum(count.value for count in counts.values()), sum(sizes.values()))
            reported = time.monotonic()
      finally:
        pool.shutdown(cancel_futures=True)
    with contextlib.suppress(OSError):  # another process staged the same in the meantime
      partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def publish(local: pathlib.Path, folder: epath.PathLike, *, last: str = "") -> None:
  """Copies a local folder into a bucket.

  Args:
    local: the folder.
    folder: remote; without `last`, what it holds under other names stays.
    last: name of the file that makes the folder usable. It is removed first and copied last, so that a copy that was
      interrupted does not look complete; and the folder then holds nothing but the copy.

  Raises:
    OSError: a file cannot be copied.
  """
  target = epath.Path(folder)
  with reaching(target):
    files = {below(path, local): path for path in files_under(local)}
    if last:
      (target / last).unlink(missing_ok=True)
      for path in files_under(target):
        if below(path, target) not in files:
          path.unlink()
    for name in sorted(files, key=lambda name: (name == last, name)):
      with files[name].open("rb") as source, (target / name).open("wb") as remote:
        shutil.copyfileobj(source, remote, _BLOCK)


@contextlib.contextmanager
def written_locally(folder: epath.PathLike, *, last: str = "") -> Iterator[pathlib.Path]:
  """Yields a local folder to write into: `folder` itself, or one that is published there at the end of the block."""
  if not is_remote(folder):
    yield pathlib.Path(folder)
    return
  with tempfile.TemporaryDirectory(prefix="kepo_jax-") as name:
    local = pathlib.Path(name) / epath.Path(folder).name
    yield local
    if local.exists():  # on several hosts only the first one writes
      publish(local, folder, last=last)
