import contextlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.training import manifest
from kepo_jax.training.checkpoints import Checkpoints, restored_params, steps_in
from tests.training.runs import flip_a_bit


def opened(tmp_path, **changes):
  return Checkpoints(tmp_path / "checkpoints", **{"every": 2, "minutes": 0.0, "keep": 2} | changes)


def state(value, mesh=None):
  mesh = mesh or sharding.make_mesh(data=8)
  tree = {"w": np.arange(64, dtype=np.float32).reshape(8, 8) + value, "b": [np.float32(value), ()]}
  cut = jax.tree.map(lambda x: sharding.batch_sharding(mesh, np.shape(x), ("prompt",) * bool(np.ndim(x))), tree)
  return jax.device_put(tree, cut)


def saved(tmp_path, steps, **changes):
  with contextlib.closing(opened(tmp_path, **changes)) as checkpoints:
    for step in steps:
      checkpoints.save(step, state(step), {"step": step})


def restored(tmp_path, mesh=None, like=None):
  with contextlib.closing(opened(tmp_path)) as checkpoints:
    return checkpoints.restore(like or state(-1, mesh))


def test_the_newest_comes_back_on_any_mesh_with_what_lay_beside_it(tmp_path, mesh_of):
  assert restored(tmp_path) is None
  saved(tmp_path, [2, 4])
  for axes in ({"data": 8}, {"data": 2, "fsdp": 2}):
    tree, record = restored(tmp_path, mesh_of(**axes))
    assert tree["w"].sharding.mesh == mesh_of(**axes)
    np.testing.assert_array_equal(tree["w"], np.arange(64).reshape(8, 8) + 4)
    assert record == {"step": 4} and tree["b"][1] == ()


def test_the_state_may_change_while_it_is_written(tmp_path):
  mesh = sharding.make_mesh(data=8)
  change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  with contextlib.closing(opened(tmp_path)) as checkpoints:
    for step in range(1, 6):
      tree = jax.device_put({"w": jnp.full((512, 512), step, jnp.float32)}, sharding.batch_sharding(mesh, (512, 512)))
      checkpoints.save(step, tree, {})
      jax.block_until_ready(change(tree))
  tree, _ = restored(tmp_path, like={"w": jax.device_put(jnp.zeros((512, 512)), sharding.replicated(mesh))})
  assert (np.asarray(tree["w"]) == 5).all()


def largest(folder):
  files = (path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME)
  return max(files, key=lambda path: path.stat().st_size)


def test_what_is_damaged_is_set_aside_and_what_is_incomplete_removed_and_the_one_before_them_used(tmp_path, said):
  saved(tmp_path, [2, 4, 6], keep=3)
  (tmp_path / "checkpoints" / "6" / manifest.NAME).unlink()
  flip_a_bit(tmp_path / "checkpoints" / "4" / "state")
  tree, record = restored(tmp_path)
  assert record == {"step": 2} and float(tree["b"][0]) == 2
  assert "the checkpoint of step 6 was never completed" in said.text
  assert "the checkpoint of step 4 is damaged" in said.text and str(tmp_path / "broken" / "4") in said.text
  assert steps_in(tmp_path / "checkpoints") == [2] and steps_in(tmp_path / "broken") == [4]
  # The step can be saved again, and be damaged again, until no other is left.
  saved(tmp_path, [4])
  for step in (2, 4):
    largest(tmp_path / "checkpoints" / str(step)).unlink()
  assert restored(tmp_path) is None
  assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["2", "4", "4-1"]


def test_the_best_of_before_stays_until_that_of_now_is_complete(tmp_path, monkeypatch):
  write = manifest.write

  def slow_then_full(folder):
    if folder.name == "3":
      raise OSError(28, "No space left on device")
    time.sleep(0.5)  # the next save begins before this one has tidied up
    write(folder)

  checkpoints = opened(tmp_path, keep=1)
  checkpoints.save(1, state(1), {}, best=1)
  monkeypatch.setattr(manifest, "write", slow_then_full)
  checkpoints.save(2, state(2), {}, best=1)
  checkpoints.save(3, state(3), {}, best=3)
  with pytest.raises(OSError, match="step 3 could not be written"):
    checkpoints.close()
  complete = [step for step in (1, 2, 3) if manifest.is_complete(tmp_path / "checkpoints" / str(step))]
  assert complete == [1, 2]


def test_another_state_is_refused(tmp_path):
  saved(tmp_path, [2])
  larger = {"w": jax.device_put(np.zeros((16, 8), np.float32), sharding.replicated(sharding.make_mesh(data=8)))}
  for like in ({"other": jnp.copy(larger["w"])}, state(-1) | larger):
    with pytest.raises(ValueError, match=r"checkpoints/2 is intact and does not fit the models of this config"):
      restored(tmp_path, like=like)


def test_parameters_alone_come_back_also_where_the_path_is_a_pattern(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  tmp_path /= "lr=[3e-4]"
  with contextlib.closing(opened(tmp_path)) as checkpoints:
    checkpoints.save(1, {"params": state(1), "moments": state(2)}, {"step": 1})
  whole = {"params": state(0), "moments": state(0)}
  assert restored(tmp_path, like=whole)[1] == {"step": 1}
  place = sharding.replicated(sharding.make_mesh(data=8))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state(0))
  folder = tmp_path / "checkpoints" / "1"
  found = restored_params(folder, like)
  np.testing.assert_array_equal(found["w"], np.arange(64).reshape(8, 8) + 1)
  assert found["w"].sharding == place
  for other, missing in ((like | {"c": like["w"]}, "c"), ({"b": like["b"]}, "w")):
    with pytest.raises(ValueError, match=f"1 is intact and does not fit .*: one of them has no {missing}$"):
      restored_params(folder, other)
  flip_a_bit(folder / "state")
  with pytest.raises(ValueError, match="checkpoints/1 is damaged: "):
    restored_params(folder, like)


def test_when_a_checkpoint_is_due(tmp_path):
  now = [100.0]
  checkpoints = opened(tmp_path, every=3, minutes=2.0, clock=lambda: now[0])
  assert [checkpoints.due(step) for step in range(1, 7)] == [False, False, True, False, False, True]
  now[0] += 119
  assert not checkpoints.due(1)
  now[0] += 1
  assert checkpoints.due(1)
  checkpoints.save(1, state(1), {})
  assert not checkpoints.due(2)
  checkpoints.close()
  assert not opened(tmp_path, every=0).due(10)


def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path):
  folder, limits = tmp_path / "checkpoints", resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints = opened(tmp_path, every=1, keep=1)
  large = {"w": jnp.asarray(np.random.default_rng(0).normal(size=1_000_000), jnp.float32)}
  checkpoints.save(1, large, {})
  checkpoints.wait()
  try:  # a limit on the size of files stands for a full disk: the write fails half-way
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    with pytest.raises(OSError, match="step 2 could not be written to .*checkpoints .*that of step 1 is intact"):
      checkpoints.save(2, large, {})
      checkpoints.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert manifest.faults(folder / "1") == [] and steps_in(folder) == [1]
