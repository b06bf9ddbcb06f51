"""What accelerators can do at most, from their data sheets."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one device."""

  name: str
  flops: float  # FLOP/s of dense products
  bandwidth: float  # bytes/s of its memory
  memory: float  # bytes; 0: unknown
  measured: bool = False  # on the device at hand; else from the data sheet
  ici: float = 0.0  # bytes/s that it sends over all its links of a TPU slice, or NVLink, together; 0: unknown
  network: float = 0.0  # bytes/s of its share of the network between slices; 0: unknown


# Part of `device_kind` -> data sheet: dense bfloat16 FLOP/s, bytes/s, bytes. The first match counts.
# TPUs from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: `ici` is half of the bidirectional bandwidth between
# chips (the two cores of TPU7x share it; v4 has 6 links of 50 GB/s each way); the network is that of a pod over its 256
# chips (v5e 6.4 Tbit/s, v6e 25.6 Tbit/s), or as given per chip (v5p 50 Gbit/s, TPU7x 100 Gbit/s for two cores; v4 as
# v5p).
CHIPS = {
  "B200": Chip("NVIDIA B200", 2250e12, 8000e9, 180e9),
  "GH200 480GB": Chip("NVIDIA GH200 96 GB", 989e12, 4000e9, 96e9),
  "H200 NVL": Chip("NVIDIA H200 NVL", 835e12, 4800e9, 141e9),
  "H200": Chip("NVIDIA H200", 989e12, 4800e9, 141e9, ici=450e9),
  "H100 PCIe": Chip("NVIDIA H100 PCIe", 756e12, 2000e9, 80e9),
  "H100 NVL": Chip("NVIDIA H100 NVL", 835e12, 3900e9, 94e9),
  "H100": Chip("NVIDIA H100 SXM", 989e12, 3350e9, 80e9, ici=450e9),
  "A100-SXM4-40GB": Chip("NVIDIA A100 40 GB", 312e12, 1555e9, 40e9),
  "A100-PCIE-40GB": Chip("NVIDIA A100 40 GB", 312e12, 1555e9, 40e9),
  "A100": Chip("NVIDIA A100 80 GB", 312e12, 2039e9, 80e9),
  "L40S": Chip("NVIDIA L40S", 362e12, 864e9, 48e9),
  "L40": Chip("NVIDIA L40", 181e12, 864e9, 48e9),
  "L4": Chip("NVIDIA L4", 121e12, 300e9, 24e9),
  "TPU v6": Chip("TPU v6e", 918e12, 1640e9, 32e9, ici=400e9, network=12.5e9),
  "TPU7": Chip("TPU7x, one core", 1153e12, 3690e9, 96e9, ici=300e9, network=6.25e9),
  "TPU v5p": Chip("TPU v5p", 459e12, 2765e9, 95e9, ici=600e9, network=6.25e9),
  "TPU v5 lite": Chip("TPU v5e", 197e12, 819e9, 16e9, ici=200e9, network=3.125e9),
  "TPU v5e": Chip("TPU v5e", 197e12, 819e9, 16e9, ici=200e9, network=3.125e9),
  "TPU v5": Chip("TPU v5p", 459e12, 2765e9, 95e9, ici=600e9, network=6.25e9),
  "TPU v4": Chip("TPU v4", 275e12, 1228e9, 32e9, ici=300e9, network=6.25e9),
}


def data_sheet(device: jax.Device) -> Chip | None:
  """Looks up the peaks of a known kind of device."""
  return next((chip for part, chip in CHIPS.items() if part in device.device_kind), None)
