"""One process of a run over several, for tests.

  python -m tests.training.several WORKDIR COORDINATOR COUNT NUMBER [FAULT]

FAULT is something that goes wrong on one of them, see `FAULTS`.
"""

import hashlib
import os
import pathlib
import sys

import jax
import numpy as np

from experiments.configs import kepo
from kepo_jax import sharding, training
from kepo_jax.data import splits
from kepo_jax.reporting import RunReporter
from kepo_jax.types import Hook
from tests.training.runs import ASSETS, shrunk


def config(devices):
  """Six steps over all devices, with a checkpoint after every second."""
  sizes = {"train__steps": 6, "eval__every": 3, "eval__prompts": 8, "checkpoint__every": 2, "mesh__data": devices}
  return shrunk(kepo.get_config(), **sizes)


class Start(Hook):
  """Says from which step the run goes on."""

  def start(self, plan):
    print(f"start {plan.start_step}", flush=True)


def no_folder(made, number):
  """The teacher's folder is there for the first process alone."""
  made.model.teacher = "weak"
  os.chdir(ASSETS.parent if number else ASSETS)
  return {}


def other_questions(made, number):
  """The last process has a question less."""
  records = splits.load(made.data)
  return {"records": records | {"train": records["train"][number:]}}


class Blocked(Hook):
  """Puts a folder where the first process is going to write a file."""

  def start(self, plan):
    if not jax.process_index():
      (pathlib.Path(plan.workdir) / "evaluation.json").mkdir()


def unwritable(made, number):
  """The first process cannot write down the evaluation before the first step."""
  made.eval.before = made.eval.test = True
  return {"hooks": [Blocked()]}


# Name -> (config, number of the process) -> further arguments of `train`.
FAULTS = {"no folder": no_folder, "other questions": other_questions, "unwritable": unwritable}


def main(workdir, coordinator, count, number, fault=""):
  """Joins, trains, and tells the hash of the state and what it evaluated to."""
  jax.distributed.initialize(coordinator, int(count), int(number))
  made = config(jax.device_count())
  settings = {"workdir": pathlib.Path(workdir), "hooks": [RunReporter(), Start()], "auto_resume": True}
  if fault:
    settings |= FAULTS[fault](made, int(number))
  with training.Interruption() as interruption:
    try:
      result = training.train(made, interruption=interruption, **settings)
    except training.Interrupted as error:
      print(f"saved {error.step}", flush=True)
      sys.exit(training.EXIT_CODE)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(result.state):
    digest.update(np.ascontiguousarray(sharding.to_host(leaf)).tobytes())
  print(f"state {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
