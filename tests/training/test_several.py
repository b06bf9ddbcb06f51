import contextlib
import json
import time

import numpy as np
import pytest

from tests.started import free_address, logs, started
from tests.training.kill import complete
from tests.training.runs import SAME
from tests.training.several import FAULTS, STEPS

pytestmark = pytest.mark.slow
MESHES = ("2,2,2", "1,1,8")  # on the last one heads do not divide
HOSTS = "1,4,2"  # rows and weights lie on both hosts
SECONDS = 1500  # that a process may take, on cores that other tests use as well
TOLERANCE = 1e-5  # of a tensor in norm, relative to one device


@contextlib.contextmanager
def running(folder, *runs, count=2, devices=1):
  shared = ("tests.training.several", folder, free_address(), count)
  for number in range(count):
    (folder / str(number)).unlink(missing_ok=True)
  with started(folder, *((*shared, number, *runs) for number in range(count)), devices=devices) as processes:
    yield processes


def end(folder, processes, code=0):
  """What each process says; all end with this exit code."""
  for process in processes:
    process.wait(timeout=SECONDS)
  assert {process.returncode for process in processes} == {code}, logs(folder)
  files = [folder / str(number) for number in range(len(processes))]
  return [file.read_text().splitlines() if file.exists() else [] for file in files]


def result(folder, mesh, number=0):
  """(state, what the steps said) of a process."""
  with np.load(folder / f"{number}-{mesh}.npz") as arrays:
    return dict(arrays), json.loads((folder / f"{number}-{mesh}.json").read_text())


def test_meshes_and_hosts_do_what_one_device_does(tmp_path):
  with running(tmp_path, "1,1,1", *MESHES, count=1, devices=8) as processes:
    end(tmp_path, processes)
  with running(tmp_path, HOSTS, devices=4) as processes:
    end(tmp_path, processes)
  expected, steps = result(tmp_path, "1,1,1")
  assert all(metrics["hint/attempts"] == 3 for metrics, _ in steps)
  assert any(sample["injected"] for _, samples in steps for sample in samples if sample["kind"] == "rollout")
  for mesh, number in ((MESHES[0], 0), (MESHES[1], 0), (HOSTS, 0), (HOSTS, 1)):
    actual, said = result(tmp_path, mesh, number)
    assert actual.keys() == expected.keys() and len(actual) > 60  # weights and both moments of each
    for name, array in expected.items():
      far = np.linalg.norm(np.float64(actual[name]) - array) / max(np.linalg.norm(np.float64(array)), 1e-12)
      assert far <= TOLERANCE, (mesh, number, name, far)
    for (metrics, samples), (wanted, texts) in zip(said, steps, strict=True):
      assert metrics == pytest.approx(wanted, rel=1e-4, abs=1e-5), (mesh, number)
      assert [sample.get("completion") for sample in samples] == [sample.get("completion") for sample in texts]
  assert result(tmp_path, HOSTS, 0)[1] == result(tmp_path, HOSTS, 1)[1]


def wait_until(there, processes):
  deadline = time.monotonic() + SECONDS
  while not there():
    assert [process.poll() for process in processes] == [None, None] and time.monotonic() < deadline
    time.sleep(0.01)


def test_what_ends_one_of_two_processes_ends_both_and_they_go_on_to_the_bit(tmp_path):
  metrics = tmp_path / "run" / "metrics.jsonl"
  # What goes wrong on one process; a run that nothing disturbs; and one of which a single process is told to stop.
  with running(tmp_path, *FAULTS, "whole", "run") as processes:
    wait_until(lambda: metrics.exists() and metrics.read_text(), processes)
    processes[1].terminate()
    said = end(tmp_path, processes, code=75)
  folder, questions, _, whole, _, stopped = zip(*said, strict=True)
  assert folder[0] == "OSError: another process of this run has failed; its log says why."
  assert folder[1].startswith("ValueError: weak is no folder")
  for each in questions:
    assert each.startswith("ValueError: process 1 has other questions of train than process 0: 15 against 16.")
  assert not (tmp_path / "other questions").exists()
  assert whole[0] == whole[1] and whole[0].startswith("state ")
  # Both stop after the same step, and save it.
  saved = complete(tmp_path / "run")
  assert stopped == (f"saved {saved}",) * 2 and 0 < saved < STEPS

  with running(tmp_path, "run") as processes:
    wait_until(lambda: complete(tmp_path / "run") > saved, processes)
    processes[1].kill()
    # The other one cannot go on alone; whether it has noticed by now or not, it is ended as a scheduler would.
    time.sleep(1)
  assert [(tmp_path / str(number)).read_text().split("\n")[0] for number in range(2)] == [f"start {saved}"] * 2
  left = complete(tmp_path / "run")
  assert left > saved

  with running(tmp_path, "run") as processes:
    said = end(tmp_path, processes)
  assert said == [[f"start {left}", each] for each in whole]
  for name in (*SAME, "model/model.safetensors"):
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
