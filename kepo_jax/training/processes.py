"""What the processes of a run agree on: one looks or decides, all act alike."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
  """Whether this process is the one that writes what is written once."""
  return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> Any:
  """What `work`, done by the first process alone, returns there; on every process.

  Args:
    work: returns a JSON-able value.

  Raises:
    ValueError: `work` raised ValueError or OSError; every process raises it, so that none waits for the others.
  """
  if jax.process_count() == 1:
    return work()
  outcome: dict[str, Any] = {"error": "it failed; its log says why."}
  try:
    if is_first():
      outcome = {"value": work()}
  except (ValueError, OSError) as error:
    outcome = {"error": str(error)}
    raise
  finally:  # whatever happened, none may wait for the others
    outcome = json.loads(_broadcast(json.dumps(outcome)))
  if "error" in outcome:
    raise ValueError(f"the first process: {outcome['error']}")
  return outcome["value"]


def together(work: Callable[[], None]) -> None:
  """Does `work` on every process; where it fails on one, it ends on all.

  Raises:
    ValueError: `work` raised it here.
    OSError: `work` raised it here, or it failed on another process.
  """
  done = False
  try:
    work()
    done = True
  finally:
    (failed,) = any_process(not done)
  if failed:
    raise OSError("another process of this run has failed; its log says why.")


def any_process(*flags: bool) -> tuple[bool, ...]:
  """Each flag, true if it is so on any process; all must call it at the same point."""
  if jax.process_count() == 1:
    return flags
  everywhere = multihost_utils.process_allgather(np.array(flags, bool))
  return tuple(bool(flag) for flag in everywhere.reshape(-1, len(flags)).any(axis=0))


def _broadcast(text: str) -> str:
  data = np.frombuffer(text.encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = data if is_first() else np.zeros(length, np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)).decode()
