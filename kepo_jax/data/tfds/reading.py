"""Reads a built data set as questions whose images are files, as the rest of the project takes them."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from kepo_jax.data import images, splits
from kepo_jax.data.cleaning import Rejected
from kepo_jax.data.tfds import folders, records
from kepo_jax.models.qwen3_vl.config import shown
from kepo_jax.types import Example

# Raised for a file that is cut off, overwritten or exchanged, by array_record and by TFDS.
_READ_ERRORS = (RuntimeError, DecodeError, ValueError, TypeError, IndexError, KeyError, AttributeError)
_AGAIN = "delete the folder and build the data set again"


class EncodedImages(tfds.decode.Decoder):
  """Leaves the images of a record as bytes; `SkipDecoding` of TFDS does so for a single image, not for a sequence."""

  def decode_example(self, example):
    """Returns the bytes of one image."""
    return example

  def decode_batch_example_np(self, example):
    """Returns the bytes of each image of a record."""
    return example


def read(data_dir: str | os.PathLike, config: str = folders.NAME, split: str = "train") -> list[Example]:
  """Reads the questions of a split in stored order; each image is written once into the project's cache folder.

  Args:
    data_dir: TFDS data directory, or the folder of one built version, which then says the config itself.
    config: name of the config.
    split: "train", "validation" or "test".

  Raises:
    ValueError: no such data set or split, or it is damaged or has other records; names the folder or the question.
    OSError: the cache folder cannot be written.
  """
  return _read(_builder(data_dir, config), split)


def read_splits(data_dir: str | os.PathLike, config: str = "*") -> dict[str, list[Example]]:
  """Reads each of `splits.SPLITS`; a part that was built without any question is empty. Errors are those of `read`."""
  builder = _builder(data_dir, config)
  return {name: _read(builder, name) if name in builder.info.splits else [] for name in splits.SPLITS}


def _builder(data_dir: str | os.PathLike, config: str) -> tfds.core.DatasetBuilder:
  folder = folders.find(data_dir, config)
  if folder is None:
    raise ValueError(f"{data_dir}: no built config {config!r}; run python -m experiments.build_tfds")
  _check_features(folder)
  try:
    builder = tfds.builder_from_directory(folder)
    listed = {pathlib.Path(path) for split in builder.info.splits.values() for path in split.filepaths}
    files = pathlib.Path(builder.data_dir).glob("*.array_record*")
    if left_out := sorted(path.name for path in files if path not in listed):
      raise ValueError(f"splits leave out {shown(left_out[0])}, {len(left_out)} files in all")
    return builder
  except (*_READ_ERRORS, OSError, json_format.Error) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{folder / 'dataset_info.json'}: not readable ({reason}); {_AGAIN}") from error


def _read(builder: tfds.core.DatasetBuilder, split: str) -> list[Example]:
  if split not in builder.info.splits:
    raise ValueError(f"{builder.data_dir}: no split {split!r}, it has {sorted(builder.info.splits)}")
  info = builder.info.splits[split]
  files = [pathlib.Path(path) for path in info.filepaths]
  if missing := [path.name for path in files if not path.is_file()]:
    raise ValueError(f"{builder.data_dir}: {missing[0]} is missing ({len(missing)} in all); build the data set again")
  try:
    lengths = [array_record_module.ArrayRecordReader(str(path)).num_records() for path in files]
    if lengths != (stated := list(info.shard_lengths)):
      raise ValueError(f"shardLengths in dataset_info.json is {shown(stated)}, and the files hold {shown(lengths)}")
    source = builder.as_data_source(split, decoders={"images": EncodedImages()})
    return [
      records.example(fields, [images.store(image, check=True) for image in fields["images"]]) for fields in source
    ]
  except (*_READ_ERRORS, Rejected) as error:
    reason = " ".join(str(error).split())[:300]
    raise ValueError(f"{builder.data_dir}, {split}: cannot be read ({reason}); {_AGAIN}") from error


def _check_features(folder: pathlib.Path) -> None:
  """Refuses records of another kind; TFDS would import whatever class their description names."""
  path, features = folder / "features.json", records.features().to_json()
  expected = {*_classes({"pythonClassName": features["type"], "featuresDict": features["content"]})}
  try:
    classes = {*_classes(json.loads(path.read_text(encoding="utf-8")))}
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: not the description of a TFDS data set ({repr(error)[:200]})") from error
  if differing := sorted(classes ^ expected):
    raise ValueError(f"{path}: describes other records ({str(differing)[:300]}); build the data set again")


def _classes(description: Any, place: str = "") -> Iterator[str]:
  """Yields the place and class of every feature in a description."""
  if isinstance(description, dict):
    for key, value in description.items():
      if key == "pythonClassName":
        yield f"{place}: {value}"
      else:
        yield from _classes(value, f"{place}/{key}")
