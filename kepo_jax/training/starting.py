"""Rollouts that are begun before their step: the device samples while the host writes down the step before."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from kepo_jax import processes, sharding
from kepo_jax.training import setup
from kepo_jax.training.state import TrainState
from kepo_jax.types import Example, Prompts


@dataclasses.dataclass
class Started:
  """What a step begins with; the device may still be sampling."""

  done: int  # steps before it
  examples: Sequence[Example]
  prompts: Prompts  # on the mesh
  actor: Any = None  # decode weights of the student, until they are released; None where it does not sample
  rollouts: Any = None  # Rollouts; None where the student does not sample

  def release(self) -> None:
    """Frees the decode weights; on the device, once what samples from them is through."""
    self.actor = None


def started(run: setup.Run, state: TrainState, done: int) -> Started:
  """Asks the device for the student's rollouts of the step after `done` steps, without waiting for them.

  Raises:
    ValueError: an image or a prompt of the batch cannot be used.
    OSError: so it is on another process, whose images are others: all of them sample, or none.
  """
  prepared: list[Any] = []
  processes.together(lambda: prepared.extend(run.batch(done)))
  examples, host_prompts = prepared
  prompts = sharding.place(run.mesh, host_prompts)
  if not run.own_rollouts:
    return Started(done, examples, prompts)
  actor = run.programs.decode_weights(state.params)
  return Started(done, examples, prompts, actor, run.programs.rollout(actor, prompts, run.key("rollout", done)))


class Ahead:
  """The step that was begun before its turn, if one was.

  Its random keys are those of its step and its weights those after the step before, so its rollouts are what they
  would be in its turn. A run that ends in between drops them.
  """

  def __init__(self, run: setup.Run):
    self._run = run
    self._started: Started | None = None

  def begin(self, state: TrainState, done: int) -> None:
    """Begins the step after `done` steps, unless they are all."""
    if done < self._run.config.train.steps:
      # What cannot be prepared is an error of that step: the one that is done is reported and saved before it.
      with contextlib.suppress(ValueError, OSError):
        self._started = started(self._run, state, done)

  def take(self, state: TrainState, done: int) -> Started:
    """The step after `done` steps as it was begun, else begun now; it is the caller's from then on.

    Args:
      state: before the step.
      done: steps.

    Raises:
      ValueError: an image or a prompt of the batch cannot be used.
    """
    begun, self._started = self._started, None
    return begun if begun and begun.done == done else started(self._run, state, done)

  def weights(self, state: TrainState) -> Any:
    """Decode weights of the state before the next step; those that its rollouts are drawn from, where it was begun.

    A second copy would not fit where the first one just does.
    """
    if self._started and self._started.actor is not None:
      return self._started.actor
    return self._run.programs.decode_weights(state.params)
