"""JSON files of unknown origin: regular, inside their folder, of bounded size, and strict about what they hold."""

import json
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kepo_jax.data.cleaning import Rejected, Summary
from kepo_jax.data.images import is_inside
from kepo_jax.types import Example

ENDINGS = (".json", ".jsonl")  # a list of records, or one record per line; in either case
MAX_BYTES = 1 << 30  # of one file; the largest of OmniMedVQA has about 30 MB
# No JSON that a person writes has these keys; they mark what `checked_record` refuses.
_REPEATED, _BROKEN = "\0repeated", "\0broken"
_ERRORS = (ValueError, RecursionError, MemoryError)  # of a parser that is given anything
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
_NAMED = 8  # skipped files that a summary names


def checked_file(file: pathlib.Path, root: pathlib.Path | None = None) -> pathlib.Path:
  """Returns a file that may be opened, without symbolic links.

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


def has_ending(file: pathlib.Path, endings: Sequence[str]) -> bool:
  """Tells whether a file's name ends in one of some endings, in capitals or not."""
  return file.suffix.lower() in endings


def below(top: pathlib.Path, endings: Sequence[str]) -> list[pathlib.Path]:
  """Lists what has one of some endings in a folder and below, sorted; links to folders are not followed."""
  return sorted(path for path in top.rglob("*") if has_ending(path, endings))


def count_skipped(top: pathlib.Path, read: Iterable[pathlib.Path], summary: Summary) -> None:
  """Counts the files of a folder that are not read, and names the first of them.

  Images are left out, since records name them, and what is hidden.

  Args:
    top: the folder.
    read: files that are read, or belong to the format.
    summary: where they are counted.
  """
  known = set(read)
  places = (path.relative_to(top) for path in top.rglob("*") if path not in known)
  skipped = sorted(
    str(place)
    for place in places
    if not has_ending(place, _IMAGES) and not any(part.startswith(".") for part in place.parts)
    if (top / place).is_file()
  )
  names = ", ".join(skipped[:_NAMED]) + (f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else "")
  for _ in skipped:
    summary.count("file_skipped", f"{top}: {names}")


def parsed(file: pathlib.Path, root: pathlib.Path | None = None) -> Any:
  """Parses a JSON file; NaN is null, an object with a repeated key is marked for `checked_record`.

  Raises:
    Rejected: malformed_file: it cannot be opened, is too large, not UTF-8, no JSON, or nested too deeply.
  """
  try:
    return _decoded(_text(file, root))
  except _ERRORS as error:
    raise Rejected("malformed_file", f"not readable as JSON in UTF-8 ({str(error)[:200]})") from error


def _text(file: pathlib.Path, root: pathlib.Path | None) -> str:
  real = checked_file(file, root)
  try:
    if real.stat().st_size > MAX_BYTES:
      raise Rejected("malformed_file", f"has more than {MAX_BYTES} bytes")
    return real.read_bytes().decode("utf-8-sig")
  except (OSError, *_ERRORS) as error:
    raise Rejected("malformed_file", f"not readable as JSON in UTF-8 ({str(error)[:200]})") from error


def _decoded(text: str) -> Any:
  # Tables that were written back as JSON have NaN where a value is absent.
  return json.loads(text, object_pairs_hook=_object, parse_constant=lambda name: None if name == "NaN" else float(name))


def records_of(file: pathlib.Path, root: pathlib.Path | None = None) -> Sequence[Any]:
  """Reads the records of a file: a JSON list, or with the ending .jsonl one record per line, empty lines left out.

  A line that is no JSON becomes a record that `checked_record` refuses, so that the others can be read.

  Raises:
    Rejected: malformed_file, as for `parsed`, or it holds something other than a list.
  """
  if has_ending(file, (".jsonl",)):
    # Not splitlines: JSON texts may hold other separators of lines as they are.
    lines = enumerate(_text(file, root).split("\n"), start=1)
    return [_line(line, number) for number, line in lines if line.strip()]
  records = parsed(file, root)
  if not isinstance(records, list):
    raise Rejected("malformed_file", f"holds a {type(records).__name__}, expected a list of records")
  return records


def files_of(
  files: Iterable[pathlib.Path], root: pathlib.Path | None, summary: Summary
) -> Iterator[tuple[pathlib.Path, Sequence[Any]]]:
  """Yields each file with its records; counts files that cannot be read."""
  for file in files:
    try:
      records = records_of(file, root)
    except Rejected as rejected:
      summary.count(rejected.rule, f"{file}: {rejected}")
      continue
    yield file, records


def converted(
  records: Iterable[Any],
  file: pathlib.Path,
  summary: Summary,
  convert: Callable[[Mapping[str, Any], int, str], Example],
  *,
  first: int = 0,
) -> Iterator[Example]:
  """Yields the examples of usable records and counts the others.

  Args:
    records: of one file.
    file: the file, for messages.
    summary: where records and rules are counted.
    convert: (record, its number, file and number for messages) -> example; raises Rejected.
    first: number of the first record.
  """
  for number, record in enumerate(records, start=first):
    summary.records += 1
    name = record.get("question_id") if isinstance(record, dict) else None
    place = f"{file}, record {number}" + (f" {ascii(name)[:80]}" if isinstance(name, str) and name else "")
    try:
      yield convert(checked_record(record), number, place)
    except Rejected as rejected:
      summary.count(rejected.rule, f"{place}: {rejected}")


def checked_record(record: Any) -> Mapping[str, Any]:
  """Returns a record that is a JSON object without repeated keys.

  Raises:
    Rejected: malformed_record.
  """
  if not isinstance(record, dict):
    raise Rejected("malformed_record", f"a record is a JSON object, this is {type(record).__name__}")
  if _BROKEN in record:
    raise Rejected("malformed_record", record[_BROKEN])
  if _REPEATED in record:
    raise Rejected("malformed_record", f"the key {record[_REPEATED]!r} stands there twice"[:120])
  return record


def _line(text: str, number: int) -> Any:
  try:
    return _decoded(text)
  except _ERRORS as error:
    return {_BROKEN: f"line {number} is not readable as JSON ({str(error)[:200]})"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  record = dict(pairs)
  if len(record) < len(pairs):
    keys = [key for key, _ in pairs]
    record[_REPEATED] = next(key for key in keys if keys.count(key) > 1)
  return record
