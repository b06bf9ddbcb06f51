"""A trace is written also when the run ends before it was to end."""

import types

import jax.numpy as jnp

from kepo_jax.training.monitoring import WARM_UP, Profiler
from kepo_jax.types import StepReport


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
  profiler = Profiler()
  config = types.SimpleNamespace(profile=types.SimpleNamespace(steps=5))
  profiler.start(types.SimpleNamespace(workdir=str(tmp_path), start_step=0, config=config))
  for step in range(1, WARM_UP + 2):
    jnp.ones(3).sum().block_until_ready()
    profiler.step(StepReport(step=step, metrics={}, timing={}, samples=()))
  assert not list((tmp_path / "profile").rglob("*.pb"))
  profiler.stop()
  assert list((tmp_path / "profile").rglob("*.pb"))
  profiler.stop()
