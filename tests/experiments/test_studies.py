"""The study matrix: every cell is a config that runs, and differs from its file where the study says so."""

import collections
import hashlib
import importlib
import json

import pytest

from experiments import studies, study_runs
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
  own = [method.name for method in studies.STUDIES["main"].methods if method.trained and not method.rate_of]
  assert counts == dict.fromkeys(own, 4 * len(studies.GRID_SEEDS)) and len(own) == 11


def test_seeds_that_choose_a_rate_do_not_count():
  main = studies.STUDIES["main"]
  chosen_by = {cell.seed for cell in studies.grid(main, PHANTOM, 50)}
  counted = {cell.seed for cell in studies.finals(main, PHANTOM, 50, dict.fromkeys(studies.MAIN_METHODS, 1e-4))}
  assert chosen_by == set(studies.GRID_SEEDS) and not chosen_by & counted


def test_a_variant_takes_the_rate_of_its_parent():
  gate = studies.STUDIES["gate"]
  grids = {cell.method.name for cell in studies.grid(gate, PHANTOM, 5)}
  parents = {"kepo-tau0", "kepo-tau1", "kepo_ke-tau0", "kepo_ke-tau1"}
  assert grids == parents | {"negative", "negative-unhinted"}  # each direction at its own best
  rates = {"kepo-tau1": 1e-4, "kepo_ke-tau0": 3e-4, "negative": 2e-4}
  found = {cell.method.name: cell.learning_rate for cell in studies.finals(gate, PHANTOM, 1, rates)}
  assert found == {"positive": 1e-4, "negative": 2e-4, "all-unhinted": 3e-4, "start": None}


def test_a_method_without_a_rate_is_left_out_and_models_come_last():
  found = [cell.method.name for cell in studies.finals(studies.STUDIES["main"], PHANTOM, 1, {"grpo": 1e-4})]
  # On the other three pairs as well.
  first = ["grpo", "grpo-long", "start", "start-no_think", "teacher"]
  assert found == first + ["grpo", "start", "teacher"] * 3


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


def test_both_thresholds_run_at_the_rates_of_each_other():
  found = {method.name: method for method in studies.STUDIES["tau"].methods}
  for name, rate_of in (("0", "kepo-tau0"), ("1", "kepo-tau1"), ("0-swapped", "kepo-tau1"), ("1-swapped", "kepo-tau0")):
    assert found[f"accuracy-{name}"].rate_of == rate_of
  for tau in (0, 1):
    assert found[f"accuracy-{tau}-swapped"].overrides == found[f"accuracy-{tau}"].overrides
  assert found["accuracy-0-swapped"].label == "accuracy, τ = 0, rate of τ = 1"


def test_a_study_of_some_methods():
  assert [m.name for m in studies.STUDIES["tau"].only(["mean-0.5", "start"]).methods] == ["start", "mean-0.5"]


def test_the_last_step_is_validated_however_few_there_are():
  for steps, every in ((2, 2), (80, 10), (7, 7), (45, 9)):
    config = studies.config_of(studies.Cell(studies.MAIN_METHODS["grpo"], PHANTOM.pairs[0], 1e-4, 0),
                               studies.phantom({"train.steps": steps}))  # fmt: skip
    assert (config.train.steps, config.eval.every) == (steps, every)
  longer = studies.config_of(studies.Cell(studies.MAIN_METHODS["grpo-long"], PHANTOM.pairs[0], 1e-4, 0), PHANTOM)
  assert longer.train.steps == 160


def test_what_a_study_varies_is_its_own():
  taken = studies.reserved(studies.STUDIES["budget"])
  assert {"seed", "optimizer.learning_rate", "exploration.rounds", "batch.on_policy_fraction"} <= taken
  assert "train.steps" not in taken


def test_defaults_are_those_of_the_revision():
  told = {}
  for name in ("grpo", "kepo"):  # what all configs depart from, and what measurements of hints are made with
    for setting in ("phantom", "medvqa"):
      config = importlib.import_module(f"experiments.configs.{name}").get_config(setting).to_dict()
      told[f"{name}:{setting}"] = {part: config[part] for part in config if part not in study_runs.IDLE_SECTIONS}
  found = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
  # Runs are told apart by what differs from the defaults, so that a changed default would leave old runs as they are.
  # Raise REVISION when this fails, and put the new hash here; where a field was only added, with a default that changes
  # nothing, the new hash is enough.
  assert (studies.REVISION, found) == (1, "2eecfa7283b894d3")


def test_an_added_field_of_a_config_changes_no_digest_and_a_revision_changes_all(monkeypatch, tmp_path):
  place = study_runs.Place(PHANTOM, tmp_path)
  cell = studies.Cell(studies.MAIN_METHODS["grpo"], PHANTOM.pairs[0], 1e-4, 0)
  before = place.digest(cell)
  monkeypatch.setattr(studies, "REVISION", studies.REVISION + 1)
  assert place.digest(cell) != before
