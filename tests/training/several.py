"""One process of a run over several, for tests: python -m tests.training.several WORKDIR COORDINATOR COUNT NUMBER."""

import hashlib
import pathlib
import sys

import jax
import numpy as np

from experiments.configs import kepo
from kepo_jax import sharding, training
from kepo_jax.reporting import RunReporter
from kepo_jax.types import Hook
from tests.training.runs import shrunk


def config(devices):
  """Six steps over all devices, with a checkpoint after every second."""
  sizes = {"train__steps": 6, "eval__every": 3, "eval__prompts": 8, "checkpoint__every": 2, "mesh__data": devices}
  return shrunk(kepo.get_config(), **sizes)


class Start(Hook):
  """Says from which step the run goes on."""

  def start(self, plan):
    print(f"start {plan.start_step}", flush=True)


def main(workdir, coordinator, count, number):
  """Joins, trains, and tells the hash of the state and what it evaluated to."""
  jax.distributed.initialize(coordinator, int(count), int(number))
  settings = {"workdir": pathlib.Path(workdir), "hooks": [RunReporter(), Start()], "auto_resume": True}
  with training.Interruption() as interruption:
    try:
      result = training.train(config(jax.device_count()), interruption=interruption, **settings)
    except training.Interrupted as error:
      print(f"saved {error.step}", flush=True)
      sys.exit(training.EXIT_CODE)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(result.state):
    digest.update(np.ascontiguousarray(sharding.to_host(leaf)).tobytes())
  print(f"state {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
