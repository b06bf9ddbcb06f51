"""Lays a mesh over the chips of a TPU slice so that the chips of a group are neighbours.

Where an axis of a mesh needs a part of an axis of the slice, `mesh_utils` may put chips of one group far apart: fsdp of
a mesh 4, 8, 8 on 16 x 16 chips gets 4 neighbours and another 4 that are eight links away, and eight groups share those
links. libtpu gathers in a one-dimensional ring, so such a gather takes 2 to 4 times as long as one along a line of 8.
Here fsdp and tensor get boxes of neighbours instead.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_DATA, _FSDP, _TENSOR = range(3)


def split_grid(devices: Sequence[Any], sizes: tuple[int, int, int]) -> np.ndarray | None:
  """Arranges the devices of one slice as object[data, fsdp, tensor] of these sizes; None for a part of a slice."""
  places = np.array([(*device.coords, device.core_on_chip) for device in devices])
  box = tuple(int(length) for length in places.max(0) + 1)
  if math.prod(box) != len(devices):
    return None
  grid = np.empty(box, object)
  for device, place in zip(devices, places, strict=True):
    grid[tuple(place)] = device
  return _cheapest(_splits(box, sizes), _wraps(devices[0].device_kind, box[:-1])).arrange(grid)


@dataclasses.dataclass(frozen=True)
class Split:
  """How the axes of a slice, the cores of a chip last, are divided among the axes of a mesh."""

  parts: tuple[tuple[int, int, int], ...]  # of each axis of the slice: what data, fsdp and tensor take of it
  inner: tuple[int, ...]  # of each: the axis of the mesh whose devices lie next to each other; data is outermost

  def link_load(self, axis: int, wraps: Sequence[bool]) -> float:
    """Returns the bytes on the busiest direction of a link, per byte that each group gathers along an axis of the mesh.

    Args:
      axis: of the mesh.
      wraps: of each axis of the slice, whether its last chip is linked to its first.
    """
    members = math.prod(part[axis] for part in self.parts)
    # Cores of one chip talk inside of it. Groups that interleave along an axis of the slice share its links.
    chips = list(zip(self.parts[:-1], self.inner[:-1], wraps, strict=True))
    sharing = [_stride(part, inner, axis) for part, inner, _ in chips if part[axis] > 1]
    closed = len(sharing) > 1 or any(
      wrap and part[axis] * _stride(part, inner, axis) == math.prod(part)
      for part, inner, wrap in chips
      if part[axis] > 1
    )
    # A ring goes both ways with half of the bytes; on an open line the way back takes the same links.
    return max(sharing, default=0) * (members - 1) / members * (0.5 if closed else 1.0)

  def arrange(self, grid: np.ndarray) -> np.ndarray:
    """Turns a slice [x, y, z, core] into a mesh [data, fsdp, tensor]."""
    shape: list[int] = []
    owners: list[int] = []
    for part, inner in zip(self.parts, self.inner, strict=True):
      order = (_DATA, *(axis for axis in (_FSDP, _TENSOR) if axis != inner), inner)
      shape += [part[axis] for axis in order]
      owners += order
    # Shorter sides first, so that the tour of a box of 2 x 4 ends beside its beginning.
    by_axis = sorted(range(len(owners)), key=lambda place: (owners[place], shape[place]))
    lengths = [[shape[place] for place in by_axis if owners[place] == axis] for axis in range(3)]
    mesh = grid.reshape(shape).transpose(by_axis).reshape([math.prod(sides) for sides in lengths])
    return mesh[np.ix_(*map(_tour, lengths))]


def _stride(part: tuple[int, int, int], inner: int, axis: int) -> int:
  """Returns the distance in chips between neighbours of a group along an axis of the slice."""
  if axis == inner:
    return 1
  return part[inner] if axis != _DATA else part[_FSDP] * part[_TENSOR]


def _cheapest(splits: Iterator[Split], wraps: Sequence[bool]) -> Split:
  def cost(split: Split) -> tuple[float, float]:
    data, fsdp, tensor = (split.link_load(axis, wraps) for axis in range(3))
    return fsdp + 2 * tensor, data  # sums over tensor, twice a gather, are most of what a step sends

  return min(splits, key=cost)


def _splits(box: Sequence[int], sizes: Sequence[int]) -> Iterator[Split]:
  """Yields every way to divide the axes of a slice among the axes of a mesh."""
  for parts in _factors(box, sizes):
    for inner in itertools.product((_TENSOR, _FSDP), repeat=len(parts)):
      yield Split(parts, inner)


def _factors(lengths: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, int, int], ...]]:
  if not lengths:
    if math.prod(sizes) == 1:
      yield ()
    return
  divisors = [[n for n in range(1, size + 1) if size % n == 0] for size in sizes]
  for data, fsdp, tensor in itertools.product(*divisors):
    if data * fsdp * tensor == lengths[0]:
      left = (sizes[_DATA] // data, sizes[_FSDP] // fsdp, sizes[_TENSOR] // tensor)
      yield from (((data, fsdp, tensor), *rest) for rest in _factors(lengths[1:], left))


def _tour(sides: Sequence[int]) -> np.ndarray:
  """Orders the points of a box so that each is a neighbour of the one before; returns their flat indices."""
  order = np.arange(1)
  for side in reversed(sides):
    order = np.concatenate([row * len(order) + (order[::-1] if row % 2 else order) for row in range(side)])
  return order


def _wraps(device_kind: str, lengths: Sequence[int]) -> list[bool]:
  """Returns whether each axis of a slice is a ring: of 16 chips on v5e and v6e, else of whole cubes of 4 x 4 x 4.

  From docs.cloud.google.com/tpu/docs/v5e and v5p. Where only some axes may be rings, none is taken for one.
  """
  if any(part in device_kind for part in ("v5 lite", "v5e", "v6")):
    return [min(lengths[:2]) >= 16] * len(lengths)
  return [all(length % 4 == 0 for length in lengths)] * len(lengths)
