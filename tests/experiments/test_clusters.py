import socket
import types

import pytest

from experiments import clusters, environment

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1,other", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_RANK": "0"}
POD = {"worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2", "tpu-env": "TYPE: 'v5e'"}
ALONE = {"worker-network-endpoints": "unknown:unknown:10.0.0.1", "tpu-env": "TYPE: 'v5e'\nMEGASCALE_NUM_SLICES: ''"}


def nobody(name):
  raise AssertionError(f"asked for {name}")


def test_what_announces_several_processes():
  hosts, slices = {"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_NUM_SLICES": "2"}
  for environ, tpu, metadata, expected in [
    ({}, False, None, ""),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None, ""),
    (MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, False, None, "Open MPI"),
    (SLURM | {"SLURM_NTASKS": "1"}, False, None, ""),
    (SLURM | {"SLURM_NTASKS": "2"}, False, None, "SLURM"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False, None, ""),  # a batch script, no step
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None, ""),  # a pod of its own
    (hosts, False, None, ""),  # a TPU machine that is told to use its CPU
    ({"TPU_WORKER_HOSTNAMES": "a"}, True, None, ""),
    (hosts, True, None, "the TPU pod"),
    ({"TPU_WORKER_HOSTNAMES": "a"} | slices, True, None, "the TPU pod"),
    ({"TPU_SKIP_MDS_QUERY": "1"}, True, None, ""),
    ({}, True, ALONE, ""),
    ({}, True, POD, "the TPU pod"),
    ({}, True, ALONE | {"tpu-env": "MEGASCALE_NUM_SLICES: '2'"}, "the TPU pod"),
    ({}, True, dict.fromkeys(POD, ""), ""),  # no metadata service
    ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, True, ALONE, ""),
  ]:
    ask = metadata.__getitem__ if metadata else nobody
    assert clusters.announced(environ, tpu=tpu, ask=ask) == expected, (environ, tpu, metadata)
  with pytest.raises(ValueError, match="--coordinator=HOST:PORT"):  # jax cannot find them
    clusters.announced({"OMPI_COMM_WORLD_SIZE": "2"}, tpu=False, ask=nobody)


def test_an_indexed_job_needs_the_package(monkeypatch):
  environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
  for found, expected in ((None, ""), (object(), "Kubernetes")):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
    assert clusters.announced(environ, tpu=False, ask=nobody) == expected


def test_a_machine_without_a_metadata_service_is_soon_told_so(monkeypatch):
  with socket.socket() as silent:  # accepts connections, and says nothing
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    monkeypatch.setattr(clusters, "_METADATA", f"http://127.0.0.1:{silent.getsockname()[1]}/")
    monkeypatch.setattr(clusters, "_SECONDS", 0.1)
    assert clusters.attribute("tpu-env") == ""
  assert clusters.attribute("tpu-env") == ""  # refused by now


@pytest.fixture
def join(monkeypatch):
  """Flags -> whether this process is one of several, and with what it joined the others; none is started."""

  def joined(announced="SLURM", refusal=None, **given):
    calls = []

    def initialize(*arguments, **settings):
      calls.append(arguments)
      if refusal:
        raise refusal

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    monkeypatch.setattr(clusters, "announced", lambda: announced)
    values = {"distributed": "auto", "coordinator": "", "processes": 1, "process_id": 0} | given
    monkeypatch.setattr(environment, "flags", types.SimpleNamespace(FLAGS=types.SimpleNamespace(**values)))
    return environment.join_processes(), calls

  return joined


def test_flags_say_which_processes_are_joined(join):
  assert join() == (True, [()])  # with real processes: tests/test_processes.py
  assert join(announced="") == (False, [])  # a lone process opens nothing
  assert join(distributed="off") == (False, [])
  assert join(coordinator="a:1", processes=2, process_id=1) == (True, [("a:1", 2, 1)])
  assert join(coordinator="a:1") == (False, [("a:1", 1, 0)])
  for given, match in [
    ({"distributed": "off", "coordinator": "a:1"}, "--distributed=off and --coordinator contradict each other"),
    ({"processes": 2}, "--processes and --process_id need --coordinator=HOST:PORT"),
    ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "--process_id=2 is none of the 2 of --processes"),
    ({"refusal": RuntimeError("none")}, "SLURM started several processes, which cannot be joined: none.*d=off"),
  ]:
    with pytest.raises(ValueError, match=match):
      join(**given)
