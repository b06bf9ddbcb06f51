"""What needs the compiler of a TPU, libtpu, is marked tpu: `make test-tpu` installs it and runs these."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import kepo
from kepo_jax.models.qwen3_vl import model
from kepo_jax.planning import benchmark, chips, hlo, pods, topologies


@dataclasses.dataclass
class Device:
  device_kind: str
  platform: str = "tpu"


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:4", "8x8", "v5e-16"])
def test_a_name_of_another_form_is_refused(name):
  with pytest.raises(ValueError, match=r"--topology=.* is not of the form v5e:8x8; for example v5e:4x4"):
    topologies.topology(name)


def test_two_numbers_of_slices_contradict_each_other():
  with pytest.raises(ValueError, match=r"--topology='2 x v5e:4x4' and --slices=3 contradict each other"):
    topologies.topology("2 x v5e:4x4", 3)


def test_without_libtpu_the_way_out_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(ValueError, match=r"pip install -r requirements-tpu.txt, or `make plan`"):
    topologies.topology("v5e:4x4")


def test_a_core_has_its_share():
  chip, core = (topologies._chip(Device("TPU v4"), cores) for cores in (1, 2))
  assert chip == chips.CHIPS["TPU v4"] and core.name == "TPU v4, one core"
  assert (core.flops, core.memory, core.link) == (chip.flops / 2, chip.memory / 2, chip.link / 2)
  assert topologies._chip(Device("TPU7x"), 2) is chips.CHIPS["TPU7"]  # the data sheet is that of a core


def test_a_mesh_takes_all_chips_as_a_pod_does():
  found = topologies.Topology("v5e:2x4", 1, tuple(jax.devices()), chips.CHIPS["TPU v5 lite"])
  assert found.mesh(-1, 2, 2).size == len(jax.devices()) == 8
  with pytest.raises(ValueError, match=r"leaves 4 of the 8 chips of v5e:2x4 idle; set mesh.data=-1"):
    found.mesh(1, 2, 2)


def test_an_unknown_chip_is_refused():
  with pytest.raises(ValueError, match=r"nothing is known about TPU v99; kepo_jax/planning/chips.py has \["):
    topologies._chip(Device("TPU v99"), 1)


@dataclasses.dataclass(eq=False)
class Placed(Device):
  coords: tuple[int, ...] = ()
  core_on_chip: int = 0
  slice_index: int = 0


@pytest.mark.parametrize("cores", [1, 2])
def test_a_collective_is_charged_for_the_links_that_it_uses(cores):
  chip = dataclasses.replace(chips.CHIPS["TPU v5p"], link=100e9 / cores)  # of a core, where each is a device
  devices = [Placed("TPU v5", coords=(x, 0, 0), core_on_chip=core) for x in range(4) for core in range(cores)]
  grid = np.array(devices, object).reshape(1, 1, -1)
  mesh = types.SimpleNamespace(devices=grid)
  bare = topologies.Topology("v5p:4x1x1", 1, tuple(devices), chip)
  laid = bare.laid(mesh)
  every = hlo.Collective("all-gather", 1e9, 4 * cores, groups=(tuple(range(4 * cores)),))
  share = 1 - 1 / (4 * cores)
  # An open line: what goes round comes back over the same links. Both cores of a chip send over those of the chip.
  assert laid.link_seconds(every) == pytest.approx(share * 1e9 / 100e9)
  assert bare.link_seconds(every) == every.sent / chip.link
  # Every second chip: two pairs share the link in the middle.
  far = hlo.Collective("all-gather", 1e9, 2, groups=((0, 2 * cores), (cores, 3 * cores)))
  assert laid.link_seconds(far) == pytest.approx(2 * 0.5 * 1e9 / 100e9)


def test_the_network_between_slices_has_no_links():
  sent = hlo.Collective("all-reduce", 1e9, 2, 2)
  devices = tuple(Placed("TPU v5 lite", coords=(x, 0, 0), slice_index=s) for s in (0, 1) for x in (0, 1))
  place = topologies.Topology("v5e:2x1", 2, devices, chips.CHIPS["TPU v5e"])
  laid = place.laid(types.SimpleNamespace(devices=np.array(devices, object)))
  assert laid.link_seconds(sent) == 0
  both = hlo.Collective("all-gather", 1e9, 4, 2, groups=((0, 1, 2, 3),))
  assert laid.link_seconds(both) == pytest.approx(0.5 * 1e9 / 50e9)


@pytest.mark.tpu
@pytest.mark.parametrize(
  ("name", "slices", "devices", "chip"),
  [("v5e:4x4", 1, 16, "TPU v5e"), ("2 x v5e:16x16", 1, 512, "TPU v5e"), ("v5e:16x16", 2, 512, "TPU v5e"),
   ("v5p:4x4x4", 1, 64, "TPU v5p"), ("v6e:4x4", 1, 16, "TPU v6e"), ("tpu7x:4x4x4", 1, 128, "TPU7x, one core"),
   ("v4:4x4x4", 1, 64, "TPU v4")],
)  # fmt: skip
def test_known_topologies(name, slices, devices, chip):
  place = topologies.topology(name, slices)
  assert len(place.devices) == devices and place.chip.name == chip
  assert place.slice_devices == devices // place.slices


@pytest.mark.tpu
def test_a_name_that_the_compiler_does_not_know_is_refused():
  with pytest.raises(ValueError, match="--topology=v5e:3x5: "):
    topologies.topology("v5e:3x5")


@pytest.mark.tpu
def test_only_the_data_axis_spans_slices():
  place = topologies.topology("v5e:2x2", 2)
  mesh = place.mesh(2, 2, 2)
  assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
  with pytest.raises(ValueError, match="mesh.data=1 does not divide over 2 slices"):
    place.mesh(1, 4, 2)


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:4x4"])
def test_an_axis_may_take_part_of_a_physical_one(name):
  place = topologies.topology(name)
  mesh = place.mesh(1, 2, 8)
  assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 8}
  assert len(set(mesh.devices.flat)) == 16


@pytest.mark.tpu
@pytest.mark.parametrize("slices", [1, 2])
def test_groups_of_a_mesh_are_lines_of_neighbours(slices):
  place = topologies.topology("v5e:16x16", slices)
  mesh = place.mesh(4 * slices, 8, 8)
  torus = place.laid(mesh).torus
  numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
  fsdp, tensor = (
    torus.busiest("all-gather", tuple(map(tuple, np.moveaxis(numbers, axis, -1).reshape(-1, 8).tolist())))
    for axis in (1, 2)
  )
  assert (fsdp, tensor) == (7 / 8, 7 / 8 / 2)


@pytest.mark.tpu
@pytest.mark.parametrize("slices", [1, 2])
def test_a_step_compiles_for_tpus(slices):
  place = topologies.topology("v5e:2x2", slices)
  config = kepo.get_config()
  config.model.compute_dtype = config.model.teacher_dtype = "bfloat16"
  config.model.remat = "full"
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = slices, 2, 2
  models = dict.fromkeys(("student", "teacher"), benchmark.MEDIUM)
  run = pods.PodRun(config, models, place.mesh(slices, 2, 2), pods.Sizes(128, 256, 256))
  with jax.default_matmul_precision("default"):  # which products of bfloat16 in a kernel of its own ask for
    plan = run.plan(place, compiled=lambda name, seconds: None)
  assert plan.failures == {} and plan.fits
  programs = {each.name: each for each in plan.programs if each.phase != "candidates"}
  gradients, scoring = programs["the gradients"], programs["scoring by a frozen model"]
  # Three products for one of the forward pass, and another one for what is computed again; the losses on top.
  assert 3 < gradients.cost.flops / scoring.cost.flops < 6
  weights = pods.bytes_per_device(run.state.params) * jnp.bfloat16.dtype.itemsize / 4
  assert sum(gradients.cost.sent.values()) > weights  # gathered, and their gradients reduced
  assert bool(sum(gradients.cost.crossed.values())) == (slices > 1)
  # A token of each row in every turn but the first; prompts on top. Weights so small may stay in the chip's own memory.
  rows, decoder = 8 * 8 / (2 * slices), model.abstract_params(benchmark.MEDIUM)["language_model"]
  turns = 23 * 2 * rows * sum(x.size for x in jax.tree.leaves(decoder)) / 2
  assert turns < programs["the student's sampler"].cost.flops < 3 * turns
