"""Each method differs from GRPO in what makes it that method, and in nothing else, in every setting."""

import importlib

import pytest

from experiments import settings
from experiments.configs import grpo, grpo_medvqa, kepo, kepo_medvqa
from kepo_jax.training import run_record
from tests.conftest import ROOT

CONFIGS = ROOT / "experiments" / "configs"
KEPO = {"objective.distill_weight": 1.0, "exploration.replacements": 2, "exploration.rounds": 5}
SUPERVISED = {"batch.on_policy_fraction": 0.0, "objective.policy_weight": 0.0}
SUPERVISED |= {"objective.aggregation": "token_mean", "objective.supervised_weight": 1.0}
# method -> the fields in which it differs from grpo.
DIFFERENCES = {
  "grpo": {},
  "rloo": {"objective.advantage": "rloo"},
  "gkd": {"objective.policy_weight": 0.0, "objective.distill_weight": 1.0}
  | {"objective.gate_mode": "none", "supervised.source": "teacher"},
  "kepo_ke": {"objective.distill_weight": 1.0},
  "kepo": KEPO,
  "kepo_released": KEPO
  | {"sampling.temperature": 0.9, "sampling.top_p": 0.95, "objective.gate_signal": "sum"}
  | {"exploration.trigger": "reward_all_zero", "exploration.hints": "once", "exploration.hint_temperature": 0.9}
  | {"exploration.acceptance": "all_or_none_accurate", "exploration.leak_filter": False},
  "kepo_eq7": KEPO
  | {"reward.combination": "product", "objective.gate_signal": "product", "objective.divergence": "forward_kl"}
  | {"objective.distill_normaliser": "group_mean", "objective.reference_weight": 1e-3}
  | {"exploration.trigger": "reward_all_zero"},
  "sft": SUPERVISED
  | {"data.prompt": "no_think", "reward.convention": "no_think", "eval.prompt": "no_think"}
  | {"batch.rollouts": 1, "supervised.source": "answer"},
  "sft_teacher": SUPERVISED | {"supervised.source": "teacher"},
}


def config_of(method, *setting):
  return importlib.import_module(f"experiments.configs.{method}").get_config(*setting)


@pytest.mark.parametrize("method", DIFFERENCES)
def test_a_method_differs_from_grpo_in_its_own_fields(method):
  for setting in settings.LEARNING_RATES:
    config = config_of(method, setting)
    fields, parent = run_record._flat(config.to_dict()), run_record._flat(grpo.get_config(setting).to_dict())
    assert fields.keys() == parent.keys()
    assert {name: value for name, value in fields.items() if value != parent[name]} == DIFFERENCES[method], setting
    # A value of another type would be another program, or fail: --config.train.steps=1.0.
    assert {name for name in parent if type(fields[name]) is not type(parent[name])} == set()
    assert config.optimizer.learning_rate in settings.LEARNING_RATES[setting]  # the grid that every method is given
    settings.typed(config).validate()


def test_names_of_methods_and_settings():
  assert {path.stem for path in CONFIGS.glob("*.py")} == {*DIFFERENCES, "grpo_medvqa", "kepo_medvqa", "__init__"}
  assert grpo_medvqa.get_config() == grpo.get_config("medvqa")
  assert kepo_medvqa.get_config() == kepo.get_config("medvqa")
  for method in DIFFERENCES:
    assert config_of(method) == config_of(method, "phantom")
    assert config_of(method) is not config_of(method)  # changing one changes no other
