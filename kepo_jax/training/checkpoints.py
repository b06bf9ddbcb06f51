"""Checkpoints of a run: the training state, sharded and asynchronous, through Orbax, each with its checksums.

A step is done or not done: random keys, the order of the data and the schedule derive from the seed and the step, so
parameters, optimizer state and step are the whole state of a run. Beside them lies what a resumed run is compared
with. A checkpoint counts once its manifest is there, which is the last thing that is written of it.
"""

import concurrent.futures
import contextlib
import logging as stdlib_logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from kepo_jax import multihost, storage
from kepo_jax.training import manifest

_STORAGE_ERRORS = (OSError, ValueError, RuntimeError)  # as Orbax and TensorStore pass them on
_BROKEN = "broken"  # what is found damaged is set aside there, not deleted


def _not_a_failed_write(record: stdlib_logging.LogRecord) -> bool:
  """Drops what Orbax logs of a failed write, up to six times with its traceback; it is raised as well."""
  return not (record.levelno >= stdlib_logging.ERROR and record.exc_info and "/orbax/" in record.pathname)


def _not_of_a_part(record: stdlib_logging.LogRecord) -> bool:
  """Drops Orbax's warning that a part of a checkpoint has no metadata of its own."""
  return "Metadata file does not exist" not in record.getMessage()


class Checkpoints:
  """The `checkpoints/` folder of one run."""

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    every: int,
    minutes: float,
    keep: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Touches nothing before the first save or restore.

    Args:
      directory: folder of the checkpoints, one sub-folder per step.
      every: steps between checkpoints; 0 does not count steps.
      minutes: between checkpoints; 0 does not look at the clock.
      keep: newest checkpoints kept, besides the best.
      clock: seconds that never jump.
    """
    directory = epath.Path(directory)
    self.directory = directory if storage.is_remote(directory) else directory.resolve()
    self._every, self._minutes = every, minutes
    self._keep = keep
    self._clock = clock
    self._saved_at = clock()
    self._manager: ocp.CheckpointManager | None = None
    self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._finishing: concurrent.futures.Future[int] | None = None  # gives its step when a checkpoint is complete
    self._saving = 0  # its step
    self.newest: int | None = None  # step of the newest one that is complete
    self.damaged = 0  # checkpoints that were found damaged, by `restore` or before
    self._best: int | None = None  # step of the one that is kept whatever its age

  def due(self, step: int) -> bool:
    """Returns whether a checkpoint after `step` updates has its turn; on several hosts the same on all."""
    late = bool(self._minutes) and self._clock() - self._saved_at >= 60 * self._minutes
    return bool(self._every and step % self._every == 0) or multihost.any_process(late)[0]

  def save(self, step: int, state: Any, record: Mapping[str, Any], *, best: int | None = None) -> None:
    """Starts to save and returns as soon as the state may change.

    Args:
      step: updates done.
      state: of jax arrays.
      record: JSON-able, kept beside it.
      best: step of the checkpoint that stays whatever its age.

    Raises:
      OSError: this checkpoint, or the one before it, cannot be written.
    """
    self.wait()  # what is being finished keeps the best of its own time
    self._best = best
    if self.newest == step:
      return
    try:
      manager = self._open()
      manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(dict(record))),
        force=True,
      )
    except _STORAGE_ERRORS as error:
      raise self._cannot_write(step, error) from error
    self._saving = step
    self._finishing = self._background.submit(self._finish, manager, step)
    self._saved_at = self._clock()

  def check(self) -> None:
    """Raises what the save in the background has raised; does not wait.

    Raises:
      OSError: it has.
    """
    if self._finishing and self._finishing.done():
      self.wait()

  def wait(self) -> None:
    """Waits until the save in the background is complete.

    Raises:
      OSError: it has failed.
    """
    if not self._finishing:
      return
    finishing, self._finishing = self._finishing, None
    try:
      self.newest = finishing.result()
    except _STORAGE_ERRORS as error:
      raise self._cannot_write(self._saving, error) from error

  def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """Restores the newest intact state, on the shardings and dtypes of `like`, and its record; None without any.

    Damaged checkpoints are set aside and named in the log; what was never completed is removed. The arrays of `like`
    are deleted when there is a checkpoint: the devices need not hold two states.

    Raises:
      OSError: a checkpoint is there and cannot be read.
      ValueError: the checkpoint holds the state of other models or another optimizer.
    """
    with storage.reaching(self.directory):
      step, self.damaged = multihost.on_first(self._newest_intact)
    if step is None:
      return None
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    jax.tree.map(lambda x: x.delete(), like)
    logging.info("restoring step %d from %s", step, self.directory)
    try:
      restored = self._open().restore(
        step, args=ocp.args.Composite(state=_restore_args(abstract), record=ocp.args.JsonRestore())
      )
    except (ValueError, KeyError, TypeError) as error:
      reason = str(error).strip().splitlines()[0]
      raise ValueError(
        f"{self.directory / str(step)} is intact and does not fit the models of this config: {reason}; "
        f"resume with the student and the optimizer of the run."
      ) from error
    self.newest = step
    return restored["state"], restored["record"]

  def close(self) -> None:
    """Waits for the last save and frees what Orbax holds.

    Raises:
      OSError: the last save has failed.
    """
    with contextlib.ExitStack() as stack:
      stack.callback(logging.get_absl_logger().removeFilter, _not_a_failed_write)
      stack.callback(self._background.shutdown)
      if self._manager:
        stack.push(self._close_manager)
      self.wait()

  def _close_manager(self, kind: Any, *_: Any) -> None:
    manager, self._manager = self._manager, None
    if manager:
      with contextlib.suppress(*(_STORAGE_ERRORS if kind else ())):  # it tells the same error again
        manager.close()

  def _open(self) -> ocp.CheckpointManager:
    # Not before damaged checkpoints are set aside: it reads the folder once.
    if self._manager is None:
      logging.get_absl_logger().addFilter(_not_a_failed_write)
      options = ocp.CheckpointManagerOptions(
        # Orbax would delete the old ones at the commit; here a new one does not count before its manifest.
        preservation_policy=ocp.checkpoint_managers.LatestN(n=None),
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        create=True,
      )
      handlers = {
        # Weights and moments shrink by less than a tenth, and compressing them is most of the work of a save: on a
        # host with few cores that work is taken from the steps beside it.
        "state": ocp.PyTreeCheckpointHandler(use_compression=False),
        "record": ocp.JsonCheckpointHandler(),
      }
      with storage.reaching(self.directory):
        self.directory.mkdir(parents=True, exist_ok=True)
        place = storage.orbax_path(self.directory)
        self._manager = ocp.CheckpointManager(place, options=options, item_handlers=handlers)
    return self._manager

  def _finish(self, manager: ocp.CheckpointManager, step: int) -> int:
    """In the background: waits for the commit, then reads the files back for their checksums."""
    with storage.reaching(self.directory):
      manager.wait_until_finished()
      if multihost.is_first():
        manifest.write(self.directory / str(step))
        self._delete_old()
    return step

  def _delete_old(self) -> None:
    for step in steps_in(self.directory)[: -self._keep]:
      if step != self._best:
        folder = self.directory / str(step)
        (folder / manifest.NAME).unlink(missing_ok=True)  # what is left of it if we are stopped here does not count
        folder.rmtree()

  def _newest_intact(self) -> tuple[int | None, int]:
    """Returns the step of the newest intact checkpoint, and the number of damaged ones."""
    damaged = 0
    for step in sorted(steps_in(self.directory), reverse=True):
      folder = self.directory / str(step)
      if not manifest.is_complete(folder):
        logging.warning("the checkpoint of step %d was never completed; looking at the one before it.", step)
        folder.rmtree()
        continue
      faults = manifest.faults(folder)
      if not faults:
        return step, damaged
      damaged += 1
      aside = self._free_name(step)
      storage.move(folder, aside)
      logging.warning(
        "the checkpoint of step %d is damaged: %s%s. It was moved to %s; looking at the one before it.",
        step,
        "; ".join(faults[:3]),
        f" and {len(faults) - 3} more" if len(faults) > 3 else "",
        aside,
      )
    # Those of an earlier try count as well: a run that was refused once must not start over at the next.
    broken = self.directory.parent / _BROKEN
    return None, len(list(broken.iterdir())) if broken.exists() else 0

  def _free_name(self, step: int) -> epath.Path:
    names = (self.directory.parent / _BROKEN / (f"{step}-{n}" if n else str(step)) for n in range(1000))
    return next(path for path in names if not path.exists())

  def _cannot_write(self, step: int, error: Exception) -> OSError:
    newest = "there is no earlier one" if self.newest is None else f"that of step {self.newest} is intact"
    # TensorStore nests what happened behind where it happened, over several hundred characters.
    reason = (isinstance(error, OSError) and error.strerror) or str(error).strip().rpartition(": ")[2] or repr(error)
    return OSError(
      f"the checkpoint of step {step} could not be written to {self.directory} ({reason}); {newest}. "
      f"Make room or mend the storage, then go on with --resume."
    )


def restored_params(folder: epath.PathLike, like: Any) -> Any:
  """Restores the parameters of one checkpoint and nothing else of it.

  Args:
    folder: of the checkpoint.
    like: their tree, as `jax.ShapeDtypeStruct` with shardings.

  Raises:
    ValueError: the checkpoint is damaged, or its parameters do not fit `like`.
  """
  folder = epath.Path(folder)
  if not manifest.is_complete(folder):
    raise ValueError(f"the checkpoint {folder} is damaged: it has no {manifest.NAME}, so it was never completed")
  if faults := manifest.faults(folder):
    raise ValueError(f"the checkpoint {folder} is damaged: {'; '.join(faults[:3])}")
  place = storage.orbax_path(folder) / "state"
  logging.get_absl_logger().addFilter(_not_of_a_part)
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      stored = checkpointer.metadata(place).item_metadata.tree["params"]
      if different := _paths(stored) ^ _paths(like):  # a partial restore says nothing of them
        raise ValueError(f"one of them has no {', '.join(sorted(different)[:3])}")
      return checkpointer.restore(place, _restore_args({"params": like}, partial_restore=True))["params"]
  except (ValueError, KeyError, TypeError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ValueError(f"{folder} is intact and does not fit the student of the run's config: {reason}") from error
  finally:
    logging.get_absl_logger().removeFilter(_not_of_a_part)


def _paths(tree: Any) -> set[str]:
  return {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)}


def _restore_args(abstract: Any, **options: Any) -> ocp.args.PyTreeRestore:
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, **options)


def steps_in(directory: epath.PathLike) -> list[int]:
  """Returns the steps with a checkpoint in a folder, intact or not, sorted."""
  directory = epath.Path(directory)
  return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.exists() else []
