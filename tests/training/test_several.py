"""Two processes: one is killed, or told to stop; both are started again, and the run is as if nothing had happened.

Or something is wrong on one of them, and both end with an error.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

FILES = ("metrics.jsonl", "samples.jsonl", "evaluation.json", "questions.json", "model/model.safetensors")
ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


@contextlib.contextmanager
def two(workdir, *fault):
  """Two processes of one run, each with one device; what is left of them is killed at the end of the block."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  command = [
    sys.executable,
    "-m",
    "tests.training.several",
    str(workdir),
    coordinator,
    "2",
  ]  # and the number, and what goes wrong
  with contextlib.ExitStack() as stack:
    processes = []
    for number in range(2):
      log = stack.enter_context((workdir.parent / f"{workdir.name}-{number}.log").open("a"))
      settings = {"cwd": ROOT, "env": os.environ | ONE_DEVICE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
      processes.append(subprocess.Popen([*command, str(number), *fault], **settings))
      stack.callback(processes[-1].wait)
      stack.callback(processes[-1].kill)
    yield processes


def last_words(processes, code=0):
  """What each process says last; all end with this exit code."""
  said = [process.communicate(timeout=500)[0] for process in processes]
  assert [process.returncode for process in processes] == [code, code]
  return [text.strip().splitlines()[-1] for text in said]


def wait_for_steps(workdir, steps):
  """Until so many lines of metrics are there."""
  metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 500
  while not (metrics.exists() and metrics.read_text().count("\n") >= steps) and time.monotonic() < deadline:
    time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """(workdir, last words) of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("several") / "whole"
  with two(workdir) as processes:
    said = last_words(processes)
  assert said[0] == said[1] and said[0].startswith("state ")
  return workdir, said


def assert_the_same(workdir, whole):
  """Continues a run, and compares it."""
  complete = [path.parent.name for path in (workdir / "checkpoints").glob("*/manifest.json")]
  newest = max(map(int, complete))
  with two(workdir) as processes:
    said = [process.communicate(timeout=500)[0].split("\n") for process in processes]
  assert newest > 0 and all(f"start {newest}" in words for words in said)
  assert [words[-2] for words in said] == whole[1]
  for name in FILES:
    assert (workdir / name).read_bytes() == (whole[0] / name).read_bytes(), name


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_go_on_to_the_bit(whole, tmp_path):
  with two(tmp_path / "run") as processes:
    wait_for_steps(tmp_path / "run", 4)
    processes[1].kill()
    # The other one cannot go on alone; whether it has noticed by now or not, it is ended as a scheduler would.
    time.sleep(1)
  assert_the_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_after_the_same_step(whole, tmp_path):
  with two(tmp_path / "run") as processes:
    wait_for_steps(tmp_path / "run", 1)
    processes[1].terminate()
    said = last_words(processes, code=75)
  assert said[0] == said[1]
  (newest,) = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())[-1:]
  assert said[0] == f"saved {newest}" and newest < 6
  assert_the_same(tmp_path / "run", whole)


def logs_of_fault(workdir, fault):
  """The log of each process of a run in which something is wrong with one; both must end by themselves, and soon."""
  with two(workdir, fault) as processes:
    for process in processes:
      process.communicate(timeout=500)
  logs = [(workdir.parent / f"{workdir.name}-{number}.log").read_text() for number in range(2)]
  assert [process.returncode for process in processes] == [1, 1], logs[0][-2000:] + logs[1][-2000:]
  return logs


@pytest.mark.slow
def test_a_folder_that_one_process_does_not_have_ends_both(tmp_path):
  first, second = logs_of_fault(tmp_path / "run", "no folder")
  assert "OSError: another process of this run has failed; its log says why." in first
  assert "ValueError: weak is no folder" in second


@pytest.mark.slow
def test_other_questions_on_one_process_end_both(tmp_path):
  for log in logs_of_fault(tmp_path / "run", "other questions"):
    assert "ValueError: process 1 has other questions of train than process 0: 15 against 16." in log
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_evaluation_that_the_first_process_cannot_write_ends_both(tmp_path):
  first, second = logs_of_fault(tmp_path / "run", "unwritable")
  assert "evaluation.json could not be written: " in first
  assert "OSError: another process of this run has failed; its log says why." in second
  assert (tmp_path / "run" / "outputs" / "before.jsonl").exists()
