"""Reads a built data set as questions whose images are files, as the rest of the project takes them."""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

# What comes of a file that is cut off, overwritten or exchanged: array_record's own, and what TFDS makes of no record.
_READ_ERRORS = (RuntimeError, DecodeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


class EncodedImages(tfds.decode.Decoder):
  """Leaves the images of a record as bytes; `SkipDecoding` of TFDS does so for a single image, not for a sequence."""

  def decode_example(self, example):
    """The bytes of one image."""
    return example

  def decode_batch_example_np(self, example):
    """The bytes of each image of a record."""
    return example


def source(
  data_dir: str | os.PathLike, config: str = folders.NAME, split: str = "train"
) -> Sequence[Mapping[str, Any]]:
  """Random access to the records of a split, strings and images as bytes.

  Args:
    data_dir: TFDS data directory, or the folder of one built version, which then says the config itself.
    config: name of the config.
    split: "train", "validation" or "test".

  Raises:
    ValueError: no such data set or split, or the records are of another kind; names the folder.
  """
  return _source(_builder(data_dir, config), split)


def read(data_dir: str | os.PathLike, config: str = folders.NAME, split: str = "train") -> list[Example]:
  """The questions of a split in stored order; arguments and errors are those of `source`."""
  return examples_from(source(data_dir, config, split))


def read_splits(data_dir: str | os.PathLike, config: str = "*") -> dict[str, list[Example]]:
  """Name of each of `splits.SPLITS` -> questions; a part that was built without any is empty."""
  builder = _builder(data_dir, config)
  return {name: examples_from(_source(builder, name)) if name in builder.info.splits else [] for name in splits.SPLITS}


def examples_from(source: Iterable[Mapping[str, Any]]) -> list[Example]:
  """Questions of records; each image is written once into the project's cache folder, named by its content.

  Args:
    source: what the function `source` gives, or any data source of the builder opened with
      `decoders={"images": EncodedImages()}`.

  Raises:
    ValueError: a record cannot be read, which names the folder; an image was decoded on the way, by which its file is
      lost, or is none, which names the question.
    OSError: the cache folder cannot be written.
  """
  return [records.example(each, [_stored(image, each["id"]) for image in each["images"]]) for each in _records(source)]


def _records(source: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
  number = 0
  try:
    for number, each in enumerate(source):
      yield each
  except _READ_ERRORS as error:
    info = getattr(source, "dataset_info", None)
    where = f"{info.data_dir}, {getattr(source, 'split', '')}" if info else "the data source"
    raise ValueError(
      f"{where}: record {number} or the next cannot be read ({str(error)[:200]}); delete the folder and build the data "
      "set again"
    ) from error


def _stored(image: Any, name: bytes) -> str:
  if not isinstance(image, bytes):
    raise ValueError(
      f"question {name.decode()}: its images are decoded; open the data source with "
      'decoders={"images": EncodedImages()}'
    )
  try:
    return images.store(image, check=True)
  except Rejected as rejected:
    raise ValueError(f"question {name.decode()}: {rejected}; build the data set again") from rejected


def _builder(data_dir: str | os.PathLike, config: str) -> tfds.core.DatasetBuilder:
  folder = folders.find(data_dir, config)
  if folder is None:
    raise ValueError(f"{data_dir}: no built config {config!r}; run python -m experiments.build_tfds")
  _check_features(folder)
  try:
    builder = tfds.builder_from_directory(folder)
    told = {pathlib.Path(path) for split in builder.info.splits.values() for path in split.filepaths}
    if left_out := sorted(
      path.name for path in pathlib.Path(builder.data_dir).glob("*.array_record*") if path not in told
    ):
      raise ValueError(f"splits leave out {shown(left_out[0])}, {len(left_out)} files in all")
    return builder
  except (*_READ_ERRORS, OSError, json_format.Error) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(
      f"{folder / 'dataset_info.json'}: not readable ({reason}); delete the folder and build the data set again"
    ) from error


def _source(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[Mapping[str, Any]]:
  if split not in builder.info.splits:
    raise ValueError(f"{builder.data_dir}: no split {split!r}, it has {sorted(builder.info.splits)}")
  files = [pathlib.Path(path) for path in builder.info.splits[split].filepaths]
  if missing := [path.name for path in files if not path.is_file()]:
    raise ValueError(f"{builder.data_dir}: {missing[0]} is missing ({len(missing)} in all); build the data set again")
  try:
    held = [array_record_module.ArrayRecordReader(str(path)).num_records() for path in files]
    if held != (told := list(builder.info.splits[split].shard_lengths)):
      raise ValueError(f"shardLengths in dataset_info.json is {shown(told)}, and the files hold {shown(held)} records")
    return builder.as_data_source(split, decoders={"images": EncodedImages()})
  except (RuntimeError, ValueError) as error:  # RuntimeError: what array_record raises on a file that is cut off
    raise ValueError(
      f"{builder.data_dir}, {split}: cannot be read ({error}); delete the folder and build the data set again"
    ) from error


def _check_features(folder: pathlib.Path) -> None:
  """Refuses records of another kind; TFDS would import whatever class their description names."""
  expected = _classes(records.features())
  path = folder / "features.json"
  try:
    found = _described_classes(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
    raise ValueError(f"{path}: not the description of a TFDS data set ({repr(error)[:200]})") from error
  if found != expected:
    told = str(sorted(found))[:300]
    raise ValueError(f"{path}: describes {told}, not the records of this version; build the data set again")


def _classes(feature: tfds.features.FeatureConnector, name: str = "") -> set[str]:
  found = {f"{name}: {type(feature).__module__}.{type(feature).__name__}"}
  if isinstance(feature, tfds.features.FeaturesDict):
    return found.union(*(_classes(inner, f"{name}/{each}") for each, inner in feature.items()))
  return found | _classes(feature.feature, f"{name}[]") if isinstance(feature, tfds.features.Sequence) else found


def _described_classes(description: Mapping[str, Any], name: str = "") -> set[str]:
  found = {f"{name}: {description['pythonClassName']}"}
  if "sequence" in description:
    found |= _described_classes(description["sequence"]["feature"], f"{name}[]")
  features = description.get("featuresDict", {}).get("features", {})
  return found.union(*(_described_classes(inner, f"{name}/{each}") for each, inner in features.items()))
