"""Images that are the same file under several names."""

import collections
import os
from collections.abc import Iterable, Mapping

from kepo_jax.data import image_files


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
      try:
        content = image_files.fingerprint(path)
      except ValueError:
        continue
      if path != first.setdefault(content, path):
        found[path] = first[content]
  return found
