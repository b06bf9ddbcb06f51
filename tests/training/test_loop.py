"""The whole job on the phantom's models: its files, its repeatability, its resumption, and what it refuses."""

import dataclasses
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from experiments.configs import grpo, kepo
from kepo_jax import training
from kepo_jax.data import splits
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.reporting import RunReporter
from kepo_jax.training import programs, setup
from tests.training.runs import ASSETS, Recorder, shrunk


def small(parent, **changes):
  """A config of `parent` that runs in seconds; changes as `section__field=value`."""
  sizes = {"train__steps": 3, "eval__every": 2, "eval__prompts": 8, "checkpoint__every": 1}
  return shrunk(parent.get_config(), **sizes | changes)


@pytest.fixture(scope="module")
def questions():
  """Few questions, a quarter of them of the kind that the student believes wrong things about."""
  return splits.load(small(kepo).data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, questions):
  """(workdir, result, recorder) of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("run") / "kepo"
  recorder = Recorder()
  result = training.train(small(kepo), workdir=workdir, records=questions, hooks=[RunReporter(), recorder])
  return workdir, result, recorder


def lines(path: pathlib.Path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def equal(a, b):
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def test_the_workdir(finished):
  workdir, result, _ = finished
  assert int(result.state.step) == 3
  names = {path.name for path in workdir.iterdir()}
  expected = {"config.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "tensorboard", "checkpoints"}
  assert names >= expected | {"evaluation.json", "report", "model"}
  metrics = [record for record in lines(workdir / "metrics.jsonl") if "reward/mean" in record]
  assert [record["step"] for record in metrics] == [1, 2, 3]
  assert not any("seconds" in name for record in metrics for name in record)
  for name in ("cliff_rate", "gate/frac", "divergence/ungated", "entropy", "ratio/mean", "grad_norm", "lr"):
    assert all(name in record for record in metrics), name
  assert all(record["ratio/mean"] == pytest.approx(1, abs=1e-5) for record in metrics)
  assert all(record["sampler/logp_gap"] < 1e-4 for record in metrics)
  evaluations = json.loads((workdir / "evaluation.json").read_text())
  assert evaluations["before"]["overall"]["count"] == evaluations["after"]["overall"]["count"] == 8
  assert [each["step"] for each in evaluations["validation"]] == [2]
  assert {path.name for path in (workdir / "report").iterdir()} >= {"curves.png", "modalities.png"}


def test_samples_tell_what_happened(finished):
  workdir, _, _ = finished
  records = lines(workdir / "samples.jsonl")
  samples = [record for record in records if record["kind"] == "rollout"]
  assert len(samples) == 3 * 4  # the rollouts of one prompt a step
  assert samples[0].keys() >= {"prompt", "completion", "rewards", "reward", "gate", "injected", "hint", "answer"}
  assert all(sample["gate"] == (sample["rewards"]["accuracy"] == 1) for sample in samples)
  assert all(bool(sample["hint"]) == sample["injected"] for sample in samples)
  # What was tried for the first prompt that asked for help, accepted or not.
  hints, candidates = ([record for record in records if record["kind"] == kind] for kind in ("hint", "candidate"))
  assert hints and all("<hint>" in record["text"] for record in hints)
  assert candidates and all(record["hint"] for record in candidates)
  assert all(record["accurate"] and record["well_formed"] for record in candidates if record["accepted"])
  asked = [record for record in lines(workdir / "metrics.jsonl") if record.get("hint/attempts")]
  assert {record["step"] for record in hints} == {record["step"] for record in asked}


def test_the_export_is_the_trained_student(finished):
  workdir, result, _ = finished
  config, params = conversion.load_pretrained(workdir / "model", np.float32)
  assert config == conversion.load_pretrained(ASSETS / "confused", np.float32)[0]
  rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), result.state.params)
  assert equal(params, rounded)
  before, after = (
    json.loads((folder / "tokenizer_config.json").read_text()) for folder in (ASSETS / "confused", workdir / "model")
  )
  assert after == before | {"kepo_templates": "brief", "kepo_resize": small(kepo).data.resize}


def test_an_export_names_the_image_size_of_the_run(tmp_path):
  config = small(kepo, data__resize="squash384", data__templates="standard")
  model = conversion.load_pretrained(ASSETS / "confused", np.float32)
  run = types.SimpleNamespace(config=config, models={"student": programs.Model(*model)})
  setup.Run.export(run, types.SimpleNamespace(params=model[1]), tmp_path / "model")
  found = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
  assert (found["kepo_templates"], found["kepo_resize"]) == ("standard", "squash384")


def test_a_second_run_in_the_same_workdir_is_refused(finished, questions):
  with pytest.raises(ValueError, match="not empty"):
    training.train(small(kepo), workdir=finished[0], records=questions)


def test_an_interrupted_run_resumes_bit_for_bit(finished, questions, tmp_path):
  workdir, result, recorder = finished
  with pytest.raises(KeyboardInterrupt):
    stopped = [Recorder(stop_after=2)]
    training.train(small(kepo), workdir=tmp_path / "run", records=questions, hooks=[RunReporter(), *stopped])
  resumed = training.train(small(kepo), workdir=tmp_path / "run", records=questions, hooks=[RunReporter()], resume=True)
  assert equal(resumed.state, result.state)
  for name in ("metrics.jsonl", "samples.jsonl"):
    assert (tmp_path / "run" / name).read_text() == (workdir / name).read_text()
  assert resumed.evaluations == result.evaluations


def test_kepo_without_its_parts_is_grpo_bit_for_bit(questions, tmp_path):
  bare = small(kepo, objective__distill_weight=0.0, exploration__replacements=0, eval__test=False, eval__every=0)
  plain = small(grpo, eval__test=False, eval__every=0)
  plain.exploration.rounds = bare.exploration.rounds
  first, second = Recorder(), Recorder()
  left = training.train(bare, records=questions, hooks=[first])
  right = training.train(plain, records=questions, hooks=[second])
  assert equal(left.state, right.state)
  assert [report.metrics for report in first.reports] == [report.metrics for report in second.reports]


def test_a_reward_of_ones_own_changes_the_advantage_alone(questions, finished):
  def brief(completion, example):
    """More reward for fewer words."""
    del example
    return -0.01 * len(completion.split())

  config = small(kepo, train__steps=1, eval__test=False, eval__every=0)
  recorder = Recorder()
  training.train(config, records=questions, rewards={"brief": (brief, 0.5)}, hooks=[recorder])
  mine, theirs = recorder.reports[0].metrics, finished[2].reports[0].metrics
  assert mine["reward/brief"] < 0
  assert mine["reward/accuracy"] == theirs["reward/accuracy"]
  assert mine["reward/mean"] == pytest.approx(theirs["reward/mean"] + 0.5 * mine["reward/brief"], abs=1e-5)
  assert mine["gate/frac"] == theirs["gate/frac"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model__teacher": ""}, "model.teacher"),
    ({"model__student": "/nowhere"}, "/nowhere"),
    ({"batch__micro_batches": 3}, "batch.micro_batches=3"),
    ({"exploration__replacements": 4}, "exploration.replacements=4"),
    ({"sampling__temperature": 0.0}, "sampling.temperature"),
    ({"data__templates": "long"}, "data.templates='long'"),
    ({"objective__gate_mode": "upwards"}, "objective.gate_mode='upwards'"),
    ({"exploration__hint_prompt": "none"}, "exploration.hint_prompt='none'"),
    ({"model__compute_dtype": "bf16"}, "model.compute_dtype='bf16'"),
    ({"batch__micro_batches": 0}, "batch.micro_batches=0"),
    ({"sampling__top_p": 0.0}, "sampling.top_p=0.0"),
    ({"mesh__data": 9}, "mesh data=9"),
    ({"model__attention": "fused"}, "model.attention=fused: there is no fused attention for platform cpu"),
  ],
)
def test_what_does_not_fit_is_refused(questions, changes, message):
  with pytest.raises(ValueError, match=message):
    training.train(small(kepo, **changes), records=questions)


def test_an_empty_split_is_refused(questions):
  with pytest.raises(ValueError, match="train split has 2 questions"):
    training.train(small(kepo), records=questions | {"train": questions["train"][:2]})


@pytest.mark.parametrize("answer", ["b", "E", "left lung"])
def test_an_answer_that_is_no_letter_is_refused(questions, answer):
  wrong = [dataclasses.replace(questions["train"][0], answer=answer), *questions["train"][1:]]
  with pytest.raises(ValueError, match=f"{wrong[0].id}: answer '{answer}' is not the letter"):
    training.train(small(kepo), records=questions | {"train": wrong})


def test_an_id_that_names_two_questions_is_refused(questions):
  twice = [*questions["test"], questions["test"][0]]
  with pytest.raises(ValueError, match="test has 1 ids more than once"):
    training.train(small(kepo), records=questions | {"test": twice})


def test_models_of_two_vocabularies_are_refused(questions, tmp_path):
  stranger = tmp_path / "stranger"
  stranger.mkdir()
  for path in (ASSETS / "weak").iterdir():
    (stranger / path.name).write_bytes(path.read_bytes())
  tokenizer = json.loads((stranger / "tokenizer.json").read_text())
  tokenizer["added_tokens"][-1]["content"] = "<other>"
  (stranger / "tokenizer.json").write_text(json.dumps(tokenizer))
  with pytest.raises(ValueError, match="do not match: tokenizer"):
    training.train(small(kepo, model__teacher=str(stranger)), records=questions)
