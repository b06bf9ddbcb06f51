"""One process of whole runs: python -m tests.training.several FOLDER COORDINATOR COUNT NUMBER [RUN ...].

RUN is a mesh, one of `FAULTS`, or a name. What becomes of each is a line of FOLDER/NUMBER.
"""

import contextlib
import json
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
from tests.training.kill import digest
from tests.training.runs import ASSETS, Recorder, changed, shrunk

STEPS = 5
MESH = ("data", "fsdp", "tensor")


def say(text):
  with open(pathlib.Path(sys.argv[1], sys.argv[4]), "a", encoding="utf-8") as file:
    file.write(text + "\n")


class Start(Hook):
  def start(self, plan):
    say(f"start {plan.start_step}")


def no_folder(made):
  """The teacher's folder is there for the first process alone."""
  os.chdir(ASSETS.parent if jax.process_index() else ASSETS)
  return {"config": made.replace({"model.teacher": "weak"})}


def other_questions(made):
  """The last process has a question less."""
  records = splits.load(made.data)
  return {"records": records | {"train": records["train"][jax.process_index() :]}}


# Name -> config -> other arguments of `train`.
FAULTS = {"no folder": no_folder, "other questions": other_questions}


def run(name):
  """A few steps over all devices; tells the hash of the state, or the error that ended it."""
  sizes = {"train__steps": STEPS, "eval__every": 3, "eval__prompts": 8, "checkpoint__every": 2}
  made = shrunk(changed(kepo), exploration__rounds=1, mesh__data=jax.device_count(), **sizes)
  settings = {"workdir": pathlib.Path(sys.argv[1], name), "hooks": [RunReporter(), Start()], "auto_resume": True}
  settings["config"] = made
  settings |= FAULTS[name](made) if name in FAULTS else {}
  with training.Interruption() as interruption:
    try:
      say(digest(training.train(interruption=interruption, **settings)))
    except training.Interrupted as error:
      say(f"saved {error.step}")
      sys.exit(training.EXIT_CODE)
    except (ValueError, OSError) as error:
      if name not in FAULTS:
        raise
      say(f"{type(error).__name__}: {error}")


def on_mesh(name):
  """Two steps on a mesh; the state goes to FOLDER/NUMBER-NAME.npz, what the steps say to .json.

  With this seed prompts fail in every step, one of the first half and two of the other.
  """
  made = shrunk(changed(kepo), train__steps=2, eval__every=0, eval__test=False, batch__prompts=8)
  fields = {"seed": 14, "exploration.rounds": 1, "optimizer.warmup_steps": 0, "log.gradients_every": 0}
  made = made.replace(fields | {"data.prompt_buckets": (72,), "data.patch_buckets": (64,)})
  made = made.replace({f"mesh.{axis}": int(size) for axis, size in zip(MESH, name.split(","), strict=True)})
  recorder = Recorder()
  state = training.train(made, hooks=[recorder]).state
  arrays = {jax.tree_util.keystr(path): sharding.to_host(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
  place = pathlib.Path(sys.argv[1], f"{sys.argv[4]}-{name}")
  np.savez(f"{place}.npz", **arrays)
  said = [[report.metrics, report.samples] for report in recorder.reports]
  pathlib.Path(f"{place}.json").write_text(json.dumps(said))


def main(_, coordinator, count, number, *names):
  # Two programs with collectives that run at a time can block each other where threads are fewer than devices.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.config.update("jax_default_matmul_precision", "highest")
  jax.distributed.initialize(coordinator, int(count), int(number))
  for name in names:
    with contextlib.chdir(os.getcwd()):  # a fault may leave it
      on_mesh(name) if "," in name else run(name)


if __name__ == "__main__":
  main(*sys.argv[1:])
