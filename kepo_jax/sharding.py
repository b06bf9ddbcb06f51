"""Meshes, and the one table from logical axes to mesh axes.

Arrays name logical axes ("prompt", "embed", ...); only this module knows the mesh. Two layouts exist per
model: `train` shards weights over fsdp and tensor; `decode` keeps them whole over data and fsdp so that the
token loop gathers nothing. A token loop that runs from the train layout gathers nothing either where its weights stay:
see `weight_stationary`. An axis that does not divide over its mesh axes is replicated.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kepo_jax import torus

MESH_AXES = ("data", "fsdp", "tensor")

# Weights. "vision" is the width of the vision tower: its heads of 72 and its MLP of 4304 do not divide over
# tensor, so the tower is sharded over fsdp alone.
WEIGHT_RULES = {
  "train": {
    "embed": "fsdp",
    "vision": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
  },
  "decode": {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"},
}
# Activations keep their width whole: fsdp and data carry rows instead.
ACTIVATION_RULES = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
# But where weights stay, activations that go into a product with one, or come out of it, lie as the weight does: fsdp
# carries their width, and data alone their rows.
STATIONARY_RULES = WEIGHT_RULES["train"] | {"prompt": "data"}
# A context of JAX's own is part of the keys of its caches: what is traced under one value never serves the other.
_STATIONARY = jax.make_user_context(False)

LogicalAxes = tuple[str | None, ...]
AnyMesh = Mesh | AbstractMesh  # an abstract mesh places shapes without devices, for planning


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the device mesh with axes data, fsdp and tensor.

  Args:
    data: devices that hold different prompts and the same weights; -1 takes what the others leave.
    fsdp: devices that hold different prompts and a share of every weight.
    tensor: devices that split heads, MLP width and vocabulary.
    devices: devices to use, all of `jax.devices()` by default.

  On several TPU slices the data axis spans them, since it alone communicates once per step and not once per layer.

  Raises:
    ValueError: the product of the axes is more than the devices, or, on several hosts, not all of them; or the data
      axis does not divide over the slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if data == -1:
    data = max(1, len(devices) // (fsdp * tensor))
  used = data * fsdp * tensor
  if used < len(devices) and jax.process_count() == 1:
    logging.warning("the mesh uses %d of %d devices; mesh.data=-1 takes them all.", used, len(devices))
    devices = devices[:used]
  if used != len(devices):
    raise ValueError(
      f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {used} devices, "
      f"found {len(devices)}; set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to {len(devices)}."
    )
  # Explicit axes, the default of make_mesh, make an ordinary embedding gather a type error.
  axis_types = (AxisType.Auto,) * 3
  if devices[0].platform != "tpu":  # elsewhere a "slice" is a host, which any axis may span
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=axis_types, devices=devices)
  slices: dict[int, list[Any]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
  if data % len(slices):
    raise ValueError(f"mesh.data={data} does not divide over {len(slices)} slices; only the data axis may span slices.")
  grids = [_slice_grid(slices[number], (data // len(slices), fsdp, tensor)) for number in sorted(slices)]
  return Mesh(np.concatenate(grids), MESH_AXES, axis_types=axis_types)


def _slice_grid(devices: list[Any], sizes: tuple[int, int, int]) -> np.ndarray:
  """Arranges the devices of one slice as object[data, fsdp, tensor]."""
  try:
    return mesh_utils.create_device_mesh(sizes, devices)
  except NotImplementedError:  # an axis of the mesh needs a part of an axis of the slice
    grid = torus.split_grid(devices, sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True) if grid is None else grid


def _fits(dimension: int, mesh_axes: tuple[str, ...], sizes: dict[str, int]) -> bool:
  return dimension % math.prod(sizes[axis] for axis in mesh_axes) == 0


def _row_axes(shape: Sequence[int], axes: LogicalAxes, sizes: dict[str, int]) -> dict[str, Any]:
  """Returns mesh axes of the rows: prompts over data and fsdp, or prompts over data and rollouts over fsdp."""
  if "prompt" not in axes:
    return {}
  prompts = shape[axes.index("prompt")]
  if _fits(prompts, ("data", "fsdp"), sizes):
    return {"prompt": ("data", "fsdp")}
  rows = {"prompt": "data"} if _fits(prompts, ("data",), sizes) else {}
  if "rollout" in axes and _fits(shape[axes.index("rollout")], ("fsdp",), sizes):
    rows["rollout"] = "fsdp"
  return rows


def _spec(shape: Sequence[int], axes: LogicalAxes, rules: dict[str, Any], sizes: dict[str, int]) -> PartitionSpec:
  if len(shape) != len(axes):
    raise ValueError(f"an array of shape {tuple(shape)} cannot have the logical axes {axes}")
  entries = []
  for dimension, axis in zip(shape, axes, strict=True):
    mesh_axes = rules.get(axis) if axis else None
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    entries.append(mesh_axes if names and _fits(dimension, names, sizes) else None)
  return PartitionSpec(*entries)


def weight_sharding(mesh: AnyMesh, shape: Sequence[int], axes: LogicalAxes, layout: str = "train") -> NamedSharding:
  """Returns the sharding of one weight of `shape` with logical `axes` in a layout, "train" or "decode"."""
  return NamedSharding(mesh, _spec(shape, axes, WEIGHT_RULES[layout], dict(mesh.shape)))


def weight_shardings(mesh: AnyMesh, shapes: Any, axes: Any, layout: str = "train") -> Any:
  """Maps `weight_sharding` over a tree; `axes` has the structure of `shapes` with a tuple of names at each leaf."""
  return jax.tree.map(lambda leaf, names: weight_sharding(mesh, leaf.shape, names, layout), shapes, axes)


def weight_stationary(enabled: bool) -> AbstractContextManager[None]:
  """Traces the block for weight-stationary decoding: weights stay sharded over fsdp, and partial products are summed.

  A product with a weight sharded over fsdp gathers the weight, unless its other operand is sharded along the same axis:
  then every device multiplies what it has, and the results are summed over fsdp. The first way sends the weight, the
  second the result, which for the few rows of a token is a thousandth of it. To make the compiler take the second,
  `constrain` shards operands and results of products, known by their last axis, like the weights, with each row on all
  devices of fsdp. Between products, attention and its caches keep their rows over data and fsdp.

  Args:
    enabled: False changes nothing.
  """
  return _STATIONARY(enabled)


def _is_stationary(sizes: dict[str, int]) -> bool:
  return _STATIONARY.value and sizes["fsdp"] > 1


def _activation_spec(shape: Sequence[int], axes: LogicalAxes, sizes: dict[str, int]) -> PartitionSpec:
  if _is_stationary(sizes) and axes[-1] in STATIONARY_RULES:
    return _spec(shape, axes, STATIONARY_RULES, sizes)
  return _spec(shape, axes, ACTIVATION_RULES | _row_axes(shape, axes, sizes), sizes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains the sharding of an activation on the current mesh (`jax.set_mesh`); without one, the identity."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, _activation_spec(x.shape, axes, dict(mesh.shape)))


def align_with_weight(x: jax.Array, axis: str | None) -> jax.Array:
  """Shards [P, ..., W] like the axis `axis` of the weight it meets; the identity unless `weight_stationary`.

  Args:
    x: operand or result of a product; or indices into a table, with None for an axis.
    axis: logical axis of W.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not _is_stationary(dict(mesh.shape)):
    return x
  spec = _spec(x.shape, ("prompt", *(None,) * (x.ndim - 2), axis), STATIONARY_RULES, dict(mesh.shape))
  return jax.lax.with_sharding_constraint(x, spec)


def per_device(function: Callable[..., jax.Array], *axes: LogicalAxes) -> Callable[..., jax.Array]:
  """Runs `function` on each device's own shard of its arguments, for kernels that the compiler cannot partition.

  Args:
    function: of arrays; its result has the shape and the axes of the first one.
    *axes: logical axes of each argument, placed as `constrain` places them.

  Returns:
    A function of the global arrays; without a current mesh (`jax.set_mesh`), `function` itself.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return function
  sizes = dict(mesh.shape)

  def run(*arrays: jax.Array) -> jax.Array:
    specs = tuple(_activation_spec(x.shape, names, sizes) for x, names in zip(arrays, axes, strict=True))
    # Kernels do not say over which mesh axes their results vary, which the check would ask of them.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)

  return run


def platform() -> str:
  """Returns the platform of the current mesh, such as "cpu", "gpu" or "tpu"; without one, JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def row_shards(prompts: int, rollouts: int) -> tuple[int, int]:
  """Counts the devices over which `constrain` splits prompts and rollouts of an activation; (1, 1) without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1, 1
  sizes = dict(mesh.shape)
  rows = _row_axes((prompts, rollouts), ("prompt", "rollout"), sizes)
  axes = [rows.get(name, ()) for name in ("prompt", "rollout")]
  shards = [math.prod(sizes[axis] for axis in ((names,) if isinstance(names, str) else names)) for names in axes]
  return shards[0], shards[1]


def batch_sharding(mesh: Mesh, shape: Sequence[int], axes: LogicalAxes = ("prompt",)) -> NamedSharding:
  """Returns the sharding of a batch array whose leading axes are `axes`, the rest replicated."""
  axes = tuple(axes) + (None,) * (len(shape) - len(axes))
  sizes = dict(mesh.shape)
  return NamedSharding(mesh, _spec(shape, axes, _row_axes(shape, axes, sizes), sizes))


def held_rows(mesh: Mesh, prompts: int) -> frozenset[int]:
  """Lists the prompts of a batch that the devices of this process hold: all of them in a single process.

  `place` never reads the other rows, so each host decodes its own images alone.
  """
  indices = batch_sharding(mesh, (prompts,)).addressable_devices_indices_map((prompts,))
  return frozenset(row for index in indices.values() if index for row in range(*index[0].indices(prompts)))


def row_holders(prompts: int, rollouts: int) -> np.ndarray:
  """Returns the process that owns each rollout of a batch: the lowest of those whose devices hold it.

  Args:
    prompts: P.
    rollouts: G.

  Returns:
    int[P, G], for the current mesh (`jax.set_mesh`), the same on every process; 0 without a mesh.
  """
  mesh, shape = jax.sharding.get_mesh(), (prompts, rollouts)
  if mesh.empty or jax.process_count() == 1:
    return np.zeros(shape, int)
  holders = np.full(shape, jax.process_count())
  places = batch_sharding(mesh, shape, ("prompt", "rollout")).devices_indices_map(shape)
  for device in mesh.devices.flat:
    rows = places[device]
    holders[rows] = np.minimum(holders[rows], device.process_index)
  return holders


def place(mesh: Mesh, batch: Any, axes: LogicalAxes = ("prompt",)) -> Any:
  """Places host arrays of the global batch on the mesh, leading axes `axes`; every host passes the same arrays.

  Arrays on the mesh stay as they are.
  """

  def put(array):
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding) and array.sharding.mesh == mesh:
      return array
    array = np.asarray(array)
    sharding = batch_sharding(mesh, array.shape, axes[: array.ndim])
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(put, batch)


def placed_shapes(mesh: Mesh, shapes: Any, axes: LogicalAxes = ("prompt",)) -> Any:
  """Returns the shapes, dtypes and shardings that `place` would give."""

  def placed(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.shape, axes[: len(x.shape)]))

  return jax.tree.map(placed, shapes)


def replicated(mesh: AnyMesh) -> NamedSharding:
  """Returns the sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
  """Fetches the global array; with several hosts, every host receives all of it."""
  if isinstance(array, np.ndarray):
    return array
  if array.is_fully_addressable:
    return jax.device_get(array)
  return multihost_utils.process_allgather(array, tiled=True)
