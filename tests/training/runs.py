"""Whole runs of any config on the phantom's models, in seconds, and a hook that keeps what they report."""

from kepo_jax.types import Hook
from tests.conftest import ROOT

ASSETS = ROOT / "experiments" / "assets" / "phantom"


def shrunk(config, **changes):
  """The config, changed in place, with few questions, prompts and rollouts; changes as `section__field=value`."""
  config.model.student, config.model.teacher = str(ASSETS / "confused"), str(ASSETS / "weak")
  # One device: XLA's collectives between virtual devices can block each other for good when two cores run whole jobs
  # of eight. What a mesh changes, and what not, is tested where it is made: sampling, scoring, update.
  config.mesh.data = 1
  config.batch.prompts, config.batch.rollouts = 4, min(config.batch.rollouts, 4)
  config.data.train_items, config.data.validation_items, config.data.test_items = 16, 1, 1
  config.exploration.rounds = min(config.exploration.rounds, 2)
  config.train.compile_ahead = False  # a run of a few steps meets less than it may
  for name, value in changes.items():
    section, field = name.split("__")
    config[section][field] = value
  return config


def changed(parent, **changes):
  """A config of `parent` with changes as `section__field=value`."""
  config = parent.get_config()
  for name, value in changes.items():
    section, field = name.split("__")
    with config.ignore_type():  # None is a wrong value as well
      config[section][field] = value
  return config


class Recorder(Hook):
  """Keeps every report; stops the run after a step, if told to."""

  def __init__(self, stop_after=None):
    self.reports, self.stop_after = [], stop_after

  def step(self, report):
    self.reports.append(report)
    if report.step == self.stop_after:
      raise KeyboardInterrupt
