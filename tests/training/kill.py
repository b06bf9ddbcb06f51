"""Kills a run again and again and compares what it becomes with a run that nobody disturbed.

  python -m tests.training.kill --kills=30 --seed=1    # what `make kill-test KILLS=30` calls

Every kill is a SIGKILL in a phase whose turn it is, at a random moment of it. A run that gets through is compared,
and another one is started until all kills are done.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from kepo_jax import training
from kepo_jax.data import splits
from kepo_jax.reporting import RunReporter
from kepo_jax.training import checkpoints, files, loop, manifest
from kepo_jax.types import Hook
from tests.conftest import ROOT
from tests.training.runs import STEPS, small

PHASES = ("sampling", "exploration", "teacher", "update", "saving", "checksums", "validation", "after", "export")
FILES = ("metrics.jsonl", "samples.jsonl", "evaluation.json", "questions.json", "model/model.safetensors")


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
  clock = loop.PhaseClock.__call__
  loop.PhaseClock.__call__ = lambda self, phase: (say(phase), clock(self, phase))[1]
  checkpoints.Checkpoints.save = announced(checkpoints.Checkpoints.save, "saving")
  manifest.write = announced(manifest.write, "checksums")
  files.RunFiles.export = announced(files.RunFiles.export, "export")
  # One old checkpoint is deleted whenever a new one is complete.
  config = small(checkpoint__keep=1)
  hooks = [RunReporter(), Phases()]
  say(digest(training.train(config, workdir=workdir, records=splits.load(config.data), hooks=hooks, auto_resume=True)))


def digest(result):
  """The state of a finished run in one word."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(result.state):
    found.update(np.asarray(leaf).tobytes())
  return f"state {found.hexdigest()}"


def start(workdir, log):
  """The child as a process; its words come through its standard output."""
  command = [sys.executable, "-m", "tests.training.kill", f"--run={workdir}"]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def words_of(process):
  """What a child says, until it ends."""
  for line in process.stdout:
    yield line.strip()


def finish(workdir, log):
  """Runs to the end without a kill; the hash of the state."""
  with start(workdir, log) as process:
    said = list(words_of(process))
  if process.returncode:
    raise RuntimeError(f"the run in {workdir} failed: {pathlib.Path(log.name).read_text()[-2000:]}")
  return said[-1]


def complete(workdir):
  """Step of the newest checkpoint with a manifest, 0 without one."""
  folder = workdir / "checkpoints"
  return max((step for step in checkpoints.steps_in(folder) if manifest.is_complete(folder / str(step))), default=0)


def killed(workdir, log, phase, occurrence, delay):
  """Runs until an occurrence of a phase and kills it there; (last step told, None), or (.., state) if it ended."""
  seen, step, newest = 0, 0, complete(workdir)
  with start(workdir, log) as process:
    for word in words_of(process):
      if word.startswith("start ") and word != f"start {newest}":
        raise RuntimeError(f"{workdir} went on after {word} instead of {newest}: its checkpoint was not used")
      if word.startswith("step "):
        step = int(word.split()[1])
      if word.startswith("state "):
        return step, word
      seen += word == phase
      if seen == occurrence:
        time.sleep(delay)
        process.kill()
        process.wait()
        return step, None
  raise RuntimeError(f"the run in {workdir} failed: {pathlib.Path(log.name).read_text()[-2000:]}")


def differences(workdir, state, whole, whole_state):
  """What of a finished run is not as in the undisturbed one."""
  found = [] if state == whole_state else ["state"]
  found += [name for name in FILES if (workdir / name).read_bytes() != (whole / name).read_bytes()]
  steps = [json.loads(line)["step"] for line in (workdir / "timing.jsonl").read_text().splitlines()]
  return found + ([] if steps == list(range(1, STEPS + 1)) else [f"steps of timing.jsonl {steps}"])


def main(kills, seed, folder, phases=PHASES, whole=None):
  """Kills so many times in these phases, in turn; runs that got through, what differed, and an entry per kill.

  `whole` is the folder and `digest` of a run that nobody disturbed; None makes one.
  """
  choose, lines = random.Random(seed), []
  with (folder / "log.txt").open("w") as log:
    whole = whole or (folder / "whole", finish(folder / "whole", log))
    runs, done, different, state = 0, 0, [], None
    while done < kills or state is None:
      workdir = folder / f"run-{runs}"
      if done == kills:
        state = finish(workdir, log)
      else:
        phase = phases[done % len(phases)]
        delay = choose.uniform(0, 0.05 if phase in ("saving", "checksums", "export") else 0.2)
        occurrence = choose.randint(1, 2) if phase in PHASES[:6] else 1  # later ones come once in a run
        before = complete(workdir)
        step, state = killed(workdir, log, phase, occurrence, delay)
        if state is None:
          done += 1
          lines.append((done, runs, phase, before, step))
      if state is not None:
        different += [(runs, name) for name in differences(workdir, state, *whole)]
        runs += 1
        state = state if done == kills else None
  return runs, different, lines


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--run", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.run:
    run(pathlib.Path(arguments.run))
    sys.exit()
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as name:
    runs, different, lines = main(arguments.kills, arguments.seed, pathlib.Path(name))
  for number, run_number, phase, start_step, step in lines:
    print(
      f"kill {number:3}  run {run_number}  in {phase:<12} from the checkpoint of {start_step}, killed after step {step}"
    )
  print(f"{len(lines)} kills ({dict(collections.Counter(phase for _, _, phase, _, _ in lines))})")
  print(f"{runs} runs finished in {time.monotonic() - begun:.0f} s; not as the undisturbed one: {different or 0}")
  sys.exit(bool(different))
