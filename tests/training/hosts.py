"""Two steps of KEPO on some meshes, for tests; the results of each go to a file.

  python -m tests.training.hosts FOLDER 1,1,1 2,2,2                      # one process, one mesh after the other
  python -m tests.training.hosts FOLDER 1,4,2 --coordinator=HOST:PORT --processes=2 --process_id=0

Process N writes FOLDER/MESH-of-COUNT-N.npz and .json.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import time

import jax
import numpy as np

from experiments.configs import kepo
from kepo_jax import sharding
from kepo_jax.training import groups as grouping
from kepo_jax.training import loop, setup
from kepo_jax.training.interruption import Interruption
from kepo_jax.training.profiling import CompileCounter
from kepo_jax.training.starting import Ahead
from tests.training.runs import shrunk

STEPS, PROMPTS, ROLLOUTS = 2, 8, 4
# Rows that ask for a hint; of two hosts one holds the first four rows and the other one the last four. As many as fail
# in the steps, or more; and few, which are padded to another number.
ASKING = ((0, 1, 2), (5, 6, 7), (0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 5, 6, 7), (6,), (0, 1), (4, 7))


def config(axes):
  """KEPO on a mesh in float32: eight prompts a step, one pair of buckets, one round of hints.

  With this seed prompts fail in every step, one of the first half and two of the other.
  """
  made = shrunk(kepo.get_config(), train__steps=STEPS, eval__every=0, eval__test=False, log__gradients_every=0)
  made.seed, made.exploration.rounds = 14, 1
  made.mesh.data, made.mesh.fsdp, made.mesh.tensor = axes
  made.data.prompt_buckets, made.data.patch_buckets = (72,), (64,)
  made.batch.prompts, made.batch.rollouts = PROMPTS, ROLLOUTS
  made.optimizer.warmup_steps = 0
  return made


class Watched:
  """A run whose programs and questions are watched."""

  def __init__(self, settings):
    self.arrays, self.said = {}, collections.defaultdict(list)
    self.scored = []  # id of the question and completion of each reward that this process was asked for
    with Interruption() as interruption:
      rewards = {"counted": (self.count, 0.0)}
      made = setup.prepare(settings, records=None, rewards=rewards, hooks=[], interruption=interruption)
    names = ("rollout", "candidate", "hint")
    watched = {name: self.sampled(name, getattr(made.programs, name)) for name in names}
    self.run = dataclasses.replace(made, programs=dataclasses.replace(made.programs, **watched))
    self.watch_update(made.programs.update)
    self.watch_images(self.run.processor)

  def count(self, completion, example):
    self.scored.append([example.id, completion])
    return 0.0

  def keep(self, name, array):
    number = sum(key.startswith(f"{name}/") for key in self.arrays)
    self.arrays[f"{name}/{number}"] = np.array(sharding.to_host(array))

  def sampled(self, name, program):
    def run(*arguments):
      rollouts = program(*arguments)
      self.keep(f"tokens of {name}", rollouts.tokens)
      return rollouts

    return run

  def watch_update(self, update):
    """Keeps the loss of every step, and the gradient of the first, whose state is that of the files."""
    gradients = update._gradients

    def run(params, experience, *others):
      sums, gradient = gradients(params, experience, *others)
      for name in ("tokens", "injected", "gate"):
        self.keep(f"{name} of the update", experience[name])
      self.keep("advantages", experience.advantages)
      self.keep("loss", sums["loss"][0])
      if "loss/1" not in self.arrays:
        self.keep_tree("gradient", gradient)
      return sums, gradient

    update._gradients = run

  def keep_tree(self, name, tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
      self.arrays[f"{name}{jax.tree_util.keystr(path)}"] = np.array(sharding.to_host(leaf))

  def watch_images(self, processor):
    """Notes batches in which other images were decoded than those of the rows that this process holds."""
    make = processor.prompts

    def prompts(examples, kind, **settings):
      made = make(examples, kind, **settings)
      held = sorted(sharding.held_rows(self.run.mesh, len(examples)))
      decoded = np.flatnonzero(made.vision.patches.any(axis=(1, 2))).tolist()
      self.said["images"].append(held)
      if held != decoded:
        self.said["other images"].append([held, decoded])
      return made

    processor.prompts = prompts


def steps(watched):
  """The state after all steps; keeps what each of them did."""
  run, explore = watched.run, loop.explore

  def noted(run, actor, groups, done):
    watched.said["failed"].append(loop.asking(run, groups))
    outcome, written = explore(run, actor, groups, done)
    watched.said["accepted"].append([len(found) for _, found in sorted(outcome.accepted.items())])
    watched.said["hints"].append([texts for _, texts in sorted(outcome.hints.items())])
    return outcome, written

  state, ahead = run.state, Ahead(run)
  for done in range(STEPS):
    loop.explore = noted
    try:
      state, report = loop.train_step(run, state, done, ahead)
    finally:
      loop.explore = explore
    watched.said["metrics"].append(report.metrics)
    watched.said["scored"].append(list(watched.scored))
    watched.scored.clear()
  watched.keep_tree("parameters", state.params)
  return state


def explored(watched, state, asking):
  """Programs compiled by exploration, for each list of rows that ask, after a first one."""
  run = watched.run
  actor = run.programs.decode_weights(state.params)
  examples, prompts = run.batch(0)
  rollouts = run.programs.rollout(actor, sharding.place(run.mesh, prompts), run.key("rollout", 0))
  groups = grouping.scored_groups(run.processor, examples, rollouts, run.scorer)
  with contextlib.closing(CompileCounter()) as counter:
    for number, rows in enumerate((asking[-1], *asking)):
      before = counter.figures()["compiled/programs"]
      groups.scores["accuracy"][:] = 1
      groups.scores["accuracy"][list(rows)] = 0
      loop.explore(run, actor, groups, number)
      watched.said["compiled"].append(counter.figures()["compiled/programs"] - before)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("meshes", nargs="+", help="data,fsdp,tensor")
  parser.add_argument("--coordinator", default="")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--process_id", type=int, default=0)
  given = parser.parse_args()
  # Two programs with collectives that run at a time can block each other where threads are fewer than devices.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.config.update("jax_default_matmul_precision", "highest")
  if given.coordinator:
    jax.distributed.initialize(given.coordinator, given.processes, given.process_id)
  for mesh in given.meshes:
    with contextlib.closing(CompileCounter()) as counter:
      watched = Watched(config([int(size) for size in mesh.split(",")]))
      with jax.set_mesh(watched.run.mesh):
        state = steps(watched)
      watched.said["compiled by steps"] = counter.figures()["compiled/programs"]
    if given.coordinator:
      with jax.set_mesh(watched.run.mesh):
        explored(watched, state, ASKING)
    name = f"{mesh.replace(',', '-')}-of-{given.processes}-{given.process_id}"
    np.savez(given.folder / f"{name}.npz", **watched.arrays)
    (given.folder / f"{name}.json").write_text(json.dumps(watched.said))
    print(f"done {name} after {time.process_time():.0f} s of the processor", flush=True)


if __name__ == "__main__":
  main()
