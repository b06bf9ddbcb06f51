"""Safetensors on disk: what a folder holds, slices of it, and a writer that streams one tensor at a time.

The format is an 8-byte length, a JSON header (dtype, shape and byte range of every tensor) and raw bytes. Tensors
are read through a memory map, so a slice touches only its own bytes; bfloat16 needs no torch.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from kepo_jax.models.qwen3_vl.config import shown

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MOST_AXES = 64  # of NumPy


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor of a file."""

  file: pathlib.Path
  dtype: str  # code of the format, for example "BF16"
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file
  complete: bool  # false when the file ends before the tensor does

  def array(self) -> np.ndarray:
    """Returns the tensor as a read-only memory map."""
    return np.memmap(self.file, DTYPES[self.dtype], "r", offset=self.offset, shape=self.shape)


def _header(file: pathlib.Path) -> tuple[dict, int]:
  """Returns the parsed header and the offset of the first tensor's bytes.

  Raises:
    ValueError: the file is not safetensors, or ends inside its header.
  """
  with file.open("rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(file.stat().st_size - 8, _MAX_HEADER):
      raise ValueError(f"{file} is truncated or not a safetensors file; download it again")
    try:
      header = json.loads(stream.read(length))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{file} is not a safetensors file ({shown(str(error))}); download it again") from error
  if not isinstance(header, dict):
    raise ValueError(f"{file} is not a safetensors file (its header is no JSON object); download it again")
  notes = header.pop("__metadata__", None)
  if not (isinstance(notes, dict | None) and all(isinstance(text, str) for text in (notes or {}).values())):
    raise ValueError(f"{file}: __metadata__ in its header is damaged; download it again")
  return header, 8 + length


def tensors_in(file: pathlib.Path) -> dict[str, Stored]:
  """Returns every tensor of one file by name.

  Raises:
    ValueError: the file is not safetensors, or its header is damaged: as the format has it, the bytes of the tensors
      follow each other without a gap and fill the file.
  """
  header, start = _header(file)
  size = file.stat().st_size
  tensors = {}
  for name, entry in header.items():
    if not _is_entry(entry):
      raise ValueError(f"{file}: the entry of {shown(name)} in its header is damaged; download it again")
  filled = 0
  for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
    begin, end = entry["data_offsets"]
    if begin != filled:
      raise ValueError(f"{file}: {shown(name)} begins at byte {begin}, expected {filled}; download the file again")
    filled = end
    tensors[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), start + begin, start + end <= size)
  if start + filled < size:
    raise ValueError(f"{file} has {size - start - filled:,} bytes behind its last tensor; download it again")
  return tensors


def _is_entry(entry: Any) -> bool:
  """Returns whether an entry of a header has a dtype, a shape and a byte range of the matching size."""
  if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
    return False
  shape, offsets = entry.get("shape", ""), entry.get("data_offsets", "")
  if not all(
    isinstance(x, list) and len(x) <= _MOST_AXES and all(type(n) is int and 0 <= n < 2**63 for n in x)
    for x in (shape, offsets)
  ):
    return False
  if len(offsets) != 2 or offsets[0] > offsets[1]:
    return False
  dtype = DTYPES.get(entry["dtype"])  # of others the sizes are not known here, and they are refused by name
  return dtype is None or math.prod(shape) * dtype.itemsize == offsets[1] - offsets[0]


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the weight files of a checkpoint, like transformers: model.safetensors, else those in the index.

  Raises:
    ValueError: there are none, the index is damaged, or files that it names are missing.
  """
  index, single = directory / INDEX, directory / SINGLE
  if os.path.isfile(single):
    if index.exists():
      logging.warning("%s has %s beside %s; the single file is read.", directory, INDEX, SINGLE)
    return [single]
  if not os.path.isfile(index):
    raise ValueError(f"{directory} holds neither a file {SINGLE} nor {INDEX}; only safetensors weights are read")
  try:
    places = json.loads(index.read_text())["weight_map"].values()
    names = sorted({name for name in places if pathlib.PurePath(name).name == name})
    if len(names) < len(set(places)):
      raise ValueError("it names files outside of the folder")
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"{index} has no usable weight_map ({shown(str(error))}); download it again") from error
  missing = [name for name in names if not os.path.isfile(directory / name)]
  if missing:
    raise ValueError(f"{index} names files that do not exist: {few(missing)}; download the folder again")
  return [directory / name for name in names]


def few(names: Sequence[str], show: Callable[[str], str] = shown) -> str:
  """Formats at most five names, and the number of further ones."""
  return ", ".join(map(show, names[:5])) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def stored_tensors(directory: pathlib.Path) -> dict[str, Stored]:
  """Returns every tensor of a checkpoint folder by name."""
  tensors: dict[str, Stored] = {}
  for file in weight_files(directory):
    tensors |= tensors_in(file)
  return tensors


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
    write_file(directory / SINGLE, shards[0], dtype, tensor)
    return
  weight_map: dict[str, str] = {}
  for number, shard in enumerate(shards, start=1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    write_file(directory / name, shard, dtype, tensor)
    weight_map |= dict.fromkeys(shard, name)
  total = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
