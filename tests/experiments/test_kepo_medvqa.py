import json
import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from etils import epath

from experiments import environment
from experiments.configs import sft
from tests.conftest import ROOT
from tests.training.runs import changed, lines


@pytest.fixture
def refused(program, monkeypatch, tmp_path):
  """`refused(*arguments)`: the one line with which the command ends; it leaves nothing."""

  def forget_overrides():
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
      delattr(flags.FLAGS, name)

  def command(*arguments):
    forget_overrides()
    monkeypatch.setattr(sys, "argv", ["kepo_medvqa", f"--workdir={tmp_path / 'run'}", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
      module = program("experiments.kepo_medvqa")
      environment.reporting_errors(module.main)(environment.parse_flags(sys.argv))
    assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
    assert not (tmp_path / "run").exists()
    return str(ended.value)

  yield command
  forget_overrides()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_what_cannot_be_is_one_line(refused, tmp_path, caplog):
  nothing = tmp_path / "nothing"
  assert "learning_rat" in refused("--config.optimizer.learning_rat=1")
  assert str(nothing) in refused(f"--config.model.student={nothing}") and "steps=4 is no flag" in refused("steps=4")
  assert "there is no config 'nope'" in (said := refused("--config=nope")) and "kepo_eq7" in said
  assert "data.directory is not given" in refused("--config=kepo_medvqa")
  assert "--config.data.directory= is empty" in refused("--config.data.directory=")
  assert "'many' is no whole number" in refused("--config", "grpo", "--config.train.steps=many")
  good = "from experiments.configs import grpo\ndef get_config():\n  config = grpo.get_config()\n  {}\n  return config"
  for number, (text, said) in enumerate((
    ("def get_config(:", "own.py, line 1: "),
    ("from experiments.configs import grop", "own.py, line 1: ImportError"),
    ("def get_config():\n  return unknown", "own.py, line 2: NameError"),
    ("def get_config():\n  pass", "returns nothing; end it with `return config`"),
    (good.replace("{}", "config.train.step = 3"), "no field train.step; did you mean train.steps?"),
    (good.replace("{}", "config.batch.prompts = '4'"), "own.py, line 4: TypeError"),
  )):  # fmt: skip
    config = tmp_path / str(number) / "own.py"
    config.parent.mkdir()
    config.write_text(text)
    assert said in refused(f"--config={config}")
  mars = refused("--config=experiments/configs/kepo.py:mars")
  assert mars.startswith("error: setting 'mars' is unknown; use one of ['medvqa', 'phantom'].")
  student = "experiments/assets/phantom/confused"
  setting = ("--config=experiments/configs/kepo.py:medvqa", f"--config.model.student={student}")
  assert str(nothing) in refused(*setting, f"--config.data.directory={nothing}")
  # The wordings of medvqa are not those of the phantom's student: the setting has reached the run.
  assert f"data.templates=standard, but {student} knows the wordings brief" in caplog.text


def test_a_run_is_resumed_with_its_own_config(program, monkeypatch, tmp_path):
  stored = json.loads(changed(sft).to_json())
  stored["train"]["steps"], stored["data"]["prompt_buckets"], stored["seed"] = 7, [64, 128], 3
  (tmp_path / "config.json").write_text(json.dumps(stored))
  monkeypatch.setattr(sys, "argv", ["kepo_medvqa", "--config.train.steps=9"])
  module = program("experiments.kepo_medvqa")
  environment.parse_flags(sys.argv)
  config = module.resumed_config(epath.Path(tmp_path))
  assert json.loads(config.to_json()) == stored | {"train": stored["train"] | {"steps": 9}}
  assert config.data.prompt_buckets == (64, 128)
  delattr(flags.FLAGS, "config.train.steps")


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on_with_real_images(shared_directory, tmp_path):
  workdir = tmp_path / "run"
  metrics = workdir / "metrics.jsonl"
  changes = f"data.directory={shared_directory / 'omnimedvqa-mini'} data.train_items=8 data.validation_items=2"
  changes += " data.test_items=1 batch.prompts=4 batch.rollouts=4 train.steps=4 train.compile_ahead=False"
  changes += " eval.every=0 eval.before=False checkpoint.every=0"
  fields = [f"--config.{change}" for change in changes.split()]
  command = [sys.executable, "-m", "experiments.kepo_medvqa", f"--workdir={workdir}", "--auto_resume", *fields]
  # One device, as on the machine of a newcomer.
  environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
  settings = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, **settings) as process:
    deadline = time.monotonic() + 300
    while process.poll() is None and not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
  assert process.returncode == 75, said
  (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
  assert step < 4 and f"interrupted after step {step}; its state is in {workdir / 'checkpoints' / str(step)}." in said
  assert f"Go on with --workdir={workdir} --resume." in said and "Traceback" not in said
  again = subprocess.run(command, **settings, timeout=300, check=False)
  assert again.returncode == 0, again.stderr[-2000:]
  assert [record["step"] for record in lines(metrics) if "grad_norm" in record] == [1, 2, 3, 4]
  evaluations = json.loads((workdir / "evaluation.json").read_text())
  assert len(evaluations["after"]["modalities"]) == 8
  assert (workdir / "model" / "model.safetensors").exists()
