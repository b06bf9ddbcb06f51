"""Whole runs of any config on the phantom's models, in seconds, and hooks that follow and stop them."""

import json
import shutil
import unittest.mock

import jax
import numpy as np

from experiments import settings
from experiments.configs import kepo
from kepo_jax import training
from kepo_jax.reporting import RunReporter
from kepo_jax.training import checkpoints, setup
from kepo_jax.types import Hook
from tests.conftest import ROOT

ASSETS = ROOT / "experiments" / "assets" / "phantom"
SAME = ("metrics.jsonl", "samples.jsonl", "evaluation.json", "questions.json")
STEPS = 4


def changed(parent, *setting, **changes):
  """The config of `parent` with changes as `section__field=value`."""
  return with_changes(settings.typed(parent.get_config(*setting)), changes)


def with_changes(config, changes):
  """A config with changes as {section__field: value}."""
  return config.replace({name.replace("__", "."): value for name, value in changes.items()})


def shrunk(config, **changes):
  """The config with few questions, prompts and rollouts; changes as `section__field=value`."""
  small = {
    "model.student": str(ASSETS / "confused"),
    "model.teacher": str(ASSETS / "weak"),
    # One device: XLA's collectives between virtual devices can block each other for good when two cores run whole jobs
    # of eight. What a mesh changes, and what not, is tested where it is made: sampling, scoring, update.
    "mesh.data": 1,
    "batch.prompts": 4,
    "batch.rollouts": min(config.batch.rollouts, 4),
    "data.train_items": 16,
    "data.validation_items": 1,
    "data.test_items": 1,
    "exploration.rounds": min(config.exploration.rounds, 2),
    "train.compile_ahead": False,  # a run of a few steps meets less than it may
  }
  return with_changes(config.replace(small), changes)


def small(parent=kepo, **changes):
  """Four steps with a validation after every second and a checkpoint after each, all of which are kept."""
  sizes = {"train__steps": STEPS, "eval__every": 2, "eval__prompts": 8, "checkpoint__every": 1, "checkpoint__keep": 9}
  return shrunk(changed(parent), **sizes | changes)


_MADE, _BUILD = {}, setup.build_programs


def _build_once(config, processor, models):
  """`setup.build_programs`, with the programs of the first run of the same config: they are compiled already."""
  state, programs = _BUILD(config, processor, models)
  # All runs here have the same models and tokenizer, wherever they lie.
  idle = {"optimizer": ("skip_limit",), "eval": ("every", "test", "before", "prompts"), "model": ("student", "teacher")}
  fields = config.to_dict()
  idle |= {name: tuple(fields[name]) for name in ("checkpoint", "log", "data")}
  for section, name in ((section, name) for section, names in idle.items() for name in names):
    del fields[section][name]
  return state, _MADE.setdefault(json.dumps(fields, sort_keys=True), programs)


def train(config, workdir="", *, hooks=(), **how):
  """`training.train` with a reporter; runs of one config share their compiled programs."""
  with unittest.mock.patch.object(setup, "build_programs", _build_once):
    return training.train(config, workdir=workdir, hooks=[RunReporter(), *hooks], **how)


def copied(run, folder, last=STEPS):
  """A copy of the folder of a run, as if it had been killed before its checkpoint after step `last` + 1."""
  shutil.copytree(run, folder)
  for step in checkpoints.steps_in(folder / "checkpoints"):
    if step > last:
      shutil.rmtree(folder / "checkpoints" / str(step))
  return folder


def flip_a_bit(folder):
  path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def equal(a, b):
  raw = lambda x: np.atleast_1d(np.asarray(x)).view(np.uint8)  # noqa: E731
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(raw(x), raw(y)), a, b)))


def assert_the_same(workdir, result, whole):
  """The folder and result of a run are those of another one, to the bit."""
  assert equal(result.state, whole[1].state)
  for name in SAME:
    assert (workdir / name).read_text() == (whole[0] / name).read_text(), name


class Recorder(Hook):
  def __init__(self):
    self.reports = []

  def step(self, report):
    self.reports.append(report)


class Signal(training.Interruption, Hook):
  """Asks the run to stop after a step, or when it tells of progress in what begins with some words."""

  def __init__(self, *, step=None, progress=None):
    super().__init__()
    self._step, self._progress = step, progress

  def step(self, report):
    self._requested |= report.step == self._step

  def progress(self, what, done, total):
    self._requested |= self._progress is not None and what.startswith(self._progress)
