"""JSON files of unknown origin: regular, inside their folder, of bounded size, and strict about what they hold."""

import json
import os
import pathlib
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from kepo_jax.data.image_files import is_inside
from kepo_jax.data.rules import Rejected

MAX_BYTES = 1 << 30  # of one file; the largest of OmniMedVQA has about 30 MB
_REPEATED = "\0repeated"  # no JSON that a person writes has this key


def checked_file(file: pathlib.Path, root: pathlib.Path | None = None) -> pathlib.Path:
  """A file that may be opened, without symbolic links.

  Args:
    file: the file, named by the user or found in a folder.
    root: folder that it must not leave; None for a file that the user named. In a folder of a Hugging Face cache,
      `<repository>/snapshots/<revision>`, links into `<repository>` are what the cache is made of.

  Raises:
    Rejected: malformed_file: it does not exist, is no regular file, or a link leads out of the root.
  """
  try:
    real = pathlib.Path(os.path.realpath(file, strict=True))
    if not stat.S_ISREG(real.stat().st_mode):
      raise Rejected("malformed_file", "is not a regular file")
  except (OSError, ValueError) as error:
    raise Rejected("malformed_file", f"cannot be opened ({error})") from error
  if root is not None:
    top = pathlib.Path(os.path.realpath(root))
    cache = next((folder.parent for folder in (top, *top.parents) if folder.name == "snapshots"), top)
    if not is_inside(str(real), str(cache)):
      raise Rejected("malformed_file", f"is a symbolic link out of {top}")
  return real


def parsed(file: pathlib.Path, root: pathlib.Path | None = None) -> Any:
  """The content of a JSON file; NaN is null, an object with a repeated key is marked, see `repeated_key`.

  Raises:
    Rejected: malformed_file: it cannot be opened, is too large, not UTF-8, no JSON, or nested too deeply.
  """
  real = checked_file(file, root)
  try:
    if real.stat().st_size > MAX_BYTES:
      raise Rejected("malformed_file", f"has more than {MAX_BYTES} bytes")
    return decoded(real.read_bytes())
  except (OSError, ValueError, RecursionError, MemoryError) as error:
    raise Rejected("malformed_file", f"not readable as JSON in UTF-8 ({str(error)[:200]})") from error


def decoded(data: bytes) -> Any:
  """The content of JSON in UTF-8, as `parsed` gives it.

  Raises:
    ValueError: it is none.
    RecursionError: it is nested too deeply.
  """
  return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant)


def records_of(file: pathlib.Path, root: pathlib.Path | None = None) -> Sequence[Any]:
  """The list of records in a JSON file.

  Raises:
    Rejected: malformed_file, as for `parsed`, or it holds something other than a list.
  """
  records = parsed(file, root)
  if not isinstance(records, list):
    raise Rejected("malformed_file", f"holds a {type(records).__name__}, expected a list of records")
  return records


def checked_record(record: Any) -> Mapping[str, Any]:
  """A record that is a JSON object without repeated keys.

  Raises:
    Rejected: malformed_record.
  """
  if not isinstance(record, dict):
    raise Rejected("malformed_record", f"a record is a JSON object, this is {type(record).__name__}")
  if _REPEATED in record:
    raise Rejected("malformed_record", f"the key {record[_REPEATED]!r} stands there twice"[:120])
  return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    found[_REPEATED] = next(key for key in keys if keys.count(key) > 1)
  return found


def _constant(name: str) -> float | None:
  # Tables that were written back as JSON have NaN where a value is absent.
  return None if name == "NaN" else float(name)
