"""The links between the chips of a TPU slice: what collectives cost on them, and how a mesh is laid over them.

Gathers, reductions and scatters are taken to run in a ring over the members of a group, both ways round, half of the
bytes each way; all groups at once. A hop to a chip that is no neighbour occupies every link on its way, and an open
line is closed by the way back. The link that most hops use sets the rate. So an axis of a mesh that takes whole rings
of a slice moves at the rate of two directions of a link, one along an open line at that of one, and one that takes
every second chip at half of that. A compiler may do better, with several rings over the axes of a slice at a time.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Place = tuple[int, ...]
Groups = tuple[tuple[int, ...], ...]
_LARGEST = 512  # devices of a slice; of a larger one not every layout is tried, which takes seconds here


@dataclasses.dataclass(frozen=True)
class Torus:
  """Where the devices of a mesh lie, numbered as its programs number them."""

  places: tuple[Place, ...]  # coordinates of its chip in the slice, and its core in the chip
  slices: tuple[int, ...]  # the slice of each device
  lengths: tuple[int, ...]  # chips along each axis of a slice
  closed: bool  # each axis is a ring, and no open line

  # Few tori are made, one for each slice and mesh, and live as long as the program.
  @functools.lru_cache(maxsize=10_000)  # noqa: B019
  def busiest(self, kind: str, groups: Groups) -> float:
    """Bytes that the busiest direction of a link carries for each byte of the array of a collective.

    Args:
      kind: of `hlo.COLLECTIVES`.
      groups: of devices; of a permutation, pairs.
    """
    inside = [group for each in groups for group in self._by_slice(each) if len(group) > 1]
    if not inside:
      return 0.0
    members = max(len(group) for group in inside)
    if kind == "collective-permute":
      return float(self._load(inside))
    if kind == "all-to-all":  # a part for each member, those of other slices too
      pairs = [pair for group in inside for pair in itertools.permutations(group, 2)]
      return self._load(pairs) / max(len(group) for group in groups)
    rings = [self.ring(group) for group in inside]
    around = [hop for ring in rings for hop in zip(ring, (*ring[1:], ring[0]), strict=True)]
    load = self._load([*around, *((target, source) for source, target in around)])
    share = (members - 1) / members * (2 if kind == "all-reduce" else 1)
    return share * load / 2

  def ring(self, group: Sequence[int]) -> tuple[int, ...]:
    """The members of a group in an order in which a tour of them is short: of neighbours, where they form a box."""
    return min((tuple(group), *self._tours(group)), key=self._length)

  def _by_slice(self, group: Sequence[int]) -> list[tuple[int, ...]]:
    parts: dict[int, list[int]] = {}
    for device in group:
      parts.setdefault(self.slices[device], []).append(device)
    return [tuple(part) for part in parts.values()]

  def _tours(self, group: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Tours of a group that fills a box, of whatever spacing: rows as a comb, whose back brings it home."""
    at = {self.places[device]: device for device in group}
    axes = [sorted({place[axis] for place in at}) for axis in range(len(self.places[group[0]]))]
    longer = [axis for axis, values in enumerate(axes) if len(values) > 1]
    if len(at) != len(group) or math.prod(len(axes[axis]) for axis in longer) != len(group):
      return
    for order in itertools.permutations(longer):
      for points in (_snake([axes[axis] for axis in order]), _comb([axes[axis] for axis in order])):
        place = [values[0] for values in axes]
        tour = []
        for point in points:
          for axis, value in zip(order, point, strict=True):
            place[axis] = value
          tour.append(at[tuple(place)])
        yield tuple(tour)

  def _length(self, ring: Sequence[int]) -> int:
    """Links on the way around."""
    return sum(1 for hop in zip(ring, (*ring[1:], ring[0]), strict=True) for _ in self._way(*hop))

  def _load(self, hops: Iterable[Sequence[int]]) -> int:
    """Of the direction of a link that most hops use."""
    used = collections.Counter(link for hop in hops if hop[0] != hop[1] for link in self._way(*hop))
    return max(used.values(), default=0)

  def _way(self, source: int, target: int) -> Iterator[tuple[Any, ...]]:
    """Links from one device to another, one axis after the other, the shorter way round on a ring."""
    here = list(self.places[source])
    for axis, length in enumerate(self.lengths):
      distance = self.places[target][axis] - here[axis]
      if self.closed and abs(distance) > length - abs(distance):
        distance += length if distance < 0 else -length
      step = 1 if distance > 0 else -1
      for _ in range(abs(distance)):
        yield (self.slices[source], tuple(here[: len(self.lengths)]), axis, step)  # the cores of a chip share it
        here[axis] = (here[axis] + step) % length


def torus(devices: Sequence[Any]) -> Torus:
  """The torus of TPU devices, numbered in their order.

  Args:
    devices: with coordinates.
  """
  places = tuple((*device.coords, device.core_on_chip) for device in devices)
  lengths = tuple(1 + max(place[axis] for place in places) for axis in range(len(devices[0].coords)))
  slices = tuple(getattr(device, "slice_index", 0) for device in devices)
  return Torus(places, slices, lengths, _closed(devices[0].device_kind, lengths))


def _closed(kind: str, lengths: Sequence[int]) -> bool:
  """Whether the axes of a slice are rings: of a whole pod of 16 x 16 chips, or of cubes of 4 x 4 x 4.

  Shorter axes end at the last chip (docs.cloud.google.com/tpu/docs/v5e and v5p). Where some may be rings, none is taken
  for one.
  """
  if any(part in kind for part in ("v5 lite", "v5e", "v6")):
    return min(lengths[:2]) >= 16
  return all(length % 4 == 0 for length in lengths)


def arranged(devices: Sequence[Any], sizes: tuple[int, int, int], usual: np.ndarray) -> np.ndarray:
  """The devices of a slice as the mesh (data, fsdp, tensor) that pays least for its links.

  `mesh_utils.create_device_mesh` may split an axis of the slice so that chips of a group lie far apart: fsdp of
  4, 8, 8 on 16 x 16 chips takes 4 neighbours here and 4 there, and 4 times as long as a line of 8. Here every way to
  cut the axes of the slice is tried, with neighbours for fsdp or tensor, and each axis of the mesh goes round.

  Args:
    devices: all of a slice, with coordinates.
    sizes: of the axes of the mesh.
    usual: the mesh of `mesh_utils`, which is kept unless another one is cheaper.

  Returns:
    object[data, fsdp, tensor] of devices.
  """
  place = torus(devices)
  box = (*place.lengths, 1 + max(each[-1] for each in place.places))
  if math.prod(box) != len(devices) or len(devices) > _LARGEST:
    return usual
  numbers = np.empty(box, int)
  for number, each in enumerate(place.places):
    numbers[each] = number
  at = {device: number for number, device in enumerate(devices)}
  kept = np.vectorize(at.__getitem__, otypes=[int])(usual)
  best, grid = _price(place, kept), kept
  for cut in _cuts(numbers, sizes):
    # Neighbours along an axis of the mesh are neighbours on the slice, where permutations go from one to the next.
    for axis, size in enumerate(sizes):
      line = [int(number) for number in np.moveaxis(cut, axis, -1)[0, 0]]
      cut = np.take(cut, [line.index(number) for number in place.ring(line)], axis) if size > 1 else cut  # noqa: PLW2901
    price = _price(place, cut)
    if price < best:
      best, grid = price, cut
  return np.array(devices, object)[grid]


def _price(place: Torus, grid: np.ndarray) -> tuple[float, float]:
  """What gathers along fsdp and tensor cost, most of what a step sends being sums over tensor; then along data."""
  data, fsdp, tensor = (
    place.busiest("all-gather", tuple(map(tuple, np.moveaxis(grid, axis, -1).reshape(-1, size).tolist())))
    for axis, size in enumerate(grid.shape)
  )
  return round(fsdp + 2 * tensor, 6), round(data, 6)


def _cuts(numbers: np.ndarray, sizes: tuple[int, int, int]) -> Iterator[np.ndarray]:
  """The axes of a slice cut into parts of the axes of a mesh, in every way; data outermost."""
  for parts in _parts(numbers.shape, sizes):
    for inner in itertools.product(((0, 1, 2), (0, 2, 1)), repeat=len(parts)):
      if any(order != (0, 1, 2) and 1 in part[1:] for order, part in zip(inner, parts, strict=True)):
        continue  # the same as in the other order
      split = numbers.reshape([part[axis] for part, order in zip(parts, inner, strict=True) for axis in order])
      owners = [axis for order in inner for axis in order]
      yield split.transpose(np.argsort(owners, kind="stable")).reshape(sizes)


def _parts(lengths: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
  """For each axis of a slice the parts that the axes of a mesh take of it."""
  if not lengths:
    if set(sizes) == {1}:
      yield ()
    return
  first, *rest = lengths
  divisors = [[n for n in range(1, size + 1) if size % n == 0 and first % n == 0] for size in sizes]
  for part in itertools.product(*divisors):
    if math.prod(part) == first:
      left = tuple(size // taken for size, taken in zip(sizes, part, strict=True))
      yield from ((part, *others) for others in _parts(tuple(rest), left))


def _snake(axes: Sequence[Sequence[int]]) -> list[Place]:
  """Every point of a box, each a neighbour of the last one."""
  if not axes:
    return [()]
  rest = _snake(axes[1:])
  return [(value, *point) for turn, value in enumerate(axes[0]) for point in (rest[::-1] if turn % 2 else rest)]


def _comb(axes: Sequence[Sequence[int]]) -> list[Place]:
  """The same, but for the first column, which leads back at the end."""
  first, *rest = _snake(axes[1:])
  teeth = [(value, *point) for turn, value in enumerate(axes[0]) for point in (rest[::-1] if turn % 2 else rest)]
  return [*teeth, *((value, *first) for value in reversed(axes[0]))]
