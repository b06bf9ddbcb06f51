"""The TFDS builder `omnimedvqa`: the open-access questions by the project's split, and the embedded phantom."""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from kepo_jax.data import splits
from kepo_jax.data.phantom import build
from kepo_jax.data.readers import omnimedvqa
from kepo_jax.data.tfds import folders, records
from kepo_jax.types import Example

NAME, PHANTOM = folders.NAME, "phantom"  # the configs
FILE_FORMAT = "array_record"  # the one that is written and read without TensorFlow
NUMBERS = ("train_modality", "train_items", "validation_items", "test_items", "split_seed")
WORDS = ("access", "lenient")  # fields whose default the name of a config leaves out
SHARD_BYTES = 256 << 20  # of image files per shard; the writer holds one shard in memory


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
  """The fields of `config.DataConfig` that `splits.split_by_modality` reads; the phantom is split already."""

  train_modality: str = "MRI"
  train_items: int = 600
  validation_items: int = 40  # of each modality
  test_items: int = 300  # of each modality
  split_seed: int = 0
  access: str = "Open-access"  # folder below QA_information
  lenient: bool = False  # leave out and count what cannot be used, with other questions in its place


def split_config(**fields: Any) -> Config:
  """Returns a config of the manual download whose name tells its fields; the default one if none differs."""
  default = Builder.BUILDER_CONFIGS[0]
  config = dataclasses.replace(default, **fields)
  if all(getattr(config, name) == getattr(default, name) for name in (*NUMBERS, *WORDS)):
    return default
  values = [getattr(config, name) for name in NUMBERS]
  values += [config.access] * (config.access != default.access) + ["lenient"] * config.lenient
  # The name becomes a folder, and the same numbers must find it again.
  name = "-".join(re.sub(r"[^\w.]+", "_", str(value)) for value in (NAME, *values))
  return dataclasses.replace(config, name=name, description=_description(config))


def _description(config: Config) -> str:
  return (
    f"{config.access} part of OmniMedVQA: {config.train_items} {config.train_modality} questions to train, "
    f"{config.validation_items} of each modality to validate and {config.test_items} to test; seed {config.split_seed}."
    + " What could not be used was left out."
    * config.lenient
  )


class Builder(tfds.core.ShardBasedBuilder):
  """Questions of medical images with lettered options.

  Shard-based, because the writer of `GeneratorBasedBuilder` sorts by hash and, beyond 1 GB of a split, needs
  TensorFlow to put records aside; this one keeps the order of the split and holds one shard at a time.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First version."}
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "Download OmniMedVQA.zip from https://huggingface.co/datasets/foreverbeliever/OmniMedVQA, unpack it, and pass the "
    "folder that holds QA_information and Images (or the folder around it) as manual_dir. The sources have licences "
    "of their own; see the data set's card."
  )
  BUILDER_CONFIGS = [
    Config(name=NAME, description=_description(Config(NAME))),
    Config(
      name=PHANTOM,
      version=f"{build.VERSION}.0.0",
      description="PhantomVQA, drawn by kepo_jax: the same splits and fields without a download.",
    ),
  ]
  DEFAULT_BUILDER_CONFIG_NAME = NAME

  images_root: str | os.PathLike | None = None  # that image paths start from, where it is not the root
  progress: Callable[[int, int], None] | None = None  # receives (questions written, questions in all)

  def __init__(self, *, file_format: Any = FILE_FORMAT, **arguments: Any):
    """Sets the file format that needs no TensorFlow as the default."""
    super().__init__(file_format=file_format, **arguments)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=records.features(),
      homepage="https://huggingface.co/datasets/foreverbeliever/OmniMedVQA",
      supervised_keys=None,
      disable_shuffling=True,
    )

  def _shard_iterators_per_split(
    self, dl_manager: tfds.download.DownloadManager
  ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[str, dict[str, Any]]]]]]:
    parts = self._phantom() if self.builder_config.name == PHANTOM else self._manual(dl_manager.manual_dir)
    total = sum(map(len, parts.values()))
    written = itertools.count(1)

    def keyed_records(examples: Sequence[Example]) -> Iterator[tuple[str, dict[str, Any]]]:
      for example in examples:
        yield example.id, records.record(example)
        if self.progress:
          self.progress(next(written), total)

    # A split without questions cannot be written; readers take its absence for that.
    return {
      name: [functools.partial(keyed_records, shard) for shard in shards(part)] for name, part in parts.items() if part
    }

  def _manual(self, directory: os.PathLike) -> dict[str, list[Example]]:
    config = self.builder_config
    examples = _read(directory, access=config.access, image_root=self.images_root, lenient=config.lenient)
    return splits.split_by_modality(examples, config)

  def _phantom(self) -> dict[str, list[Example]]:
    return {name: _read(root) for name, root in splits.phantom_roots().items()}


def shards(examples: Sequence[Example], limit: int = SHARD_BYTES) -> list[list[Example]]:
  """Returns consecutive runs of questions whose image files sum to about `limit` bytes."""
  runs: list[list[Example]] = []
  room = 0
  for example in examples:
    if room <= 0:
      runs.append([])
      room = limit
    runs[-1].append(example)
    room -= sum(os.path.getsize(path) for path in example.images)
  return runs


def _read(root: str | os.PathLike, **settings: Any) -> list[Example]:
  examples, summary = omnimedvqa.read(root, **settings)
  logging.log(logging.WARNING if summary.dropped else logging.INFO, "%s", summary.text())
  return examples
