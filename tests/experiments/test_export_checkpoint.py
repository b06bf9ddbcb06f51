"""Checkpoints become model folders: the same bytes as the run's own export, the best by name, errors in one line."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags

from experiments.configs import grpo
from kepo_jax import training
from kepo_jax.data import splits
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.training import manifest
from tests.training.runs import shrunk

STEPS = 3


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of three steps that keeps all of its checkpoints."""
  sizes = {"train__steps": STEPS, "eval__every": 1, "eval__prompts": 8, "eval__test": False}
  # Not what the folder of the student says: the export must say what this run was trained with.
  data = {"data__templates": "standard", "data__resize": "squash384"}
  config = shrunk(grpo.get_config(), **sizes, **data, checkpoint__every=1, checkpoint__keep=STEPS)
  folder = tmp_path_factory.mktemp("export") / "run"
  training.train(config, workdir=folder, records=splits.load(config.data))
  return folder


@pytest.fixture
def copied(workdir, tmp_path):
  """The same run, to be damaged."""
  return shutil.copytree(workdir, tmp_path / "run")


@pytest.fixture
def exported(program, capsys):
  """`exported(workdir, step, output)`: what the command says."""

  def run(workdir, step, output):
    module = program("experiments.export_checkpoint")
    for name, value in {"workdir": str(workdir), "step": step, "output": str(output)}.items():
      setattr(flags.FLAGS, name, value)
    module.main([])
    return capsys.readouterr().out

  return run


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def evaluated(workdir, **steps):
  """Overwrites the validations: `step_1=(in_domain, out_of_domain)` accuracies."""
  entries = [
    {"step": int(name[5:]), "in_domain": {"accuracy": inside}, "out_of_domain": {"mean": outside}}
    for name, (inside, outside) in steps.items()
  ]
  (workdir / "evaluation.json").write_text(json.dumps({"validation": entries}))


def test_the_last_step_is_the_run_s_own_model(workdir, exported, tmp_path):
  # A folder of the same name: the model card says it.
  said = exported(workdir, "last", tmp_path / "model")
  assert said == f"wrote the student of step {STEPS} to {tmp_path / 'model'}\n"
  mine, theirs = contents(tmp_path / "model"), contents(workdir / "model")
  assert mine.keys() == theirs.keys() and "model.safetensors" in mine
  assert [name for name in mine if mine[name] != theirs[name]] == []


def test_an_earlier_step_is_another_model(workdir, exported, tmp_path):
  exported(workdir, "1", tmp_path / "first")
  exported(workdir, str(STEPS), tmp_path / "third")
  first, third = (conversion.load_pretrained(tmp_path / name, np.float32)[1] for name in ("first", "third"))
  assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, third)))


@pytest.mark.parametrize(("figure", "best"), [("out_of_domain", 1), ("in_domain", 2)])
def test_the_best_is_the_validation_s_by_the_figure_of_the_run(copied, exported, tmp_path, figure, best):
  evaluated(copied, step_1=(0.5, 0.7), step_2=(0.8, 0.6), step_3=(0.8, 0.7))  # the first of equals
  config = json.loads((copied / "config.json").read_text())
  config["checkpoint"]["best"] = figure
  (copied / "config.json").write_text(json.dumps(config))
  assert f"the student of step {best} " in exported(copied, "best", tmp_path / "best")
  assert (tmp_path / "best" / "config.json").exists()


def test_the_optimizer_is_not_read(copied, exported, tmp_path, monkeypatch):
  asked = []
  original = ocp.PyTreeCheckpointHandler.restore

  def restore(self, directory, *args, **kwargs):
    asked.append(sorted(kwargs["args"].item))
    return original(self, directory, *args, **kwargs)

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
  exported(copied, "last", tmp_path / "model")
  assert asked == [["params"]]


def largest(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(workdir):
  path = largest(workdir / "checkpoints" / str(STEPS))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def remove_all(workdir):
  shutil.rmtree(workdir / "checkpoints")


@pytest.mark.parametrize(
  ("change", "step", "message"),
  [
    (lambda run: (run / "config.json").unlink(), "last", r"run holds no run \(no config.json\)"),
    (lambda run: None, "7", r"--step=7: there is no such checkpoint; there are 1, 2, 3\.$"),
    (lambda run: None, "newest", r"--step=newest: give last, best or a number; there are 1, 2, 3\.$"),
    (remove_all, "last", "holds no complete checkpoint"),
    (flip, "last", r"checkpoints/3 is damaged: state/\S+ has other bytes than were written"),
    (lambda run: (run / "checkpoints" / "3" / "record" / "metadata").unlink(), "3", "record/metadata is missing"),
    (lambda run: (run / "checkpoints" / "2" / manifest.NAME).unlink(), "2", "no such checkpoint; there are 1, 3"),
    (lambda run: (run / "evaluation.json").unlink(), "best", "no validation by checkpoint.best=out_of_domain yet"),
    (
      lambda run: evaluated(run, step_9=(1.0, 1.0)),
      "best",
      "the checkpoint of step 9, the best by out_of_domain, is not there; there are 1, 2, 3",
    ),
    (lambda run: (run / "config.json").write_text("{"), "last", "config.json is not JSON"),
  ],
)
def test_what_is_refused(copied, exported, tmp_path, change, step, message):
  change(copied)
  with pytest.raises(ValueError, match=message) as refused:
    exported(copied, step, tmp_path / "model")
  assert "\n" not in str(refused.value)
  assert not (tmp_path / "model").exists()


def test_another_student_in_the_place_of_the_first_is_refused(copied, exported, tmp_path):
  config = json.loads((copied / "config.json").read_text())
  folder = shutil.copytree(config["model"]["student"], tmp_path / "other")
  other = json.loads((folder / "config.json").read_text())
  other["text_config"]["intermediate_size"] *= 2
  (folder / "config.json").write_text(json.dumps(other))
  config["model"]["student"] = str(folder)
  (copied / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="checkpoints/3 is intact and does not fit the student"):
    exported(copied, "last", tmp_path / "model")


def test_an_output_that_exists_is_left_alone(workdir, exported, tmp_path):
  (tmp_path / "notes").write_text("mine")
  with pytest.raises(ValueError, match="exists; choose a new folder"):
    exported(workdir, "last", tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["notes"]
