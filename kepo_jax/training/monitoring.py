"""Watches a run: compilations, a trace of the profiler, and a watchdog for runs that stand still."""

import contextlib
import os
import sys
import threading
import traceback
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


class Watchdog(Hook):
  """Warns when a run has completed nothing for some seconds, inside its block; again after twice the time."""

  def __init__(self, seconds: float, workdir: epath.PathLike = ""):
    """Sets the limit.

    Args:
      seconds: longest silence; 0 never warns. Measured by a clock that never jumps.
      workdir: where stalls/ with the stack traces is written; "" puts them into the log.
    """
    self._seconds = seconds
    self._workdir = str(workdir)
    self._heard = threading.Condition()
    self._beats = 0
    self._what = "the start"
    self._closed = False
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    with self._heard:
      self._closed = True
      self._heard.notify()
    if self._seconds:
      self._thread.join()

  def step(self, report: StepReport) -> None:
    """A step is a sign of life."""
    self._beat(f"step {report.step}")

  def evaluation(self, step: int, name: str, result: dict[str, Any]) -> None:
    """So is an evaluation."""
    del step, result
    self._beat(f"evaluation {name}")

  def progress(self, what: str, done: int, total: int) -> None:
    """And a part of long work."""
    self._beat(f"{what} {done} of {total}")

  def _beat(self, what: str) -> None:
    with self._heard:
      self._beats += 1
      self._what = what
      self._heard.notify()

  def _watch(self) -> None:
    limit = self._seconds
    while True:
      with self._heard:
        heard = self._closed or self._heard.wait(limit)
        if self._closed:
          return
        what, number = self._what, self._beats
      if heard:
        limit = self._seconds
      else:
        self._warn(limit, what, number)  # not under the lock: storage may be what does not answer
        limit *= 2

  def _warn(self, silence: float, what: str, number: int) -> None:
    stacks = stack_traces()
    where = "below"
    if self._workdir:
      folder = epath.Path(self._workdir) / "stalls"
      host = f"-process-{jax.process_index()}" if jax.process_count() > 1 else ""
      path = folder / f"after-{what.replace(' ', '-')}-{number}{host}.txt"
      try:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, stacks)
        where = f"in {path}"
      except (OSError, ValueError) as error:  # the latter where credentials have expired
        logging.warning("%s", error)
    logging.warning(
      "nothing has been completed for %.0f s since %s: a collective that waits for another host, storage that does "
      "not answer, or a compilation longer than log.stall_seconds. The stacks of all threads are %s.%s",
      silence,
      what,
      where,
      "\n" + stacks if where == "below" else "",
    )


def stack_traces() -> str:
  """Where every thread of this process stands, as Python prints tracebacks."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  parts = [
    f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
    for ident, frame in sys._current_frames().items()
  ]
  return "\n".join(parts)
