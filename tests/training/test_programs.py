import gc
import types

import jax
import numpy as np
import pytest

from experiments.configs import kepo_eq7
from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import model
from kepo_jax.training import programs, update
from tests.training.runs import Recorder, equal, small, train


def weights(mesh):
  """A matrix cut over fsdp and a vector, of shapes that no other test has."""
  tree = {"w": np.arange(4 * 77, dtype=np.float32).reshape(4, 77), "b": np.arange(79, dtype=np.float32)}
  return jax.device_put(tree, {"w": sharding.batch_sharding(mesh, (4, 77)), "b": sharding.replicated(mesh)})


def held():
  """Memory kinds in which the matrix is alive; a vector that is read leaves views of its copies."""
  gc.collect()
  return sorted(x.sharding.memory_kind for x in jax.live_arrays() if x.shape == (4, 77))


def test_a_phase_brings_weights_and_gives_them_up(mesh_of):
  expected = jax.device_get(weights(mesh_of(fsdp=2)))
  home = programs.offloaded(weights(mesh_of(fsdp=2)))
  assert held() == ["pinned_host"]
  offloadable = programs.OffloadableWeights(home)
  places = jax.tree.map(lambda x: x.sharding, weights(mesh_of(fsdp=2)))
  assert jax.tree.map(lambda x: x.sharding, offloadable.shapes) == places
  for _ in range(2):
    with offloadable.on_device() as params:
      jax.tree.map(np.testing.assert_array_equal, params, expected)
      assert jax.tree.map(lambda x: x.sharding, params) == places
      assert held() == ["device"] + ["pinned_host"]
      for _ in range(2):  # the end of an inner phase is not that of the outer one
        with offloadable.on_device() as again:
          assert again is params
      assert held() == ["device"] + ["pinned_host"]
    del params, again
    assert held() == ["pinned_host"]
  with pytest.raises(KeyError), offloadable.on_device():  # an error ends a phase
    raise KeyError
  assert held() == ["pinned_host"]
  # Weights on the devices stay there.
  there = weights(mesh_of(fsdp=2))
  with programs.OffloadableWeights(there).on_device() as found:
    assert found["w"] is there["w"]


def test_targets_outlive_the_weights_that_made_them(tiny_config, tiny_params, tiny_experience, mesh_of):
  mesh = mesh_of(data=2)
  batch = sharding.place(mesh, tiny_experience)

  def placed():
    return jax.device_put(tiny_params, sharding.weight_shardings(mesh, tiny_params, model.logical_axes(tiny_config)))

  found = []
  with jax.set_mesh(mesh):
    for params in (placed(), programs.offloaded(placed())):
      score = programs.targets_program([programs.Model(tiny_config, params)] * 2, parts=1)
      found.append(jax.device_get(score(batch.prompts, batch.tokens)))
    expected = jax.jit(lambda p, b: update.target(tiny_config, p, b.prompts, b.tokens, parts=1))(placed(), batch)
  assert equal(*found)
  np.testing.assert_array_equal(found[1][0].head, expected.head)
  np.testing.assert_array_equal(found[1][1].hidden, expected.hidden)


def test_a_backend_without_host_memory_is_named(mesh_of):
  def mesh_with(*kinds):
    memories = [types.SimpleNamespace(kind=kind) for kind in kinds]
    device = types.SimpleNamespace(platform="other", addressable_memories=lambda: memories)
    return types.SimpleNamespace(local_devices=[device])

  with pytest.raises(ValueError, match=r"model.teacher_memory=host needs .* pinned_host, and other has \['device'\]"):
    programs.check_host_memory(mesh_with("device"))
  programs.check_host_memory(mesh_with("device", "pinned_host"))
  programs.check_host_memory(mesh_of(data=2))  # this backend has it


@pytest.mark.slow
def test_a_run_is_the_same_to_the_bit(questions):
  found = []
  for place in programs.PLACES:
    recorder = Recorder()
    config = small(kepo_eq7, train__steps=2, eval__every=0, eval__test=False, model__teacher_memory=place)
    found.append((train(config, records=questions, hooks=[recorder]), recorder.reports))
  (here, reports), (there, others) = found
  assert equal(here.state, there.state)
  np.testing.assert_equal([report.metrics for report in reports], [report.metrics for report in others])
  assert sum(report.metrics.get("hint/attempts", 0) for report in reports) > 0
