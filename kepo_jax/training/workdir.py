"""The working directory of a run: locked, claimed once, resumed only as the run that it holds."""

import contextlib
import io
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from kepo_jax import multihost, storage
from kepo_jax.config import Config
from kepo_jax.data import id_files, splits
from kepo_jax.data.cleaning import Summary
from kepo_jax.evaluation import outputs as outputs_lib
from kepo_jax.training import lock, run_record
from kepo_jax.training.checkpoints import Checkpoints, steps_in
from kepo_jax.types import Example

# Files that may be there although the run has not begun.
_BEFORE = {lock.NAME, "stalls"}
# What a run writes before its first step.
_BEGINNING = {
  "config.json",
  "questions.json",
  "data_summary.json",
  "metrics.jsonl",
  "timing.jsonl",
  "samples.jsonl",
  "tensorboard",
  "checkpoints",
}


class RunFiles:
  """The files of one run: config, questions, evaluations, checkpoints and model; none where workdir is "".

  Inside its block the folder is locked.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    config: Config,
    *,
    resume: bool = False,
    auto_resume: bool = False,
    allow_config_change: bool = False,
  ):
    """Touches nothing before the block is entered.

    Args:
      workdir: the folder, local or remote, or "".
      config: of the run; stored as config.json, and compared with it on resume.
      resume: continue what the folder holds.
      auto_resume: continue it if there is something to continue.
      allow_config_change: go on with another config, and other questions, than those of the folder.
    """
    self.workdir = str(workdir)
    self.evaluations: dict[str, Any] = {}
    self.positions: dict[str, int] = {}  # of the files that the hooks write, at the checkpoint that was restored
    self.owes_validation = False  # the restored step was saved before its validation
    self._resume, self._auto_resume, self._allow_change = resume, auto_resume, allow_config_change
    self._config = config
    self.resumes = False
    self._begun = False
    self._made = False  # whether the folder did not exist before
    self._lock: lock.WorkdirLock | None = None
    self._identity: dict[str, Any] = {"questions": "", "models": {}}  # hashes of what the run is made of
    self._replaces_questions: Callable[[], Any] | None = None  # writes questions that differ from those of the folder
    self._blocked: float | None = None
    self._checkpoints: Checkpoints | None = None

  def __enter__(self) -> "RunFiles":
    """Locks the folder and checks that it can be used.

    Raises:
      ValueError: it is in use, holds another run, nothing to resume, or a run of another config.
      OSError: it cannot be written.
    """
    if not self.workdir:
      if self._resume or self._auto_resume:
        raise ValueError("resume needs a workdir; pass --workdir=DIR of the run to continue.")
      return self
    storage.orbax_path(self.workdir)
    with contextlib.ExitStack() as refused:
      refused.callback(self._leave)
      claim = multihost.on_first(self._claimed)
      refused.pop_all()
    self.resumes, self.evaluations = claim["resumes"], claim["evaluations"]
    settings = self._config.checkpoint
    self._checkpoints = Checkpoints(
      self._root / "checkpoints", every=settings.every, minutes=settings.minutes, keep=settings.keep
    )
    return self

  def __exit__(self, kind: Any, *_: Any) -> None:
    try:
      if self._checkpoints:
        # What is going wrong already matters more than a save that fails with it.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
          self._checkpoints.close()
    finally:
      if kind and issubclass(kind, Exception) and self._begun and not self.resumes and multihost.is_first():
        self._forget_start()
      self._leave()

  def _forget_start(self) -> None:
    """Removes what a start that failed before its first step has written, so that it can be tried again.

    The folder held nothing when it was claimed. With more in it than a start writes, such as an evaluation, it is a run
    that --resume goes on with.
    """
    steps, names = self._root / "metrics.jsonl", {path.name for path in self._root.iterdir()}
    began = steps.exists() and steps.read_text() or steps_in(self._root / "checkpoints")
    if began or names - _BEFORE - _BEGINNING:
      return
    with contextlib.suppress(OSError, ValueError):
      for path in (self._root / name for name in _BEGINNING):
        if path.exists():
          path.rmtree() if path.is_dir() else path.unlink()
    self._begun = False

  def begin(
    self, questions: Mapping[str, Sequence[Example]], *, rule: str, models: Mapping[str, pathlib.Path] | None = None
  ) -> None:
    """Writes config.json and questions.json of a new run; checks that the questions of a resumed one are the same.

    Args:
      questions: part -> questions.
      rule: in words how they were chosen.
      models: role -> folder of the checkpoint.

    Raises:
      ValueError: the run that is resumed had other questions, or some of them have changed; names the first. Or another
        process has taken the folder.
      OSError: a file cannot be written.
    """
    if not self.workdir:
      return
    parts = {name: questions.get(name, ()) for name in splits.SPLITS}

    def write() -> dict[str, Any]:
      if self._lock:
        self._lock.check_now()
      if not self.resumes:  # first of all: with it there is something to resume
        storage.write_text(self._root / "config.json", self._config_text)
      hashes = {role: outputs_lib.model_hash(folder) for role, folder in (models or {}).items()}
      return {"questions": self._checked_questions(parts, rule), "models": hashes}

    self._identity = multihost.on_first(write)
    self._begun = True

  def record_summaries(self, summaries: Mapping[str, Sequence[Summary]]) -> None:
    """Writes data_summary.json: by which rules the data of the run were repaired and questions dropped.

    Args:
      summaries: "reading" and "checking" -> one for each folder or split.
    """
    record = {name: [summary.to_dict() for summary in parts] for name, parts in summaries.items()}
    self._write("data_summary.json", json.dumps(record, indent=2) + "\n")

  def restored(self, like: Any) -> Any:
    """Returns the newest intact checkpoint on the shardings of `like`, or `like` itself where there is none.

    Evaluations after that checkpoint are forgotten.

    Raises:
      ValueError: the checkpoint is not one of this run as it is now; says what differs.
    """
    if not self._checkpoints:
      return like
    self._warn_of_room(like)
    if not self.resumes:
      return like
    restored = self._checkpoints.restore(like)
    if restored is None and self._checkpoints.damaged and not self._auto_resume:
      raise ValueError(
        f"no checkpoint of {self._root} is intact; the damaged ones are in broken/. --auto_resume starts "
        f"the run over in this folder."
      )
    if restored is None:
      logging.warning("%s holds no complete checkpoint; starting from the first step.", self._root)
      self.evaluations = {}
      self._adopt_changes()
      return like
    state, record = restored
    step = int(state.step)
    now = run_record.make(self._config, self._identity, step=step, positions={}, validated=True)
    multihost.run_on_all(lambda: run_record.check(record, now, self.workdir, allow_change=self._allow_change))
    self._adopt_changes()
    self.positions, self.owes_validation = record["positions"], not record["validated"]
    # Its own validation is made again if the checkpoint was written before it.
    last = step - self.owes_validation
    self.evaluations.pop("after", None)
    validations = self.evaluations.get("validation", [])
    self.evaluations["validation"] = [validation for validation in validations if validation["step"] <= last]
    return state

  def record(self, name: str, result: dict[str, Any]) -> None:
    """Adds an evaluation ("before", "validation" or "after") to evaluation.json."""
    if name == "validation":
      self.evaluations.setdefault(name, []).append(result)
    else:
      self.evaluations[name] = result
    self._write("evaluation.json", json.dumps(self.evaluations, indent=2) + "\n")

  def record_outputs(self, name: str, outputs: Sequence[Mapping[str, Any]]) -> None:
    """Writes the student's answer to each question of a test, outputs/NAME.jsonl."""
    if self.workdir and multihost.is_first():
      (self._root / "outputs").mkdir(exist_ok=True)
    self._write(f"outputs/{name}.jsonl", "".join(json.dumps(output) + "\n" for output in outputs))

  def save(
    self,
    step: int,
    state: Any,
    *,
    now: bool,
    positions: Callable[[], Mapping[str, int]] = dict,
    validated: bool = True,
  ) -> None:
    """Checkpoints the state if its turn has come, `now`, or if the last validation was the best.

    Args:
      step: updates done.
      state: after them.
      now: whatever the turn.
      positions: gives the sizes of the files that the hooks write, safely on the disk.
      validated: whether the validation of this step, where it has one, is done.

    Raises:
      ValueError: another process has taken the folder.
      OSError: this checkpoint, or the one before it, cannot be written.
    """
    if not self._checkpoints:
      return
    checkpoints, lengths = self._checkpoints, dict[str, int]()

    def ready() -> None:
      checkpoints.check()
      if self._lock:
        self._lock.check()
      if wanted:
        checkpoints.wait()
        lengths.update(positions())

    best = best_step(self.evaluations, self._config.checkpoint.best)
    wanted = checkpoints.due(step) or now or best == step
    multihost.run_on_all(ready)
    if wanted:
      start = time.perf_counter()
      record = run_record.make(self._config, self._identity, step=step, positions=lengths, validated=validated)
      checkpoints.save(step, state, record, best=best)
      self._blocked = time.perf_counter() - start

  def newest(self) -> tuple[int, str]:
    """Returns step and folder of the newest checkpoint before anything is restored, (0, "") where there is none."""
    steps = steps_in(self._checkpoints.directory) if self._checkpoints else []
    return (steps[-1], str(self._root / "checkpoints" / str(steps[-1]))) if steps else (0, "")

  @property
  def saved(self) -> str:
    """Folder of the newest checkpoint, "" where there is none; waits until it is complete."""
    if not self._checkpoints:
      return ""
    self._checkpoints.wait()
    newest = self._checkpoints.newest
    return "" if newest is None else str(self._checkpoints.directory / str(newest))

  def timing(self) -> dict[str, float]:
    """Returns the seconds for which a save after the last step held up the run; nothing where there was none."""
    blocked, self._blocked = self._blocked, None
    return {} if blocked is None else {"seconds/checkpoint": blocked}

  def dump(self, name: str, arrays: Mapping[str, np.ndarray], records: Sequence[Mapping[str, Any]]) -> str:
    """Writes a batch for inspection and returns its folder, "" without a workdir.

    Args:
      name: of the folder.
      arrays: go to batch.npz.
      records: JSON-able, go to samples.jsonl.
    """
    if not self.workdir:
      return ""
    folder = self._root / name
    if multihost.is_first():
      folder.mkdir(parents=True, exist_ok=True)
      packed = io.BytesIO()
      np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]  # its only positional argument is the file
      storage.write_bytes(folder / "batch.npz", packed.getvalue())
      storage.write_text(folder / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    return str(folder)

  def export(self, write: Callable[[Any], None]) -> None:
    """Calls `write` with the path of model/ unless there is no workdir; half an export never looks like one.

    Args:
      write: called by every process; what it raises on one of them it must raise on all.

    Raises:
      OSError: the folder cannot be written, here or on another process.
    """
    if not self.workdir:
      return
    with contextlib.ExitStack() as place:
      # A folder without config.json is no model.
      local = storage.written_locally(self._root / "model", last="config.json")
      folder = multihost.run_on_all(lambda: place.enter_context(local))
      write(folder)
      multihost.run_on_all(place.close)

  @property
  def _root(self) -> epath.Path:
    return epath.Path(self.workdir)

  def _write(self, name: str, text: str) -> None:
    if self.workdir and multihost.is_first():
      storage.write_text(self._root / name, text)

  def _claimed(self) -> dict[str, Any]:
    """Locks the folder; returns whether it holds a run that is to be continued, and its evaluations."""
    root = self._root
    storage.check_bucket(root)
    self._made = not root.exists()
    try:
      root.mkdir(parents=True, exist_ok=True)
      self._lock = lock.WorkdirLock(root)
      self._lock.__enter__()
    except OSError as error:
      raise OSError(f"workdir {root} cannot be written: {str(error.strerror or error).rstrip('.')}.") from error
    names = [path.name for path in root.iterdir()]
    if "config.json" in names and (self._resume or self._auto_resume):
      self._check_config()
      path = root / "evaluation.json"
      return {"resumes": True, "evaluations": json.loads(path.read_text()) if path.exists() else {}}
    # What a run may leave that was killed before it began.
    names = [name for name in names if name not in _BEFORE and not (name.startswith(".") and name.endswith(".partial"))]
    if self._resume:
      raise ValueError(f"{root} holds no run to resume (no config.json); start without --resume.")
    if names:
      raise ValueError(
        f"{root} is not empty; pass --resume to continue the run in it, or another --workdir for a new one."
      )
    return {"resumes": False, "evaluations": {}}

  def _leave(self) -> None:
    if self._lock:
      self._lock.__exit__()
      self._lock = None
      if self._made and not self._begun:  # a run that was refused leaves nothing
        with contextlib.suppress(OSError, ValueError):
          self._root.rmdir()

  def _check_config(self) -> None:
    stored = json.loads((self._root / "config.json").read_text())
    changes = run_record.changes(stored, json.loads(self._config.to_json()))
    if not changes:
      return
    if not self._allow_change:
      raise ValueError(
        f"the config differs from that of the run in {self._root} ({changes}); resume with the same config, or pass "
        f"--allow_config_change to go on with this one."
      )
    logging.warning("%s goes on with another config: %s.", self._root, changes)

  def _checked_questions(self, parts: id_files.Parts, rule: str) -> str:
    path, seed = self._root / "questions.json", self._config.data.split_seed
    try:
      return id_files.write(parts, path, rule=rule, seed=seed)
    except ValueError as error:
      if not (self._allow_change and path.exists()):
        raise
      logging.warning("%s. Going on with the questions as they are now.", error)
      self._replaces_questions = lambda: id_files.write(parts, path, rule=rule, seed=seed)
      return id_files.content_digest(parts)

  def _adopt_changes(self) -> None:
    """Replaces config and questions of the run, now that it is known to go on with the new ones."""

    def write() -> None:
      path = self._root / "config.json"
      if path.read_text() != self._config_text:
        _set_aside(path)
        storage.write_text(path, self._config_text)
      if self._replaces_questions:
        _set_aside(self._root / "questions.json")
        self._replaces_questions()

    multihost.on_first(write)

  @property
  def _config_text(self) -> str:
    return str(self._config.to_json(indent=2)) + "\n"

  def _warn_of_room(self, state: Any) -> None:
    """Warns of a disk that cannot hold the checkpoints before the first one is written."""
    if storage.is_remote(self.workdir) or not multihost.is_first():
      return
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    written = len(steps_in(self._root / "checkpoints"))
    more = max(1, self._config.checkpoint.keep + 1 + (self._config.checkpoint.best != "none") - written)
    free = shutil.disk_usage(self._root).free
    if free < more * need:
      logging.warning(
        "%s has %.1f GB free; %d more checkpoints of %.1f GB do not fit. Lower checkpoint.keep or use another disk.",
        self._root,
        free / 1e9,
        more,
        need / 1e9,
      )


def best_step(evaluations: Mapping[str, Any], metric: str) -> int | None:
  """Returns the step of the validation with the highest metric, the first of equals; None without one.

  Args:
    evaluations: as in evaluation.json.
    metric: `checkpoint.best` of the run.
  """
  values = {
    validation["step"]: validation[metric].get("accuracy", validation[metric].get("mean"))
    for validation in evaluations.get("validation", [])
    if validation.get(metric)
  }
  return max(values, key=lambda step: values[step], default=None)


def _set_aside(path: epath.Path) -> None:
  """Renames a file that is about to be replaced, under a name that says so."""
  names = (path.parent / f"{path.stem}-before-{n}{path.suffix}" for n in range(1, 1000))
  storage.move(path, next(name for name in names if not name.exists()))
