"""Images on the host: safe loading of files, their headers, and Qwen's preprocessing bit for bit."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import stat
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from kepo_jax import storage
from kepo_jax.data.cleaning import Rejected
from kepo_jax.models.qwen3_vl.config import shown

MAX_PIXELS = 89_478_485  # Pillow's own limit before it speaks of a decompression bomb
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")  # no format that starts a program, such as EPS
MAX_ASPECT_RATIO = 200  # the reference refuses more
_SETTINGS = (
  ("patch_size", "patch_size"), ("merge_size", "merge_size"), ("temporal_patch_size", "temporal_patch_size"),
  ("image_mean", "mean"), ("image_std", "std"), ("rescale_factor", "scale"), ("resample", "resample"),
)  # fmt: skip  # name in the file, and here
_BOUNDS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))  # old and new name of an area in pixels
RESIZES = {"native": None, "squash384": 384}  # side of a square that ignores the aspect ratio, before all else

_GDAL_NODATA = 42113  # tag of a TIFF
# No measurement: GDAL and ITK fill with the greatest number that there is.
_BEYOND = float(np.finfo(np.float32).max) / 2
_TURNS: dict[object, Image.Transpose] = {
  2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}  # fmt: skip  # EXIF orientation

# What Pillow's decoders raise on damaged files, besides OSError.
DECODER_ERRORS = (
  OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError,
  struct.error, zlib.error,
)  # fmt: skip


def load_image(path: str | os.PathLike) -> Image.Image:
  """Decodes the image of a file, 8 bits per channel, turned as its EXIF orientation says.

  Greyscale of more than 8 bits is mapped linearly from its own least and greatest value, where Pillow would clip nearly
  everything to white. Values that are not finite, or that fill places without a value, are brought between these two.

  Raises:
    ValueError: the file is missing, damaged, of another format or too large; the message names it.
  """
  try:
    with quiet(), Image.open(path, formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
      image.load()
      return _eight_bit(_upright(image), _fill(image))
  except FileNotFoundError as error:
    raise ValueError(f"image {path}: no such file; check the data directory") from error
  except Image.DecompressionBombError as error:
    raise ValueError(f"image {path}: too large to decode ({error}); scale the file down") from error
  except Image.UnidentifiedImageError as error:
    raise ValueError(f"image {path}: not an image of a known format ({', '.join(FORMATS)})") from error
  except DECODER_ERRORS as error:
    raise ValueError(f"image {path}: damaged or truncated ({error}); fetch the file again") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences Pillow's warnings of metadata that it cannot read, which do not concern the pixels."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", module=r"PIL\.")
    yield


def _upright(image: Image.Image) -> Image.Image:
  """Turns an image; `ImageOps.exif_transpose` would write all of EXIF anew, and raise at a tag that it cannot write."""
  try:
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
  except DECODER_ERRORS:
    return image
  return image if turn is None else image.transpose(turn)


def _fill(image: Image.Image) -> float:
  """Reads the fill value that a TIFF has for places without a value; NaN where it names none."""
  try:
    fill = float(getattr(image, "tag_v2", {}).get(_GDAL_NODATA, math.nan))
    return fill if abs(fill) < _BEYOND else math.nan
  except (TypeError, ValueError):
    return math.nan


def _eight_bit(image: Image.Image, fill: float) -> Image.Image:
  if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
    return image.copy()
  grey = np.asarray(image, dtype=np.float64)
  if image.mode == "F":
    fill = float(np.array(fill, np.float32))  # as rounded as the pixels
  values = grey[(np.abs(grey) < _BEYOND) & (grey != fill)]
  if not values.size:
    raise ValueError("no pixel is a finite number")
  low, high = values.min(), values.max()
  grey = np.clip(np.nan_to_num(grey, nan=low), low, high)
  return Image.fromarray(np.round((grey - low) * (255 / (high - low) if high > low else 0.0)).astype(np.uint8))


def rgb(image: Image.Image) -> Image.Image:
  """Converts an image to RGB; transparency is laid over white."""
  if "A" not in image.getbands() and image.info.get("transparency") is None:
    return image.convert("RGB")
  layer = image.convert("RGBA")
  ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
  return Image.alpha_composite(ground, layer).convert("RGB")


def resized_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
  """Computes (height, width) in multiples of `factor`, near the aspect ratio, with an area inside the two bounds.

  Raises:
    ValueError: one side is more than 200 times the other.
  """
  if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
    raise ValueError(f"an image of {width} x {height} pixels is more than {MAX_ASPECT_RATIO} times longer than wide")
  rows, columns = round(height / factor), round(width / factor)
  area = rows * columns * factor * factor
  if area > max_pixels:
    shrink = math.sqrt(height * width / max_pixels)
    rows = max(1, math.floor(height / shrink / factor))
    columns = max(1, math.floor(width / shrink / factor))
  elif area < min_pixels:
    grow = math.sqrt(min_pixels / (height * width))
    rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
  return rows * factor, columns * factor


def _read_settings(directory: pathlib.Path) -> tuple[pathlib.Path, dict]:
  """Reads the image settings of a checkpoint folder, from where transformers takes them first."""
  for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
    path = directory / name
    if not path.is_file():
      continue
    try:
      settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{path}: not valid JSON ({shown(str(error))})") from error
    settings = settings.get(part) if part and isinstance(settings, dict) else settings
    if isinstance(settings, dict):
      return path, settings
  raise ValueError(f"{directory}: no preprocessor_config.json; copy it from the published checkpoint")


def _areas(settings: dict, defaults: dict[str, int]) -> dict[str, Any]:
  """Reads the bounds of the area after resizing, merged and refused as the reference does.

  Raises:
    ValueError: others than two whole numbers of pixels.
  """
  size = settings.get("size")
  size = defaults if size is None else size
  for old, edge in _BOUNDS if isinstance(size, dict) else ():
    if settings.get(old) is not None:
      size = {key: value for key, value in size.items() if key != old} | {edge: settings[old]}
  if not isinstance(size, dict) or size.keys() != defaults.keys():
    raise ValueError(f"size is {shown(size)}, expected areas in pixels as shortest_edge and longest_edge alone")
  # JSON of other languages writes 1024.0 for a whole number.
  sizes = {edge: int(x) if isinstance(x, float) and x.is_integer() else x for edge, x in size.items()}
  return {old: _checked(f"{edge} or {old}", sizes[edge], defaults[edge]) for old, edge in _BOUNDS}


def _checked(name: str, value: Any, like: int | float | tuple[float, ...]) -> Any:
  """Returns a setting of the type of its default: a whole number, a number or several, for which one may stand.

  Raises:
    ValueError: it is of another type.
  """
  types = (int,) if isinstance(like, int) else (int, float)
  many = isinstance(like, tuple) and isinstance(value, list)
  if not all(type(x) in types and abs(x) < 1e12 for x in (value if many else (value,))):
    wanted = "a list of numbers" if isinstance(like, tuple) else "a whole number" if types == (int,) else "a number"
    raise ValueError(f"{name} is {shown(value)}, expected {wanted}")
  return tuple(value) if many else (value,) * len(like) if isinstance(like, tuple) else value


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
  """Image preprocessing of one checkpoint; the defaults are those of the reference class."""

  patch_size: int = 14
  merge_size: int = 2
  temporal_patch_size: int = 2  # a still image is repeated this often
  min_pixels: int = 56 * 56  # area after resizing
  max_pixels: int = 28 * 28 * 1280
  mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # per channel, after scaling
  std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  scale: float = 1 / 255
  resample: int = int(Image.Resampling.BICUBIC)
  resize: str = "native"  # a key of RESIZES

  def __post_init__(self):
    if self.resize not in RESIZES:
      raise ValueError(f"resize={self.resize!r}; choose from {sorted(RESIZES)}")
    if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
      raise ValueError(
        f"image_mean={shown(self.mean)} and image_std={shown(self.std)} need three channels and no zero std"
      )
    if self.resample not in list(Image.Resampling):
      raise ValueError(f"resample={self.resample} is none of Pillow's filters, 0 to 5")
    if min(self.patch_size, self.merge_size, self.temporal_patch_size, self.min_pixels) < 1:
      raise ValueError("patch_size, merge_size, temporal_patch_size and the smallest area must be positive")
    if self.max_pixels < max(self.min_pixels, self.factor**2):
      raise ValueError(f"max_pixels={self.max_pixels} is below min_pixels={self.min_pixels} or one merged patch")

  @classmethod
  def from_directory(cls, directory: str | os.PathLike, *, resize: str = "native") -> "ImageProcessor":
    """Reads the processor of a checkpoint folder; both styles of area bounds are read.

    Raises:
      ValueError: the settings are missing, unreadable or ask for something that is not supported.
    """
    path, settings = _read_settings(pathlib.Path(directory))
    try:
      for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if settings.get(key, True) is not True:
          raise ValueError(f"{key} is {shown(settings[key])}, expected true: Qwen-VL preprocessing has every step on")
      if settings.get("do_center_crop") and not settings.get("crop_size"):  # with both the reference ignores them
        raise ValueError("do_center_crop is on without crop_size, expected false")
      areas = _areas(settings, {edge: getattr(cls, old) for old, edge in _BOUNDS})
      given = {name: _checked(key, settings[key], getattr(cls, name)) for key, name in _SETTINGS if key in settings}
      return cls(resize=resize, **areas, **given)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error

  @property
  def factor(self) -> int:
    """Pixels per side of one merged image token."""
    return self.patch_size * self.merge_size

  def grid(self, height: int, width: int) -> tuple[int, int, int]:
    """Computes (frames, rows, columns) in patches of an image of this size in pixels."""
    if side := RESIZES[self.resize]:
      height = width = side
    height, width = resized_size(
      height, width, factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels
    )
    return 1, height // self.patch_size, width // self.patch_size

  def pixels(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cuts an image into patches before normalisation, an eighth of the bytes: what a cache should hold.

    Returns:
      uint8[r, 3 * patch * patch], each row channel by channel, and the grid (1, rows, columns) with
      r = rows * columns; rows in merge-block order (rows / merge, columns / merge, merge, merge).
    """
    grid = self.grid(image.height, image.width)
    image = rgb(image)
    if side := RESIZES[self.resize]:
      image = image.resize((side, side), Image.Resampling.BICUBIC)
    size, merge = self.patch_size, self.merge_size
    image = image.resize((grid[2] * size, grid[1] * size), self.resample)
    blocks = np.asarray(image).reshape(grid[1] // merge, merge, size, grid[2] // merge, merge, size, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(grid[1] * grid[2], -1), grid

  def normalised(self, pixels: np.ndarray) -> np.ndarray:
    """Computes float32[r, 3 * temporal * patch * patch] from the uint8 rows of `pixels`."""
    # The order and width of these roundings is the reference's: float64 product, then float32 throughout.
    scaled = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
    table = (scaled[None] - np.array(self.mean, np.float32)[:, None]) / np.array(self.std, np.float32)[:, None]
    rows = pixels.reshape(len(pixels), 3, 1, -1)
    values = np.stack([table[channel][rows[:, channel]] for channel in range(3)], axis=1)
    return np.repeat(values, self.temporal_patch_size, axis=2).reshape(len(pixels), -1)

  def patches(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Computes (float32[r, 3 * temporal * patch * patch], grid), equal to the reference in every bit."""
    pixels, grid = self.pixels(image)
    return self.normalised(pixels), grid


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
    """Returns an absolute path without symbolic links.

    Raises:
      Rejected: it is no text, leaves the root or does not exist.
    """
    if not isinstance(relative, str):
      raise Rejected("malformed_record", f"the image's path is no text but {type(relative).__name__}")
    pure = pathlib.PurePosixPath(relative)
    text = relative.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in relative)
    if pure.is_absolute() or ".." in pure.parts or "\0" in relative or not pure.name or not text:
      raise Rejected("unsafe_path", f"the image's path {relative[:200]!r} is not a path below the root")
    parent = str(pure.parent)
    try:
      if parent not in self._folders:
        self._folders[parent] = os.path.realpath(os.path.join(self._root, parent))
      path = os.path.join(self._folders[parent], pure.name)
      path = os.path.realpath(path) if os.path.islink(path) else path
      if not is_inside(path, self._root):
        raise Rejected("unsafe_path", f"the path {relative!r} leads out of {self._root} by a symbolic link")
      if (self._check or os.path.lexists(path)) and not stat.S_ISREG(os.stat(path).st_mode):
        raise Rejected("missing_image", f"image {relative!r} is not a file")
    except OSError as error:
      raise Rejected("missing_image", f"image {relative[:200]!r} cannot be found ({str(error)[:200]})") from error
    return path


def is_inside(real: str, root: str) -> bool:
  """Tells whether a path lies in a folder or is it; both without symbolic links."""
  return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def store(data: bytes, *, check: bool) -> str:
  """Writes an image that came as bytes into the cache folder, under its SHA-256, once; returns the path.

  Args:
    data: the encoded image.
    check: whether to look at the header and to write; without it only the path is computed.

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
  """Reads (format, width, height) of an image file or its bytes; pixels are not decoded.

  Raises:
    Rejected: unreadable_image, with the reason.
  """
  file = io.BytesIO(source) if isinstance(source, bytes) else source
  try:
    with quiet(), Image.open(file, formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise Rejected("unreadable_image", f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
      return image.format or "?", image.width, image.height
  except FileNotFoundError as error:
    raise Rejected("missing_image", f"there is no such file from {pathlib.Path.cwd()}") from error
  except (*DECODER_ERRORS, Image.DecompressionBombError) as error:
    raise Rejected("unreadable_image", f"damaged, too large or of another format ({str(error)[:200]})") from error


def fingerprint(path: str | os.PathLike) -> str:
  """Computes the SHA-256 of an image file; read once in a process, unless its size or time changes.

  Raises:
    ValueError: the file cannot be read; names it.
  """
  try:
    status = os.stat(path)
    return _fingerprint(os.fspath(path), status.st_size, status.st_mtime_ns)
  except OSError as error:
    raise ValueError(f"image {path}: cannot be read ({error.strerror}); check the data directory") from error


@functools.lru_cache(maxsize=1 << 17)
def _fingerprint(path: str, size: int, time: int) -> str:
  del size, time  # parts of the key
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def repeats(paths: Iterable[str]) -> Mapping[str, str]:
  """Maps each image whose bytes are those of another one to the first that has them.

  Only files of equal size are read. A file that is missing or unreadable equals nothing; nor does the same picture in
  another encoding.

  Args:
    paths: of the images; "first" is by name, not by order.
  """
  by_size: dict[int, list[str]] = collections.defaultdict(list)
  for path in sorted(set(paths)):
    try:
      by_size[os.stat(path).st_size].append(path)
    except OSError:
      continue
  same = {}
  for equal in by_size.values():
    first: dict[str, str] = {}
    for path in equal if len(equal) > 1 else ():
      try:
        content = fingerprint(path)
      except ValueError:
        continue
      if path != first.setdefault(content, path):
        same[path] = first[content]
  return same
