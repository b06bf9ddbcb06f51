"""Files that say which questions the parts of a split hold and what they are, to check later data against.

Ids alone do not tell that the data behind them have changed, so each question has a digest of everything that it is.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from kepo_jax import storage
from kepo_jax.data import images as images_lib
from kepo_jax.data.cleaning import Rejected
from kepo_jax.data.readers import json_files
from kepo_jax.types import Example

DIGITS = 12  # of a question's digest that a file holds: enough to name what has changed
_NAMED = 3  # questions that a message names


def contents(examples: Iterable[Example]) -> dict[str, str]:
  """Id of each question -> SHA-256, in hex, of everything that it is.

  That is every field, where an image counts with the bytes of its file: not with its path, so that data that were
  moved are still the same.

  Raises:
    ValueError: an image cannot be read; names it and the question.
  """
  images: dict[str, str] = {}
  found = {}
  for example in examples:
    for path in example.images:
      if path not in images:
        try:
          images[path] = images_lib.fingerprint(path)
        except ValueError as error:
          raise ValueError(f"question {example.id}: {error}") from error
    content = dataclasses.asdict(example) | {"images": [images[path] for path in example.images]}
    found[example.id] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
  return found


def ids_digest(ids: Mapping[str, Sequence[str]]) -> str:
  """SHA-256, in hex, over the ids of all parts."""
  lines = (f"{name}\t{one}\n" for name, part in ids.items() for one in part)
  return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def identity(parts: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
  """The fields of a file that depend on the questions.

  Args:
    parts: name -> questions.

  Returns:
    counts, sorted ids of each part and their SHA-256, and in the order of the ids the first digits of each question's
    digest, with the SHA-256 over all digests in full.

  Raises:
    ValueError: an image cannot be read.
  """
  ids = {name: sorted(example.id for example in part) for name, part in parts.items()}
  digests = {name: contents(part) for name, part in parts.items()}
  return {
    "counts": {name: len(part) for name, part in ids.items()},
    "sha256": ids_digest(ids),
    "content_sha256": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
    "ids": ids,
    "contents": {name: [digests[name][one][:DIGITS] for one in part] for name, part in ids.items()},
  }


def write(path: epath.PathLike, record: Mapping[str, Any]) -> None:
  """Writes `identity` and what else is to be known, as JSON.

  Raises:
    ValueError: the file exists and holds something else; names the questions that have changed.
  """
  text, target = json.dumps(record, indent=1) + "\n", epath.Path(path)
  if target.exists() and target.read_bytes() != text.encode():
    raise ValueError(f"{target}: exists and {_difference(target, record)}")
  storage.write_text(target, text)


def stored(path: epath.PathLike, names: Sequence[str]) -> dict[str, Any]:
  """The fields of `identity` in a file, consistent in themselves.

  Args:
    path: the file.
    names: of its parts.

  Raises:
    ValueError: the file is damaged or was changed, or lists an id twice.
  """
  try:
    remote = storage.is_remote(path)
    record = json_files.decoded(epath.Path(path).read_text()) if remote else json_files.parsed(pathlib.Path(path))
    lists = {field: {name: record[field][name] for name in names} for field in ("ids", "contents")}
    parts = [part for each in lists.values() for part in each.values()]
    if not all(isinstance(part, list) and all(isinstance(one, str) for one in part) for part in parts):
      raise TypeError("ids and contents are lists of texts")
    counts = {name: record["counts"][name] for name in names}
    said = {field: record[field] for field in ("sha256", "content_sha256")}
  except (Rejected, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: no list of a split's ids ({error})") from error
  ids, sizes = lists["ids"], [{name: len(part) for name, part in each.items()} for each in lists.values()]
  if said["sha256"] != ids_digest(ids) or any(size != counts for size in sizes):
    raise ValueError(f"{path}: its ids do not have the counts {counts} and the SHA-256 {said['sha256']} that it states")
  listed = [one for part in ids.values() for one in part]
  if len(set(listed)) < len(listed):
    raise ValueError(f"{path}: {len(listed) - len(set(listed))} ids stand there twice")
  return {"counts": counts} | said | lists


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """In words which questions are not what they were; "" if all are.

  Args:
    before: fields of `identity`.
    now: the same, with the same ids.
  """
  changed = [
    one
    for name, ids in now["ids"].items()
    for one, old, new in zip(ids, before["contents"][name], now["contents"][name], strict=True)
    if old != new
  ]
  if not changed and before["content_sha256"] == now["content_sha256"]:
    return ""
  which = f"{len(changed)} of its {sum(now['counts'].values())} questions have changed"
  which = f"{which} ({_named(changed)})" if changed else "its content_sha256 is another"
  return f"{which}: text, options, answer, kind or image are not what they were"


def _difference(path: epath.Path, record: Mapping[str, Any]) -> str:
  """In words what a file holds instead of a record, and the way out."""
  way_out = "choose another name, or remove it"
  try:
    before = stored(path, list(record["ids"]))
  except ValueError:
    return f"holds something else; {way_out}"
  if before["ids"] != record["ids"]:
    here, there = ({one for part in each["ids"].values() for one in part} for each in (before, record))
    apart = sorted(here ^ there)
    which = f" ({_named(apart)} {'is' if len(apart) == 1 else 'are'} not in both)" if apart else ""
    return f"holds another split{which}; {way_out}"
  if changed := changes(before, record):
    return f"{changed}; restore the data, or {way_out}"
  return f"holds these questions by another rule or seed; {way_out}"


def _named(ids: Sequence[str]) -> str:
  """The first of some ids."""
  more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
  return ", ".join(map(repr, ids[:_NAMED])) + more
