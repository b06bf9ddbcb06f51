"""What is refused or warned of once models and mesh are known."""

import re

import pytest
from absl import logging

from experiments.configs import grpo, kepo, sft, sft_teacher
from kepo_jax.config import Config
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import checks
from tests.training.runs import ASSETS, changed


def one(field, value):
  """KEPO with one field changed."""
  return changed(kepo, **{field.replace(".", "__"): value})


@pytest.fixture
def warned(monkeypatch):
  """Messages of warnings."""
  said = []
  monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
  return said


def test_what_is_warned_of(warned, tmp_path):
  k1, weight = {"objective__reference_estimator": "k1"}, {"objective__reference_weight": 0.1}
  parts = changed(grpo, batch__micro_batches=2)  # 8 prompts x 8 rollouts in parts of 4
  other = changed(grpo, data__templates="brief", model__student="other")
  for check, arguments, said in (
    (Config.validate, [changed(kepo, **k1)], []),  # without weight: idle
    (Config.validate, [changed(kepo, objective__reference_estimator="k3", **weight)], []),
    (Config.validate, [changed(kepo, **k1, **weight)], ["objective.reference_estimator=k1: .* use k2 or k3"]),
    *((checks.warn_of_prompts, [changed(parent)], []) for parent in (kepo, sft, sft_teacher)),
    (checks.warn_of_prompts, [changed(kepo, data__prompt="no_think")], ["data.prompt=no_think .*=med_r1 rewards"]),
    (checks.warn_of_prompts, [changed(kepo, reward__convention="no_think")], ["data.prompt=think .*=no_think rewards"]),
    (checks.warn_of_replication, [parts, {"data": 2, "fsdp": 4}], []),  # 4 prompts on 2, 8 rollouts on 4
    (checks.warn_of_replication, [parts, {"data": 8, "fsdp": 1}], ["a micro-batch: 4 prompts x 8 rollouts do not"]),
    (checks.warn_of_replication, [changed(grpo, eval__prompts=6), {"data": 4, "fsdp": 1}], ["eval.prompts=6 does not"]),
    (checks.warn_of_templates, [changed(grpo, data__templates="brief"), ASSETS / "confused"], []),
    (checks.warn_of_templates, [changed(grpo, data__templates="standard"), tmp_path], []),  # it declares nothing
    (
      checks.warn_of_templates,
      [changed(grpo, data__templates="standard"), ASSETS / "confused"],
      [".*=standard, .*brief"],
    ),
    (checks.warn_of_templates, [other, tmp_path], ["data.templates=brief, but other knows the wordings standard"]),
  ):
    warned.clear()
    check(*arguments)
    assert len(warned) == len(said) and all(map(re.match, said, warned)), (check.__name__, said, warned)


def test_a_rank_that_is_not_low_is_refused():
  student = Qwen3VLConfig.from_directory(ASSETS / "confused")
  smallest = student.text.num_key_value_heads * student.text.head_dim
  checks.check_rank(changed(kepo, model__lora_rank=smallest - 1), student)
  checks.check_rank(changed(kepo, model__lora_rank=smallest, model__lora_targets=("gate_proj",)), student)
  checks.check_rank(changed(kepo, model__lora_rank=0), student)
  message = f"model.lora_rank={smallest} is no lower than a side of .*confused; use {smallest - 1} or less, or 0"
  with pytest.raises(ValueError, match=message):
    checks.check_rank(changed(kepo, model__lora_rank=smallest), student)
