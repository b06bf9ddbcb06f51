"""Checksums of a checkpoint, written once it is committed: what a disk or a copy did to it later is seen.

A checkpoint without a manifest does not count: it was committed and the process ended before it was read back.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Mapping
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
  storage.write_text(epath.Path(folder) / NAME, json.dumps({"files": _described(epath.Path(folder))}, indent=1) + "\n")


def is_complete(folder: epath.PathLike) -> bool:
  """Whether a checkpoint has its manifest."""
  return bool((epath.Path(folder) / NAME).exists())


def faults(folder: epath.PathLike) -> list[str]:
  """What is wrong with a complete checkpoint, in words, by file; empty where it is as it was written.

  Raises:
    OSError: a file is there and cannot be read: the way there may be at fault, and the checkpoint intact.
  """
  folder = epath.Path(folder)
  with storage.reaching(folder):
    data = (folder / NAME).read_bytes()
    found = _described(folder)
  try:
    written = json.loads(data)["files"]
    if not all(entry.keys() == {"bytes", "sha256"} for entry in written.values()):
      raise ValueError("an entry without size or checksum")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    return [f"{NAME} cannot be read ({error})"]
  return [said for name, entry in sorted(written.items()) if (said := _fault(name, entry, found.get(name)))]


def _fault(name: str, written: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
  if found is None:
    return f"{name} is missing"
  if found["bytes"] != written["bytes"]:
    return f"{name} has {found['bytes']} of {written['bytes']} bytes"
  return "" if found == written else f"{name} has other bytes than were written"


def _described(folder: epath.Path) -> dict[str, dict[str, Any]]:
  paths = {storage.below(path, folder): path for path in storage.files_under(folder)}
  paths.pop(NAME, None)
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
    return dict(zip(paths, pool.map(_digest, paths.values()), strict=True))


def _digest(path: epath.Path) -> dict[str, Any]:
  digest, size = hashlib.sha256(), 0
  with path.open("rb") as file:
    while block := file.read(1 << 22):
      digest.update(block)
      size += len(block)
  return {"bytes": size, "sha256": digest.hexdigest()}
