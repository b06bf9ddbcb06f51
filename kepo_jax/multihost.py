"""What the processes of a run agree on: one looks or decides, or each does its part, and all act alike.

Every function here that talks to other processes must be called by all of them, at the same point of the program.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kepo_jax import sharding

# Bytes that each process sends at a time. One size for all messages is one program, whatever the lengths of the texts
# of a step: sizes that follow them would compile anew in the middle of a run.
CHUNK = 1 << 16
S = TypeVar("S")
T = TypeVar("T")


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


def together(work: Callable[[], T]) -> T:
  """What `work` returns here, done on every process; where it fails on one, it ends on all.

  Raises:
    ValueError: `work` raised it here.
    OSError: `work` raised it here, or it failed on another process.
  """
  done = False
  try:
    value = work()
    done = True
  finally:
    (failed,) = any_process(not done)
  if failed:
    raise _failed_elsewhere()
  return value


def any_process(*flags: bool) -> tuple[bool, ...]:
  """Each flag, true if it is so on any process; all must call it at the same point."""
  if jax.process_count() == 1:
    return flags
  everywhere = multihost_utils.process_allgather(np.array(flags, bool))
  return tuple(bool(flag) for flag in everywhere.reshape(-1, len(flags)).any(axis=0))


def gathered(work: Callable[[], Any]) -> list[Any]:
  """What `work` returns on each process, in their order; on every process.

  Args:
    work: returns a JSON-able value, of any size.

  Raises:
    OSError: `work` failed on another process. Whatever it raises here passes on, and never leaves the others waiting.
  """
  if jax.process_count() == 1:
    return [work()]
  data: np.ndarray | None = None
  try:
    data = np.frombuffer(json.dumps(work()).encode(), np.uint8)
  finally:
    sizes = multihost_utils.process_allgather(np.int32(-1 if data is None else len(data)))
  if data is None or (sizes < 0).any():
    raise _failed_elsewhere()
  parts = [_everywhere(data, start) for start in range(0, int(sizes.max()), CHUNK)]
  texts = np.concatenate(parts, axis=1)
  return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def divided(items: Sequence[S], work: Callable[[Sequence[S]], Sequence[Any]]) -> list[Any]:
  """What `work` finds about each of some things, of which every process looks at its own share; on every process.

  Args:
    items: the same number on every process, in the same order.
    work: some of them -> a JSON-able value for each.

  Returns:
    the values in the order of `items`; in a run of several processes tuples have become lists.

  Raises:
    OSError: `work` failed on another process. Whatever it raises here passes on, and never leaves the others waiting.
  """
  count, number = jax.process_count(), jax.process_index()
  values: list[Any] = [None] * len(items)
  for first, part in enumerate(gathered(lambda: list(work(items[number::count])))):
    values[first::count] = part
  return values


def by_holders(shape: Sequence[int], prompts: int, read: Callable[[int, Sequence[int]], Sequence[Any]]) -> np.ndarray:
  """What is read from the rollouts of a batch, each by the one process that answers for it; on every process.

  Args:
    shape: P, G of the batch.
    prompts: of them are read, the first ones; what is behind them is padding.
    read: (prompt, rollouts of it) -> one JSON-able value for each; what it raises ends the work on every process.

  Returns:
    object[prompts, G]; in a run of several processes tuples have become lists.

  Raises:
    OSError: reading failed on another process.
  """
  mine = sharding.row_holders(*shape)[:prompts] == jax.process_index()

  def work() -> list[Any]:
    rows = [(prompt, np.flatnonzero(row).tolist()) for prompt, row in enumerate(mine) if row.any()]
    return [(prompt, slots, list(read(prompt, slots))) for prompt, slots in rows]

  values = np.empty(mine.shape, object)
  for part in gathered(work):
    for prompt, slots, found in part:
      for slot, value in zip(slots, found, strict=True):
        values[prompt, slot] = value
  return values


def _failed_elsewhere() -> OSError:
  return OSError("another process of this run has failed; its log says why.")


def _everywhere(data: np.ndarray, start: int) -> np.ndarray:
  """uint8[processes, CHUNK], the bytes from `start` on of each, zero behind the end."""
  chunk = np.zeros(CHUNK, np.uint8)
  part = data[start : start + CHUNK]
  chunk[: len(part)] = part
  return multihost_utils.process_allgather(chunk)


def _broadcast(text: str) -> str:
  data = np.frombuffer(text.encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = data if is_first() else np.zeros(length, np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)).decode()
