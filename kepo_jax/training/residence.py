"""Where frozen models live: on the devices, or in the memory of their hosts between the phases of a step that use them.

A teacher is idle while the student samples and learns, and is often larger than everything else together.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from kepo_jax.training import compiling

PLACES = ("device", "host")

_HOST = "pinned_host"  # pages that a device copies from by itself, beside its work


def check_host_memory(mesh: jax.sharding.Mesh, field: str, instead: str) -> None:
  """Refuses a choice that needs host memory on a backend without.

  Args:
    mesh: of the run.
    field: "section.name=value", as the message says it.
    instead: a value that works.

  Raises:
    ValueError: there is no host memory that the devices can address.
  """
  device = mesh.local_devices[0]
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if _HOST not in kinds:
    raise ValueError(f"{field} needs memory of the kind {_HOST}, and {device.platform} has {kinds}; use {instead}.")


def on_host(params: Any) -> Any:
  """The arrays in the memory of their hosts, sharded as they were; those on the devices are given up one by one."""

  def moved(x: jax.Array) -> jax.Array:
    there = jax.block_until_ready(jax.device_put(x, x.sharding.with_memory_kind(_HOST)))
    x.delete()
    return there

  return jax.tree.map(moved, params)


class Resident:
  """Weights that are wanted on the devices now and then."""

  def __init__(self, params: Any):
    """Keeps them where they are.

    Args:
      params: arrays, on the devices or, from `on_host`, in host memory.
    """
    self._home = params
    self._places = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), params)
    self._on_device: Any = None
    self._phases = 0  # that are open

  @property
  def shapes(self) -> Any:
    """The tree as `jax.ShapeDtypeStruct`, with the shardings that it has on the devices."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self._home, self._places)

  @contextlib.contextmanager
  def on_device(self) -> Iterator[Any]:
    """The arrays on the devices for a phase; phases inside it share them, and the outermost one gives them up.

    The copy is only started: programs that take the arrays wait for it, and the host goes on. Nor are they deleted at
    the end, since programs may still run on them, and results may be one of them (the head of a target): they are gone
    when nothing uses them any more.
    """
    if not self._phases:
      self._on_device = jax.device_put(self._home, self._places)  # arrays that are there already stay as they are
    self._phases += 1
    try:
      yield self._on_device
    finally:
      self._phases -= 1
      if not self._phases:
        self._on_device = None

  @contextlib.contextmanager
  def beside(self, arguments: Any) -> Iterator[Any]:
    """`on_device` for a call with these arguments; where they are shapes, its own `shapes`, and nothing is moved."""
    if compiling.is_abstract(arguments):
      yield self.shapes
      return
    with self.on_device() as params:
      yield params
