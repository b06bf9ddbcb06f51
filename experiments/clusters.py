"""Whether this process is one of several, told by what started it: a TPU pod, SLURM, Open MPI or Kubernetes.

`jax.distributed.initialize()` finds the others by itself there, but raises an error on a laptop, and on a lone machine
it opens a port and waits for itself. So it is called only where several processes are announced.
"""

import importlib.util
import os
import urllib.request
from collections.abc import Callable, Mapping

import jax

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_SECONDS = 2.0  # to wait for an answer; the service is on the machine itself
# What jax's own detection wants to see of a job step of SLURM.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def attribute(name: str) -> str:
  """An attribute of this machine from the metadata service of Google Cloud; "" where there is none."""
  request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})  # noqa: S310 (a fixed http address)
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows another machine
  try:
    with direct.open(request, timeout=_SECONDS) as answer:
      return answer.read().decode()
  except OSError:
    return ""


def uses_tpu() -> bool:
  """Whether jax is going to use TPUs: it chooses them where it sees chips, unless JAX_PLATFORMS says otherwise."""
  return "tpu" in (getattr(jax.config, "jax_platforms", "") or "").split(",")


def announced(
  environ: Mapping[str, str] = os.environ, *, tpu: bool | None = None, ask: Callable[[str], str] = attribute
) -> str:
  """What announces that this process is one of several; "" where nothing does.

  Nothing is asked for over a network, but for the metadata service of a TPU machine in Google Cloud.

  Args:
    environ: variables of the process.
    tpu: whether jax is going to use TPUs; None looks.
    ask: the metadata service: attribute -> value.

  Raises:
    ValueError: there are several processes that jax cannot find by itself.
  """
  if _count(environ, "OMPI_COMM_WORLD_SIZE") > 1:
    if "OMPI_MCA_orte_hnp_uri" not in environ:  # no longer there since Open MPI 5
      raise ValueError(
        f"Open MPI started {environ['OMPI_COMM_WORLD_SIZE']} processes and does not say where the first one is; pass "
        "--coordinator=HOST:PORT --processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK, or "
        "--distributed=off to run each of them alone."
      )
    return "Open MPI"
  if all(name in environ for name in _SLURM) and _count(environ, "SLURM_NTASKS") > 1:
    return "SLURM"
  if uses_tpu() if tpu is None else tpu:
    return "the TPU pod" if _tpu_hosts(environ, ask) > 1 else ""
  indexed = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
  if indexed and importlib.util.find_spec("kubernetes"):
    return "Kubernetes"
  return ""


def _tpu_hosts(environ: Mapping[str, str], ask: Callable[[str], str]) -> int:
  """Hosts of all slices; more than one where there are several slices."""
  slices = _count(environ, "MEGASCALE_NUM_SLICES")
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")  # GKE
  if hosts is None and not environ.get("TPU_SKIP_MDS_QUERY"):
    hosts = ask("worker-network-endpoints")
    if slices < 2:
      named = dict(line.split(":", 1) for line in ask("tpu-env").splitlines() if ":" in line)
      slices = _count({name.strip(): value.strip(" '") for name, value in named.items()}, "MEGASCALE_NUM_SLICES")
  return max(1, slices) * len((hosts or "").split(","))


def _count(environ: Mapping[str, str], name: str) -> int:
  """A number among some variables; 0 where it is not there, or none."""
  value = environ.get(name, "")
  return int(value) if value.isdecimal() else 0
