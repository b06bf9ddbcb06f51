"""A trace is written also when the run ends before it was to end."""

import threading
import time
import types

import jax.numpy as jnp

from kepo_jax.training.monitoring import WARM_UP, Profiler, Watchdog
from kepo_jax.types import StepReport
from tests.training.cases import until


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
  profiler = Profiler()
  config = types.SimpleNamespace(profile=types.SimpleNamespace(steps=5))
  profiler.start(types.SimpleNamespace(workdir=str(tmp_path), start_step=0, config=config))
  for step in range(1, WARM_UP + 2):
    jnp.ones(3).sum().block_until_ready()
    profiler.step(StepReport(step=step, metrics={}, timing={}, samples=()))
  assert not list((tmp_path / "profile").rglob("*.pb"))
  profiler.stop()
  assert list((tmp_path / "profile").rglob("*.pb"))
  profiler.stop()


STEP = StepReport(step=3, metrics={}, timing={}, samples=())


def test_a_stall_leaves_the_stacks_of_all_threads(tmp_path, said):
  release = threading.Event()

  def waiting_for_a_collective():
    release.wait()

  thread = threading.Thread(target=waiting_for_a_collective, name="stuck")
  thread.start()
  with Watchdog(0.1, tmp_path) as watchdog:
    watchdog.step(STEP)
    until(lambda: "nothing has been completed" in said.text)
    release.set()
  (path,) = list((tmp_path / "stalls").glob("*step-3*"))
  text = path.read_text()
  assert "thread stuck" in text and "waiting_for_a_collective" in text and "thread MainThread" in text
  assert "since step 3" in said.text and str(path) in said.text
  thread.join()


def test_without_a_workdir_the_stacks_are_in_the_log(said):
  with Watchdog(0.05):
    until(lambda: "thread MainThread" in said.text)


def test_beats_keep_it_quiet_and_a_stall_is_told_less_and_less_often(monkeypatch):
  warned = []
  with Watchdog(0.2) as watchdog:
    monkeypatch.setattr(watchdog, "_warn", lambda silence, *_: warned.append(silence))
    for _ in range(40):
      time.sleep(0.02)
      watchdog.progress("loading", 1, 2)
    assert warned == []
    until(lambda: len(warned) == 2)
  assert warned == [0.2, 0.4]
  with Watchdog(0) as watchdog:  # never warns
    watchdog.step(STEP)
  assert not watchdog._thread.is_alive()
