"""Work shared by the processes of a run, so that all of them act alike and none waits for one that has failed.

Every process must call a communicating function at the same point of the program.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kepo_jax import sharding

# Bytes that each process sends at a time. One size needs one compiled program. Sizes that depend on the texts would
# recompile in the middle of a run.
CHUNK = 1 << 16
S = TypeVar("S")
T = TypeVar("T")


def is_first() -> bool:
  """Returns whether this process writes the shared files."""
  return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> Any:
  """Runs `work` on the first process and returns its result on every process.

  Args:
    work: returns a JSON-able value.

  Raises:
    ValueError: `work` raised ValueError or OSError; raised on every process.
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


def run_on_all(work: Callable[[], T]) -> T:
  """Runs `work` on every process and returns its result here; a failure on one process ends all.

  Raises:
    ValueError: `work` raised it here.
    OSError: `work` raised it here, or it failed on another process.
  """
  failed = True
  try:
    value = work()
    failed = False
  finally:
    (failed,) = any_process(failed)
  if failed:
    raise _failed_elsewhere()
  return value


def any_process(*flags: bool) -> tuple[bool, ...]:
  """Returns each flag, true if it is true on any process."""
  if jax.process_count() == 1:
    return flags
  everywhere = multihost_utils.process_allgather(np.array(flags, bool))
  return tuple(bool(flag) for flag in everywhere.reshape(-1, len(flags)).any(axis=0))


def all_gather(work: Callable[[], Any]) -> list[Any]:
  """Runs `work` on every process and returns all results, by process, on every process.

  Args:
    work: returns a JSON-able value, of any size.

  Raises:
    OSError: `work` failed on another process. Its own errors here propagate and leave no process waiting.
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
  parts = [_gather_chunk(data, start) for start in range(0, int(sizes.max()), CHUNK)]
  texts = np.concatenate(parts, axis=1)
  return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def shard_across_hosts(items: Sequence[S], work: Callable[[Sequence[S]], Sequence[Any]]) -> list[Any]:
  """Runs `work` on a share of the items in each process and returns the results for all, on every process.

  Args:
    items: the same number on every process, in the same order.
    work: some items -> a JSON-able value for each.

  Returns:
    the values in the order of `items`; in a run of several processes tuples have become lists.

  Raises:
    OSError: `work` failed on another process. Its own errors here propagate and leave no process waiting.
  """
  count, number = jax.process_count(), jax.process_index()
  values: list[Any] = [None] * len(items)
  for first, part in enumerate(all_gather(lambda: list(work(items[number::count])))):
    values[first::count] = part
  return values


def gather_from_owners(
  shape: Sequence[int], prompts: int, read: Callable[[int, Sequence[int]], Sequence[Any]]
) -> np.ndarray:
  """Reads every rollout of a batch on the one process that owns it and returns the results on every process.

  Args:
    shape: P, G of the batch.
    prompts: number of prompts that are read, the first ones; the others are padding.
    read: (prompt, its rollouts) -> one JSON-able value for each; what it raises ends the work on every process.

  Returns:
    object[prompts, G]; in a run of several processes tuples have become lists.

  Raises:
    OSError: reading failed on another process.
  """
  owned = sharding.row_holders(*shape)[:prompts] == jax.process_index()

  def work() -> list[Any]:
    rows = [(prompt, np.flatnonzero(row).tolist()) for prompt, row in enumerate(owned) if row.any()]
    return [(prompt, rollouts, list(read(prompt, rollouts))) for prompt, rollouts in rows]

  values = np.empty(owned.shape, object)
  for part in all_gather(work):
    for prompt, rollouts, results in part:
      for rollout, result in zip(rollouts, results, strict=True):
        values[prompt, rollout] = result
  return values


def _failed_elsewhere() -> OSError:
  return OSError("another process of this run has failed; its log says why.")


def _gather_chunk(data: np.ndarray, start: int) -> np.ndarray:
  """Returns uint8[processes, CHUNK], the bytes of each process from `start` on, padded with zeros."""
  chunk = np.zeros(CHUNK, np.uint8)
  part = data[start : start + CHUNK]
  chunk[: len(part)] = part
  return multihost_utils.process_allgather(chunk)


def _broadcast(text: str) -> str:
  data = np.frombuffer(text.encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = data if is_first() else np.zeros(length, np.uint8)
  return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)).decode()
