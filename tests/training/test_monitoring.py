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


def test_a_stall_leaves_the_stacks_of_all_threads_and_a_line_in_the_log(tmp_path, said):
  release = threading.Event()

  def waiting_for_a_collective():
    release.wait()

  thread = threading.Thread(target=waiting_for_a_collective)
  thread.start()
  with Watchdog(0.2, tmp_path) as watchdog:
    time.sleep(0.05)
    watchdog.step(STEP)
    path = tmp_path / "stalls" / "process-0.txt"
    until(lambda: path.stat().st_size and "nothing has been completed" in said.text)
    release.set()
  text = path.read_text()
  assert "waiting_for_a_collective" in text and "test_monitoring.py" in text
  assert "since step 3" in said.text and str(path) in said.text
  thread.join()


def test_a_run_that_goes_on_leaves_nothing(tmp_path, said):
  with Watchdog(0.5, tmp_path) as watchdog:
    for _ in range(40):
      time.sleep(0.02)
      watchdog.progress("loading", 1, 2)
  with Watchdog(0, tmp_path) as watchdog:  # never warns
    watchdog.step(STEP)
  assert not list(tmp_path.iterdir()) and not said.text
