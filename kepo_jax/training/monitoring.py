"""Watches a run: compilations, a trace of the profiler, and a watchdog for runs that stand still."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from typing import Any

import jax
from absl import logging
from etils import epath

from kepo_jax import storage
from kepo_jax.types import Hook, RunPlan, StepReport

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_EVENT = "/jax/compilation_cache/cache_hits"  # of the persistent cache
WARM_UP = 2  # steps before a trace: the first ones compile


class CompileCounter:
  """Programs that XLA compiled, or read from the persistent cache, while it was open; in any thread."""

  def __init__(self):
    self._programs = self._cached = 0
    self._seconds = 0.0
    self._lock = threading.Lock()
    jax.monitoring.register_event_duration_secs_listener(self._count)
    jax.monitoring.register_event_listener(self._count_cached)

  def _count(self, event: str, duration_secs: float, **_: Any) -> None:
    if event == COMPILE_EVENT:
      with self._lock:
        self._programs += 1
        self._seconds += duration_secs

  def _count_cached(self, event: str, **_: Any) -> None:
    if event == CACHE_EVENT:
      with self._lock:
        self._cached += 1

  def metrics(self) -> dict[str, float]:
    """Returns `compiled/programs` so far, how many of them are `compiled/cached`, and their `compiled/seconds`."""
    with self._lock:
      counts = {"compiled/programs": float(self._programs), "compiled/cached": float(self._cached)}
      return counts | {"compiled/seconds": self._seconds}

  def close(self) -> None:
    """Stops counting."""
    jax.monitoring.unregister_event_duration_listener(self._count)
    jax.monitoring.unregister_event_listener(self._count_cached)


class Profiler(Hook):
  """Traces `profile.steps` steps after a warm-up into WORKDIR/profile, for TensorBoard or Perfetto."""

  def __init__(self):
    self._first = self._last = 0  # steps between which the trace runs
    self._directory = epath.Path()
    self._trace = contextlib.ExitStack()
    self._running = False

  def start(self, plan: RunPlan) -> None:
    """Plans the trace.

    Raises:
      ValueError: there is no workdir to write it to.
    """
    if not plan.workdir:
      raise ValueError("profile.steps needs a workdir to write the trace to; pass --workdir=DIR.")
    self._directory = epath.Path(plan.workdir) / "profile"
    self._first = plan.start_step + WARM_UP
    self._last = self._first + plan.config.profile.steps

  def step(self, report: StepReport) -> None:
    """Starts or ends the trace when its step has come."""
    if report.step == self._first:
      jax.profiler.start_trace(os.fspath(self._trace.enter_context(storage.written_locally(self._directory))))
      self._running = True
    if report.step == self._last:
      self.finish()

  def finish(self) -> None:
    """Ends the trace if the run was shorter than planned."""
    if self._running:
      jax.profiler.stop_trace()
      self._trace.close()
      self._running = False
      logging.info("profiler trace: %s", self._directory)

  def stop(self) -> None:
    """Ends the trace of a run that ends early: what was traced until then is written."""
    self.finish()


class Watchdog(Hook):
  """Dumps the stacks of all threads when a run has completed nothing for some seconds; inside its block."""

  def __init__(self, seconds: float, workdir: epath.PathLike = ""):
    """Sets the limit.

    Args:
      seconds: longest silence, after which stacks are dumped, again and again; 0 never dumps any.
      workdir: has the stacks in stalls/; where it is remote or "", they go to the standard error stream.
    """
    self._seconds = seconds
    self._folder = pathlib.Path(workdir) / "stalls" if workdir and not storage.is_remote(workdir) else None
    self._file: Any = sys.__stderr__
    self._armed = 0.0
    self._warning: threading.Timer | None = None

  def __enter__(self) -> "Watchdog":
    if self._seconds and self._folder:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._file = (self._folder / f"process-{jax.process_index()}.txt").open("a", encoding="utf-8")
    self._arm("the start")
    return self

  def __exit__(self, *_: Any) -> None:
    if not self._warning:
      return
    faulthandler.cancel_dump_traceback_later()
    self._warning.cancel()
    if self._folder:
      self._file.close()
      path = pathlib.Path(self._file.name)
      with contextlib.suppress(OSError):
        if not path.stat().st_size:
          path.unlink()
          self._folder.rmdir()  # unless another process has written there

  def step(self, report: StepReport) -> None:
    """Takes a step as a sign of life."""
    self._arm(f"step {report.step}")

  def evaluation(self, step: int, name: str, result: dict[str, Any]) -> None:
    """Takes an evaluation as one."""
    del step, result
    self._arm(f"evaluation {name}")

  def progress(self, what: str, done: int, total: int) -> None:
    """Takes a part of long work as one."""
    self._arm(f"{what} {done} of {total}")

  def _arm(self, completed: str) -> None:
    now = time.monotonic()
    if not self._seconds or now - self._armed < self._seconds / 100:  # progress may come a thousand times a second
      return
    self._armed = now
    # A thread of C, which needs no lock of the interpreter: a call that holds it for good is shown as well.
    faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)
    if self._warning:
      self._warning.cancel()
    self._warning = threading.Timer(self._seconds, self._warn, (completed,))
    self._warning.daemon = True
    self._warning.start()

  def _warn(self, completed: str) -> None:
    logging.warning(
      "nothing has been completed for %.0f s since %s: a collective that waits for another host, storage that does "
      "not answer, or a compilation longer than log.stall_seconds. The stacks of all threads are in %s.",
      self._seconds,
      completed,
      self._file.name,
    )
