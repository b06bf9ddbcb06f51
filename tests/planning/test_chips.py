import types

from kepo_jax.planning import chips


def test_the_data_sheet_of_a_device():
  for kind, name in {  # names of which some are parts of others
    "NVIDIA H100 80GB HBM3": "NVIDIA H100 SXM", "NVIDIA H100 PCIe": "NVIDIA H100 PCIe", "NVIDIA L4": "NVIDIA L4",
    "NVIDIA A100-SXM4-40GB": "NVIDIA A100 40 GB", "NVIDIA A100-SXM4-80GB": "NVIDIA A100 80 GB",
    "NVIDIA GH200 480GB": "NVIDIA GH200 96 GB", "TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p",  # as jax calls a v5p
  }.items():  # fmt: skip
    assert chips.data_sheet(types.SimpleNamespace(device_kind=kind)).name == name
  assert chips.data_sheet(types.SimpleNamespace(device_kind="new")) is None
