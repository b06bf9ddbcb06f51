"""Which questions a page shows where there are more than fit."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import zip_longest

from kepo_jax.reporting.pages.blocks import Sample


def balanced(samples: Iterable[Sample]) -> list[Sample]:
  """All samples in the order in which a page takes them: as many of each cell as there are, whatever the number taken.

  Cells are source, modality and outcome; within one, tags take turns. Hashes of the keys decide the rest, so that the
  same samples are taken in whatever order they come.
  """
  ordered = sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode("utf-8", "replace")).digest())
  cells = _grouped(ordered, lambda sample: (sample.source, sample.modality, sample.outcome))
  return _in_turns([_in_turns(_grouped(cell, lambda sample: sample.tags)) for cell in cells])


def _grouped(samples: Iterable[Sample], key: Callable[[Sample], Hashable]) -> list[list[Sample]]:
  found: dict[Hashable, list[Sample]] = {}
  for sample in samples:
    found.setdefault(key(sample), []).append(sample)
  return list(found.values())


def _in_turns(lists: Sequence[Sequence[Sample]]) -> list[Sample]:
  return [sample for turn in zip_longest(*lists) for sample in turn if sample is not None]
