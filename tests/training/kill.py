"""Kills a run again and again and compares what it becomes with a run that nobody disturbed.

  python -m tests.training.kill --kills=30 --seed=1    # what `make kill-test KILLS=30` calls

Every kill is a SIGKILL in a phase whose turn it is, at a random moment of it.
"""

import argparse
import hashlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from kepo_jax import sharding, training
from kepo_jax.data import splits
from kepo_jax.reporting import RunReporter
from kepo_jax.training import checkpoints, manifest, metrics
from kepo_jax.training import workdir as workdir_lib
from kepo_jax.types import Hook
from tests.conftest import ROOT
from tests.training.runs import SAME, STEPS, lines, small

PHASES = ("sampling", "exploration", "teacher", "update", "saving", "checksums", "validation", "after", "export")


def say(word):
  """Tells the parent where this process is; a pipe keeps what a killed writer has written."""
  os.write(sys.stdout.fileno(), f"{word}\n".encode())


class Phases(Hook):
  """Says from which step the run goes on, and which evaluation is under way."""

  def start(self, plan):
    say(f"start {plan.start_step}")

  def step(self, report):
    say(f"step {report.step}")

  def progress(self, what, done, total):
    if what.startswith("evaluation"):
      say(what.split()[1])


def announced(function, word):
  """`function`, told before it is called."""

  def called(*arguments, **settings):
    say(word)
    return function(*arguments, **settings)

  return called


def run(workdir):
  """The child: starts or continues the run, saying what it does, and at last the hash of its state."""
  clock = metrics.PhaseClock.__call__
  metrics.PhaseClock.__call__ = lambda self, phase: (say(phase), clock(self, phase))[1]
  checkpoints.Checkpoints.save = announced(checkpoints.Checkpoints.save, "saving")
  manifest.write = announced(manifest.write, "checksums")
  workdir_lib.RunFiles.export = announced(workdir_lib.RunFiles.export, "export")
  # One old checkpoint is deleted whenever a new one is complete.
  config = small(checkpoint__keep=1)
  hooks = [RunReporter(), Phases()]
  say(digest(training.train(config, workdir=workdir, records=splits.load(config.data), hooks=hooks, auto_resume=True)))


def digest(result):
  """The state of a finished run in one word."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(result.state):
    found.update(np.ascontiguousarray(sharding.to_host(leaf)).tobytes())
  return f"state {found.hexdigest()}"


def complete(workdir):
  """Step of the newest checkpoint with a manifest, 0 without one."""
  folder = workdir / "checkpoints"
  return max((step for step in checkpoints.steps_in(folder) if manifest.is_complete(folder / str(step))), default=0)


def killed(workdir, log, phase=None, occurrence=0, delay=0.0):
  """Runs until an occurrence of a phase and kills it there, or to its end: (last step told, hash of the state or None).

  The child is a process; its words come through its standard output.
  """
  command = [sys.executable, "-m", "tests.training.kill", f"--run={workdir}"]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  seen, step, newest = 0, 0, complete(workdir)
  with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True) as process:
    for word in map(str.strip, process.stdout):
      if word.startswith("start ") and word != f"start {newest}":
        raise RuntimeError(f"{workdir} went on after {word} instead of {newest}: its checkpoint was not used")
      if word.startswith("step "):
        step = int(word.split()[1])
      if word.startswith("state "):
        return step, word
      seen += word == phase
      if phase and seen == occurrence:
        time.sleep(delay)
        process.kill()
        return step, None
  raise RuntimeError(f"the run in {workdir} failed: {pathlib.Path(log.name).read_text()[-2000:]}")


def differences(workdir, state, whole, whole_state):
  """What of a finished run is not as in the undisturbed one."""
  files, found = (*SAME, "model/model.safetensors"), [] if state == whole_state else ["state"]
  found += [name for name in files if (workdir / name).read_bytes() != (whole / name).read_bytes()]
  steps = [line["step"] for line in lines(workdir / "timing.jsonl")]
  return found + ([] if steps == list(range(1, STEPS + 1)) else [f"steps of timing.jsonl {steps}"])


def main(kills, seed, folder, phases=PHASES, whole=None):
  """Kills so many times in these phases, in turn; runs that got through, what differed, and a line per kill.

  `whole` is the folder and `digest` of a run that nobody disturbed; None makes one.
  """
  choose, told = random.Random(seed), []
  with (folder / "log.txt").open("w") as log:
    whole = whole or (folder / "whole", killed(folder / "whole", log)[1])
    runs, different, state = 0, [], None
    while len(told) < kills or state is None:
      workdir, before, moment = folder / f"run-{runs}", complete(folder / f"run-{runs}"), ()
      if len(told) < kills:
        phase = phases[len(told) % len(phases)]
        delay = choose.uniform(0, 0.05 if phase in ("saving", "checksums", "export") else 0.2)
        # Later phases come once in a run.
        moment = phase, choose.randint(1, 2) if phase in PHASES[:6] else 1, delay
      step, state = killed(workdir, log, *moment)
      if state is None:
        told.append(f"run {runs} in {phase} from the checkpoint of {before}, killed after step {step}")
      else:
        different += [(runs, name) for name in differences(workdir, state, *whole)]
        runs += 1
  return runs, different, told


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--run", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.run:
    run(pathlib.Path(arguments.run))
    sys.exit()
  with tempfile.TemporaryDirectory() as name:
    runs, different, told = main(arguments.kills, arguments.seed, pathlib.Path(name))
  print(*told, sep="\n")
  print(f"{len(told)} kills, {runs} runs finished; not as the undisturbed one: {different or 0}")
  sys.exit(bool(different))
