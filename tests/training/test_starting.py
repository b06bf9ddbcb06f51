"""A step that is begun before its turn: what it holds, when it is dropped, and what a failure of it leaves."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.training import OutOfMemory, job, loop, starting
from kepo_jax.types import Rollouts


def run_of(*, own=2, fails=()):
  """What `starting` asks of a run; `log` tells what was asked of it."""
  log = []

  def batch(done):
    if done in fails:
      raise ValueError(f"no image in step {done}")
    return [f"question {done}"], np.full(1, done)

  def rollout(actor, prompts, key):
    log.append((actor, int(prompts[0]), key))
    return Rollouts(tokens=np.zeros((1, 2, 3), np.int32), mask=np.ones((1, 2, 3), bool), logps=np.zeros((1, 2, 3)))

  programs = types.SimpleNamespace(decode_weights=lambda params: f"copy of {params}", rollout=rollout)
  config = types.SimpleNamespace(train=types.SimpleNamespace(steps=5))
  settings = {"mesh": None, "key": lambda *purpose: purpose, "log": log, "programs": programs, "config": config}
  return types.SimpleNamespace(own_rollouts=own, batch=batch, **settings)


@pytest.fixture(autouse=True)
def nothing_is_placed(monkeypatch):
  monkeypatch.setattr(starting.sharding, "place", lambda mesh, batch: batch)


def state_of(name):
  return types.SimpleNamespace(params=name)


def test_what_was_begun_is_taken_once():
  run = run_of()
  ahead = starting.Ahead(run)
  ahead.begin(state_of("a"), 3)
  assert ahead.weights(state_of("a")) == "copy of a"
  begun = ahead.take(state_of("a"), 3)
  assert run.log == [("copy of a", 3, ("rollout", 3))]
  assert (begun.done, begun.examples, begun.actor) == (3, ["question 3"], "copy of a")
  begun.release()
  assert begun.actor is None
  assert ahead.take(state_of("b"), 3).actor == "copy of b"  # nothing is left: it begins now
  assert ahead.weights(state_of("c")) == "copy of c"


def test_another_step_than_the_one_that_was_begun():
  run = run_of()
  ahead = starting.Ahead(run)
  ahead.begin(state_of("a"), 5)  # there is no such step any more
  assert run.log == []
  ahead.begin(state_of("a"), 3)
  assert ahead.take(state_of("b"), 4).examples == ["question 4"]


def test_a_method_that_does_not_sample_and_a_step_that_fails_in_its_turn():
  run = run_of(own=0, fails=[2])
  ahead = starting.Ahead(run)
  ahead.begin(state_of("a"), 1)
  begun = ahead.take(state_of("a"), 1)
  assert begun.rollouts is None and begun.actor is None and begun.examples == ["question 1"] and not run.log
  ahead.begin(state_of("a"), 2)
  with pytest.raises(ValueError, match="no image in step 2"):
    ahead.take(state_of("a"), 2)


def test_the_teacher_is_asked_before_texts_are_read_and_without_the_students_copy():
  asked = []
  rollouts = Rollouts(**dict.fromkeys(("tokens", "mask", "logps"), jnp.ones((1, 2, 3))))
  begun = starting.Started(0, ["q"], "prompts", "weights", rollouts)

  def targets(prompts, tokens):
    asked.append((prompts, type(tokens), begun.actor))
    return ("target",)

  run = types.SimpleNamespace(mesh=None, programs=types.SimpleNamespace(targets=targets))
  assert loop.scored_at_once(run, begun, loop.PhaseClock()) == ("target",)
  assert asked == [("prompts", np.ndarray, None)]


def test_nothing_is_begun_where_another_process_cannot(monkeypatch):
  run = run_of()
  ahead = starting.Ahead(run)
  with monkeypatch.context() as elsewhere:
    elsewhere.setattr(starting.processes, "any_process", lambda *flags: (True,))
    ahead.begin(state_of("a"), 3)
    assert run.log == []
    with pytest.raises(OSError, match="another process of this run has failed"):
      ahead.take(state_of("a"), 3)
  assert ahead.take(state_of("a"), 3).examples == ["question 3"]


def test_out_of_memory_names_the_phase():
  for text, error in (("RESOURCE_EXHAUSTED: 9 bytes", OutOfMemory), ("INVALID_ARGUMENT", jax.errors.JaxRuntimeError)):
    with pytest.raises(error) as caught, job.telling_out_of_memory(), loop.PhaseClock()("update"):
      raise jax.errors.JaxRuntimeError(text)
    assert error is not OutOfMemory or str(caught.value) == "out of memory in update"
