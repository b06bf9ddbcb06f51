"""The command line: what it refuses in one line, and the same command on real images."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MODULE = [sys.executable, "-m", "experiments.kepo_medvqa"]


def run(*arguments):
  # One device, as on the machine of a newcomer.
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [*MODULE, *map(str, arguments)]
  return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_misspelt_field_is_named(tmp_path):
  result = run(f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rat=1")
  assert result.returncode
  assert result.stderr.strip().splitlines()[-1].startswith("error: ")
  assert "learning_rat" in result.stderr
  assert "Traceback" not in result.stderr
  assert not (tmp_path / "run").exists()


def test_a_missing_student_is_one_line(tmp_path):
  result = run(f"--workdir={tmp_path / 'run'}", f"--config.model.student={tmp_path / 'nothing'}")
  assert result.returncode == 1
  assert result.stderr.strip().splitlines()[-1].startswith("error: ")
  assert str(tmp_path / "nothing") in result.stderr
  assert "Traceback" not in result.stderr
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_steps_on_real_images(shared_directory, tmp_path):
  result = run(
    f"--workdir={tmp_path / 'run'}",
    f"--config.data.directory={shared_directory / 'omnimedvqa-mini'}",
    "--config.data.train_items=8",
    "--config.data.validation_items=2",
    "--config.data.test_items=3",
    "--config.batch.prompts=4",
    "--config.train.steps=2",
    "--config.eval.every=2",
    "--config.eval.prompts=8",
  )
  assert result.returncode == 0, result.stderr[-2000:]
  metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [record["step"] for record in metrics if "grad_norm" in record] == [1, 2]
  evaluations = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert len(evaluations["after"]["modalities"]) == 8
  assert (tmp_path / "run" / "model" / "model.safetensors").exists()
