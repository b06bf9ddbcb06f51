import os
import signal
import time
import types as pytypes

import pytest

from experiments.studies import plan, runs

PHANTOM = plan.phantom()
PAIR = PHANTOM.pairs[0]


def cell(method="grpo", rate=1e-4, seed=0, pair=PAIR):
  return plan.Cell(plan.MAIN_METHODS[method], pair, rate, seed)


@pytest.fixture
def place(tmp_path):
  return runs.Place(PHANTOM, tmp_path / "runs")


def test_a_digest_names_what_is_computed(place, monkeypatch):
  same = place.digest(cell())
  assert place.digest(cell(pair=PHANTOM.pairs[1])) == same  # GRPO asks no teacher
  assert place.digest(cell("kepo-tau1")) != place.digest(cell("kepo-tau1", pair=PHANTOM.pairs[1]))
  others = [cell(seed=1), cell(rate=2e-4), cell("rloo"), cell(pair=PHANTOM.pairs[2])]
  assert len({same, *map(place.digest, others)}) == 5
  kept = plan.phantom({"checkpoint.keep": 7})
  assert runs.Place(kept, place.workdir).digest(cell()) == same
  shorter = plan.phantom({"train.steps": 7})
  assert runs.Place(shorter, place.workdir).digest(cell()) != same
  monkeypatch.setattr(plan, "REVISION", plan.REVISION + 1)
  assert place.digest(cell()) != same


def test_a_command_is_what_a_user_would_type(place):
  (command,) = place.commands(cell("gkd-0"))
  assert command[:2] == ["experiments.kepo_medvqa", "--config=experiments/configs/gkd.py:phantom"]
  assert {"--config.batch.on_policy_fraction=0.0", "--config.seed=0", "--auto_resume"} <= set(command)
  test, validation = place.commands(plan.Cell(plan.START, PHANTOM.pairs[1]))
  assert "--model=experiments/assets/phantom/confused" in test and "--split=validation" in validation
  (command,) = place.commands(plan.Cell(plan.TEACHER, PHANTOM.pairs[1]))
  assert "--model=experiments/assets/phantom/strong" in command and "--split=test" in command


def commands(folder, statements):
  """A place whose cells run timeit with one statement each."""
  return pytypes.SimpleNamespace(
    folder=lambda given: folder / str(given.seed),
    commands=lambda given: [["timeit", "-n", "1", "-r", "1", statements[given.seed]]],
  )


def test_processes_run_side_by_side_and_faults_are_told(tmp_path):
  cores = sorted(os.sched_getaffinity(0))
  statements = ["import os; assert len(os.sched_getaffinity(0)) == 1", "1/0", "sum(range(3_000_000))"]
  found = {}
  (tmp_path / "0").mkdir()  # goes on from an earlier process, whose seconds nobody has
  workers = runs.Workers([{"core": cores[0]}, {"core": cores[-1]}])
  workers.run(
    [cell(seed=seed) for seed in range(3)],
    commands(tmp_path, statements),
    lambda given, seconds, cpu, fault: found.update({given.seed: (cpu, fault)}),
  )
  assert found[0][1] == found[2][1] == ""
  assert found[1][1].startswith("exit code 1") and found[1][1].endswith("ZeroDivisionError: division by zero")
  assert found[2][0] > 0 == found[0][0]  # CPU seconds
  assert len(os.sched_getaffinity(0)) == len(cores)  # this thread's own cores are untouched


def test_interruptions_stop_the_processes_and_are_passed_on(tmp_path):
  # It plays the user as well, and ends by the second signal only: the first one is what a run saves upon.
  statement = f"""
import os, pathlib, signal, time
def heard(number, frame):
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  pathlib.Path({str(tmp_path / "once")!r}).touch()
  os.kill({os.getpid()}, signal.SIGINT)
signal.signal(signal.SIGTERM, heard)
os.kill({os.getpid()}, signal.SIGINT)
time.sleep(120)
"""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  start = time.monotonic()
  try:
    with pytest.raises(KeyboardInterrupt):
      runs.Workers([{}]).run([cell(seed=0), cell(seed=0)], commands(tmp_path, [statement]), lambda *_: None)
  finally:
    signal.signal(signal.SIGINT, before)
  assert (tmp_path / "once").exists() and time.monotonic() - start < 120
