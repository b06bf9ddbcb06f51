import types

import jax
import numpy as np
import pytest

from kepo_jax.training import OutOfMemory, metrics
from kepo_jax.training import prefetch as prefetch_lib
from kepo_jax.training.train import out_of_memory_errors
from kepo_jax.types import Rollouts


def run_of(*, own=2, fails=()):
  """What `prefetch` asks of a run; `log` tells what was asked of it."""
  log = []

  def batch(step):
    if step in fails:
      raise ValueError(f"no image in step {step}")
    return [f"question {step}"], np.full(1, step)

  def rollout(weights, prompts, key):
    log.append((weights, int(prompts[0]), key))
    return Rollouts(tokens=np.zeros((1, 2, 3), np.int32), mask=np.ones((1, 2, 3), bool), logps=np.zeros((1, 2, 3)))

  programs = types.SimpleNamespace(decode_weights=lambda params: f"copy of {params}", rollout=rollout)
  config = types.SimpleNamespace(train=types.SimpleNamespace(steps=5), own_rollouts=own, seed=0)
  settings = {"mesh": None, "log": log, "programs": programs, "config": config}
  return types.SimpleNamespace(batch=batch, **settings)


@pytest.fixture(autouse=True)
def nothing_is_placed(monkeypatch):
  monkeypatch.setattr(prefetch_lib.sharding, "place", lambda mesh, batch: batch)
  monkeypatch.setattr(prefetch_lib.setup, "random_key", lambda seed, *purpose: purpose)


def state_of(name):
  return types.SimpleNamespace(params=name)


def test_what_was_pending_is_taken_once():
  run = run_of()
  prefetch = prefetch_lib.Prefetch(run)
  prefetch.start(state_of("a"), 3)
  assert prefetch.weights(state_of("a")) == "copy of a"
  pending = prefetch.take(state_of("a"), 3)
  assert run.log == [("copy of a", 3, ("rollout", 3))]
  assert (pending.step, pending.examples, pending.weights) == (3, ["question 3"], "copy of a")
  pending.release()
  assert pending.weights is None
  assert prefetch.take(state_of("b"), 3).weights == "copy of b"  # nothing is left: it begins now
  assert prefetch.weights(state_of("c")) == "copy of c"
  prefetch.start(state_of("a"), 3)
  assert prefetch.take(state_of("b"), 4).examples == ["question 4"]  # of another step
  prefetch.start(state_of("a"), 5)  # there is no such step any more
  assert len(run.log) == 4


def test_a_method_that_does_not_sample_and_a_step_that_fails_in_its_turn():
  run = run_of(own=0, fails=[2])
  prefetch = prefetch_lib.Prefetch(run)
  prefetch.start(state_of("a"), 1)
  pending = prefetch.take(state_of("a"), 1)
  assert pending.rollouts is None and pending.weights is None and pending.examples == ["question 1"] and not run.log
  prefetch.start(state_of("a"), 2)
  with pytest.raises(ValueError, match="no image in step 2"):
    prefetch.take(state_of("a"), 2)


def test_nothing_is_pending_where_another_process_cannot(monkeypatch):
  run = run_of()
  prefetch = prefetch_lib.Prefetch(run)
  with monkeypatch.context() as elsewhere:
    elsewhere.setattr(prefetch_lib.multihost, "any_process", lambda *flags: (True,))
    prefetch.start(state_of("a"), 3)
    assert run.log == []
    with pytest.raises(OSError, match="another process of this run has failed"):
      prefetch.take(state_of("a"), 3)
  assert prefetch.take(state_of("a"), 3).examples == ["question 3"]


def test_out_of_memory_names_the_phase_whatever_says_so():
  full = [jax.errors.JaxRuntimeError(text) for text in ("RESOURCE_EXHAUSTED: 9 bytes", "Failed to allocate 9 bytes")]
  for error in (*full, ValueError("RESOURCE_EXHAUSTED"), MemoryError()):
    with pytest.raises(OutOfMemory) as caught, out_of_memory_errors(), metrics.PhaseClock()("update"):
      raise error
    assert str(caught.value) == "out of memory in update"
  for other in (jax.errors.JaxRuntimeError("INVALID_ARGUMENT"), ValueError("an image")):
    with pytest.raises(type(other), match=str(other)), out_of_memory_errors(), metrics.PhaseClock()("update"):
      raise other
