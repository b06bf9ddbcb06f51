"""Whatever stops a run, it continues where a run without the accident would be; what must not continue says why."""

import json

import jax
import numpy as np
import pytest

from experiments.configs import kepo
from kepo_jax import training
from kepo_jax.data import splits
from kepo_jax.objectives import advantages
from kepo_jax.reporting import RunReporter
from kepo_jax.training.checkpoints import steps_in
from kepo_jax.types import Hook
from tests.training.runs import shrunk

SAME = ("metrics.jsonl", "samples.jsonl", "evaluation.json", "questions.json")


def small(**changes):
  """A run of three steps with a validation after the second."""
  sizes = {"train__steps": 3, "eval__every": 2, "eval__prompts": 8, "checkpoint__every": 1}
  return shrunk(kepo.get_config(), **sizes | changes)


@pytest.fixture(scope="module")
def questions():
  return splits.load(small().data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, questions):
  """(workdir, result) of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  return workdir, train(workdir, questions)


def train(workdir, questions, config=None, **settings):
  hooks = [RunReporter(), *settings.pop("hooks", [])]
  return training.train(config or small(), workdir=workdir, records=questions, hooks=hooks, **settings)


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def assert_the_same(workdir, result, whole):
  assert equal(result.state, whole[1].state)
  for name in SAME:
    assert (workdir / name).read_text() == (whole[0] / name).read_text(), name


class Signal(training.Interruption, Hook):
  """Asks the run to stop once something has happened; asked again, it does not."""

  def __init__(self, *, step=None, evaluation=None, loading=False):
    super().__init__()
    self._step, self._evaluation, self._loading = step, evaluation, loading

  def step(self, report):
    self._asked |= report.step == self._step

  def progress(self, what, done, total):
    self._asked |= what == f"evaluation {self._evaluation}" or (self._loading and what.startswith("loading"))


@pytest.mark.parametrize(
  ("signal", "step"),
  [
    ({"step": 1}, 1),  # during a step
    ({"step": 2}, 2),  # during a step that a validation follows
    ({"evaluation": "validation"}, 2),  # during the validation
    ({"evaluation": "after"}, 3),  # after the last step
  ],
  ids=["step", "step before a validation", "validation", "last evaluation"],
)
def test_an_interrupted_run_saves_and_continues_to_the_bit(whole, questions, tmp_path, signal, step):
  signal = Signal(**signal)
  config = small(checkpoint__every=0)  # the checkpoint is that of the signal
  with pytest.raises(training.Interrupted) as caught:
    train(tmp_path / "run", questions, config, hooks=[signal], interruption=signal)
  saved = tmp_path / "run" / "checkpoints" / str(step)
  assert (caught.value.step, caught.value.saved) == (step, str(saved))
  assert (saved / "manifest.json").exists() and not (tmp_path / "run" / "lock.json").exists()
  result = train(tmp_path / "run", questions, config, resume=True)
  assert_the_same(tmp_path / "run", result, whole)


def test_before_the_first_step_there_is_nothing_to_save(whole, questions, tmp_path):
  signal = Signal(evaluation="before")
  with pytest.raises(training.Interrupted, match="after step 0; nothing was saved"):
    train(tmp_path / "run", questions, hooks=[signal], interruption=signal)
  result = train(tmp_path / "run", questions, auto_resume=True)
  assert_the_same(tmp_path / "run", result, whole)


def test_a_signal_before_the_run_goes_on_says_where_it_stands(whole, questions, tmp_path):
  config = small(checkpoint__every=0)
  signal = Signal(evaluation="validation")
  with pytest.raises(training.Interrupted):
    train(tmp_path / "run", questions, config, hooks=[signal], interruption=signal)
  for again in (Signal(evaluation="validation"), Signal(loading=True)):
    with pytest.raises(training.Interrupted, match="after step 2; its state is in .*checkpoints/2"):
      train(tmp_path / "run", questions, config, hooks=[again], interruption=again, resume=True)
  result = train(tmp_path / "run", questions, config, resume=True)
  assert_the_same(tmp_path / "run", result, whole)


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(whole, questions, tmp_path):
  signal = Signal(step=2)
  with pytest.raises(training.Interrupted):
    train(tmp_path / "run", questions, hooks=[signal], interruption=signal)
  newest = tmp_path / "run" / "checkpoints" / "2"
  path = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  result = train(tmp_path / "run", questions, resume=True)
  assert_the_same(tmp_path / "run", result, whole)
  assert steps_in(tmp_path / "run" / "broken") == [2]


def test_a_finished_run_that_is_resumed_stays_as_it_is(whole, questions):
  before = {name: (whole[0] / name).read_bytes() for name in SAME}
  result = train(whole[0], questions, auto_resume=True)
  assert equal(result.state, whole[1].state)
  assert {name: (whole[0] / name).read_bytes() for name in SAME} == before


def test_another_mesh_continues_to_rounding(whole, questions, tmp_path):
  signal = Signal(step=2)
  with pytest.raises(training.Interrupted):
    train(tmp_path / "run", questions, hooks=[signal], interruption=signal)
  config = small(mesh__data=2)
  with pytest.raises(ValueError, match="mesh.data: 1 -> 2"):
    train(tmp_path / "run", questions, config, resume=True)
  result = train(tmp_path / "run", questions, config, resume=True, allow_config_change=True)
  for mine, theirs in zip(jax.tree.leaves(result.state.params), jax.tree.leaves(whole[1].state.params), strict=True):
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs)
  lines = lambda root: [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
  assert lines(tmp_path / "run") == lines(whole[0])


@pytest.fixture
def poisoned(monkeypatch):
  """`poisoned(calls)`: advantages are not numbers in those calls, counted from 1."""

  def poison(calls):
    plain, counted = advantages.group_advantages, []

    def group_advantages(rewards, **settings):
      counted.append(1)
      found = np.array(plain(rewards, **settings))
      return found * np.nan if len(counted) in calls else found

    monkeypatch.setattr(advantages, "group_advantages", group_advantages)

  return poison


def metrics(workdir):
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [record for record in records if "loss" in record]


def test_a_step_that_is_not_finite_is_skipped_and_counted(questions, tmp_path, poisoned):
  poisoned({2})
  quiet = small(eval__test=False, eval__every=0, optimizer__skip_limit=2)
  result = train(tmp_path / "run", questions, quiet)
  assert [record["update/skipped"] for record in metrics(tmp_path / "run")] == [0, 1, 0]
  assert metrics(tmp_path / "run")[1]["loss"] is None
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.params))


def test_too_many_in_a_row_stop_the_run_with_the_batch_that_shows_it(questions, tmp_path, poisoned):
  poisoned({2, 3})
  quiet = small(eval__test=False, eval__every=0, optimizer__skip_limit=2)
  folder = tmp_path / "run" / "not_finite" / "step-3"
  with pytest.raises(ValueError, match=f"not finite in 2 updates in a row, the last one in step 3.*{folder}"):
    train(tmp_path / "run", questions, quiet)
  assert [record["update/skipped"] for record in metrics(tmp_path / "run")] == [0, 1, 1]
  with np.load(folder / "batch.npz") as batch:
    assert np.isnan(batch[".advantages"]).all() and batch[".tokens"].shape[:2] == (4, 4)
  samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
  assert len(samples) == 16 and len({sample["id"] for sample in samples}) == 4


def test_the_count_of_skipped_updates_survives_a_resume(questions, tmp_path, poisoned):
  poisoned({2, 3})
  quiet = small(eval__test=False, eval__every=0, optimizer__skip_limit=2)
  signal = Signal(step=2)
  with pytest.raises(training.Interrupted):
    train(tmp_path / "run", questions, quiet, hooks=[signal], interruption=signal)
  with pytest.raises(ValueError, match="2 updates in a row"):
    train(tmp_path / "run", questions, quiet, resume=True)
