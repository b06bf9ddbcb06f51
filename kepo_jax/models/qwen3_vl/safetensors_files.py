"""Safetensors on disk: what a folder holds, slices of it, and a writer that streams one tensor at a time.

The format is an 8-byte length, a JSON header (dtype, shape and byte range of every tensor) and raw bytes. Tensors
are read through a memory map, so a slice touches only its own bytes; bfloat16 needs no torch.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor of a file."""

  file: pathlib.Path
  dtype: str  # code of the format, for example "BF16"
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file
  complete: bool  # false when the file ends before the tensor does

  def array(self) -> np.ndarray:
    """The tensor as a read-only memory map."""
    return np.memmap(self.file, DTYPES[self.dtype], "r", offset=self.offset, shape=self.shape)


def _header(file: pathlib.Path) -> tuple[dict, int]:
  """The parsed header and the offset of the first tensor's bytes.

  Raises:
    ValueError: the file is not safetensors, or ends inside its header.
  """
  with file.open("rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= file.stat().st_size - 8:
      raise ValueError(f"{file} is truncated or not a safetensors file")
    try:
      header = json.loads(stream.read(length))
    except ValueError as error:
      raise ValueError(f"{file} is not a safetensors file: {error}") from error
  header.pop("__metadata__", None)
  return header, 8 + length


def tensors_in(file: pathlib.Path) -> dict[str, Stored]:
  """Every tensor of one file by name."""
  header, start = _header(file)
  size = file.stat().st_size
  found = {}
  for name, entry in header.items():
    begin, end = entry["data_offsets"]
    found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), start + begin, start + end <= size)
  return found


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint: those its index names, else model.safetensors.

  Raises:
    ValueError: there are none, or files that the index names are missing.
  """
  index = directory / INDEX
  single = directory / "model.safetensors"
  if index.exists():
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
      raise ValueError(f"{index} names files that do not exist: {', '.join(missing)}; download the folder again")
    return [directory / name for name in names]
  if single.exists():
    return [single]
  raise ValueError(f"{directory} holds neither model.safetensors nor {INDEX}; only safetensors weights are read")


def stored_tensors(directory: pathlib.Path) -> dict[str, Stored]:
  """Every tensor of a checkpoint folder by name."""
  found: dict[str, Stored] = {}
  for file in weight_files(directory):
    found |= tensors_in(file)
  return found


def write_file(
  file: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: np.dtype,
  tensor: Callable[[str], np.ndarray],
) -> None:
  """Writes one file.

  Args:
    file: its path.
    shapes: tensors in the order of writing.
    dtype: of every tensor.
    tensor: gives the array of a name; asked for once, just before it is written.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, shape in shapes.items():
    size = int(np.prod(shape)) * dtype.itemsize
    header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
    offset += size
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)  # data starts at a multiple of 8 bytes
  with file.open("wb") as stream:
    stream.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in shapes:
      stream.write(np.ascontiguousarray(tensor(name)).view(np.uint8).data)


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, most: int) -> Iterable[dict[str, tuple[int, ...]]]:
  shard: dict[str, tuple[int, ...]] = {}
  size = 0
  for name, shape in shapes.items():
    nbytes = int(np.prod(shape)) * itemsize
    if shard and size + nbytes > most:
      yield shard
      shard, size = {}, 0
    shard[name] = shape
    size += nbytes
  yield shard


def write(
  directory: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  tensor: Callable[[str], np.ndarray],
  *,
  dtype: np.dtype,
  max_shard_bytes: int,
) -> None:
  """Writes a checkpoint in files of at most `max_shard_bytes` bytes of tensors, with an index if several.

  Args:
    directory: an existing folder.
    shapes: tensors in the order of writing.
    tensor: gives the array of a name, of its shape and `dtype`; asked for once, just before it is written.
    dtype: of every tensor.
    max_shard_bytes: a tensor that is larger gets a file of its own.
  """
  shards = list(_shards(shapes, dtype.itemsize, max_shard_bytes))
  if len(shards) == 1:
    write_file(directory / "model.safetensors", shards[0], dtype, tensor)
    return
  weight_map: dict[str, str] = {}
  for number, shard in enumerate(shards, start=1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    write_file(directory / name, shard, dtype, tensor)
    weight_map |= dict.fromkeys(shard, name)
  total = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
