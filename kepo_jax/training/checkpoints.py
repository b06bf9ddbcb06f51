"""Checkpoints of a run: the training state, sharded and asynchronous, through Orbax.

A step is done or not done: random keys, the order of the data and the schedule derive from the seed and the
step, so parameters, optimizer state and step are the whole state of a run.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath


class Checkpoints:
  """The `checkpoints/` folder of one run."""

  def __init__(self, directory: epath.PathLike, *, every: int, keep: int):
    """Opens or creates the folder.

    Args:
      directory: folder of the checkpoints, one sub-folder per step.
      every: steps between checkpoints; 0 saves the last step alone.
      keep: newest checkpoints kept.
    """
    self._every = every
    self._manager = ocp.CheckpointManager(
      epath.Path(directory).resolve(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True),
    )

  @property
  def latest_step(self) -> int | None:
    """Updates done at the newest complete checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, *, last: bool = False) -> bool:
    """Starts to save `state` after `step` updates if its turn has come (or `last`); True if it does."""
    due = last or (self._every > 0 and step % self._every == 0)
    if not due or self.latest_step == step:
      return False
    return self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

  def restore(self, like: Any) -> Any:
    """The newest state, on the shardings and dtypes of `like`; `like` itself where no checkpoint is complete.

    The arrays of `like` are deleted when there is a checkpoint: the devices need not hold two states.
    """
    step = self.latest_step
    if step is None:
      logging.warning("%s holds no complete checkpoint; starting from the first step.", self._manager.directory)
      return like
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    logging.info("restoring step %d from %s", step, self._manager.directory)
    jax.tree.map(lambda x: x.delete(), like)
    return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

  def close(self) -> None:
    """Waits for the last save."""
    self._manager.wait_until_finished()
    self._manager.close()
