"""Rings on slices drawn by hand."""

import dataclasses
import itertools

import numpy as np

from kepo_jax import links

GATHER, REDUCE = "all-gather", "all-reduce"
OPEN, CLOSED = "TPU v5 lite", "TPU v5"  # what the axes of a few chips are


@dataclasses.dataclass(eq=False)
class Device:
  device_kind: str
  coords: list[int]
  core_on_chip: int
  slice_index: int


def devices_of(kind, *lengths, slices=1, cores=1):
  places = itertools.product(range(slices), itertools.product(*map(range, lengths)), range(cores))
  return [Device(kind, list(place), core, number) for number, place, core in places]


def torus(kind, *lengths, **settings):
  return links.torus(devices_of(kind, *lengths, **settings))


def test_the_busiest_link_of_rings_by_hand():
  eight, four = (tuple(range(8)),), (tuple(range(4)),)
  # 7/8 of the array, half of it each way; along a line both halves share every link.
  for kind, share in ((CLOSED, 7 / 8 / 2), (OPEN, 7 / 8)):
    place = torus(kind, 8)
    assert place.busiest(GATHER, eight) == place.busiest("reduce-scatter", eight) == share, kind
    assert place.busiest(REDUCE, eight) == 2 * share, kind
  # Two hops for each, and the middle link carries both pairs, there and back.
  near, far = (torus(OPEN, 4).busiest(GATHER, pairs) for pairs in (((0, 1), (2, 3)), ((0, 2), (1, 3))))
  assert (near, far) == (1 / 2, 2 * 1 / 2)
  # Of two slices of 4 chips, only what stays in a slice.
  two = torus(OPEN, 4, slices=2)
  assert two.busiest(GATHER, eight) == torus(OPEN, 4).busiest(GATHER, four)
  assert two.busiest(REDUCE, tuple((n, n + 4) for n in range(4))) == 0
  assert two.busiest("all-to-all", eight) == 4 / 8  # a part for each of 8 members
  # Whole pods and cubes of 4 are closed, and a long axis beside a short one is not.
  assert not torus(CLOSED, 2, 2, 4).closed and not torus(OPEN, 8, 16, 1).closed
  # The last one of a line sends over all links, in the other direction.
  assert torus(OPEN, 8).busiest("collective-permute", tuple((n, (n + 1) % 8) for n in range(8))) == 1


def gathered(devices, grid, axis):
  """Bytes on the busiest link in gathers along an axis of a mesh."""
  lines = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
  groups = tuple(tuple(devices.index(device) for device in line) for line in lines)
  return links.torus(devices).busiest(GATHER, groups)


def test_axes_of_a_mesh_take_neighbours():
  devices = devices_of(OPEN, 16, 16, 1)
  # As mesh_utils lays them: tensor on 8 chips in a row, fsdp on 4 next to each other and 4 that are eight chips away.
  parts = np.array(devices, object).reshape(2, 8, 4, 4)  # of x, of y
  usual = parts.transpose(2, 0, 3, 1).reshape(4, 8, 8)
  assert (gathered(devices, usual, 1), gathered(devices, usual, 2)) == (3.5, 7 / 8)
  found = links.arranged(devices, (4, 8, 8), usual)
  assert found.shape == (4, 8, 8) and set(found.flat) == set(devices)
  # A line of 8 for one, a block of 2 x 4 with a way round for the other.
  assert (gathered(devices, found, 1), gathered(devices, found, 2)) == (7 / 8, 7 / 8 / 2)
  for line in found.reshape(-1, 8):
    for here, there in itertools.pairwise(line):
      assert sum(abs(a - b) for a, b in zip(here.coords, there.coords, strict=True)) == 1


def test_cores_of_a_chip_belong_together():
  devices = devices_of("TPU7x", 2, 2, 1, cores=2)
  found = links.arranged(devices, (1, 4, 2), np.array(devices, object).reshape(2, 4).T.reshape(1, 4, 2))
  assert all(first.coords == second.coords for first, second in found.reshape(-1, 2))
  part = np.array(devices[:3], object).reshape(1, 3, 1)
  assert links.arranged(devices[:3], (1, 3, 1), part) is part  # of a slice: left as it is
