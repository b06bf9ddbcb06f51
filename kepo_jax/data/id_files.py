"""Files that list the questions of each part of a split, to check later data against.

Ids do not change when the data behind them do, so each question also has a digest of all its content.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from kepo_jax import storage
from kepo_jax.data import images as images_lib
from kepo_jax.types import Example

DIGITS = 12  # of a question's digest that a file holds: enough to name the questions that have changed
_NAMED = 3  # questions that a message names

Parts = Mapping[str, Sequence[Example]]  # name of a part -> its questions


def write(parts: Parts, path: epath.PathLike, *, rule: str, seed: int) -> str:
  """Writes the ids and digests of the questions of a split, as JSON.

  Args:
    parts: name -> questions.
    path: the file.
    rule: how the split was made, in words or by name, for example "mri600".
    seed: of the rule.

  Returns:
    the SHA-256 over the content of all questions.

  Raises:
    ValueError: the file exists and holds something else; names the questions that have changed. Or an image cannot be
      read.
  """
  record = {"rule": rule, "seed": seed} | _identity(parts)
  text, target = json.dumps(record, indent=1) + "\n", epath.Path(path)
  if target.exists() and (stored := target.read_bytes()) != text.encode():
    raise ValueError(f"{target}: exists and {_difference(stored, record)}")
  storage.write_text(target, text)
  return str(record["content_sha256"])


def content_digest(parts: Parts) -> str:
  """Returns the SHA-256 over the content of all questions of a split.

  Raises:
    ValueError: an image cannot be read.
  """
  return str(_identity(parts)["content_sha256"])


def _identity(parts: Parts) -> dict[str, Any]:
  """Returns the fields of a file that depend on the questions: counts, sorted ids and digests, and their SHA-256."""
  ids = {name: sorted(example.id for example in part) for name, part in parts.items()}
  digests = {name: _contents(part) for name, part in parts.items()}
  lines = (f"{name}\t{example_id}\n" for name, part in ids.items() for example_id in part)
  return {
    "counts": {name: len(part) for name, part in ids.items()},
    "sha256": hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest(),
    "content_sha256": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
    "ids": ids,
    "contents": {name: [digests[name][example_id][:DIGITS] for example_id in part] for name, part in ids.items()},
  }


def _contents(examples: Iterable[Example]) -> dict[str, str]:
  """Maps the id of each question to the SHA-256 of its fields.

  An image counts with the bytes of its file, not with its path, so that data can be moved.
  """
  digests = {}
  for example in examples:
    try:
      images = [images_lib.fingerprint(path) for path in example.images]
    except ValueError as error:
      raise ValueError(f"question {example.id}: {error}") from error
    content = dataclasses.asdict(example) | {"images": images}
    digests[example.id] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
  return digests


def _difference(stored: bytes, record: Mapping[str, Any]) -> str:
  """Says how the content of a file differs from a record, and what to do."""
  way_out = "choose another name, or remove it"
  try:
    before = json.loads(stored)
    listed = {name: dict(zip(ids, before["contents"][name], strict=True)) for name, ids in before["ids"].items()}
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
    return f"holds something else; {way_out}"
  now = {name: dict(zip(ids, record["contents"][name], strict=True)) for name, ids in record["ids"].items()}
  if before["ids"] != record["ids"]:
    apart = sorted(set().union(*listed.values()) ^ set().union(*now.values()))
    which = f" ({_named(apart)} {'is' if len(apart) == 1 else 'are'} not in both)" if apart else ""
    return f"holds another split{which}; {way_out}"
  changed = [
    example_id for name in now for example_id in now[name] if now[name][example_id] != listed[name][example_id]
  ]
  if not changed:
    return f"holds these questions by another rule or seed; {way_out}"
  return (
    f"{len(changed)} of its {sum(map(len, now.values()))} questions have changed ({_named(changed)}): text, options, "
    f"answer, kind or image are not what they were; restore the data, or {way_out}"
  )


def _named(ids: Sequence[str]) -> str:
  """Returns the first of some ids, and the number of the others."""
  more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
  return ", ".join(map(repr, ids[:_NAMED])) + more
