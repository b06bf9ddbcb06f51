"""Images of records: paths below a root, bytes in a table, and what a file's header tells."""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import stat
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from PIL import Image

from kepo_jax import storage
from kepo_jax.data import images
from kepo_jax.data.rules import Rejected

MAX_BYTES = 1 << 28  # of one encoded image inside a table
_BEGINNINGS = {
  b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif", b"GIF8": ".gif",
  b"RIFF": ".webp",
}  # fmt: skip


class ImageFiles:
  """Image paths of records, resolved inside a root; folders are resolved once."""

  def __init__(self, root: str | os.PathLike, check: bool):
    """Opens nothing.

    Args:
      root: folder that no path may leave.
      check: whether the files must exist.
    """
    self._root = os.path.realpath(root)
    self._check = check
    self._folders: dict[str, str] = {}

  def path(self, relative: Any) -> str:
    """Absolute path without symbolic links.

    Raises:
      Rejected: it is no text, leaves the root or does not exist.
    """
    if not isinstance(relative, str):
      raise Rejected("malformed_record", f"the image's path is no text but {type(relative).__name__}")
    pure = pathlib.PurePosixPath(relative)
    text = relative.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in relative)
    if pure.is_absolute() or ".." in pure.parts or "\0" in relative or not pure.name or not text:
      raise Rejected("unsafe_path", f"the image's path {relative[:200]!r} is not a path below the root")
    try:
      return self._resolved(str(pure.parent), pure.name, relative)
    except OSError as error:
      raise Rejected("missing_image", f"image {relative[:200]!r} cannot be found ({str(error)[:200]})") from error

  def _resolved(self, parent: str, name: str, relative: str) -> str:
    if parent not in self._folders:
      self._folders[parent] = os.path.realpath(os.path.join(self._root, parent))
    path = os.path.join(self._folders[parent], name)
    mode = os.lstat(path).st_mode if self._check or os.path.lexists(path) else None
    if mode is not None and stat.S_ISLNK(mode):
      path = os.path.realpath(path)
      mode = os.stat(path).st_mode if is_inside(path, self._root) else mode
    if not is_inside(path, self._root):
      raise Rejected("unsafe_path", f"the path {relative!r} leads out of {self._root} by a symbolic link")
    if mode is not None and not stat.S_ISREG(mode):
      raise Rejected("missing_image", f"image {relative!r} is not a file")
    return path


def is_inside(real: str, root: str) -> bool:
  """Whether a path lies in a folder or is it; both without symbolic links."""
  return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def store(data: bytes, *, check: bool) -> str:
  """Path of an image that came as bytes, in the cache folder under its SHA-256; written once.

  Args:
    data: the encoded image.
    check: whether to look at the header and to write; without it the path alone is told.

  Raises:
    Rejected: not an image of a known format, or too large.
    OSError: the cache folder cannot be written.
  """
  if len(data) > MAX_BYTES:
    raise Rejected("unreadable_image", f"an image of {len(data)} bytes, more than {MAX_BYTES}")
  folder = storage.cache_directory() / "images"
  target = folder / f"{hashlib.sha256(data).hexdigest()}{_suffix(data)}"
  if not check:
    return str(target)
  header(data)
  if not (target.is_file() and target.stat().st_size == len(data)):
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved: another process never reads half of it.
    handle, written = tempfile.mkstemp(dir=folder, prefix="writing-")
    with os.fdopen(handle, "wb") as file:
      file.write(data)
    os.replace(written, target)
  return str(target)


def _suffix(data: bytes) -> str:
  return next((suffix for beginning, suffix in _BEGINNINGS.items() if data.startswith(beginning)), ".bin")


def header(source: str | os.PathLike | bytes) -> tuple[str, int, int]:
  """(format, width, height) of an image file or its bytes; pixels are not decoded.

  Raises:
    Rejected: unreadable_image, with the reason.
  """
  with unreadable():
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=images.FORMATS) as image:
      if image.width * image.height > images.MAX_PIXELS:
        raise Rejected("unreadable_image", f"{image.width} x {image.height} pixels, more than {images.MAX_PIXELS}")
      return image.format or "?", image.width, image.height


def fingerprint(path: str | os.PathLike) -> str:
  """SHA-256 of an image file's bytes; read once in a process, unless its size or time changes.

  Raises:
    ValueError: the file cannot be read; names it.
  """
  try:
    found = os.stat(path)
    return _fingerprint(os.fspath(path), found.st_size, found.st_mtime_ns)
  except OSError as error:
    raise ValueError(f"image {path}: cannot be read ({error.strerror}); check the data directory") from error


@functools.lru_cache(maxsize=1 << 17)
def _fingerprint(path: str, size: int, time: int) -> str:
  del size, time  # parts of the key
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def unreadable() -> Iterator[None]:
  """What Pillow raises on a bad image, as Rejected; its warnings about odd files are not shown."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  except (*images.DECODER_ERRORS, Image.DecompressionBombError) as error:
    if isinstance(error, FileNotFoundError):
      raise Rejected("missing_image", f"there is no such file from {pathlib.Path.cwd()}") from error
    raise Rejected("unreadable_image", f"damaged, too large or of another format ({str(error)[:200]})") from error
