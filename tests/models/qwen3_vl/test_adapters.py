"""What an export with LoRA leaves behind: merged weights, and an adapter that PEFT loads onto the base."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import checkpoint, lora, safetensors_files
from tests.models.qwen3_vl import runs
from tests.models.qwen3_vl.test_lora import ALPHA, CASE, RANK, adapted, drawn

SOME = ("v_proj", "up_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("adapters") / "base"
  checkpoint.save_pretrained(folder, CASE.config, lora.without(drawn(adapted())), dtype=jnp.float32)
  return folder


@pytest.fixture(scope="module", params=[tuple(lora.TARGETS), SOME], ids=["all", "some"])
def exported(request, base):
  config = adapted(request.param)
  params, folder = drawn(config), base.parent / f"student-{len(request.param)}"
  checkpoint.save_pretrained(folder, config, params, source=base, dtype=jnp.float32)
  return config, params, folder


def test_the_export_and_a_sharded_copy_hold_merged_weights(exported, tmp_path):
  config, params, folder = exported
  merged = lora.merged(config, params, jnp.float32)
  loaded_config, loaded = checkpoint.load_pretrained(folder)
  assert loaded_config == CASE.config and "lora" not in (folder / "config.json").read_text()
  assert sorted(path.name for path in (folder / "adapter").iterdir()) == [checkpoint.CONFIG, checkpoint.WEIGHTS]
  checkpoint.save_orbax(tmp_path / "copy", config, params)
  for weights in (loaded, checkpoint.load_pretrained(tmp_path / "copy")[1]):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), weights, merged)


def test_the_tensors_of_the_adapter(exported, base):
  config, params, folder = exported
  found = safetensors_files.tensors_in(folder / "adapter" / checkpoint.WEIGHTS)
  assert len(found) == 2 * 4 * len(config.lora.targets)
  for target in SOME:
    module = lora.TARGETS[target]
    name = f"base_model.model.model.language_model.layers.2.{module}.{target}"
    a, b = (found[f"{name}.lora_{letter}.weight"].array() for letter in "AB")
    np.testing.assert_array_equal(a, np.asarray(params[lora.PART][module][target][lora.A][2]).T)
    np.testing.assert_array_equal(b, np.asarray(params[lora.PART][module][target][lora.B][2]).T)
  record = json.loads((folder / "adapter" / checkpoint.CONFIG).read_text())
  assert (record["r"], record["lora_alpha"]) == (RANK, ALPHA) and isinstance(record["lora_alpha"], int)
  assert record["target_modules"] == list(config.lora.targets)
  assert record["base_model_name_or_path"] == str(base)


def test_a_new_export_replaces_the_adapter_as_well(base, tmp_path):
  folder = tmp_path / "model"
  checkpoint.save_pretrained(folder, adapted(SOME), drawn(adapted(SOME)), source=base)
  assert (folder / "adapter").exists()
  checkpoint.save_pretrained(folder, CASE.config, lora.without(drawn(adapted())), source=base)
  assert not (folder / "adapter").exists()


def test_matrices_that_do_not_fit_are_refused(base, tmp_path):
  for config in (adapted(), CASE.config):
    with pytest.raises(ValueError, match="do not fit the config.*'lora'"):
      checkpoint.save_pretrained(tmp_path / "model", config, drawn(adapted(SOME)), source=base)
  assert not (tmp_path / "model").exists()


@pytest.mark.parity
def test_peft_says_the_same_and_would_write_the_same(exported, base, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from tests.models.qwen3_vl.oracle import Oracle

  config, params, folder = exported
  completions = CASE.completions()
  plain, merged = (Oracle(path, CASE) for path in (base, folder))
  adapter = peft.PeftModel.from_pretrained(plain.model, folder / "adapter")
  theirs = plain.loss_and_logits(completions)[1]  # PEFT has put its layers into the model
  np.testing.assert_allclose(theirs, merged.loss_and_logits(completions)[1], rtol=1e-5, atol=1e-5)
  ours = runs.logits(config, params, CASE.prompts()[0], completions)
  np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)

  adapter.save_pretrained(tmp_path)
  mine, written = (safetensors_files.tensors_in(path / checkpoint.WEIGHTS) for path in (folder / "adapter", tmp_path))
  assert mine.keys() == written.keys()
  for name, tensor in written.items():
    np.testing.assert_array_equal(mine[name].array(), tensor.array(), strict=True, err_msg=name)
  record, written = (json.loads((path / checkpoint.CONFIG).read_text()) for path in (folder / "adapter", tmp_path))
  different = {name for name in record if written[name] != record[name]}
  assert different <= {"target_modules"} and set(written["target_modules"]) == set(record["target_modules"])

  state = adapter.merge_and_unload().state_dict()
  for name, tensor in safetensors_files.stored_tensors(folder).items():
    np.testing.assert_allclose(state[name].numpy(), tensor.array(), atol=1e-6, err_msg=name)
