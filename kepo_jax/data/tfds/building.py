"""Builds the TFDS data set: `download_and_prepare` with the settings that work without TensorFlow."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable

import tensorflow_datasets as tfds
from etils import epath

from kepo_jax import storage
from kepo_jax.data.tfds.omnimedvqa import omnimedvqa_dataset_builder as builder_module
from kepo_jax.data.tfds.omnimedvqa.omnimedvqa_dataset_builder import Builder, Config

_INFO = "dataset_info.json"  # without it, a folder is no data set


@dataclasses.dataclass(frozen=True)
class Built:
  """A data set on disk."""

  directory: pathlib.Path | epath.Path  # of the version; what `config.data.directory` takes
  questions: dict[str, int]  # split -> number
  bytes: int  # of the records
  reused: bool  # it was there before

  def text(self) -> str:
    """Returns one line for the user."""
    parts = ", ".join(f"{name} {number}" for name, number in self.questions.items())
    return f"{'reused' if self.reused else 'wrote'} {self.directory}: {parts} questions, {self.bytes / 1e6:.1f} MB"


def build(
  data_dir: str | os.PathLike,
  *,
  manual_dir: str | os.PathLike | None = None,
  config: str | Config = builder_module.NAME,
  images_root: str | os.PathLike | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Built:
  """Writes a config of the data set below `data_dir` unless it is there already.

  Args:
    data_dir: TFDS data directory; the data set becomes data_dir/omnimedvqa/<config>/<version>. Where it is remote, the
      data set is written to a temporary folder and copied there.
    manual_dir: folder with the unpacked OmniMedVQA download; the phantom needs none.
    config: "omnimedvqa", "phantom", or what `omnimedvqa_dataset_builder.split_config` gives for other numbers,
      another folder of questions, or what is to be left out.
    images_root: folder that image paths start from, where that is not the root of the download.
    progress: receives (questions written, questions in all) after each question.

  Raises:
    ValueError: no manual folder, or it cannot be read or split; names it and the way out.
    OSError: a remote data_dir cannot be read or written.
  """
  known = [known.name for known in Builder.BUILDER_CONFIGS]
  if isinstance(config, str) and config not in known:
    raise ValueError(f"config {config!r}; choose from {known}")
  if storage.is_remote(data_dir):
    return _build_remote(epath.Path(data_dir), manual_dir, config, images_root, progress)
  builder = Builder(data_dir=os.path.abspath(data_dir), config=config)
  directory = pathlib.Path(builder.data_dir)
  reused = directory.is_dir()
  if not reused and builder.builder_config.name != builder_module.PHANTOM:
    _require(manual_dir)
  builder.progress, builder.images_root = progress, images_root
  settings = tfds.download.DownloadConfig(manual_dir=os.path.abspath(manual_dir) if manual_dir else None)
  try:
    builder.download_and_prepare(download_config=settings, file_format=builder_module.FILE_FORMAT)
  except OSError:
    if reused or not (directory / _INFO).exists():
      raise
    # Another process has built the same meanwhile, and its folder stands in the way of ours.
    builder, reused = Builder(data_dir=os.path.abspath(data_dir), config=config), True
  splits = builder.info.splits
  questions = {name: split.num_examples for name, split in splits.items()}
  return Built(directory, questions, sum(split.num_bytes for split in splits.values()), reused)


def _build_remote(data_dir: epath.Path, manual_dir, config, images_root, progress) -> Built:
  """Builds in a temporary folder and copies the result, unless the data set is there already."""
  storage.check_bucket(data_dir)
  with tempfile.TemporaryDirectory(prefix="kepo_jax-") as local:
    inside = os.path.relpath(Builder(data_dir=local, config=config).data_dir, local)
    target, copy = data_dir / inside, pathlib.Path(local) / inside
    if (target / _INFO).exists():
      copy.mkdir(parents=True)
      for name in (_INFO, "features.json"):  # all that TFDS reads to see that it need not build again
        (copy / name).write_bytes((target / name).read_bytes())
    built = build(local, manual_dir=manual_dir, config=config, images_root=images_root, progress=progress)
    if not built.reused:
      storage.publish(copy, target, last=_INFO)
    return dataclasses.replace(built, directory=target)


def _require(manual_dir: str | os.PathLike | None) -> None:
  if not manual_dir:
    raise ValueError(f"manual_dir is not set: OmniMedVQA is downloaded by hand. {Builder.MANUAL_DOWNLOAD_INSTRUCTIONS}")
  if not os.path.isdir(manual_dir) or not os.listdir(manual_dir):
    state = "is empty" if os.path.isdir(manual_dir) else "no such directory"
    raise ValueError(f"manual_dir {manual_dir}: {state}. {Builder.MANUAL_DOWNLOAD_INSTRUCTIONS}")
