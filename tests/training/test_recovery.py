import jax
import numpy as np
import pytest

from kepo_jax import training
from kepo_jax.objectives import advantages
from kepo_jax.training.checkpoints import steps_in
from tests.training import kill
from tests.training.runs import Signal, assert_the_same, copied, flip_a_bit, lines, small, train

pytestmark = pytest.mark.slow


def test_a_run_that_is_interrupted_everywhere_ends_as_if_it_never_was(whole, questions, tmp_path):
  run, every_signal = tmp_path / "run", {"checkpoint__every": 0}  # all checkpoints but the last are those of signals
  for signal, step in (
    (Signal(progress="evaluation before"), 0),
    (Signal(step=1), 1),
    (Signal(step=2), 2),  # a validation would follow
    (Signal(progress="evaluation validation"), 2),  # it is made after all, and interrupted
    (Signal(progress="loading"), 2),
    (Signal(step=3), 3),
    (Signal(progress="evaluation validation"), 4),  # the validation that belongs to step 4
    (Signal(progress="evaluation after"), 4),
  ):
    with pytest.raises(training.Interrupted) as caught:
      train(small(**every_signal), run, records=questions, hooks=[signal], interruption=signal, auto_resume=True)
    saved = run / "checkpoints" / str(step)
    assert (caught.value.step, caught.value.saved) == (step, str(saved) if step else "")
    assert not step or (saved / "manifest.json").exists()
    assert not (run / "lock.json").exists()
  result = train(small(**every_signal), run, records=questions, resume=True)
  assert_the_same(run, result, whole)


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(whole, questions, tmp_path):
  run = copied(whole[0], tmp_path / "run", last=3)
  flip_a_bit(run / "checkpoints" / "3")
  assert_the_same(run, train(small(), run, records=questions, resume=True), whole)
  assert steps_in(run / "broken") == [3]
  # A finished run that is resumed stays as it is.
  assert_the_same(run, train(small(), run, records=questions, auto_resume=True), whole)


def test_another_mesh_continues_to_rounding(whole, questions, tmp_path):
  run = copied(whole[0], tmp_path / "run", last=3)
  config = small(mesh__data=2, eval__every=0, eval__test=False)
  with pytest.raises(ValueError, match="mesh.data: 1 -> 2"):
    train(config, run, records=questions, resume=True)
  result = train(config, run, records=questions, resume=True, allow_config_change=True)
  for mine, theirs in zip(jax.tree.leaves(result.state.params), jax.tree.leaves(whole[1].state.params), strict=True):
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)
  assert [record["step"] for record in lines(run / "metrics.jsonl") if "loss" in record] == [1, 2, 3, 4]


def test_updates_that_are_not_finite_are_skipped_and_counted_until_there_are_too_many(questions, tmp_path, monkeypatch):
  plain, calls = advantages.group_advantages, []

  def poisoned(rewards, **settings):
    calls.append(1)
    return np.array(plain(rewards, **settings)) * (np.nan if len(calls) in (1, 3, 4) else 1)

  monkeypatch.setattr(advantages, "group_advantages", poisoned)
  run, config = tmp_path / "run", small(eval__test=False, eval__every=0, optimizer__skip_limit=2)
  signal = Signal(step=3)
  with pytest.raises(training.Interrupted):
    train(config, run, records=questions, hooks=[signal], interruption=signal)
  folder = run / "not_finite" / "step-4"
  with pytest.raises(ValueError, match=f"not finite in 2 updates in a row, the last one in step 4.*{folder}"):
    train(config, run, records=questions, resume=True)
  metrics = [record for record in lines(run / "metrics.jsonl") if "loss" in record]
  assert [record["update/skipped"] for record in metrics] == [1, 0, 1, 1]
  assert [record["loss"] is None for record in metrics] == [True, False, True, True]  # the weights stay numbers
  with np.load(folder / "batch.npz") as batch:
    assert np.isnan(batch[".advantages"]).all() and batch[".tokens"].shape[:2] == (4, 4)
  samples = lines(folder / "samples.jsonl")
  assert len(samples) == 16 and len({sample["id"] for sample in samples}) == 4


def test_a_run_that_is_killed_again_and_again_continues_to_the_bit(whole, tmp_path):
  phases = ("saving", "checksums")
  runs, different, kills = kill.main(2, seed=5, folder=tmp_path, phases=phases, whole=(whole[0], kill.digest(whole[1])))
  assert different == [] and runs == 1
  assert all(f" in {phase} " in told for phase, told in zip(phases, kills, strict=True))
