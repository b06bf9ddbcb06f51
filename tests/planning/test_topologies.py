"""What needs the compiler of a TPU, libtpu, is marked tpu: `make test-tpu` installs it and runs these."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import model
from kepo_jax.planning import benchmark, chips, pods, topologies
from tests.planning import test_memory


def test_a_name_of_another_form_and_two_numbers_of_slices_are_refused():
  for name in ("v5e", "v5e:", "v5e:4", "8x8", "v5e-16"):
    with pytest.raises(ValueError, match=r"--topology=.* is not of the form v5e:8x8; for example v5e:4x4"):
      topologies.topology(name)
  with pytest.raises(ValueError, match=r"--topology='2 x v5e:4x4' and --slices=3 contradict each other"):
    topologies.topology("2 x v5e:4x4", 3)


def test_without_libtpu_the_way_out_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(ValueError, match=r"pip install -r requirements-tpu.txt, or `make plan`"):
    topologies.topology("v5e:4x4")


def test_a_core_has_its_share():
  def chip_of(kind, cores):
    return topologies._chip(types.SimpleNamespace(device_kind=kind, platform="tpu"), cores)

  chip, core = (chip_of("TPU v4", cores) for cores in (1, 2))
  assert chip == chips.CHIPS["TPU v4"] and core.name == "TPU v4, one core"
  assert (core.flops, core.memory, core.link) == (chip.flops / 2, chip.memory / 2, chip.link / 2)
  assert chip_of("TPU7x", 2) is chips.CHIPS["TPU7"]  # the data sheet is that of a core
  with pytest.raises(ValueError, match=r"nothing is known about TPU v99; kepo_jax/planning/chips.py has \["):
    chip_of("TPU v99", 1)


def test_a_mesh_takes_all_chips_as_a_pod_does():
  found = topologies.Topology("v5e:2x4", 1, tuple(jax.devices()), chips.CHIPS["TPU v5 lite"])
  assert found.mesh(-1, 2, 2).size == len(jax.devices()) == 8
  with pytest.raises(ValueError, match=r"leaves 4 of the 8 chips of v5e:2x4 idle; set mesh.data=-1"):
    found.mesh(1, 2, 2)


@pytest.mark.tpu
def test_known_topologies():
  for name, slices, devices, chip in [
    ("v5e:4x4", 1, 16, "TPU v5e"),
    ("2 x v5e:16x16", 1, 512, "TPU v5e"),
    ("v5p:4x4x4", 1, 64, "TPU v5p"),
    ("v6e:4x4", 1, 16, "TPU v6e"),
    ("tpu7x:4x4x4", 1, 128, "TPU7x, one core"),
    ("v4:4x4x4", 1, 64, "TPU v4"),
  ]:
    place = topologies.topology(name, slices)
    assert (len(place.devices), place.chip.name) == (devices, chip), name
    assert place.slice_devices == devices // place.slices
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
def test_groups_of_a_mesh_are_lines_of_neighbours():
  place = topologies.topology("v5e:16x16", 2)
  mesh = place.mesh(8, 8, 8)
  torus = place.laid(mesh).torus
  numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
  fsdp, tensor = (
    torus.busiest("all-gather", tuple(map(tuple, np.moveaxis(numbers, axis, -1).reshape(-1, 8).tolist())))
    for axis in (1, 2)
  )
  assert (fsdp, tensor) == (7 / 8, 7 / 8 / 2)


@pytest.mark.tpu
def test_a_step_compiles_for_tpus():
  place = topologies.topology("v5e:2x2", 2)
  fields = {f"mesh__{axis}": 2 for axis in ("data", "fsdp", "tensor")} | {"log__gradients_every": 0}
  fields |= {"model__compute_dtype": "bfloat16", "model__teacher_dtype": "bfloat16", "model__remat": "full"}
  config = test_memory.changed(**fields)
  text = dataclasses.replace(benchmark.MEDIUM.text, num_hidden_layers=2, vocab_size=2048)
  vision = dataclasses.replace(benchmark.MEDIUM.vision, depth=2, deepstack_visual_indexes=(0,))
  small = dataclasses.replace(benchmark.MEDIUM, text=text, vision=vision)
  run = pods.PodRun(config, dict.fromkeys(("student", "teacher"), small), place.mesh(2, 2, 2), pods.Sizes(128, 256, 64))
  with jax.default_matmul_precision("default"):  # which products of bfloat16 in a kernel of its own ask for
    plan = run.plan(place, compiled=lambda name, seconds: print(f"{name}: {seconds:.0f} s"))
  assert plan.failures == {} and plan.fits
  programs = {each.name: each for each in plan.programs if each.phase != "candidates"}
  gradients, scoring = programs["the gradients"], programs["scoring by a frozen model"]
  # Three products for one of the forward pass, and another one for what is computed again; the losses on top.
  assert 3 < gradients.cost.flops / scoring.cost.flops < 6
  weights = pods.bytes_per_device(run.state.params) * jnp.bfloat16.dtype.itemsize / 4
  assert sum(gradients.cost.sent.values()) > weights  # gathered, and their gradients reduced
  assert sum(gradients.cost.crossed.values()) > 0
  # A token of each row in every turn but the first; prompts on top. Weights so small may stay in the chip's own memory.
  rows, decoder = 8 * 8 / 4, model.abstract_params(small)["language_model"]
  turns = 23 * 2 * rows * sum(x.size for x in jax.tree.leaves(decoder)) / 2
  assert turns < programs["the student's sampler"].cost.flops < 3 * turns
