import collections
import dataclasses
import itertools

import numpy as np
import pytest

from kepo_jax import sharding, torus


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a layout reads of a device."""

  device_kind: str
  coords: tuple[int, ...]
  core_on_chip: int = 0
  platform: str = "tpu"
  process_index: int = 0


def chips(kind, *lengths):
  return [Chip(kind, place) for place in itertools.product(*map(range, lengths))]


def busiest_link(grid, axis, length):
  """Bytes on it per gathered byte, in rings both ways along an axis of a mesh, on closed axes of `length` chips."""
  size, used = grid.shape[axis], collections.Counter()
  for group in np.moveaxis(grid, axis, -1).reshape(-1, size):
    around = list(zip(group, np.roll(group, -1), strict=True))
    for source, target in (*around, *((b, a) for a, b in around)):
      here = list(source.coords)
      for side, goal in enumerate(target.coords):
        away = (goal - here[side]) % length
        step = 1 if away <= length / 2 else -1
        while here[side] != goal:
          used[(*here, side, step)] += 1
          here[side] = (here[side] + step) % length
  return max(used.values()) * (size - 1) / size / 2


def test_a_split_axis_shares_no_links_that_it_need_not():
  devices = chips("TPU v5 lite", 16, 16, 1)
  usual = sharding.mesh_utils.create_device_mesh((4, 8, 8), devices, allow_split_physical_axes=True)
  ours = sharding._slice_grid(devices, (4, 8, 8))
  assert ours.shape == (4, 8, 8) and set(ours.flat) == set(devices)
  assert (busiest_link(usual, 1, 16), busiest_link(usual, 2, 16)) == (4 * 7 / 8, 7 / 8)
  assert (busiest_link(ours, 1, 16), busiest_link(ours, 2, 16)) == (7 / 8, 7 / 16)


def test_whole_axes_and_parts_of_a_slice_are_left_to_jax():
  devices = chips("TPU v5 lite", 4, 4, 1)
  for devices, sizes in ((devices, (1, 4, 4)), (devices[4:], (1, 2, 6))):
    usual = sharding.mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    assert (sharding._slice_grid(devices, sizes) == usual).all()


@pytest.mark.parametrize(("parts", "inner", "wraps", "load"), [
  (((1, 8, 1),), 1, False, 7 / 8),  # an open line: both halves of the ring use every link
  (((1, 8, 1),), 1, True, 7 / 16),
  (((1, 2, 1), (1, 4, 1)), 1, False, 7 / 16),  # a block of 2 x 4 has a way round
  (((1, 2, 2),), 2, False, 2 * 1 / 2),  # every second chip: two groups share a link
  (((1, 4, 2),), 2, True, 2 * 3 / 8),  # which go round together where the axis does
  (((1, 1, 8),), 2, False, 0),  # fsdp on the two cores of a chip
])  # fmt: skip
def test_the_load_of_a_link(parts, inner, wraps, load):
  cores = (1, 1, 1) if load else (1, 2, 1)
  split = torus.Split((*parts, cores), (inner,) * len(parts) + (1,))
  assert split.link_load(1, [wraps] * len(parts)) == load
