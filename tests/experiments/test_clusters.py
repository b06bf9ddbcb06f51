"""Several processes are joined where something announces them; a lone machine asks nobody and opens nothing."""

import contextlib
import os
import socket
import subprocess
import sys
import types

import pytest

from experiments import clusters, environment
from tests.conftest import ROOT

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1,other", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_RANK": "0"}
POD = {"worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2", "tpu-env": "TYPE: 'v5e'"}
ALONE = {"worker-network-endpoints": "unknown:unknown:10.0.0.1", "tpu-env": "TYPE: 'v5e'\nMEGASCALE_NUM_SLICES: ''"}


def nobody(name):
  raise AssertionError(f"asked for {name}")


@pytest.mark.parametrize(
  ("environ", "tpu", "metadata", "expected"),
  [
    ({}, False, None, ""),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None, ""),
    (MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, False, None, "Open MPI"),
    (SLURM | {"SLURM_NTASKS": "1"}, False, None, ""),
    (SLURM | {"SLURM_NTASKS": "2"}, False, None, "SLURM"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False, None, ""),  # a batch script, no step
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None, ""),  # a pod of its own
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None, ""),  # a TPU machine that is told to use its CPU
    ({"TPU_WORKER_HOSTNAMES": "a"}, True, None, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, None, "the TPU pod"),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, None, "the TPU pod"),
    ({"TPU_SKIP_MDS_QUERY": "1"}, True, None, ""),
    ({}, True, ALONE, ""),
    ({}, True, POD, "the TPU pod"),
    ({}, True, ALONE | {"tpu-env": "MEGASCALE_NUM_SLICES: '2'"}, "the TPU pod"),
    ({}, True, dict.fromkeys(POD, ""), ""),  # no metadata service
    ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, True, ALONE, ""),
  ],
)
def test_what_announces_several_processes(environ, tpu, metadata, expected):
  assert clusters.announced(environ, tpu=tpu, ask=metadata.__getitem__ if metadata else nobody) == expected


@pytest.mark.parametrize(("found", "expected"), [(None, ""), (object(), "Kubernetes")])
def test_an_indexed_job_needs_the_package(monkeypatch, found, expected):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
  environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
  assert clusters.announced(environ, tpu=False, ask=nobody) == expected


def test_processes_that_jax_cannot_find_are_refused():
  with pytest.raises(ValueError, match="--coordinator=HOST:PORT"):
    clusters.announced({"OMPI_COMM_WORLD_SIZE": "2"}, tpu=False, ask=nobody)


def test_a_machine_without_a_metadata_service_is_soon_told_so(monkeypatch):
  with socket.socket() as silent:  # accepts connections, and says nothing
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    monkeypatch.setattr(clusters, "_METADATA", f"http://127.0.0.1:{silent.getsockname()[1]}/")
    monkeypatch.setattr(clusters, "_SECONDS", 0.1)
    assert clusters.attribute("tpu-env") == ""
  assert clusters.attribute("tpu-env") == ""  # refused by now


PROGRAM = """
import sys
from absl import flags
from experiments import environment
environment.define_process_flags()
flags.FLAGS(sys.argv)
try:
  several = environment.join_processes()
except ValueError as error:
  sys.exit(f"error: {error}")
import jax
print(several, jax.distributed.is_initialized(), jax.process_index(), jax.process_count(), flush=True)
"""


def said(*environments):
  """(what is printed, what is said of errors) by one process in each environment."""
  base = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
  with contextlib.ExitStack() as stack:
    running = []
    for environ in environments:
      pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
      process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=base | environ, **pipes)
      stack.callback(process.wait)
      stack.callback(process.kill)
      running.append(process)
    return [tuple(text.strip() for text in process.communicate(timeout=300)) for process in running]


@pytest.mark.slow
def test_two_processes_that_open_mpi_started_find_each_other():  # with SLURM: tests/test_processes.py
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  shared = {"JAX_COORDINATOR_PORT": port, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
  shared |= MPI | {"OMPI_COMM_WORLD_SIZE": "2"}
  found = said(*(shared | {"OMPI_COMM_WORLD_RANK": i, "OMPI_COMM_WORLD_LOCAL_RANK": i} for i in "01"))
  assert [out.splitlines()[-1:] for out, _ in found] == [["True True 0 2"], ["True True 1 2"]], found


@pytest.mark.slow
def test_a_lone_process_opens_nothing_and_one_that_cannot_join_says_the_way_out():
  # A count of processes that does not hold this one's number.
  (alone, _), (_, error) = said({}, SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "5"})
  assert alone == "False False 0 1"
  assert error.splitlines()[-1].startswith("error: SLURM started several processes, which cannot be joined: ")
  assert "--distributed=off" in error


@pytest.fixture
def join(monkeypatch):
  """Flags -> whether this process is one of several, and with what it joined the others; none is started."""

  def joined(**given):
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *arguments, **settings: calls.append(arguments))
    monkeypatch.setattr(clusters, "announced", lambda: "SLURM")
    values = {"distributed": "auto", "coordinator": "", "processes": 1, "process_id": 0} | given
    monkeypatch.setattr(environment, "flags", types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values)))
    return environment.join_processes(), calls

  return joined


def test_flags_say_which_processes_are_joined(join):
  assert join() == (True, [()])
  assert join(distributed="off") == (False, [])
  assert join(coordinator="a:1", processes=2, process_id=1) == (True, [("a:1", 2, 1)])
  assert join(coordinator="a:1") == (False, [("a:1", 1, 0)])


@pytest.mark.parametrize(
  ("given", "match"),
  [
    ({"distributed": "off", "coordinator": "a:1"}, "--distributed=off and --coordinator contradict each other"),
    ({"processes": 2}, "--processes and --process_id need --coordinator=HOST:PORT"),
    ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "--process_id=2 is none of the 2 of --processes"),
  ],
)
def test_flags_that_do_not_fit_together_are_refused(join, given, match):
  with pytest.raises(ValueError, match=match):
    join(**given)
