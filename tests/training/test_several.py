"""Two processes: one is killed, both are started again, and the run is as if nothing had happened."""

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


def states(processes):
  """The last word of each process."""
  said = [process.communicate(timeout=500)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  return [text.strip().splitlines()[-1] for text in said]


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_go_on_to_the_bit(tmp_path):
  with two(tmp_path / "whole") as processes:
    whole = states(processes)
  assert whole[0] == whole[1]
  metrics = tmp_path / "run" / "metrics.jsonl"
  with two(tmp_path / "run") as processes:
    deadline = time.monotonic() + 500
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
      time.sleep(0.01)
    processes[1].kill()
    # The other one cannot go on alone; whether it has noticed by now or not, it is ended as a scheduler would.
    time.sleep(1)
  with two(tmp_path / "run") as processes:
    assert states(processes) == whole
  for name in FILES:
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
