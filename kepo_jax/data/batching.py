"""Which buckets the batches of a run fall into, known from texts and headers of images before a pixel is decoded."""

import bisect
import dataclasses
from collections.abc import Sequence

from kepo_jax.data import processor as processor_lib
from kepo_jax.types import Example

Buckets = tuple[int, int]  # prompt tokens S, patch rows R (0 without images)


@dataclasses.dataclass(frozen=True)
class Need:
  """The buckets that one question needs."""

  lengths: tuple[int, ...]  # of prompt tokens, rising: without a hint, and what longer and longer ones make of it
  patches: int  # of patch rows, 0 without images


class Needs:
  """The needs of questions, each measured once per wording."""

  def __init__(self, processor: processor_lib.Processor):
    self._processor = processor
    self._known: dict[tuple[str, int], dict[str, Need]] = {}

  def __call__(self, examples: Sequence[Example], kind: str, *, hint: int = 0) -> list[Need]:
    """The need of each question.

    Args:
      examples: questions for which there is room, see `limits.refusals`.
      kind: wording, as in `data.prompts.prompt_text`.
      hint: most tokens that a hint adds to the prompt; which text it will have is not known.

    Raises:
      ValueError: a file is no image; names it.
    """
    known = self._known.setdefault((kind, hint), {})
    fresh = list({example.id: example for example in examples if example.id not in known}.values())
    for example, (tokens, rows) in zip(fresh, self._processor.sizes(fresh, kind), strict=True):
      known[example.id] = Need(
        lengths=_reached(self._processor.prompt_buckets, tokens, tokens + hint),
        patches=_reached(self._processor.patch_buckets, rows, rows)[0] if rows else 0,
      )
    return [known[example.id] for example in examples]


def _reached(buckets: Sequence[int], least: int, most: int) -> tuple[int, ...]:
  """The buckets of sizes from `least` to `most`, or the largest."""
  first, last = (min(bisect.bisect_left(buckets, size), len(buckets) - 1) for size in (least, most))
  return tuple(buckets[first : last + 1])


def batch_buckets(needs: Sequence[Need]) -> Buckets:
  """The buckets of a batch of exactly these questions, without hints."""
  return max(need.lengths[0] for need in needs), max(need.patches for need in needs)


def reachable(needs: Sequence[Need], least: int, most: int) -> set[Buckets]:
  """Every pair of buckets that a batch of `least` to `most` of these questions can have, whatever the hints are.

  Args:
    needs: of the questions to choose from.
    least: questions in the batch, 1 or more.
    most: the same or more.
  """
  found = set()
  for length in {length for need in needs for length in need.lengths}:
    for patches in {need.patches for need in needs}:
      fitting = [need for need in needs if need.lengths[0] <= length and need.patches <= patches]
      long = [need for need in fitting if length in need.lengths]
      large = [need for need in fitting if need.patches == patches]
      # One question may fill both buckets; two questions always can.
      filled = bool(long and large) and (most > 1 or any(need.patches == patches for need in long))
      if filled and len(fitting) >= least:
        found.add((length, patches))
  return found
