"""One run from end to end: what its folder holds, that its export and its resume are what they say, what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags

from experiments.configs import kepo
from kepo_jax import training
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.training import checkpoints, compiling
from tests.training.runs import ASSETS, STEPS, Recorder, Signal, assert_the_same, equal, lines, small, train

pytestmark = pytest.mark.xdist_group("whole")  # one worker makes the run that they look at


def test_the_workdir(whole):
  workdir, result, _ = whole
  assert int(result.state.step) == STEPS
  names = {path.name for path in workdir.iterdir()}
  expected = {"config.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "tensorboard", "checkpoints"}
  assert names >= expected | {"evaluation.json", "report", "model"}
  metrics = [record for record in lines(workdir / "metrics.jsonl") if "reward/mean" in record]
  assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
  assert not any("seconds" in name for record in metrics for name in record)
  for name in ("cliff_rate", "gate/frac", "divergence/ungated", "entropy", "ratio/mean", "grad_norm"):
    assert all(name in record for record in metrics), name
  assert all(record["ratio/mean"] == pytest.approx(1, abs=1e-5) for record in metrics)
  assert all(record["sampler/logp_gap"] < 1e-4 for record in metrics)
  evaluations = json.loads((workdir / "evaluation.json").read_text())
  assert evaluations["before"]["overall"]["count"] == evaluations["after"]["overall"]["count"] == 8
  assert [each["step"] for each in evaluations["validation"]] == [2, 4]
  assert (evaluations["before"]["step"], evaluations["after"]["step"]) == (0, STEPS)
  assert {path.name for path in (workdir / "report").iterdir()} >= {"curves.png", "modalities.png"}


def test_samples_tell_what_happened(whole):
  workdir, _, _ = whole
  records = lines(workdir / "samples.jsonl")
  samples = [record for record in records if record["kind"] == "rollout"]
  assert len(samples) == STEPS * 4  # the rollouts of one prompt a step
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


def test_the_learning_rate_is_that_of_the_update_it_is_logged_with(whole):
  workdir, result, recorder = whole
  told = [report.metrics["lr"] for report in recorder.reports]
  # A ramp over five updates, the first of which already moves.
  np.testing.assert_allclose(told, [3e-4 * step / 5 for step in range(1, STEPS + 1)], rtol=1e-6)
  # Adam's first update moves every weight with a gradient by the rate, whatever the gradient.
  first = checkpoints.restored_params(workdir / "checkpoints" / "1", compiling.shapes_of(result.state.params))
  before = conversion.load_pretrained(ASSETS / "confused", np.float32)[1]
  moved = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), first, before)
  assert max(jax.tree.leaves(moved)) == pytest.approx(told[0], rel=0.02)


def test_the_export_is_the_trained_student(whole, program, tmp_path):
  workdir, result, _ = whole
  config, params = conversion.load_pretrained(workdir / "model", np.float32)
  assert config == conversion.load_pretrained(ASSETS / "confused", np.float32)[0]
  assert equal(params, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), result.state.params))
  before, after = (
    json.loads((folder / "tokenizer_config.json").read_text()) for folder in (ASSETS / "confused", workdir / "model")
  )
  assert after == before | {"kepo_templates": "brief", "kepo_resize": small().data.resize}
  # What is exported of its last checkpoint is the same; the folder has the same name, which the model card says.
  module = program("experiments.export_checkpoint")
  for name, value in {"workdir": str(workdir), "step": "last", "output": str(tmp_path / "model")}.items():
    setattr(flags.FLAGS, name, value)
  module.main([])
  mine, theirs = (
    {path.name: path.read_bytes() for path in root.iterdir()} for root in (tmp_path / "model", workdir / "model")
  )
  assert mine == theirs and "model.safetensors" in mine


def test_a_run_that_a_signal_ends_is_resumed_to_the_bit(whole, questions, tmp_path):
  signal = Signal(step=2)  # a validation follows this step: it is made on resume
  with pytest.raises(training.Interrupted) as caught:
    train(small(), tmp_path / "run", records=questions, hooks=[signal], interruption=signal)
  saved = tmp_path / "run" / "checkpoints" / "2"
  assert (caught.value.step, caught.value.saved) == (2, str(saved))
  assert (saved / "manifest.json").exists() and not (tmp_path / "run" / "lock.json").exists()
  recorder = Recorder()
  resumed = train(small(), tmp_path / "run", records=questions, resume=True, hooks=[recorder])
  assert [report.step for report in recorder.reports] == [3, 4]
  assert_the_same(tmp_path / "run", resumed, whole)
  assert resumed.evaluations == whole[1].evaluations


# ---- what is refused before anything is compiled ----


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"objective__gate_mode": "upwards"}, "objective.gate_mode='upwards'"),
    ({"model__teacher": ""}, "model.teacher"),
    ({"model__student": "/nowhere"}, "/nowhere"),
    ({"mesh__data": 9}, "mesh data=9"),
    ({"model__attention": "fused"}, "model.attention=fused: there is no fused attention for platform cpu"),
  ],
)
def test_what_does_not_fit_is_refused(questions, changes, message):
  with pytest.raises(ValueError, match=message):
    training.train(small(**changes), records=questions)


def test_questions_that_cannot_be_asked_are_refused(questions):
  train_part, test_part = questions["train"], questions["test"]
  wrong = [(answer, dataclasses.replace(train_part[0], answer=answer)) for answer in ("b", "E", "left lung")]
  refused = [
    ({"train": train_part[:2]}, "train split has 2 questions"),
    ({"test": [*test_part, test_part[0]]}, "test has 1 ids more than once"),
  ] + [({"train": [one, *train_part[1:]]}, f"{one.id}: answer '{answer}' is not the letter") for answer, one in wrong]
  for parts, message in refused:
    with pytest.raises(ValueError, match=message):
      training.train(small(), records=questions | parts)


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
