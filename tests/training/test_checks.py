import dataclasses
import re
import shutil

import pytest
from absl import logging

from experiments.configs import grpo, kepo, sft, sft_teacher
from kepo_jax.config import Config
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import checks
from tests.training.cases import example
from tests.training.runs import ASSETS, changed

TRAIN = [example(f"q{n}") for n in range(4)]
QUESTIONS = {"train": TRAIN, "test": [example("t")]}
MODELS = {"student": ASSETS / "confused", "teacher": ASSETS / "weak"}


def facts(config=None, **changes):
  return checks.host_facts(config or changed(kepo), QUESTIONS | changes, MODELS)


def test_the_same_is_the_same_wherever_it_lies(tmp_path):
  teacher = shutil.copytree(ASSETS / "weak", tmp_path / "teacher")
  moved = [dataclasses.replace(each, images=(f"elsewhere/{each.id}.png",)) for each in TRAIN]
  copied = checks.host_facts(changed(kepo), QUESTIONS | {"train": moved}, MODELS | {"teacher": teacher})
  assert checks.host_differences([facts(), copied]) == "" == checks.host_differences([facts()])
  # Another model under the same name.
  (teacher / "tokenizer.json").open("a").write("\n")
  other = checks.host_facts(changed(kepo), QUESTIONS, MODELS | {"teacher": teacher})
  said = checks.host_differences([facts(), other])
  assert said == "process 1 has another teacher than process 0; give all of them folders with the same files."


def test_other_questions_on_one_process():
  fewer = facts(train=TRAIN[1:])
  said = checks.host_differences([facts(), fewer, facts()])
  assert said.startswith("process 1 has other questions of train than process 0: 3 against 4.")
  assert "processes 1, 2 have other questions of train" in checks.host_differences([fewer, facts(), facts()])
  said = checks.host_differences([facts(), facts(validation=TRAIN)])
  assert "process 1 has other questions of validation than process 0: 4 against 0" in said
  images = dataclasses.replace(TRAIN[3], images=("a.png", "b.png"))
  for train in (TRAIN[::-1], *([*TRAIN[:3], last] for last in (example("q9"), example("q3", answer="A"), images))):
    said = checks.host_differences([facts(), facts(train=train)])
    assert "other questions of train than process 0: 4 against 4" in said, train


def test_another_config_is_told_by_its_fields_and_before_what_follows_from_it():
  said = checks.host_differences([facts(), facts(changed(kepo, train__steps=7), train=TRAIN[1:])])
  fields = f"train.steps: {changed(kepo).train.steps} -> 7"
  assert said.startswith(f"process 1 has another config than process 0 ({fields}); start all of them with the same")


def test_every_process_refuses(monkeypatch):
  checks.check_hosts_agree(None, questions=QUESTIONS, models={"student": "nowhere"})  # a lone process reads nothing
  monkeypatch.setattr("jax.process_count", lambda: 2)
  monkeypatch.setattr(checks.multihost, "all_gather", lambda work: [facts(), work()])
  checks.check_hosts_agree(changed(kepo), questions=QUESTIONS, models=MODELS)
  with pytest.raises(ValueError, match="process 1 has other questions of test than process 0: 0 against 1"):
    checks.check_hosts_agree(changed(kepo), questions=QUESTIONS | {"test": []}, models=MODELS)


@pytest.fixture
def warned(monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
  return said


def test_what_is_warned_of(warned, tmp_path):
  parts = changed(grpo, batch__micro_batches=2)  # 8 prompts x 8 rollouts in parts of 4
  other = changed(grpo, data__templates="brief", model__student="other")
  k1 = {"objective__reference_estimator": "k1", "objective__reference_weight": 0.1}
  for check, arguments, said in (
    (Config.validate, [changed(kepo, **k1)], ["objective.reference_estimator=k1: .* use k2 or k3"]),
    *((checks.warn_of_prompts, [changed(parent)], []) for parent in (kepo, sft, sft_teacher)),
    (checks.warn_of_prompts, [changed(kepo, data__prompt="no_think")], ["data.prompt=no_think .*=med_r1 rewards"]),
    (checks.warn_of_replication, [parts, {"data": 2, "fsdp": 4}], []),  # 4 prompts on 2, 8 rollouts on 4
    (checks.warn_of_replication, [parts, {"data": 8, "fsdp": 1}], ["a micro-batch: 4 prompts x 8 rollouts do not"]),
    (checks.warn_of_replication, [changed(grpo, eval__prompts=6), {"data": 4, "fsdp": 1}], ["eval.prompts=6 does not"]),
    (checks.warn_of_templates, [changed(grpo, data__templates="brief"), ASSETS / "confused"], []),
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
