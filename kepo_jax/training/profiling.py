"""What compilation and a trace of the profiler say about a run."""

import contextlib
import os
import threading
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

  def figures(self) -> dict[str, float]:
    """`compiled/programs` so far, how many of them are `compiled/cached`, and the `compiled/seconds` that they took."""
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
