"""Processes that would not train on the same are refused, with what differs and on which of them."""

import dataclasses
import shutil

import pytest

from experiments.configs import kepo
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


def test_a_question_less_on_one_process():
  fewer = facts(train=TRAIN[1:])
  said = checks.host_differences([facts(), fewer, facts()])
  assert said.startswith("process 1 has other questions of train than process 0: 3 against 4.")
  assert "processes 1, 2 have other questions of train" in checks.host_differences([fewer, facts(), facts()])
  said = checks.host_differences([facts(), facts(validation=TRAIN)])
  assert "process 1 has other questions of validation than process 0: 4 against 0" in said


IMAGES = dataclasses.replace(TRAIN[3], images=("a.png", "b.png"))


@pytest.mark.parametrize(
  "train",
  [TRAIN[::-1], [*TRAIN[:3], example("q9")], [*TRAIN[:3], example("q3", answer="A")], [*TRAIN[:3], IMAGES]],
  ids=["order", "another", "answer", "images"],
)
def test_as_many_questions_which_are_not_the_same(train):
  assert "other questions of train than process 0: 4 against 4" in checks.host_differences(
    [facts(), facts(train=train)]
  )


def test_another_config_is_told_by_its_fields_and_before_what_follows_from_it():
  said = checks.host_differences([facts(), facts(changed(kepo, train__steps=7), train=TRAIN[1:])])
  fields = f"train.steps: {changed(kepo).train.steps} -> 7"
  assert said.startswith(f"process 1 has another config than process 0 ({fields}); start all of them with the same")


def test_every_process_refuses(monkeypatch):
  checks.check_hosts_agree(None, questions=QUESTIONS, models={"student": "nowhere"})  # a lone process reads nothing
  monkeypatch.setattr("jax.process_count", lambda: 2)
  monkeypatch.setattr(checks.processes, "gathered", lambda work: [facts(), work()])
  checks.check_hosts_agree(changed(kepo), questions=QUESTIONS, models=MODELS)
  with pytest.raises(ValueError, match="process 1 has other questions of test than process 0: 0 against 1"):
    checks.check_hosts_agree(changed(kepo), questions=QUESTIONS | {"test": []}, models=MODELS)
