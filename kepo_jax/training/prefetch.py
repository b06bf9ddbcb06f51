"""Prefetch: the device samples the rollouts of the next step while the host writes down the step before."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from kepo_jax import multihost, sharding
from kepo_jax.training import setup
from kepo_jax.training.optimizer import TrainState
from kepo_jax.types import Example, Prompts


@dataclasses.dataclass
class Pending:
  """What a step begins with; the device may still be sampling."""

  done: int  # steps before it
  examples: Sequence[Example]
  prompts: Prompts  # on the mesh
  weights: Any = None  # decode weights of the student, until they are released; None where it does not sample
  rollouts: Any = None  # Rollouts; None where the student does not sample

  def release(self) -> None:
    """Frees the decode weights; on the device, once what samples from them is through."""
    self.weights = None


def start_rollouts(run: setup.Run, state: TrainState, done: int) -> Pending:
  """Asks the device for the student's rollouts of the step after `done` steps, without waiting for them.

  Raises:
    ValueError: an image or a prompt of the batch cannot be used.
    OSError: another process could not read its images.
  """
  prepared: list[Any] = []
  multihost.together(lambda: prepared.extend(run.batch(done)))
  examples, host_prompts = prepared
  prompts = sharding.place(run.mesh, host_prompts)
  if not run.config.own_rollouts:
    return Pending(done, examples, prompts)
  weights = run.programs.decode_weights(state.params)
  return Pending(done, examples, prompts, weights, run.programs.rollout(weights, prompts, run.key("rollout", done)))


class Prefetch:
  """The rollouts of the next step, if they were begun before its turn.

  Their random keys are those of their step and their weights those after the step before, so they are what they would
  be in its turn. A run that ends in between drops them.
  """

  def __init__(self, run: setup.Run):
    self._run = run
    self._pending: Pending | None = None

  def begin(self, state: TrainState, done: int) -> None:
    """Begins the step after `done` steps, unless they are all."""
    if done < self._run.config.train.steps:
      # What cannot be prepared is an error of that step: the one that is done is reported and saved before it.
      with contextlib.suppress(ValueError, OSError):
        self._pending = start_rollouts(self._run, state, done)

  def take(self, state: TrainState, done: int) -> Pending:
    """The step after `done` steps as it was begun, else begun now; it is the caller's from then on.

    Args:
      state: before the step.
      done: steps.

    Raises:
      ValueError: an image or a prompt of the batch cannot be used.
    """
    pending, self._pending = self._pending, None
    return pending if pending and pending.done == done else start_rollouts(self._run, state, done)

  def weights(self, state: TrainState) -> Any:
    """Decode weights of the state before the next step; those that its rollouts are drawn from, where it was begun.

    A second copy would not fit where the first one just does.
    """
    if self._pending and self._pending.weights is not None:
      return self._pending.weights
    return self._run.programs.decode_weights(state.params)
