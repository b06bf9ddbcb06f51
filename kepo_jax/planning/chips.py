"""What accelerators can do at most: arithmetic and memory traffic per second, from data sheets or measured."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one device."""

  name: str
  flops: float  # FLOP/s of dense products
  bandwidth: float  # bytes/s of its memory
  memory: float  # bytes; 0: unknown
  measured: bool = False  # here and now, and not by the maker
  link: float = 0.0  # bytes/s one way over one port to a neighbour in its torus; 0: unknown
  network: float = 0.0  # bytes/s of its share of the network between slices; 0: unknown


# Part of `device_kind` -> data sheet: dense bfloat16 FLOP/s, bytes/s, bytes. The first match counts.
# TPUs from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: a link is the bidirectional bandwidth between chips
# over twice their ports (v5e 400 GB/s and v6e 800 GB/s over 4; v5p and TPU7x 1,200 GB/s over 6, the two cores of TPU7x
# sharing it; v4 300 GB/s one way over 6), the network that of a pod over its chips (v5e 6.4 Tbit/s and v6e 25.6 Tbit/s
# over 256) or as it is given per chip (v5p 50 Gbit/s, TPU7x 100 Gbit/s for two cores; v4 as v5p).
CHIPS = {
  "B200": Chip("NVIDIA B200", 2250e12, 8000e9, 180e9),
  "GH200 480GB": Chip("NVIDIA GH200 96 GB", 989e12, 4000e9, 96e9),
  "H200 NVL": Chip("NVIDIA H200 NVL", 835e12, 4800e9, 141e9),
  "H200": Chip("NVIDIA H200", 989e12, 4800e9, 141e9),
  "H100 PCIe": Chip("NVIDIA H100 PCIe", 756e12, 2000e9, 80e9),
  "H100 NVL": Chip("NVIDIA H100 NVL", 835e12, 3900e9, 94e9),
  "H100": Chip("NVIDIA H100 SXM", 989e12, 3350e9, 80e9),
  "A100-SXM4-40GB": Chip("NVIDIA A100 40 GB", 312e12, 1555e9, 40e9),
  "A100-PCIE-40GB": Chip("NVIDIA A100 40 GB", 312e12, 1555e9, 40e9),
  "A100": Chip("NVIDIA A100 80 GB", 312e12, 2039e9, 80e9),
  "L40S": Chip("NVIDIA L40S", 362e12, 864e9, 48e9),
  "L40": Chip("NVIDIA L40", 181e12, 864e9, 48e9),
  "L4": Chip("NVIDIA L4", 121e12, 300e9, 24e9),
  "TPU v6": Chip("TPU v6e", 918e12, 1640e9, 32e9, link=100e9, network=12.5e9),
  "TPU7": Chip("TPU7x, one core", 1153e12, 3690e9, 96e9, link=50e9, network=6.25e9),
  "TPU v5p": Chip("TPU v5p", 459e12, 2765e9, 95e9, link=100e9, network=6.25e9),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 819e9, 16e9, link=50e9, network=3.125e9),
  "TPU v5e": Chip("TPU v5e", 197e12, 819e9, 16e9, link=50e9, network=3.125e9),
  "TPU v5": Chip("TPU v5p", 459e12, 2765e9, 95e9, link=100e9, network=6.25e9),
  "TPU v4": Chip("TPU v4", 275e12, 1228e9, 32e9, link=50e9, network=6.25e9),
}
_REPEATS = 5
# What everything here is timed with: wall seconds, or those of the process (`time.process_time`) where others compute.
clock: Callable[[], float] = time.perf_counter


def chip_of(device: jax.Device, dtype: Any) -> Chip:
  """Peaks of a device: of its data sheet for bfloat16 products on a known one, else measured.

  Args:
    device: to look up.
    dtype: of the products.
  """
  known = data_sheet(device)
  if known and jnp.dtype(dtype) == jnp.bfloat16:
    return known
  return measured(device, dtype)


def data_sheet(device: jax.Device) -> Chip | None:
  """Peaks of a known kind of device."""
  return next((chip for part, chip in CHIPS.items() if part in device.device_kind), None)


def measured(device: jax.Device, dtype: Any) -> Chip:
  """Peaks of a device as large products and large copies reach them now: the best of five."""
  on_cpu = device.platform == "cpu"
  side, rows = (2048, 2**24) if on_cpu else (8192, 2**28)
  with jax.default_device(device):
    left, right = (jnp.full((side, side), value, dtype) for value in (0.5, 0.25))
    product = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))
    flops = 2 * side**3 / min(seconds(product, left, right) for _ in range(_REPEATS))
    moved = 2 * 4 * rows / min(_sweeps(rows))
  name = f"{device.device_kind or device.platform}, {os.cpu_count()} cores" if on_cpu else device.device_kind
  return Chip(name, flops, moved, _memory(device), measured=True)


def _sweeps(rows: int) -> list[float]:
  """Seconds in which float32[rows] are read and written in place: pages that are new to a process cost far more."""
  sweep, taken = jax.jit(lambda x: x + 1, donate_argnums=0), []
  values = sweep(jnp.ones((rows,), jnp.float32))
  for _ in range(_REPEATS):
    values, elapsed = timed(sweep, values)
    taken.append(elapsed)
  return taken


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
  """Results of one call, awaited, and its seconds; compile it first."""
  jax.block_until_ready(arguments)
  start = clock()
  results = jax.block_until_ready(function(*arguments))
  return results, clock() - start


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
  """Seconds of one call, its results awaited; compile it first."""
  return timed(function, *arguments)[1]


def product_rate(rows: int, inputs: int, outputs: int, dtype: Any) -> float:
  """FLOP/s of one product [rows, inputs] x [outputs, inputs]: the median of five, each of about 20 GFLOP."""
  work = 2.0 * rows * inputs * outputs
  left, right = jnp.ones((rows, inputs), dtype), jnp.ones((outputs, inputs), dtype)
  product = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))
  jax.block_until_ready(product(left, right))
  repeats = max(1, round(2e10 / work))

  def several(*operands):
    for _ in range(repeats):
      result = product(*operands)
    return result

  return work * repeats / statistics.median(seconds(several, left, right) for _ in range(_REPEATS))


def _memory(device: jax.Device) -> float:
  return float((device.memory_stats() or {}).get("bytes_limit", 0)) if device.platform != "cpu" else 0.0
