"""Where the figures of a run go: files of JSON lines, TensorBoard, and optional trackers.

metrics.jsonl holds deterministic values only, so two runs of one config leave equal files; what depends on the
machine goes to timing.jsonl.
"""

import hashlib
import importlib
import json
import math
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Protocol

import tensorboardX
from etils import epath

# What one import needs, by module name.
_INSTALL = "{name} is asked for by log.{name} and not installed; run `pip install {name}` or leave log.{name} empty."


class Sink(Protocol):
  """Takes the scalar figures of steps in order."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Figures after `step` updates."""

  def close(self) -> None:
    """Writes out what is pending."""


def read_records(path: epath.PathLike) -> list[dict[str, Any]]:
  """Records of a file of JSON lines; a last line that a crash cut short is left out.

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
  """An append-only file of one JSON object per line, each with its `step`; a sink, and more than scalars."""

  def __init__(self, path: epath.PathLike):
    self._path = epath.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self._path.open("a")

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one record; a number that is not finite becomes null, which every JSON reader takes."""
    record = {"step": int(step)} | {name: _plain(value) for name, value in values.items()}
    self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
    self._file.flush()

  def truncate_after(self, step: int) -> None:
    """Drops the records of later steps, which a resumed run is about to write again."""
    self._file.close()
    kept = [record for record in read_records(self._path) if record["step"] <= step]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
    # Replaced in one move: a crash here must not cost the history.
    fresh = self._path.parent / f"{self._path.name}.new"
    fresh.write_text(lines)
    fresh.replace(self._path)
    self._file = self._path.open("a")

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class TensorBoardSink:
  """Scalars as TensorBoard events."""

  def __init__(self, directory: epath.PathLike, *, start_step: int = 0):
    """Opens `directory`; events of steps after `start_step`, left by an earlier try, are marked as void."""
    purge = start_step + 1 if start_step else None
    # The suffix keeps two tries within one second from sharing a file name.
    self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=purge, filename_suffix=f".{start_step}")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds one point per figure."""
    for name, value in values.items():
      # TensorBoard takes no "@" in names and would say so at every step.
      self._writer.add_scalar(name.replace("@", "_at_"), value, global_step=step)

  def close(self) -> None:
    """Flushes and closes the event file."""
    self._writer.close()


class WandbSink:
  """Scalars to Weights & Biases."""

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
      dir=workdir,
      config=dict(config),
      resume="allow" if start_step else None,
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Logs one step."""
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


class TrackioSink:
  """Scalars to a local trackio dashboard."""

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

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


def write_all(sinks: Iterable[Sink], step: int, values: Mapping[str, float]) -> None:
  """Hands one step's figures to every sink."""
  for sink in sinks:
    sink.write(step, values)


def _optional(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ValueError(_INSTALL.format(name=name)) from error


def _plain(value: Any) -> Any:
  """A value as JSON has it: arrays' scalars to Python, nan and infinities to None, inside containers too."""
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
  return hashlib.sha256(str(epath.Path(workdir).resolve()).encode()).hexdigest()[:16]
