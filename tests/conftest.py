"""Switches of the whole suite, and the fixtures that several rooms share."""

import collections
import importlib
import os
import pathlib
import sys
from importlib.metadata import version

# Before jax is imported. The timeout keeps 8 virtual devices on 2 cores from aborting in a collective; programs here
# run once on tiny shapes, so compile time is worth more than optimised code, and the emitters of fusions take most of
# it. Cut into parts, programs that do the same arithmetic are no longer the same to the bit without those emitters.
# XLA ends a process at a flag that it does not know, and jaxlib 0.11 does not know this one any more.
os.environ["XLA_FLAGS"] = " ".join(
  [
    "--xla_force_host_platform_device_count=8",
    os.environ.get("XLA_FLAGS", ""),  # the last of two counts holds: programs that tests start may ask for another
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_backend_optimization_level=0",
    *(
      ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
      if version("jaxlib").startswith("0.10.")
      else []
    ),
  ]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# In the environment, so that programs which a test starts or calls share the cache. A bounded cache is a locked
# cache: two test processes then never read half of a file.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 * 1024**3)
os.environ.setdefault(
  "HYPOTHESIS_STORAGE_DIRECTORY", str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "hypothesis")
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is wrong
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import numpy as np
import pytest
from absl import flags, logging

from kepo_jax import memory
from tests import fake_bucket

ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_numpy_rank_promotion", "raise")  # [P, T] * [T] becomes an error
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config):
  """Lets code that reads absl flags run without a command line, and counts compilations."""
  flags.FLAGS.mark_as_parsed()
  config.pluginmanager.register(Costs(config), "costs")


class Costs:
  """Counts compilations of each test file and the peak memory of each process, and says so at the end."""

  def __init__(self, config):
    self._config, self._file = config, "collection"
    self._compilations, self._gigabytes = collections.Counter(), []
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      self._compilations[self._file] += 1

  def pytest_runtest_logstart(self, nodeid, location):
    self._file = location[0]

  def pytest_sessionfinish(self):
    self._gigabytes.append(memory.peak_resident_bytes() / 1e9)
    if hasattr(self._config, "workeroutput"):
      self._config.workeroutput["costs"] = (dict(self._compilations), self._gigabytes[0])

  @pytest.hookimpl(optionalhook=True)
  def pytest_testnodedown(self, node, error):
    compilations, gigabytes = getattr(node, "workeroutput", {}).get("costs", ({}, 0.0))
    self._compilations.update(compilations)
    self._gigabytes.append(gigabytes)

  def pytest_terminal_summary(self, terminalreporter):
    most = ", ".join(f"{file} {count}" for file, count in self._compilations.most_common(5))
    terminalreporter.write_line(f"{self._compilations.total()} compilations: {most}")
    terminalreporter.write_line(f"peak memory of each process, GB: {', '.join(f'{x:.1f}' for x in self._gigabytes)}")


@pytest.fixture(scope="session")
def shared_directory() -> pathlib.Path:
  """Real images and question texts that are not part of the repository."""
  path = pathlib.Path(os.environ.get("KEPO_SHARED", ROOT.parent / "shared"))
  if not path.is_dir():
    pytest.skip("no shared data: set KEPO_SHARED to the folder that holds omnimedvqa-mini")
  return path


@pytest.fixture
def rng() -> np.random.Generator:
  """Random numbers that are the same in every run of a test."""
  return np.random.default_rng(20260202)


@pytest.fixture(scope="session")
def mesh_of():
  """`mesh_of(data, fsdp, tensor)`: a mesh over the first devices of the host."""
  from kepo_jax import sharding

  def make(data: int = 1, fsdp: int = 1, tensor: int = 1):
    return sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])

  return make


@pytest.fixture
def bucket(tmp_path):
  """gs://bucket, an empty folder of this test."""
  (tmp_path / "cloud" / "bucket").mkdir(parents=True)
  with fake_bucket.served(tmp_path / "cloud") as store:
    yield store


@pytest.fixture
def said(caplog, monkeypatch):
  """What was logged."""
  monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
  return caplog


@pytest.fixture
def program():
  """`program("experiments.x")`: an entry point as if it were alone in its process.

  Flags are global and entry points share names such as --output, so those of other entry points are removed and the
  module is imported anew.
  """

  def load(name: str):
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
      for flag in list(defined) if module.startswith("experiments.") else ():
        if flag.name in flags.FLAGS:
          delattr(flags.FLAGS, flag.name)
    sys.modules.pop(name, None)
    return importlib.import_module(name)

  return load
