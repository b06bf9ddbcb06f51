"""SIGTERM and SIGINT: the first asks a run to stop after its step, the second ends it at once."""

import os
import signal
import threading
from typing import Any

from absl import logging

from kepo_jax import multihost

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command again goes on.
EXIT_CODE = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
  """A run was asked to stop, and has stopped in a state from which it can be resumed."""

  def __init__(self, step: int = 0, saved: str = ""):
    """Says where the run stands.

    Args:
      step: updates done.
      saved: folder of the checkpoint of that step; "" where there is none.
    """
    where = f"its state is in {saved}" if saved else "nothing was saved"
    super().__init__(f"interrupted after step {step}; {where}.")
    self.step, self.saved = step, saved


class Interruption:
  """Listens for signals inside its block, in the main thread; elsewhere it never asks for anything.

  A thread reads what the signals write to a pipe: Python's own handlers wait for the main thread, which may be inside
  a compilation or a long step, and a second signal must not wait.
  """

  def __init__(self):
    self._requested = False
    self._pipe: tuple[int, int] | None = None
    self._before: dict[int, Any] = {}
    self._wakeup = -1

  def __enter__(self) -> "Interruption":
    if threading.current_thread() is threading.main_thread():
      self._pipe = os.pipe()
      os.set_blocking(self._pipe[1], False)
      self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
      self._before = {number: signal.signal(number, _ignore) for number in _SIGNALS}
      threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._pipe:
      for number, handler in self._before.items():
        signal.signal(number, handler)
      signal.set_wakeup_fd(self._wakeup)
      os.close(self._pipe[1])  # ends the thread
      self._pipe = None

  def requested(self) -> bool:
    """Returns whether any process of the run was asked to stop; all must call it at the same point."""
    return multihost.any_process(self._requested)[0]

  def check(self) -> None:
    """Stops work that can be done again, such as an evaluation.

    Raises:
      Interrupted: the run was asked to stop.
    """
    if self.requested():
      raise Interrupted

  def _listen(self, pipe: int) -> None:
    while data := os.read(pipe, 1):
      if data[0] not in _SIGNALS:
        continue
      if self._requested:
        os._exit(128 + data[0])
      self._requested = True
      name = signal.Signals(data[0]).name
      logging.warning("%s: the run stops as soon as its state can be saved; again to exit at once.", name)
    os.close(pipe)


def _ignore(*_: Any) -> None:
  """A handler of Python's, so that the signal reaches the pipe; the thread does the rest."""
