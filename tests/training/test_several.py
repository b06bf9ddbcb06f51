"""Two processes: one is killed, or told to stop; both are started again, and the run is as if nothing had happened."""

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
def two(workdir):
  """Two processes of one run, each with one device; what is left of them is killed at the end of the block."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  command = [sys.executable, "-m", "tests.training.several", str(workdir), coordinator, "2"]
  with contextlib.ExitStack() as stack:
    processes = []
    for number in range(2):
      log = stack.enter_context((workdir.parent / f"{workdir.name}-{number}.log").open("a"))
      settings = {"cwd": ROOT, "env": os.environ | ONE_DEVICE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
      processes.append(subprocess.Popen([*command, str(number)], **settings))
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
