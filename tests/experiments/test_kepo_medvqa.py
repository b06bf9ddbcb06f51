"""The command line: what it refuses in one line, and the same command on real images."""

import json
import os
import signal
import subprocess
import sys
import time

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


SMALL = [
  "--config.batch.prompts=4",
  "--config.batch.rollouts=2",
  "--config.exploration.replacements=1",
  "--config.data.train_items=16",
  "--config.data.validation_items=1",
  "--config.train.steps=4",
  "--config.eval.every=0",
  "--config.eval.test=False",
  "--config.checkpoint.every=0",
]


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
  workdir = tmp_path / "run"
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [*MODULE, *SMALL, f"--workdir={workdir}", "--auto_resume"]
  process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 300
  metrics = workdir / "metrics.jsonl"
  while process.poll() is None and not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=300)
  assert process.returncode == 75, said
  (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
  assert step < 4
  assert f"interrupted after step {step}; its state is in {workdir / 'checkpoints' / str(step)}." in said
  assert f"Go on with --workdir={workdir} --resume." in said and "Traceback" not in said
  assert run(*command[3:]).returncode == 0
  steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
  assert steps == [1, 2, 3, 4]
  assert (workdir / "model" / "model.safetensors").exists()


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
