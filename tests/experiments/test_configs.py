"""Each method differs from GRPO in what makes it that method, and in nothing else, in every setting."""

import importlib
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import settings
from experiments.configs import grpo, grpo_medvqa, kepo, kepo_medvqa
from kepo_jax.training import checks
from tests.conftest import ROOT

CONFIGS = ROOT / "experiments" / "configs"
SHORT = ("grpo_medvqa", "kepo_medvqa")  # other names of a method in a setting
KEPO = {"objective.distill_weight": 1.0, "exploration.replacements": 2, "exploration.rounds": 5}
# method -> the fields in which it differs from grpo.
DIFFERENCES = {
  "grpo": {},
  "rloo": {"objective.advantage": "rloo"},
  "gkd": {
    "objective.policy_weight": 0.0,
    "objective.distill_weight": 1.0,
    "objective.gate_mode": "none",
    "supervised.source": "teacher",
  },
  "kepo_ke": {"objective.distill_weight": 1.0},
  "kepo": KEPO,
  "kepo_released": KEPO
  | {
    "sampling.temperature": 0.9,
    "sampling.top_p": 0.95,
    "objective.gate_signal": "sum",
    "exploration.trigger": "reward_all_zero",
    "exploration.hints": "once",
    "exploration.hint_temperature": 0.9,
    "exploration.acceptance": "all_or_none_accurate",
    "exploration.leak_filter": False,
  },
  "kepo_eq7": KEPO
  | {
    "reward.combination": "product",
    "objective.gate_signal": "product",
    "objective.divergence": "forward_kl",
    "objective.distill_normaliser": "group_mean",
    "objective.reference_weight": 1e-3,
    "exploration.trigger": "reward_all_zero",
  },
  "sft": {
    "data.prompt": "no_think",
    "batch.rollouts": 1,
    "batch.on_policy_fraction": 0.0,
    "reward.convention": "no_think",
    "objective.policy_weight": 0.0,
    "objective.aggregation": "token_mean",
    "objective.supervised_weight": 1.0,
    "supervised.source": "answer",
    "eval.prompt": "no_think",
  },
  "sft_teacher": {
    "batch.on_policy_fraction": 0.0,
    "objective.policy_weight": 0.0,
    "objective.aggregation": "token_mean",
    "objective.supervised_weight": 1.0,
    "supervised.source": "teacher",
  },
}
EVERY = pytest.mark.parametrize("method", DIFFERENCES)


def config_of(method, *setting):
  return importlib.import_module(f"experiments.configs.{method}").get_config(*setting)


def flat(config, prefix=""):
  """Dotted name -> value of all fields."""
  found = {}
  for name, value in config.items():
    inner = isinstance(value, ml_collections.ConfigDict)
    found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
  return found


def test_every_file_is_tested():
  assert {path.stem for path in CONFIGS.glob("*.py")} == {*DIFFERENCES, *SHORT, "__init__"}


@EVERY
def test_a_method_differs_from_grpo_in_its_own_fields(method):
  for setting in settings.LEARNING_RATES:
    config = config_of(method, setting)
    fields, parent = flat(config), flat(grpo.get_config(setting))
    assert fields.keys() == parent.keys()
    assert {name: value for name, value in fields.items() if value != parent[name]} == DIFFERENCES[method], setting
    # A value of another type would be another program, or fail: --config.train.steps=1.0.
    assert {name for name in parent if type(fields[name]) is not type(parent[name])} == set()
    assert config.optimizer.learning_rate in settings.LEARNING_RATES[setting]  # the grid that every method is given
    checks.check_config(config)


@EVERY
def test_the_phantom_is_the_setting_of_who_names_none(method):
  assert config_of(method) == config_of(method, "phantom")
  assert config_of(method) is not config_of(method)  # changing one changes no other
  with pytest.raises(ValueError, match=r"setting 'mars' is unknown; use one of \['medvqa', 'phantom'\]"):
    config_of(method, "mars")


def test_a_setting_says_nothing_about_methods():
  phantom, medvqa = (flat(grpo.get_config(setting)) for setting in ("phantom", "medvqa"))
  changed = {name for name, value in medvqa.items() if value != phantom[name]}
  assert {name for name in changed if name.split(".")[0] in ("objective", "reward", "batch", "supervised")} == set()
  assert {name for name in changed if name.startswith(("exploration.", "sampling."))} == {
    "exploration.hint_tokens",
    "sampling.max_new_tokens",
  }


def test_the_setting_of_the_paper():
  config = grpo.get_config("medvqa")
  # One epoch of 600 questions in steps of 8; 1,024 new tokens in training and evaluation.
  assert config.train.steps * config.batch.prompts == config.data.train_items == 600
  assert config.sampling.max_new_tokens == config.eval.max_new_tokens == 1024
  assert (config.batch.prompts, config.batch.rollouts, config.data.test_items) == (8, 8, 300)
  assert (config.model.student, config.data.resize) == ("Qwen/Qwen3-VL-2B-Instruct", "squash384")
  # An image of 384 x 384 is 24 x 24 patches of 16 pixels; the smallest bucket holds one.
  assert config.data.patch_buckets[0] == 24 * 24


def test_the_short_names():
  assert grpo_medvqa.get_config() == grpo.get_config("medvqa")
  assert kepo_medvqa.get_config() == kepo.get_config("medvqa")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("setting", settings.LEARNING_RATES)
def test_a_setting_follows_its_file_on_the_command_line(setting, monkeypatch):
  for method in DIFFERENCES:
    arguments = [f"--config={CONFIGS / method}.py:{setting}", "--config.train.steps=3"]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])  # where overrides are looked up
    config = config_of(method, setting)
    assert config.train.steps != 3
    config.train.steps = 3
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(["program", *arguments])
    assert values.config.to_dict() == config.to_dict(), method  # a parsed config is locked, and unequal for that
