import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags

from kepo_jax import training
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.training import checkpoints, compiling
from tests.training.runs import ASSETS, STEPS, Recorder, Signal, assert_the_same, equal, lines, small, train


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
  records, metrics = (lines(whole[0] / f"{name}.jsonl") for name in ("samples", "metrics"))
  samples, hints, candidates = (
    [record for record in records if record["kind"] == kind] for kind in ("rollout", "hint", "candidate")
  )
  assert len(samples) == STEPS * 4  # the rollouts of one prompt a step
  assert samples[0].keys() >= {"prompt", "completion", "rewards", "reward", "gate", "injected", "hint", "answer"}
  assert all(sample["gate"] == (sample["rewards"]["accuracy"] == 1) for sample in samples)
  assert all(bool(sample["hint"]) == sample["injected"] for sample in samples)
  # What was tried for the first prompt that asked for help, accepted or not.
  assert candidates and all(record["hint"] for record in candidates)
  assert all(record["accurate"] and record["well_formed"] for record in candidates if record["accepted"])
  assert {record["step"] for record in hints} == {record["step"] for record in metrics if record.get("hint/attempts")}


def test_the_learning_rate_is_that_of_the_update_it_is_logged_with(whole):
  workdir, result, recorder = whole
  told = [report.metrics["lr"] for report in recorder.reports]
  # A ramp over five updates, the first of which already moves.
  np.testing.assert_allclose(told, [3e-4 * step / 5 for step in range(1, STEPS + 1)], rtol=1e-6)
  # Adam's first update moves every weight with a gradient by the rate, whatever the gradient.
  first = checkpoints.restored_params(workdir / "checkpoints" / "1", compiling.shapes_of(result.state.params))
  before = checkpoint.load_pretrained(ASSETS / "confused", np.float32)[1]
  moved = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), first, before)
  assert max(jax.tree.leaves(moved)) == pytest.approx(told[0], rel=0.02)


def test_the_export_is_the_trained_student(whole, program, tmp_path):
  workdir, result, _ = whole
  config, params = checkpoint.load_pretrained(workdir / "model", np.float32)
  assert config == checkpoint.load_pretrained(ASSETS / "confused", np.float32)[0]
  assert equal(params, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), result.state.params))
  before, after = (
    json.loads((at / "tokenizer_config.json").read_text()) for at in (ASSETS / "confused", workdir / "model")
  )
  assert after == before | {"kepo_templates": "brief", "kepo_resize": small().data.resize}
  # What is exported of its last checkpoint is the same; the folder has the same name, which the model card says.
  module = program("experiments.export_checkpoint")
  for name, value in {"workdir": str(workdir), "step": "last", "output": str(tmp_path / "model")}.items():
    setattr(flags.FLAGS, name, value)
  module.main([])
  theirs = {path.name: path.read_bytes() for path in (workdir / "model").iterdir()}
  assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == theirs


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


def test_what_does_not_fit_is_refused(questions, tmp_path):
  first, *others = questions["train"]
  stranger = shutil.copytree(ASSETS / "weak", tmp_path / "stranger")
  tokenizer = json.loads((stranger / "tokenizer.json").read_text())
  tokenizer["added_tokens"][-1]["content"] = "<other>"
  (stranger / "tokenizer.json").write_text(json.dumps(tokenizer))
  wrong = [dataclasses.replace(first, answer=answer) for answer in ("b", "E", "left lung")]
  for parts, changes, message in (
    ({}, {"mesh__data": 9}, "mesh data=9"),
    ({}, {"model__attention": "fused"}, "model.attention=fused: there is no fused attention for platform cpu"),
    ({}, {"model__teacher": str(stranger)}, "do not match: tokenizer"),
    ({"train": [first]}, {}, "train split has 1 questions"),
    ({"test": questions["test"] * 2}, {}, "ids more than once"),
    *(({"train": [one, *others]}, {}, f"{one.id}: answer '{one.answer}' is not the letter") for one in wrong),
  ):
    with pytest.raises(ValueError, match=message):
      training.train(small(**changes), records=questions | parts)
