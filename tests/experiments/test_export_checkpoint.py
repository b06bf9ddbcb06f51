import json
import shutil
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags

from experiments.configs import grpo
from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import checkpoint, model
from kepo_jax.training import checkpoints, manifest
from tests.training.runs import ASSETS, changed, flip_a_bit, shrunk

RESTORE = ocp.PyTreeCheckpointHandler.restore


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """What a run of three steps leaves, without its training: the weights of step n are n eighths of the student's."""
  folder = tmp_path_factory.mktemp("export") / "run"
  # Not what the folder of the student says: the export must say what this run was trained with.
  config = shrunk(changed(grpo), data__templates="standard", data__resize="squash384")
  student, params = checkpoint.load_pretrained(ASSETS / "confused", np.float32)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  places = sharding.weight_shardings(mesh, params, model.logical_axes(student))
  store = checkpoints.Checkpoints(folder / "checkpoints", every=1, minutes=0.0, keep=3)
  for step in (1, 2, 3):
    weights = jax.device_put(jax.tree.map(lambda x, step=step: np.asarray(x) * step / 8, params), places)
    state = {"params": weights, "opt_state": {"mu": weights}}
    store.save(step, state, {"step": step})
  store.close()
  (folder / "config.json").write_text(config.to_json())
  return folder


@pytest.fixture
def copied(workdir, tmp_path):
  return shutil.copytree(workdir, tmp_path / "run")


@pytest.fixture
def exported(program, capsys):
  """`exported(workdir, step, output)`: what the command says."""
  module = program("experiments.export_checkpoint")

  def run(workdir, step, output):
    for name, value in {"workdir": str(workdir), "step": step, "output": str(output)}.items():
      setattr(flags.FLAGS, name, value)
    module.main([])
    return capsys.readouterr().out

  return run


def evaluated(workdir, best="out_of_domain", **steps):
  """Overwrites the validations, `step_1=(in_domain, out_of_domain)`, and the figure of the best."""
  entries = [
    {"step": int(name[5:]), "in_domain": {"accuracy": inside}, "out_of_domain": {"mean": outside}}
    for name, (inside, outside) in steps.items()
  ]
  (workdir / "evaluation.json").write_text(json.dumps({"validation": entries}))
  config = json.loads((workdir / "config.json").read_text())
  config["checkpoint"]["best"] = best
  (workdir / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("wanted", "step"), [("last", 3), ("1", 1)])
def test_the_weights_are_those_of_the_step_and_nothing_else_is_read(workdir, exported, tmp_path, wanted, step):
  with mock.patch.object(ocp.PyTreeCheckpointHandler, "restore", autospec=True, side_effect=RESTORE) as restore:
    said = exported(workdir, wanted, tmp_path / "model")
  assert said == f"wrote the student of step {step} to {tmp_path / 'model'}\n"
  assert [list(call.kwargs["args"].item) for call in restore.call_args_list] == [["params"]]
  config, params = checkpoint.load_pretrained(tmp_path / "model", np.float32)
  before, weights = checkpoint.load_pretrained(ASSETS / "confused", np.float32)
  assert config == before
  # Stored as bfloat16: half a unit in the last of 8 bits.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y * (step / 8), rtol=2**-8), params, weights)
  declared = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
  assert (declared["kepo_templates"], declared["kepo_resize"]) == ("standard", "squash384")


@pytest.mark.parametrize(("figure", "best"), [("out_of_domain", 1), ("in_domain", 2)])
def test_the_best_is_the_validation_s_by_the_figure_of_the_run(copied, exported, tmp_path, figure, best):
  evaluated(copied, figure, step_1=(0.5, 0.7), step_2=(0.8, 0.6), step_3=(0.8, 0.7))  # the first of equals
  assert f"the student of step {best} " in exported(copied, "best", tmp_path / "best")
  assert (tmp_path / "best" / "config.json").exists()


@pytest.mark.parametrize(("change", "step", "message"), [
  (lambda run: (run / "config.json").unlink(), "last", r"run holds no run \(no config.json\)"),
  (lambda run: None, "7", r"--step=7: there is no such checkpoint; there are 1, 2, 3\.$"),
  (lambda run: None, "newest", r"--step=newest: give last, best or a number; there are 1, 2, 3\.$"),
  (lambda run: shutil.rmtree(run / "checkpoints"), "last", "holds no complete checkpoint"),
  (lambda run: flip_a_bit(run / "checkpoints" / "3"), "last", "checkpoints/3 is damaged: state/"),
  (lambda run: (run / "checkpoints" / "2" / manifest.NAME).unlink(), "2", "no such checkpoint; there are 1, 3"),
  (lambda run: None, "best", "no validation by checkpoint.best=out_of_domain yet"),
  (lambda run: evaluated(run, step_9=(1.0, 1.0)), "best", "checkpoint of step 9, .* is not there; there are 1, 2, 3"),
  (lambda run: (run / "config.json").write_text("{"), "last", "config.json is not JSON"),
])  # fmt: skip
def test_what_is_refused(copied, exported, tmp_path, change, step, message):
  change(copied)
  with pytest.raises(ValueError, match=message) as refused:
    exported(copied, step, tmp_path / "model")
  assert "\n" not in str(refused.value)
  assert not (tmp_path / "model").exists()


def test_another_student_in_the_place_of_the_first_is_refused(copied, exported, tmp_path):
  folder = shutil.copytree(ASSETS / "confused", tmp_path / "other")
  for path, section, changes in (
    (folder / "config.json", "text_config", {"intermediate_size": 192}),
    (copied / "config.json", "model", {"student": str(folder)}),
  ):
    config = json.loads(path.read_text())
    assert config[section] != config[section] | changes
    path.write_text(json.dumps(config | {section: config[section] | changes}))
  with pytest.raises(ValueError, match="checkpoints/3 is intact and does not fit the student"):
    exported(copied, "last", tmp_path / "model")


def test_an_output_that_exists_is_left_alone(workdir, exported, tmp_path):
  (tmp_path / "notes").write_text("mine")
  with pytest.raises(ValueError, match="exists; choose a new folder"):
    exported(workdir, "last", tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["notes"]
