import types

import jax
import jax.numpy as jnp
import pytest

from kepo_jax.planning import chips


def device(kind):
  return types.SimpleNamespace(device_kind=kind, platform="gpu")


def test_data_sheets(monkeypatch):
  # Kinds whose names are parts of one another.
  for kind, name, flops, bandwidth in [
    ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM", 989e12, 3.35e12),
    ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe", 756e12, 2e12),
    ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40 GB", 312e12, 1.555e12),
    ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80 GB", 312e12, 2.039e12),
    ("NVIDIA GH200 480GB", "NVIDIA GH200 96 GB", 989e12, 4e12),
    ("NVIDIA L4", "NVIDIA L4", 121e12, 0.3e12),
    ("TPU v5 lite", "TPU v5e", 197e12, 0.819e12),
    ("TPU v5", "TPU v5p", 459e12, 2.765e12),  # as jax calls a v5p
  ]:
    chip = chips.chip_of(device(kind), jnp.bfloat16)
    assert (chip.name, chip.flops, chip.bandwidth, chip.measured) == (name, flops, bandwidth, False)
  # What no data sheet says is measured.
  monkeypatch.setattr(chips, "measured", lambda device, dtype: (device.device_kind, jnp.dtype(dtype).name))
  assert chips.chip_of(device("NVIDIA H100"), jnp.float32) == ("NVIDIA H100", "float32")
  assert chips.chip_of(device("new"), jnp.bfloat16) == ("new", "bfloat16")


def test_rates_are_work_over_the_shortest_time(monkeypatch):
  assert all(each > 0 for each in chips._sweeps(8))
  calls = []
  monkeypatch.setattr(chips, "seconds", lambda function, *arguments: calls.append(arguments) or float(len(calls)))
  monkeypatch.setattr(chips, "_sweeps", lambda rows: [4.0, 2.0])
  chip = chips.measured(jax.devices()[0], jnp.float32)
  assert (chip.flops, chip.bandwidth, chip.measured) == (2 * 2048**3, 2 * 4 * 2**24 / 2, True)
  calls.clear()
  # The median of 1 to 5 seconds, in each of which the product is made 2e10 / (2 x 3 x 5 x 2) times.
  assert chips.product_rate(2, 3, 5, jnp.float32) == pytest.approx(2e10 / 3)
