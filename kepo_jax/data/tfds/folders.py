"""Finds what TensorFlow Datasets has built; imports nothing of it, so that other data are read as fast as before."""

import os
import pathlib

NAME = "omnimedvqa"  # of the data set, and of its default config


def find(directory: str | os.PathLike, config: str = "*") -> pathlib.Path | None:
  """Finds the folder of one built version: the directory itself, or the only one inside it as a TFDS data directory.

  Args:
    directory: DIR/omnimedvqa/<config>/<version>, or DIR.
    config: name of a config, to choose among several in DIR.

  Returns:
    None if nothing is built there.

  Raises:
    ValueError: several are built there, or one in a format that cannot be read without TensorFlow.
  """
  top = pathlib.Path(directory)
  found = [top] if _is_version(top) else sorted(filter(_is_version, top.glob(f"{NAME}/{config}/*")))
  if len(found) > 1:
    raise ValueError(f"{top} holds several built data sets ({', '.join(map(str, found))}); name one of them")
  if found and not any(found[0].glob("*.array_record*")):
    raise ValueError(f"{found[0]}: holds no array_record files; build the data set with file_format='array_record'")
  return found[0] if found else None


def _is_version(folder: pathlib.Path) -> bool:
  return all((folder / name).is_file() for name in ("dataset_info.json", "features.json"))
