"""Images that are the same file under several names."""

import collections
import hashlib
import os
from collections.abc import Iterable, Mapping


def digest(path: str) -> str:
  """SHA-256 of a file's bytes; "" if it cannot be read."""
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError:
    return ""


def repeats(paths: Iterable[str]) -> Mapping[str, str]:
  """Images whose bytes are those of another one, each with the first that has them.

  Only files of equal size are read. What is not there, or cannot be read, equals nothing; nor does the same picture
  that was written in another way.

  Args:
    paths: of the images; "first" is by name, not by order.
  """
  by_size: dict[int, list[str]] = collections.defaultdict(list)
  for path in sorted(set(paths)):
    try:
      by_size[os.stat(path).st_size].append(path)
    except OSError:
      continue
  found = {}
  for equal in by_size.values():
    first: dict[str, str] = {}
    for path in equal if len(equal) > 1 else ():
      if content := digest(path):
        if path != first.setdefault(content, path):
          found[path] = first[content]
  return found
