"""Measures what a device reaches in products and memory traffic, where no data sheet says it, and times calls."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kepo_jax.planning.chips import Chip, data_sheet

_REPEATS = 5


def chip_of(device: jax.Device, dtype: Any) -> Chip:
  """Takes the peaks of a known device from its data sheet for bfloat16 products, and measures others.

  Args:
    device: to look up.
    dtype: of the products.
  """
  known = data_sheet(device)
  if known and jnp.dtype(dtype) == jnp.bfloat16:
    return known
  return measured(device, dtype)


def measured(device: jax.Device, dtype: Any) -> Chip:
  """Measures what large products and large copies reach now: the best of five."""
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
  """Times reading and writing float32[rows] in place: pages that are new to a process cost far more."""
  sweep, taken = jax.jit(lambda x: x + 1, donate_argnums=0), []
  values = sweep(jnp.ones((rows,), jnp.float32))
  for _ in range(_REPEATS):
    values, elapsed = timed(sweep, values)
    taken.append(elapsed)
  return taken


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
  """Returns the results of one call, awaited, and its seconds; compile it first."""
  jax.block_until_ready(arguments)
  start = time.perf_counter()
  results = jax.block_until_ready(function(*arguments))
  return results, time.perf_counter() - start


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
  """Times one call until its results are there; compile it first."""
  return timed(function, *arguments)[1]


def _memory(device: jax.Device) -> float:
  return float((device.memory_stats() or {}).get("bytes_limit", 0)) if device.platform != "cpu" else 0.0
