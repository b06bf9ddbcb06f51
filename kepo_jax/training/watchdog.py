"""Says when a run has come to a standstill, and where every thread of it stands."""

import sys
import threading
import traceback
from typing import Any

import jax
from absl import logging
from etils import epath

from kepo_jax import storage
from kepo_jax.types import Hook, StepReport


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
