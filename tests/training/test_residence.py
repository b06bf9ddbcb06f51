"""A teacher in host memory is on the devices in its phases, and nowhere else; what it says is the same to the bit."""

import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import kepo, kepo_eq7, kepo_ke
from kepo_jax import sharding
from kepo_jax.data import splits
from kepo_jax.models.qwen3_vl import model
from kepo_jax.training import forward, programs, residence, setup
from tests.training.runs import Recorder, changed, copied, equal, small, train


def weights(mesh):
  """A matrix cut over fsdp and a vector, of shapes that no other test has."""
  tree = {"w": np.arange(4 * 77, dtype=np.float32).reshape(4, 77), "b": np.arange(79, dtype=np.float32)}
  cut = sharding.batch_sharding(mesh, (4, 77)), sharding.replicated(mesh)
  return jax.device_put(tree, dict(zip("wb", cut, strict=True)))


def held():
  """Memory kinds in which the matrix is alive; a vector that is read leaves views of its copies."""
  gc.collect()
  return sorted(x.sharding.memory_kind for x in jax.live_arrays() if x.shape == (4, 77))


def test_a_phase_brings_weights_and_gives_them_up(mesh_of):
  expected = jax.device_get(weights(mesh_of(fsdp=2)))
  home = residence.on_host(weights(mesh_of(fsdp=2)))
  assert held() == ["pinned_host"]
  resident = residence.Resident(home)
  places = jax.tree.map(lambda x: x.sharding, weights(mesh_of(fsdp=2)))
  assert jax.tree.map(lambda x: x.sharding, resident.shapes) == places
  for _ in range(2):
    with resident.on_device() as params:
      jax.tree.map(np.testing.assert_array_equal, params, expected)
      assert jax.tree.map(lambda x: x.sharding, params) == places
      assert held() == ["device"] + ["pinned_host"]
      for _ in range(2):  # the end of an inner phase is not that of the outer one
        with resident.on_device() as again:
          assert again is params
      assert held() == ["device"] + ["pinned_host"]
    del params, again
    assert held() == ["pinned_host"]


def test_an_error_ends_a_phase(mesh_of):
  resident = residence.Resident(residence.on_host(weights(mesh_of())))
  with pytest.raises(KeyError), resident.on_device():
    raise KeyError
  assert held() == ["pinned_host"]


def test_weights_on_the_devices_stay_there(mesh_of):
  params = weights(mesh_of(fsdp=2))
  resident = residence.Resident(params)
  with resident.on_device() as found:
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, found, params)))
    assert held() == ["device"]
  del found
  assert held() == ["device"]


def test_targets_outlive_the_weights_that_made_them(tiny_config, tiny_params, tiny_experience, mesh_of):
  mesh = mesh_of(data=2)
  batch = sharding.place(mesh, tiny_experience)

  def placed():
    return jax.device_put(tiny_params, sharding.weight_shardings(mesh, tiny_params, model.logical_axes(tiny_config)))

  found = []
  with jax.set_mesh(mesh):
    for params in (placed(), residence.on_host(placed())):
      score = programs.targets_program([programs.Model(tiny_config, params)] * 2, parts=1)
      found.append(jax.device_get(score(batch.prompts, batch.tokens)))
    expected = jax.jit(lambda p, b: forward.target(tiny_config, p, b.prompts, b.tokens, parts=1))(placed(), batch)
  jax.tree.map(np.testing.assert_array_equal, found[0], found[1])
  np.testing.assert_array_equal(found[1][0].head, expected.head)
  np.testing.assert_array_equal(found[1][1].hidden, expected.hidden)


@pytest.mark.parametrize("place", residence.PLACES)
def test_a_teacher_decodes_from_the_weights_that_it_has(tiny_config, tiny_params, mesh_of, monkeypatch, place):
  places = sharding.weight_shardings(mesh_of(fsdp=2), tiny_params, model.logical_axes(tiny_config))
  params = jax.device_put(tiny_params, places)
  teacher = programs.Model(tiny_config, residence.on_host(params) if place == "host" else params)
  monkeypatch.setattr(programs, "sampling_program", lambda *_, stationary, **named: lambda *given: (stationary, given))
  sampled = programs.teacher_program(teacher, None, None)
  with teacher.resident.on_device() as found:
    stationary, (used, prompts, key) = sampled("prompts", "key")
  assert stationary and used is found and (prompts, key) == ("prompts", "key")


# ---- the backend ----


def mesh_with(*kinds):
  memories = [types.SimpleNamespace(kind=kind) for kind in kinds]
  device = types.SimpleNamespace(platform="other", addressable_memories=lambda: memories)
  return types.SimpleNamespace(local_devices=[device])


def test_a_backend_without_host_memory_is_named(mesh_of):
  host, offloaded = {"model__teacher_memory": "host"}, {"model__remat": "dots_offloaded"}
  for changes, message in (
    (host, r"model.teacher_memory=host needs .* pinned_host, and other has \['device'\]"),
    (offloaded, "model.remat=dots_offloaded needs memory .*; use dots or full"),
  ):
    with pytest.raises(ValueError, match=message):
      setup.check_memories(changed(kepo, **changes), mesh_with("device"))
    setup.check_memories(changed(kepo, **changes), mesh_with("device", "pinned_host"))
  setup.check_memories(changed(kepo), mesh_with("device"))
  setup.check_memories(changed(kepo, **host, **offloaded), mesh_of(data=2))  # this backend has it


# ---- a run ----


@pytest.mark.slow
def test_a_run_is_the_same_to_the_bit():
  found = []
  for place in residence.PLACES:
    recorder = Recorder()
    config = small(kepo_eq7, train__steps=2, eval__every=0, eval__test=False, model__teacher_memory=place)
    found.append((train(config, records=splits.load(config.data), hooks=[recorder]), recorder.reports))
  (here, reports), (there, others) = found
  assert equal(here.state, there.state)
  np.testing.assert_equal([report.metrics for report in reports], [report.metrics for report in others])
  assert sum(report.metrics.get("hint/attempts", 0) for report in reports) > 0


@pytest.mark.slow
def test_all_that_saves_memory_at_once_and_a_resume(questions, tmp_path):
  saves = {"optimizer__moments": "float8", "model__remat": "dots_offloaded", "model__teacher_memory": "host"}
  config = small(kepo_ke, train__steps=2, eval__every=0, eval__test=False, **saves)
  whole = train(config, tmp_path / "whole", records=questions)
  assert jnp.dtype(jnp.float8_e4m3fn) in {leaf.dtype for leaf in jax.tree.leaves(whole.state.opt_state)}
  run = copied(tmp_path / "whole", tmp_path / "run", last=1)
  assert equal(train(config, run, records=questions, resume=True).state, whole.state)
