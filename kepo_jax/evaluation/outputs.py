"""The folder of an evaluation: what was asked of whom, and every answer as it comes, so that it can be continued."""

import hashlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from kepo_jax import storage
from kepo_jax.data import images as images_lib
from kepo_jax.data import prompts
from kepo_jax.types import Example

ABOUT, OUTPUTS, RESULT = "about.json", "outputs.jsonl", "evaluation.json"
# What decides about a model's answers in its folder; notes and licences may change.
_MODEL_FILES = ("*config.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template*", "*.safetensors")
_COPY_SECONDS = 60  # between copies of the answers to a remote folder
_BLOCKS, _BLOCK = 64, 1 << 16  # of a large file that are read, and the bytes of each
# Fields of a record of `evaluate` and their types; what else a record holds is not looked at.
_FIELDS: Mapping[str, tuple[type, ...]] = {
  "id": (str,),
  "sample": (int,),
  "dataset": (str,),
  "modality": (str,),
  "question_type": (str,),
  "question": (str,),
  "options": (list,),
  "answer": (str,),
  "completion": (str,),
  "parsed": (str, type(None)),
  "correct": (bool,),
  "lenient": (str, type(None)),
  "lenient_correct": (bool,),
  "format": (bool,),
  "tokens": (int,),
  "truncated": (bool,),
}


def digest(parts: Iterable[str | bytes]) -> str:
  """SHA-256 of texts, each after its length, so that no two lists share one by accident."""
  found = hashlib.sha256()
  for part in parts:
    data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
    found.update(len(data).to_bytes(8, "big") + data)
  return found.hexdigest()


def model_hash(folder: pathlib.Path) -> str:
  """Fingerprint of a model folder: names, sizes and contents of its files, weights by evenly spread blocks.

  64 blocks of 64 KiB stand for a file of weights: training moves every tensor, and a whole pass over a large model
  would take minutes.
  """
  paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
  parts: list[str | bytes] = []
  for path in paths:
    size = path.stat().st_size
    parts += [path.name, str(size)]
    with path.open("rb") as file:
      if path.suffix != ".safetensors" or size <= _BLOCKS * _BLOCK:
        parts.append(file.read())
        continue
      for i in range(_BLOCKS):
        file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
        parts.append(file.read(_BLOCK))
  return digest(parts)


def questions_identity(examples: Sequence[Example], templates: prompts.Templates, kind: str) -> dict[str, Any]:
  """Hashes of ids, questions, image files and wordings, in order: what must be equal for an evaluation to go on.

  Images count by their content: a folder may be moved, and a picture may not change under its name.

  Raises:
    ValueError: an image cannot be read.
  """
  return {
    "count": len(examples),
    "ids_hash": digest(example.id for example in examples),
    "questions_hash": digest(
      json.dumps([e.question, e.options, e.answer, e.modality, e.question_type, e.dataset, len(e.images)])
      for e in examples
    ),
    "images_hash": digest(json.dumps([images_lib.fingerprint(path) for path in e.images]) for e in examples),
    "prompts_hash": digest(prompts.prompt_text(example, templates, kind) for example in examples),
  }


def read_outputs(path: epath.PathLike) -> list[dict[str, Any]]:
  """The records of a finished outputs.jsonl, or of that of a folder, local or remote; of a run, its last evaluation.

  How many there should be stands in about.json beside it; without one, that cannot be checked.

  Raises:
    ValueError: there is none, it is not finished, or a line is no record of an evaluation; names it.
  """
  file = epath.Path(path)
  with storage.reaching(file):
    file = _outputs_file(file)
    if not file.is_file():
      raise ValueError(
        f"{file} does not exist; give the --output of an evaluation, its {OUTPUTS}, or the folder of a finished run."
      )
    records, kept = _whole_lines(file)
    if kept != file.stat().length:
      raise ValueError(f"the last line of {file} is cut short; --resume finishes the evaluation.")
    if not records:
      raise ValueError(f"{file} holds no record; --resume finishes the evaluation.")
    if len({(record["id"], record["sample"]) for record in records}) < len(records):
      raise ValueError(f"{file} holds a completion twice; an evaluation has each once.")
    about = file.parent / ABOUT
    if about.is_file():
      _check_whole(file, len(records), about)
  return records


def _outputs_file(path: epath.Path) -> epath.Path:
  """The file of outputs that a folder of an evaluation or of a run has; a file itself."""
  if not path.is_dir():
    return path
  after = path / "outputs" / "after.jsonl"
  return after if after.is_file() else path / OUTPUTS


def _check_whole(file: epath.Path, found: int, about: epath.Path) -> None:
  """Refuses outputs that are not as many as were asked for."""
  settings = _read_object(about)
  count, samples = settings.get("count"), settings.get("samples")
  if not (isinstance(count, int) and isinstance(samples, int) and count > 0 and samples > 0):
    raise ValueError(f"{about} is not that of an evaluation: count and samples are {count!r} and {samples!r}.")
  wanted = count * samples
  if found < wanted:
    raise ValueError(f"{file} holds {found} of {wanted} completions; --resume finishes the evaluation.")
  if found > wanted:
    raise ValueError(f"{file} holds {found} completions and {about} asked for {wanted}; they do not belong together.")


def read_settings(path: epath.PathLike) -> dict[str, Any]:
  """What about.json or evaluation.json beside the outputs say; empty where neither exists.

  Raises:
    ValueError: one of them is damaged, or of something else.
  """
  folder = _outputs_file(epath.Path(path)).parent
  found = [_read_object(folder / name) for name in (ABOUT, RESULT) if (folder / name).is_file()]
  settings = {key: value for each in found for key, value in each.items()}
  if folder.name == "outputs" and (folder.parent / RESULT).is_file():  # of a run, which writes whole evaluations
    result = _read_object(folder.parent / RESULT).get(_outputs_file(epath.Path(path)).stem)
    if isinstance(result, dict) and "train_modality" in result:
      settings |= {"train_modality": result["train_modality"], "whole": True}
  if not isinstance(settings.get("train_modality", ""), str):
    raise ValueError(f"{folder / RESULT} is not that of an evaluation: train_modality is no text.")
  return settings


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}); the file was changed by something else.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} is no file of an evaluation: it holds no JSON object.")
  return content


def _whole_lines(file: pathlib.Path | epath.Path) -> tuple[list[dict[str, Any]], int]:
  """The records of the lines that end, and their bytes; what a crash left of a line after them is left out."""
  *lines, _ = file.read_bytes().split(b"\n")
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{file}:{number} is not JSON ({error}); no evaluation wrote it so.") from error
    if fault := _fault(record):
      raise ValueError(f"{file}:{number} is no record of an evaluation: {fault}.")
    records.append(record)
  return records, sum(len(line) + 1 for line in lines)


def _fault(record: Any) -> str:
  """What keeps a value from being a record of `evaluate`; empty for nothing."""
  if not isinstance(record, dict):
    return "it is no JSON object"
  if missing := [name for name in _FIELDS if name not in record]:
    return f"it has no {', '.join(missing)}"
  if wrong := [name for name, types in _FIELDS.items() if type(record[name]) not in types]:
    return f"{wrong[0]} is {str(record[wrong[0]])[:40]!r}"
  images = record.get("images", [])
  if not record["options"] or not isinstance(images, list) or {type(x) for x in (*record["options"], *images)} != {str}:
    return "options and images are no lists of texts"
  return ""


class Journal:
  """about.json, outputs.jsonl and evaluation.json of one evaluation; writes nothing when the folder is "".

  Every record is written as one line and flushed, so that a crash costs at most the batch that was running. A bucket
  takes whole objects only: there the answers grow on the local disk, and are copied once a minute and at the end.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    identity: Mapping[str, Any],
    notes: Mapping[str, Any],
    *,
    order: Sequence[tuple[str, int]],
    batch: int,
    resume: bool = False,
  ):
    """Checks the folder; nothing is written before the block is entered.

    Args:
      folder: where the files are, local or remote, or "".
      identity: JSON-able; what must be equal for an evaluation to go on.
      notes: JSON-able; what else about.json says, for example where the data lie: it changes no answer.
      order: (id, number of the completion) of each record that there will be.
      batch: records of one batch; what is left of the last one is asked again, so that batches are composed as in an
        unbroken evaluation, and equal to the last bit.
      resume: continue what the folder holds.

    Raises:
      ValueError: the folder holds an evaluation; or on resuming: none, one of something else, or a damaged one.
      OSError: a remote folder cannot be reached.
    """
    self.about: dict[str, Any] = {**identity, **notes}
    self.earlier: list[dict[str, Any]] = []
    self._place = epath.Path(folder) if str(folder) else None
    self._folder = pathlib.Path(folder) if str(folder) else None  # where lines are appended
    self._spool: tempfile.TemporaryDirectory[str] | None = None
    self._copied = time.monotonic()
    self._total = len(order)
    self._kept = 0  # bytes
    self._torn = 0  # bytes of a last line that does not end
    self._file: Any = None
    if self._place and storage.is_remote(self._place):
      storage.check_bucket(self._place)
      self._spool = tempfile.TemporaryDirectory(prefix="kepo_jax-")
      self._folder = pathlib.Path(self._spool.name)
    if resume:
      self._look_back(json.loads(json.dumps(dict(identity))), order, batch)
    else:
      self.check_fresh(folder)

  @staticmethod
  def check_fresh(folder: epath.PathLike) -> None:
    """Refuses a folder with files of an evaluation.

    Raises:
      ValueError: there are some, and what to do.
    """
    if not str(folder):
      return
    storage.check_bucket(folder)
    with storage.reaching(folder):
      there = [name for name in (ABOUT, OUTPUTS, RESULT) if (epath.Path(folder) / name).exists()]
    if RESULT in there:
      raise ValueError(f"{folder} holds an evaluation already; choose another --output.")
    if there:
      raise ValueError(f"{folder} holds an unfinished evaluation; --resume continues it, or choose another --output.")

  @property
  def complete(self) -> bool:
    """Whether every answer was there from the start."""
    return len(self.earlier) == self._total

  @property
  def resumed(self) -> str:
    """In words what was there already, and what a kill had cut off; empty where nothing was."""
    if not self.earlier and not self._torn:
      return ""
    text = f"resumed: {len(self.earlier)} of {self._total} completions are there"
    return text + (f"; the last line was cut short ({self._torn} bytes) and is asked again" if self._torn else "")

  def __enter__(self) -> "Journal":
    if self._folder and self._place:
      self._folder.mkdir(parents=True, exist_ok=True)
      if not (self._place / ABOUT).exists():
        _write(self._place / ABOUT, self.about)
      path = self._folder / OUTPUTS
      path.touch()
      os.truncate(path, self._kept)
      self._file = path.open("a", encoding="utf-8", newline="\n")
    return self

  def __exit__(self, *_: Any) -> None:
    if self._file:
      self._file.close()
      self._copy()
    if self._spool:
      self._spool.cleanup()

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends one answer."""
    if self._file:
      self._file.write(json.dumps(record) + "\n")
      self._file.flush()
      if time.monotonic() - self._copied > _COPY_SECONDS:
        self._copy()

  def _copy(self) -> None:
    """Brings the answers to a remote folder."""
    if self._spool and self._place and self._folder:
      storage.write_bytes(self._place / OUTPUTS, (self._folder / OUTPUTS).read_bytes())
      self._copied = time.monotonic()

  def finish(self, result: Mapping[str, Any]) -> None:
    """Writes evaluation.json: what about.json says, and the metrics."""
    if self._place:
      _write(self._place / RESULT, {**self.about, **result})

  def _look_back(self, identity: dict[str, Any], order: Sequence[tuple[str, int]], batch: int) -> None:
    if not (self._folder and self._place):
      raise ValueError("--resume needs the --output of the evaluation to continue.")
    with storage.reaching(self._place):
      if not (self._place / ABOUT).is_file():
        raise ValueError(f"{self._place} holds no evaluation to resume (no {ABOUT}); start without --resume.")
      self.about = _read_object(self._place / ABOUT)
      if self._spool and (self._place / OUTPUTS).is_file():
        (self._folder / OUTPUTS).write_bytes((self._place / OUTPUTS).read_bytes())
    changed = [name for name in identity if self.about.get(name) != identity[name]]
    if changed:
      changes = ", ".join(f"{name}: {self.about.get(name)!r} -> {identity[name]!r}" for name in changed)
      raise ValueError(
        f"{self._place} holds an evaluation of something else ({changes}); ask as it did, or choose another --output."
      )
    path = self._folder / OUTPUTS
    records, whole_bytes = _whole_lines(path) if path.is_file() else ([], 0)
    self._torn = path.stat().st_size - whole_bytes if path.is_file() else 0
    found = [(record["id"], record["sample"]) for record in records]
    if found != list(order[: len(found)]):
      place = next((i for i, (a, b) in enumerate(zip(found, order, strict=False)) if a != b), len(order))
      raise ValueError(
        f"{self._place / OUTPUTS}:{place + 1} answers another question than the one that was asked; start anew."
      )
    whole = len(records) if len(records) == self._total else len(records) // batch * batch
    self.earlier = records[:whole]
    if whole:
      lines = path.read_bytes().split(b"\n")[:whole]
      self._kept = sum(len(line) + 1 for line in lines)


def _write(path: epath.Path, content: Mapping[str, Any]) -> None:
  """JSON in one move: a crash leaves the old file or the new one."""
  storage.write_text(path, json.dumps(content, indent=2) + "\n")
