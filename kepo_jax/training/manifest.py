"""Checksums of a checkpoint, written once it is committed: what a disk or a copy did to it later is seen.

A checkpoint without a manifest does not count: it was committed and the process ended before it was read back.
"""

import concurrent.futures
import hashlib
import json
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


def faults(folder: epath.PathLike) -> list[str]:
  """What is wrong with a checkpoint, in words, by file; empty where it is as it was written."""
  folder = epath.Path(folder)
  try:
    written = json.loads((folder / NAME).read_text())["files"]
  except FileNotFoundError:
    return [f"{NAME} is missing: it was never completed"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    return [f"{NAME} cannot be read ({error})"]
  try:
    with storage.reaching(folder):
      found = _described(folder)
  except OSError as error:
    if storage.is_remote(folder):
      raise  # the way there may be at fault, and what is intact must not be set aside
    return [f"it cannot be read ({error})"]
  return [said for name, entry in sorted(written.items()) if (said := _fault(name, entry, found.get(name)))]


def _fault(name: str, written: dict[str, Any], found: dict[str, Any] | None) -> str:
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
