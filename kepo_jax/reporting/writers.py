"""Where the metrics of a run go: files of JSON lines, TensorBoard, and optional trackers.

metrics.jsonl holds deterministic values only, so two runs of one config leave equal files; what depends on the
machine goes to timing.jsonl.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

import tensorboardX
from absl import logging
from etils import epath

from kepo_jax import storage

# What one import needs, by module name.
_INSTALL = "{name} is asked for by log.{name} and not installed; run `pip install {name}` or leave log.{name} empty."


class Sink(Protocol):
  """Takes the scalar figures of steps in order."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values after `step` updates."""

  def flush(self) -> None:
    """Makes sure that what was written outlives the process."""

  def close(self) -> None:
    """Writes out what is pending."""


def read_records(path: epath.PathLike) -> list[dict[str, Any]]:
  """Reads a file of JSON lines; leaves out a last line that a crash cut short.

  Raises:
    ValueError: a line before the last one is not a JSON object.
  """
  # Not splitlines: that also cuts at U+0085 and U+2028, which JSON leaves raw inside a string.
  lines = epath.Path(path).read_text().removesuffix("\n").split("\n")
  records = []
  for number, line in enumerate(lines, 1):
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number < len(lines):
        raise ValueError(f"{path}:{number} is not JSON ({error.msg}); remove the line to go on.") from error
  return records


class JsonLines:
  """An append-only file of one JSON object per line, each with its `step`; a sink, and more than scalars.

  A bucket takes whole objects only: there the file grows on the local disk, and `flush` copies it.
  """

  def __init__(self, path: epath.PathLike, *, position: int = 0):
    """Opens the file and cuts off what lies behind `position`: records that a resumed run is about to write again.

    Args:
      path: of the file, made if missing.
      position: bytes that stay.

    Raises:
      OSError: it cannot be written; names it.
    """
    self._path = epath.Path(path)
    self._spool: tempfile.TemporaryDirectory[str] | None = None
    with self._named_errors():
      self._path.parent.mkdir(parents=True, exist_ok=True)
      local = pathlib.Path(self._path)
      if storage.is_remote(self._path):
        self._spool = tempfile.TemporaryDirectory(prefix="kepo_jax-")
        local = pathlib.Path(self._spool.name) / self._path.name
        if self._path.exists():
          local.write_bytes(self._path.read_bytes())
      self._file = local.open("ab")
      size = self._file.seek(0, os.SEEK_END)
      if size < position:
        logging.warning("%s has %d of the %d bytes that it had: its history has a gap.", path, size, position)
        position = local.read_bytes().rfind(b"\n") + 1  # a record that was cut would spoil the next one
      self._file.truncate(position)
      self._file.seek(0, os.SEEK_END)

  @property
  def position(self) -> int:
    """Returns the number of bytes written."""
    return self._file.tell()

  def records(self) -> list[dict[str, Any]]:
    """Reads what the file holds."""
    return read_records(self._file.name)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one record; a number that is not finite becomes null, which every JSON reader takes.

    Raises:
      OSError: the disk is full; names the file.
    """
    record = {"step": int(step)} | {name: _plain(value) for name, value in values.items()}
    with self._named_errors():
      self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
      self._file.flush()

  def flush(self) -> None:
    """Brings the file to the disk, or to its bucket.

    Raises:
      OSError: that fails; names the file.
    """
    with self._named_errors():
      self._file.flush()
      os.fsync(self._file.fileno())
      if self._spool:
        self._path.write_bytes(pathlib.Path(self._file.name).read_bytes())

  def close(self) -> None:
    """Flushes and closes the file."""
    if not self._file.closed:
      self.flush()
      self._file.close()
    if self._spool:
      self._spool.cleanup()

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    try:
      with storage.reaching(self._path):
        yield
    except OSError as error:
      raise OSError(f"{self._path} could not be written: {error.strerror or error}; make room and resume.") from error


class TensorBoardSink:
  """Writes scalars as TensorBoard events; what a resumed run repeats is written anew from the records that stay."""

  def __init__(self, directory: epath.PathLike, *, history: Iterable[Mapping[str, Any]] = ()):
    """Opens `directory`, without the events of an earlier try.

    Args:
      directory: of the events.
      history: records of the steps done, with their `step`; written as if they had just happened.
    """
    self._directory = epath.Path(directory)
    self._spool = tempfile.TemporaryDirectory(prefix="kepo_jax-") if storage.is_remote(directory) else None
    if self._directory.exists():
      with storage.reaching(directory):
        self._directory.rmtree()
    self._writer = tensorboardX.SummaryWriter(self._spool.name if self._spool else str(directory))
    for record in history:
      self.write(record["step"], {name: value for name, value in record.items() if name != "step"})

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Adds one point per figure; none where it is not a number."""
    for name, value in values.items():
      if value is not None:
        # TensorBoard takes no "@" in names and would say so at every step.
        self._writer.add_scalar(name.replace("@", "_at_"), value, global_step=step)

  def flush(self) -> None:
    """Brings the events to the disk, or to their bucket."""
    self._writer.flush()
    if self._spool:
      storage.publish(pathlib.Path(self._spool.name), self._directory)

  def close(self) -> None:
    """Flushes and closes the event file."""
    self._writer.close()
    if self._spool:
      storage.publish(pathlib.Path(self._spool.name), self._directory)
      self._spool.cleanup()
      self._spool = None


class WandbSink:
  """Sends scalars to Weights & Biases."""

  def __init__(self, project: str, *, workdir: str, config: Mapping[str, Any], start_step: int = 0):
    """Starts a run, or continues the one of the same workdir.

    Raises:
      ValueError: wandb is not installed.
    """
    module = _optional("wandb")
    self._run = module.init(
      project=project,
      name=_run_name(workdir),
      id=_run_id(workdir),
      dir=None if storage.is_remote(workdir) else workdir,
      config=dict(config),
      resume="allow" if start_step else None,
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Logs one step."""
    self._run.log(dict(values), step=step)

  def flush(self) -> None:
    """Does nothing: the tracker sends on its own."""

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


class TrackioSink:
  """Sends scalars to a local trackio dashboard."""

  def __init__(self, project: str, *, workdir: str, config: Mapping[str, Any], start_step: int = 0):
    """Starts a run, or continues the one of the same workdir.

    Raises:
      ValueError: trackio is not installed.
    """
    module = _optional("trackio")
    name = f"{_run_name(workdir)}-{_run_id(workdir)[:6]}"
    self._run = module.init(project=project, name=name, config=dict(config), resume="allow" if start_step else "never")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Logs one step."""
    self._run.log(dict(values), step=step)

  def flush(self) -> None:
    """Does nothing: the tracker sends on its own."""

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


def write_all(sinks: Iterable[Sink], step: int, values: Mapping[str, float]) -> None:
  """Writes the values of one step to every sink."""
  for sink in sinks:
    sink.write(step, values)


def _optional(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ValueError(_INSTALL.format(name=name)) from error


def _plain(value: Any) -> Any:
  """Converts a value for JSON: arrays to Python numbers, nan and infinities to None, inside containers too."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if hasattr(value, "tolist"):  # NumPy and JAX, scalars and arrays
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _run_name(workdir: str) -> str:
  return epath.Path(workdir).name


def _run_id(workdir: str) -> str:
  """An identity that a resumed run finds again."""
  path = epath.Path(workdir)
  # resolve() takes a scheme for a folder of the current one.
  return hashlib.sha256(str(path if storage.is_remote(path) else path.resolve()).encode()).hexdigest()[:16]
