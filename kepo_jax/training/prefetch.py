"""Prefetch: the device samples the rollouts of the next step while the host reports the step before."""

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
  """The prompts of a step and its rollouts, which the device may still be sampling."""

  step: int  # its number, from 0
  examples: Sequence[Example]
  prompts: Prompts  # on the mesh
  weights: Any = None  # decode weights of the student, until they are released; None where it does not sample
  rollouts: Any = None  # Rollouts; None where the student does not sample

  def release(self) -> None:
    """Frees the decode weights; on the device, once what samples from them is through."""
    self.weights = None


def start_rollouts(run: setup.Run, state: TrainState, step: int) -> Pending:
  """Asks the device for the student's rollouts of a step, without waiting for them.

  Raises:
    ValueError: an image or a prompt of the batch cannot be used.
    OSError: another process could not read its images.
  """
  examples, host_prompts = multihost.run_on_all(lambda: run.batch(step))
  prompts = sharding.place(run.mesh, host_prompts)
  if not run.config.own_rollouts:
    return Pending(step, examples, prompts)
  weights = run.programs.decode_weights(state.params)
  key = setup.random_key(run.config.seed, "rollout", step)
  return Pending(step, examples, prompts, weights, run.programs.rollout(weights, prompts, key))


class Prefetch:
  """The rollouts of the next step, if they were started early.

  Their random keys are those of their step and their weights those after the step before, so starting them early
  changes nothing. A run that ends in between drops them.
  """

  def __init__(self, run: setup.Run):
    self._run = run
    self._pending: Pending | None = None

  def start(self, state: TrainState, step: int) -> None:
    """Starts the rollouts of a step, unless the run ends before it."""
    if step < self._run.config.train.steps:
      # What cannot be prepared is an error of that step: the one before it is reported and saved first.
      with contextlib.suppress(ValueError, OSError):
        self._pending = start_rollouts(self._run, state, step)

  def take(self, state: TrainState, step: int) -> Pending:
    """Returns the rollouts of a step, which are started now if they were not before.

    Args:
      state: before the step.
      step: its number, from 0.

    Raises:
      ValueError: an image or a prompt of the batch cannot be used.
    """
    pending, self._pending = self._pending, None
    return pending if pending and pending.step == step else start_rollouts(self._run, state, step)

  def weights(self, state: TrainState) -> Any:
    """Returns decode weights of the state before the next step: those of its rollouts, if they were started.

    A second copy would not fit where the first one just does.
    """
    if self._pending and self._pending.weights is not None:
      return self._pending.weights
    return self._run.programs.decode_weights(state.params)
