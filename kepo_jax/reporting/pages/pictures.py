"""Images of questions, small enough for a page."""

import base64
import contextlib
import io
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath
from PIL import Image, ImageChops

from kepo_jax import storage
from kepo_jax.data import images

SIDE = 256  # pixels of the longest side of a thumbnail
_BUCKETS = ("gs://", "s3://", "az://")  # what is read; no file of a run makes this process ask any other server
_LOSSLESS = 24_000  # bytes up to which a thumbnail stays a PNG; noisy photographs are several times larger as such


class Thumbnails:
  """Data URIs of image files; each file is read once."""

  def __init__(self) -> None:
    """Reads nothing."""
    self._found: dict[str, str] = {}
    self._unreachable: set[str] = set()

  def __call__(self, path: str) -> str:
    """The image as a data URI, "" where it cannot be read; the same pixels give the same text."""
    if path not in self._found:
      self._found[path] = self._made(path)
    return self._found[path]

  def _made(self, path: str) -> str:
    bucket = "/".join(path.split("/")[:3]) if storage.is_remote(path) else ""
    if bucket in self._unreachable:
      return ""
    try:
      with _local(path) as file:
        return thumbnail(images.rgb(images.load_image(file)))
    except _Unreachable:
      # Asking once is enough: a storage that does not answer costs seconds of retries for every image.
      self._unreachable.add(bucket)
    except (OSError, ValueError):
      pass  # missing, damaged or of another format: its name is shown
    return ""


def thumbnail(image: Image.Image) -> str:
  """An RGB image as a data URI: as it is if it is small, else with a longest side of 256 pixels."""
  image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
  grey = image.convert("L")
  if ImageChops.difference(image, grey.convert("RGB")).getbbox() is None:
    image = grey
  media, data = "image/png", _encoded(image, "PNG")
  if len(data) > _LOSSLESS:
    media, data = "image/jpeg", _encoded(image, "JPEG", quality=85)
  return f"data:{media};base64,{base64.b64encode(data).decode()}"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format=kind, optimize=True, **options)
  return buffer.getvalue()


class _Unreachable(Exception):
  """The storage of an image does not answer."""


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
  """A local file with the content of a path: itself, the copy that this process trained on, or a temporary one."""
  copy = storage.copy_of(path)
  if not storage.is_remote(copy):
    yield copy
    return
  if not path.startswith(_BUCKETS):
    raise ValueError(f"{path} lies in no bucket")
  try:
    with storage.reaching(path):
      data = epath.Path(path).read_bytes()
  except FileNotFoundError:
    raise
  except (OSError, ValueError) as error:
    raise _Unreachable(path) from error
  with tempfile.NamedTemporaryFile(suffix=pathlib.PurePosixPath(path).suffix) as file:
    file.write(data)
    file.flush()
    yield file.name
