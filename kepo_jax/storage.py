"""Paths that may lie on a disk or in a bucket: whole-or-not-at-all writes, staging, publishing."""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from etils import epath

Progress = Callable[[int, int], None]


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path has a scheme, such as gs://: no rename, no append, no memory map."""
  return "://" in os.fspath(path)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a file as a whole: after a crash it holds the old bytes or the new ones, never a part.

  Raises:
    OSError: it cannot be written; names the file.
  """
  path = epath.Path(path)
  try:
    if is_remote(path):
      path.write_bytes(data)  # an object appears when its upload is complete
      return
    partial = path.parent / f".{path.name}.partial"
    with partial.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError as error:
    raise OSError(f"{path} could not be written: {error.strerror or error}.") from error


def write_text(path: epath.PathLike, text: str) -> None:
  """`write_bytes` of UTF-8."""
  write_bytes(path, text.encode())


def files_under(folder: epath.PathLike) -> list[epath.Path]:
  """Every file below a folder, sorted."""
  found: list[epath.Path] = []
  for path in epath.Path(folder).iterdir():  # not walk: it loses the scheme
    found += files_under(path) if path.is_dir() else [path]
  return sorted(found, key=os.fspath)


def below(path: epath.Path, folder: epath.PathLike) -> str:
  """The part of a path behind a folder, with slashes; schemes survive, unlike in `relative_to`."""
  return os.fspath(path).removeprefix(os.fspath(epath.Path(folder))).lstrip("/")


def staged(folder: epath.PathLike, cache: pathlib.Path, *, progress: Progress | None = None) -> pathlib.Path:
  """The local folder with the content of `folder`: itself where it is local, else a copy under `cache`.

  A copy that is complete is used again as long as names and sizes of the files are those of the source.

  Args:
    folder: local or remote.
    cache: where copies are kept.
    progress: receives (bytes copied, bytes in all).

  Raises:
    ValueError: a remote folder that is not there or has no files.
    OSError: it cannot be read, or the copy not be written.
  """
  if not is_remote(folder):
    return pathlib.Path(folder)
  source = epath.Path(folder)
  sizes = {below(path, source): path.stat().length for path in files_under(source)} if source.is_dir() else {}
  if not sizes:
    raise ValueError(f"{source} is no folder or has no files; check the name, and the credentials of its storage.")
  listing = "\n".join(f"{name} {size}" for name, size in sorted(sizes.items()))
  name = hashlib.sha256(f"{source}\n{listing}".encode()).hexdigest()[:16]
  target = cache / "staged" / f"{source.name}-{name}"
  if target.is_dir():
    return target
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
  try:
    done = 0
    for relative, size in sizes.items():
      place = partial / relative
      place.parent.mkdir(parents=True, exist_ok=True)
      with (source / relative).open("rb") as remote, place.open("wb") as local:
        shutil.copyfileobj(remote, local, 1 << 24)
      if place.stat().st_size != size:
        raise OSError(f"{source / relative} has {size} bytes, {place.stat().st_size} of them arrived; try again.")
      done += size
      if progress:
        progress(done, sum(sizes.values()))
    with contextlib.suppress(OSError):  # another process staged the same in the meantime
      partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return target


def publish(local: pathlib.Path, folder: epath.PathLike, *, last: str = "") -> None:
  """Copies a local folder into a bucket.

  Args:
    local: the folder.
    folder: remote; what it holds under other names stays.
    last: name of the file that makes the folder usable. It is removed first and copied last, so that a copy that was
      interrupted does not look complete.

  Raises:
    OSError: a file cannot be copied.
  """
  target = epath.Path(folder)
  (target / last).unlink(missing_ok=True) if last else None
  files = [path for path in files_under(local) if below(path, local) != last]
  for path in [*files, *([epath.Path(local) / last] if last else [])]:
    place = target / below(path, local)
    place.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source, place.open("wb") as remote:
      shutil.copyfileobj(source, remote, 1 << 24)


@contextlib.contextmanager
def written_locally(folder: epath.PathLike, *, last: str = "") -> Iterator[pathlib.Path]:
  """A local folder to write into: `folder` itself, or one that is published there at the end of the block."""
  if not is_remote(folder):
    yield pathlib.Path(folder)
    return
  with tempfile.TemporaryDirectory(prefix="kepo_jax-") as name:
    local = pathlib.Path(name) / epath.Path(folder).name
    yield local
    if local.exists():  # on several hosts only the first one writes
      publish(local, folder, last=last)
