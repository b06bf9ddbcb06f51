"""The study matrix: every cell is a config that runs, and differs from its file where the study says so."""

import collections
import hashlib
import importlib
import json

import pytest

from experiments.studies import plan, runs

PHANTOM = plan.phantom()


def cells(name, seeds=2):
  study = plan.STUDIES[name]
  found = list(plan.grid(study, PHANTOM, seeds))
  return found + list(plan.finals(study, PHANTOM, seeds, {cell.method.name: 2e-4 for cell in found}))


@pytest.mark.parametrize("name", plan.STUDIES)
def test_every_cell_is_a_config_that_runs(name):
  for cell in {cell.method.name: cell for cell in cells(name) if cell.pair == PHANTOM.pairs[0]}.values():
    for benchmark in (PHANTOM, plan.omnimedvqa("S", "T", "DIR")) if cell.method.trained else ():
      pair = benchmark.pairs[0]
      config = plan.config_of(plan.Cell(cell.method, pair, cell.learning_rate, cell.seed), benchmark)
      config.validate()
      assert config.seed == cell.seed and config.optimizer.learning_rate == cell.learning_rate
      assert config.model.student == benchmark.models[pair.student]


def test_every_method_gets_the_same_grid_on_seeds_that_do_not_count():
  main = plan.STUDIES["main"]
  grid = list(plan.grid(main, PHANTOM, 50))
  own = [method.name for method in main.methods if method.trained and not method.rate_of]
  counts = collections.Counter(cell.method.name for cell in grid)
  assert counts == dict.fromkeys(own, 4 * len(plan.GRID_SEEDS)) and len(own) == 11
  counted = {cell.seed for cell in plan.finals(main, PHANTOM, 50, dict.fromkeys(plan.MAIN_METHODS, 1e-4))}
  assert {cell.seed for cell in grid} == set(plan.GRID_SEEDS) and not counted & set(plan.GRID_SEEDS)


def test_the_last_step_is_validated_however_few_there_are():
  cell = plan.Cell(plan.MAIN_METHODS["grpo"], PHANTOM.pairs[0], 1e-4, 0)
  for steps, every in ((2, 2), (80, 10), (7, 7), (45, 9)):
    config = plan.config_of(cell, plan.phantom({"train.steps": steps}))
    assert (config.train.steps, config.eval.every) == (steps, every)


def test_defaults_are_those_of_the_revision():
  told = {}
  for name in ("grpo", "kepo"):  # what all configs depart from, and what measurements of hints are made with
    for setting in ("phantom", "medvqa"):
      config = importlib.import_module(f"experiments.configs.{name}").get_config(setting).to_dict()
      told[f"{name}:{setting}"] = {part: config[part] for part in config if part not in runs.IDLE_SECTIONS}
  found = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
  # Runs are told apart by what differs from the defaults, so that a changed default would leave old runs as they are.
  # Raise REVISION when this fails, and put the new hash here; where a field was only added, with a default that changes
  # nothing, or one that nobody set was removed, the new hash is enough.
  assert (plan.REVISION, found) == (1, "0f45859a999396bb")
