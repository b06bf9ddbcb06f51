"""TPU slices that are not here: their devices, for which programs compile, and what their chips can do."""

import dataclasses
import math
import os
import re
from typing import Any

import jax

from kepo_jax import links, sharding
from kepo_jax.planning import chips, hlo

# As the compiler calls them; other shapes of these generations work as well.
EXAMPLES = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:4x4", "v5p:4x4x4", "v4:4x4x4", "tpu7x:4x4x4")
_NO_HOST = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at a time: no TPU is held
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more slices of TPU chips."""

  name: str  # of one slice
  slices: int
  devices: tuple[Any, ...]  # that programs can be compiled for, and cannot run on
  chip: chips.Chip  # one of them
  torus: links.Torus | None = None  # where the devices of a mesh lie in it, where that is known

  @property
  def slice_devices(self) -> int:
    """Devices of a slice."""
    return len(self.devices) // self.slices

  @property
  def label(self) -> str:
    """Name, with the number of slices."""
    return f"{self.slices} x {self.name}" if self.slices > 1 else self.name

  def laid(self, mesh: jax.sharding.Mesh) -> "Topology":
    """With a mesh of its devices laid over it, so that collectives are charged for the links that they use."""
    return dataclasses.replace(self, torus=links.torus(list(mesh.devices.flat)))

  def link_seconds(self, collective: hlo.Collective) -> float:
    """Seconds of a collective on the links of a slice; without a mesh laid over it, at the rate of one of them."""
    if not self.torus or not collective.groups:
      return collective.sent / self.chip.link
    cores = 1 + max(place[-1] for place in self.torus.places)  # each has its share of a link on the data sheet
    return collective.size * self.torus.busiest(collective.kind, collective.groups) / (cores * self.chip.link)

  def mesh(self, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """The mesh of a run on it, as `sharding.make_mesh` makes it there.

    Raises:
      ValueError: the axes do not fit.
    """
    mesh = sharding.make_mesh(data, fsdp, tensor, self.devices)
    if mesh.size != len(self.devices):  # which several hosts refuse, and this process could not know
      raise ValueError(
        f"mesh data={data} x fsdp={fsdp} x tensor={tensor} leaves {len(self.devices) - mesh.size} of the "
        f"{len(self.devices)} chips of {self.label} idle; set mesh.data=-1, or axes that multiply to all of them."
      )
    return mesh


def topology(name: str, slices: int = 1) -> Topology:
  """The slices of a name such as v5e:8x8, "2 x v5e:16x16" included; needs libtpu, and no TPU.

  Args:
    name: generation, and chips along each axis.
    slices: how many of them.

  Raises:
    ValueError: libtpu is not installed or does not know the name, nothing is known about its chips, or the name has
      another number of slices.
  """
  if several := re.fullmatch(r"(\d+)\s*x\s*(\D.*)", name):
    if slices not in (1, int(several.group(1))):
      raise ValueError(f"--topology={name!r} and --slices={slices} contradict each other; leave one of them out.")
    slices, name = int(several.group(1)), several.group(2)
  if not re.fullmatch(r"\w+:\d+(x\d+)+", name):
    raise ValueError(f"--topology={name!r} is not of the form v5e:8x8; for example {', '.join(EXAMPLES)}.")
  # libtpu else asks a server that only TPU hosts have, and complains about what it does not find.
  for variable, value in _NO_HOST.items():
    os.environ.setdefault(variable, value)
  try:
    import libtpu  # noqa: F401, PLC0415
    from jax.experimental import topologies  # noqa: PLC0415
  except ImportError:
    raise ValueError(
      "planning for a TPU needs its compiler: pip install -r requirements-tpu.txt, or `make plan`, which does it."
    ) from None
  settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if name.startswith("v4:"):  # JAX shows the two cores of this chip as one device
    settings["chip_config_name"] = "megacore"
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"--topology={name}: {reason} Known are, for example, {', '.join(EXAMPLES)}.") from error
  devices: tuple[Any, ...] = tuple(found.devices)
  return Topology(name, slices, devices, _chip(devices[0], cores=len(devices) // (slices * math.prod(_shape(name)))))


def _shape(name: str) -> list[int]:
  return [int(number) for number in name.partition(":")[2].split("x")]


def _chip(device: Any, cores: int) -> chips.Chip:
  """The data sheet of a device: a chip, or one of its cores where each is a device of its own."""
  chip = chips.data_sheet(device)
  if chip is None:
    kinds = sorted(part for part, chip in chips.CHIPS.items() if chip.link)
    raise ValueError(f"nothing is known about {device.device_kind}; kepo_jax/planning/chips.py has {kinds}.")
  if cores == 1 or "core" in chip.name:
    return chip
  shares = {name: getattr(chip, name) / cores for name in ("flops", "bandwidth", "memory", "link", "network")}
  return dataclasses.replace(chip, name=f"{chip.name}, one core", **shares)
