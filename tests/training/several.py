"""One process of runs over several: python -m tests.training.several FOLDER COORDINATOR COUNT NUMBER [RUN ...].

RUN is "whole" or "run", the names of runs that are alike, or something that goes wrong on one of the processes, see
`FAULTS`; one after the other. What becomes of each is a line of FOLDER/NUMBER.
"""

import contextlib
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

STEPS = 5


def config(devices):
  """A few steps over all devices, with a checkpoint after every second."""
  sizes = {"train__steps": STEPS, "eval__every": 3, "eval__prompts": 8, "checkpoint__every": 2}
  sizes |= {"exploration__rounds": 1, "mesh__data": devices}
  return shrunk(kepo.get_config(), **sizes)


class Start(Hook):
  """Says from which step the run goes on."""

  def start(self, plan):
    say(f"start {plan.start_step}")


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


def say(text):
  folder, _, _, number = sys.argv[1:5]
  with open(pathlib.Path(folder) / number, "a", encoding="utf-8") as file:
    file.write(text + "\n")


def run(name, number):
  """Trains, and tells the hash of the state, or the error that ended it."""
  made = config(jax.device_count())
  settings = {"workdir": pathlib.Path(sys.argv[1]) / name, "hooks": [RunReporter(), Start()], "auto_resume": True}
  if name in FAULTS:
    settings |= FAULTS[name](made, number)
  with training.Interruption() as interruption:
    try:
      result = training.train(made, interruption=interruption, **settings)
    except training.Interrupted as error:
      say(f"saved {error.step}")
      sys.exit(training.EXIT_CODE)
    except (ValueError, OSError) as error:
      if name not in FAULTS:
        raise
      say(f"{type(error).__name__}: {error}")
      return
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(result.state):
    digest.update(np.ascontiguousarray(sharding.to_host(leaf)).tobytes())
  say(f"state {digest.hexdigest()}")


def main(_, coordinator, count, number, *names):
  jax.distributed.initialize(coordinator, int(count), int(number))
  for name in names:
    with contextlib.chdir(os.getcwd()):  # a fault may leave it
      run(name, int(number))


if __name__ == "__main__":
  main(*sys.argv[1:])
