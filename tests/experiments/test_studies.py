"""The study matrix: every cell is a config that runs, and differs from its file where the study says so."""

import collections

import pytest

from experiments import studies
from kepo_jax.training import checks

PHANTOM = studies.phantom()


def cells(name, seeds=2):
  study = studies.STUDIES[name]
  found = list(studies.grid(study, PHANTOM, seeds))
  return found + list(studies.finals(study, PHANTOM, seeds, {cell.method.name: 2e-4 for cell in found}))


@pytest.mark.parametrize("name", studies.STUDIES)
@pytest.mark.parametrize("benchmark", [PHANTOM, studies.omnimedvqa("S", "T", "DIR")], ids=lambda b: b.name)
def test_every_cell_is_a_config_that_runs(name, benchmark):
  for cell in cells(name):
    if cell.method.trained and cell.pair == PHANTOM.pairs[0]:
      pair = benchmark.pairs[0]
      config = studies.config_of(studies.Cell(cell.method, pair, cell.learning_rate, cell.seed), benchmark)
      checks.check_config(config)
      assert config.seed == cell.seed and config.optimizer.learning_rate == cell.learning_rate
      assert config.model.student == benchmark.models[pair.student]


def test_every_method_gets_the_same_grid():
  counts = collections.Counter(cell.method.name for cell in studies.grid(studies.STUDIES["main"], PHANTOM, 5))
  trained = [method.name for method in studies.STUDIES["main"].methods if method.trained]
  assert counts == dict.fromkeys(trained, 3 * studies.GRID_SEEDS) and len(trained) == 11


def test_a_variant_takes_the_rate_of_its_parent():
  gate = studies.STUDIES["gate"]
  assert {cell.method.name for cell in studies.grid(gate, PHANTOM, 5)} == {"kepo-tau1", "kepo_ke-tau1"}
  rates = {"kepo-tau1": 1e-4, "kepo_ke-tau1": 3e-4}
  found = {cell.method.name: cell.learning_rate for cell in studies.finals(gate, PHANTOM, 1, rates)}
  assert found["negative"] == 1e-4 and found["negative-unhinted"] == 3e-4 and found["start"] is None


def test_a_method_without_a_rate_is_left_out_and_models_come_last():
  found = [cell.method.name for cell in studies.finals(studies.STUDIES["main"], PHANTOM, 1, {"grpo": 1e-4})]
  # On the other three pairs as well.
  assert found == ["grpo", "start", "teacher"] * 4


def test_other_pairs_have_the_methods_that_the_study_names():
  found = collections.defaultdict(set)
  for cell in cells("main"):
    found[cell.pair].add(cell.method.name)
  assert [str(pair) for pair in found] == ["confused, weak", "confused, strong", "noisy, weak", "noisy, strong"]
  assert found[PHANTOM.pairs[3]] == {"start", "teacher", "grpo", "gkd-1", "kepo-tau1"}


def test_the_gates_direction_and_threshold_are_what_varies():
  parent = studies.config_of(studies.Cell(studies.MAIN_METHODS["kepo-tau1"], PHANTOM.pairs[0], 1e-4, 0), PHANTOM)
  gate = studies.STUDIES["gate"].methods
  for method, mode, threshold in zip(gate[1:4], ("positive", "negative", "positive"), (1, 1, 0), strict=True):
    config = studies.config_of(studies.Cell(method, PHANTOM.pairs[0], 1e-4, 0), PHANTOM)
    assert (config.objective.gate_mode, config.objective.gate_threshold) == (mode, threshold)
    config.objective = parent.objective
    assert config == parent


def test_a_study_of_some_methods():
  assert [m.name for m in studies.STUDIES["tau"].only(["mean-0.5", "start"]).methods] == ["start", "mean-0.5"]
