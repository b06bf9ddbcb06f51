"""Rings on slices drawn by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

from kepo_jax import links

REDUCE, GATHER, PERMUTE = "all-reduce", "all-gather", "collective-permute"


def torus(*lengths, closed=False, slices=1, cores=1):
  places = [(*place, core) for place in itertools.product(*map(range, lengths)) for core in range(cores)]
  numbers = tuple(number for number in range(slices) for _ in places)
  return links.Torus(tuple(places) * slices, numbers, lengths, closed)


def rows(count, length):
  return tuple(tuple(range(row * length, (row + 1) * length)) for row in range(count))


@pytest.mark.parametrize(("closed", "busiest"), [(True, 7 / 8 / 2), (False, 7 / 8)])
def test_a_ring_uses_both_directions_and_an_open_line_one(closed, busiest):
  # Bytes over a link: 7/8 of the array, half of them each way; along a line both halves share every link.
  assert torus(8, closed=closed).busiest(GATHER, rows(1, 8)) == busiest
  assert torus(8, closed=closed).busiest("reduce-scatter", rows(1, 8)) == busiest
  assert torus(8, closed=closed).busiest(REDUCE, rows(1, 8)) == 2 * busiest


def test_chips_that_are_no_neighbours_share_what_lies_between():
  place = torus(4)
  # Two hops for each, and the middle link carries both pairs, there and back.
  near, far = place.busiest(GATHER, ((0, 1), (2, 3))), place.busiest(GATHER, ((0, 2), (1, 3)))
  assert (near, far) == (1 / 2, 2 * 1 / 2)


def test_a_permutation_is_charged_for_its_direction():
  around = tuple((n, (n + 1) % 8) for n in range(8))
  assert torus(8, closed=True).busiest(PERMUTE, around) == 1
  # On a line the last one sends over all links, in the other direction.
  assert torus(8).busiest(PERMUTE, around) == 1
  # Cores of a chip share its links.
  cores = torus(4, cores=2)
  assert (cores.busiest(PERMUTE, ((0, 1),)), cores.busiest(PERMUTE, ((0, 2), (1, 3)))) == (0, 2)


def test_only_what_stays_in_a_slice_is_on_its_links():
  both = (tuple(range(8)),)  # 4 chips of each of two slices
  assert torus(4, slices=2).busiest(GATHER, both) == torus(4).busiest(GATHER, rows(1, 4))
  assert torus(4, slices=2).busiest(REDUCE, tuple((n, n + 4) for n in range(4))) == 0
  # A part for each of 8 members: those of the own slice alone.
  assert torus(4, slices=2).busiest("all-to-all", both) == 4 / 8


@dataclasses.dataclass(eq=False)
class Device:
  device_kind: str
  coords: list[int]
  core_on_chip: int
  slice_index: int


def devices_of(kind, *lengths, slices=1, cores=1):
  return [
    Device(kind, list(place), core, number)
    for number in range(slices)
    for place in itertools.product(*map(range, lengths))
    for core in range(cores)
  ]


def test_whole_pods_and_cubes_are_closed():
  for kind, lengths, closed in [
    ("TPU v5 lite", (4, 4, 1), False),
    ("TPU v5 lite", (16, 16, 1), True),
    ("TPU v6 lite", (8, 16, 1), False),
    ("TPU v5", (4, 4, 4), True),
    ("TPU v5", (2, 2, 4), False),
  ]:
    assert links.torus(devices_of(kind, *lengths)).closed == closed, (kind, lengths)


def gathered(devices, grid, axis):
  """Bytes on the busiest link in gathers along an axis of a mesh."""
  lines = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
  groups = tuple(tuple(devices.index(device) for device in line) for line in lines)
  return links.torus(devices).busiest(GATHER, groups)


def test_axes_of_a_mesh_take_neighbours():
  devices = devices_of("TPU v5 lite", 16, 16, 1)
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
