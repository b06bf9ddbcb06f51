"""Checksums of a checkpoint, written once it is committed, which show what a disk or a copy did to it later.

A checkpoint without a manifest does not count: the process ended before the files were read back.
"""

import concurrent.futures
import hashlib
import json
import os
from typing import Any

from etils import epath

from kepo_jax import storage

NAME = "manifest.json"
_READERS = 8  # files hashed at a time; hashing lets go of the interpreter's lock


def write(folder: epath.PathLike) -> None:
  """Reads every file of a committed checkpoint and writes their sizes and SHA-256 beside them.

  Raises:
    OSError: a file cannot be read or the manifest not be written.
  """
  storage.write_text(epath.Path(folder) / NAME, json.dumps({"files": _digests(epath.Path(folder))}, indent=1) + "\n")


def is_complete(folder: epath.PathLike) -> bool:
  """Returns whether a checkpoint has its manifest."""
  return bool((epath.Path(folder) / NAME).exists())


def faults(folder: epath.PathLike) -> list[str]:
  """Describes what is wrong with the files of a complete checkpoint; empty where they are as they were written.

  Raises:
    OSError: a file is there and cannot be read: the way there may be at fault, and the checkpoint intact.
  """
  folder = epath.Path(folder)
  with storage.reaching(folder):
    data = (folder / NAME).read_bytes()
    actual = _digests(folder)
  try:
    written = json.loads(data)["files"]
    if not all(entry.keys() == {"bytes", "sha256"} for entry in written.values()):
      raise ValueError("an entry without size or checksum")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    return [f"{NAME} cannot be read ({error})"]
  described = []
  for name, entry in sorted(written.items()):
    if name not in actual:
      described.append(f"{name} is missing")
    elif (size := actual[name]["bytes"]) != entry["bytes"]:
      described.append(f"{name} has {size} of {entry['bytes']} bytes")
    elif actual[name] != entry:
      described.append(f"{name} has other bytes than were written")
  return described


def _digests(folder: epath.Path) -> dict[str, dict[str, Any]]:
  paths = {storage.below(path, folder): path for path in storage.files_under(folder)}
  paths.pop(NAME, None)
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    return dict(zip(paths, pool.map(_digest, paths.values()), strict=True))


def _digest(path: epath.Path) -> dict[str, Any]:
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256")
    return {"bytes": file.seek(0, os.SEEK_END), "sha256": digest.hexdigest()}
