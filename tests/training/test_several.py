"""Two processes of a run: what goes wrong on one ends both; told to stop or killed, they go on to the bit."""

import contextlib
import time

import pytest

from tests.started import free_address, logs, started
from tests.training.several import FAULTS, STEPS

FILES = ("metrics.jsonl", "samples.jsonl", "evaluation.json", "questions.json", "model/model.safetensors")
SECONDS = 900


@contextlib.contextmanager
def two(folder, *runs):
  """Two processes, each with one device."""
  shared = ("tests.training.several", folder, free_address(), 2)
  for number in range(2):
    (folder / str(number)).unlink(missing_ok=True)
  with started(folder, *((*shared, number, *runs) for number in range(2)), devices=1) as processes:
    yield processes


def end(folder, processes, code=0):
  """What each process says; both end with this exit code."""
  for process in processes:
    process.wait(timeout=SECONDS)
  assert [process.returncode for process in processes] == [code, code], logs(folder)
  return [(folder / str(number)).read_text().splitlines() for number in range(2)]


def wait_until(there, processes):
  deadline = time.monotonic() + SECONDS
  while not there():
    assert [process.poll() for process in processes] == [None, None] and time.monotonic() < deadline
    time.sleep(0.01)


def newest_checkpoint(workdir):
  return max((int(path.parent.name) for path in (workdir / "checkpoints").glob("*/manifest.json")), default=0)


@pytest.mark.slow
def test_what_ends_one_of_two_processes_ends_both_and_they_go_on_to_the_bit(tmp_path):
  metrics = tmp_path / "run" / "metrics.jsonl"
  # What goes wrong on one process; a run that nothing disturbs; and one of which a single process is told to stop.
  with two(tmp_path, *FAULTS, "whole", "run") as processes:
    wait_until(lambda: metrics.exists() and metrics.read_text(), processes)
    processes[1].terminate()
    said = end(tmp_path, processes, code=75)
  folder, questions, unwritable, _, whole, _, stopped = zip(*said, strict=True)
  another = "OSError: another process of this run has failed; its log says why."
  assert folder[0] == another and folder[1].startswith("ValueError: weak is no folder")
  for each in questions:
    assert each.startswith("ValueError: process 1 has other questions of train than process 0: 15 against 16.")
  assert not (tmp_path / "other questions").exists()
  assert "evaluation.json could not be written: " in unwritable[0] and unwritable[1] == another
  assert (tmp_path / "unwritable" / "outputs" / "before.jsonl").exists()
  assert whole[0] == whole[1] and whole[0].startswith("state ")
  # Both stop after the same step, and save it.
  saved = newest_checkpoint(tmp_path / "run")
  assert stopped == (f"saved {saved}",) * 2 and 0 < saved < STEPS

  with two(tmp_path, "run") as processes:
    wait_until(lambda: newest_checkpoint(tmp_path / "run") > saved, processes)
    processes[1].kill()
    # The other one cannot go on alone; whether it has noticed by now or not, it is ended as a scheduler would.
    time.sleep(1)
  assert [(tmp_path / str(number)).read_text().split("\n")[0] for number in range(2)] == [f"start {saved}"] * 2
  left = newest_checkpoint(tmp_path / "run")
  assert left > saved

  with two(tmp_path, "run") as processes:
    said = end(tmp_path, processes)
  assert said == [[f"start {left}", each] for each in whole]
  for name in FILES:
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
