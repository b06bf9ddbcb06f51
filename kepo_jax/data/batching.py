"""Batches of a run: the seed and the step alone decide which questions a step sees."""

import hashlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from kepo_jax.types import Example

T = TypeVar("T")


def row_id(example_id: str) -> int:
  """Returns the identity of a question, uint32: the same in every process, run and version of Python."""
  return zlib.crc32(example_id.encode("utf-8", "surrogatepass"))


def shuffled(examples: Sequence[Example], *salt: object) -> list[Example]:
  """Orders questions by their ids and the salt alone, whatever their order and the version of NumPy."""
  prefix = "".join(f"{part}/" for part in salt)

  def rank(example: Example) -> bytes:
    return hashlib.sha256((prefix + example.id).encode("utf-8", "surrogatepass")).digest()

  return sorted(examples, key=rank)


def batch_at(examples: Sequence[Example], batch_size: int, *, seed: int, step: int) -> list[Example]:
  """Returns the batch of one step; each epoch is a new permutation, whose remainder below a batch is left out.

  Args:
    examples: at least `batch_size` questions.
    batch_size: P.
    seed: fixes the order.
    step: number of batches before this one.

  Raises:
    ValueError: fewer questions than one batch needs.
  """
  return next(epoch_batches(examples, batch_size, seed, step))


def epoch_batches(
  examples: Sequence[Example], batch_size: int, seed: int, start_step: int = 0
) -> Iterator[list[Example]]:
  """Yields batches of `batch_at` without end; one that starts at a step yields what an unbroken one would have."""
  if len(examples) < batch_size:
    raise ValueError(f"{len(examples)} questions do not fill a batch of {batch_size}; lower batch.prompts.")
  order: tuple[int, list[Example]] = (-1, [])
  for step in itertools.count(start_step):
    epoch, place = divmod(step, len(examples) // batch_size)
    if order[0] != epoch:
      order = epoch, shuffled(examples, seed, epoch)
    yield order[1][place * batch_size : (place + 1) * batch_size]


class Lookahead(Generic[T]):
  """`function(i)` for rising i; while the caller uses one result, a thread prepares the next."""

  def __init__(self, function: Callable[[int], T], stop: int | None = None):
    self._function = function
    self._stop = stop  # first i that is never asked for
    self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lookahead")
    self._pending: dict[int, Future[T]] = {}

  def __call__(self, index: int) -> T:
    """Returns function(index), or raises what it raises."""
    pending = self._pending.pop(index, None) or self._thread.submit(self._function, index)
    self._pending.clear()  # a jump makes the prepared one useless
    result = pending.result()
    if self._stop is None or index + 1 < self._stop:
      self._pending[index + 1] = self._thread.submit(self._function, index + 1)
    return result
