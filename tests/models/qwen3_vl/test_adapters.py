"""What an export with LoRA leaves behind: merged weights, and an adapter that PEFT loads onto the base."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import adapters, conversion, lora, model, safetensors_files
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from tests.models.qwen3_vl.test_lora import ALPHA, CASE, RANK, adapted, drawn

SOME = ("v_proj", "up_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """The folder of the model that the matrices were trained on."""
  folder = tmp_path_factory.mktemp("adapters") / "base"
  conversion.save_pretrained(folder, CASE.config, lora.without(drawn(adapted())), dtype=jnp.float32)
  return folder


@pytest.fixture(scope="module", params=[tuple(lora.TARGETS), SOME], ids=["all", "some"])
def exported(request, base):
  """(config, parameters, folder) of a student with LoRA, in float32."""
  config = adapted(request.param)
  params, folder = drawn(config), base.parent / f"student-{len(request.param)}"
  conversion.save_pretrained(folder, config, params, source=base, dtype=jnp.float32)
  return config, params, folder


def test_the_export_is_an_ordinary_folder_of_merged_weights(exported):
  config, params, folder = exported
  loaded_config, loaded = conversion.load_pretrained(folder)
  assert loaded_config == CASE.config and loaded_config.lora is None
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), loaded, lora.merged(config, params, jnp.float32)
  )
  assert Qwen3VLConfig.from_dict(json.loads((folder / "config.json").read_text())) == CASE.config
  assert "lora" not in (folder / "config.json").read_text()
  assert sorted(path.name for path in (folder / "adapter").iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]


def test_the_tensors_of_the_adapter(exported):
  config, params, folder = exported
  found = safetensors_files.tensors_in(folder / "adapter" / adapters.WEIGHTS)
  assert len(found) == 2 * 4 * len(config.lora.targets)
  prefix = "base_model.model.model.language_model.layers.2."
  for target in SOME:
    module = lora.TARGETS[target]
    a, b = (found[f"{prefix}{module}.{target}.lora_{letter}.weight"].array() for letter in "AB")
    assert a.dtype == np.float32 and a.shape[0] == b.shape[1] == RANK
    np.testing.assert_array_equal(a, np.asarray(params[lora.PART][module][target][lora.A][2]).T)
    np.testing.assert_array_equal(b, np.asarray(params[lora.PART][module][target][lora.B][2]).T)


def test_what_the_adapter_says_of_itself(exported, base):
  config, _, folder = exported
  record = json.loads((folder / "adapter" / adapters.CONFIG).read_text())
  assert record["peft_type"] == "LORA" and record["bias"] == "none" and record["task_type"] is None
  assert (record["r"], record["lora_alpha"]) == (RANK, ALPHA) and isinstance(record["lora_alpha"], int)
  assert record["target_modules"] == list(config.lora.targets)
  assert record["base_model_name_or_path"] == str(base)


def test_a_new_export_replaces_the_adapter_as_well(base, tmp_path):
  folder = tmp_path / "model"
  conversion.save_pretrained(folder, adapted(), drawn(adapted()), source=base)
  conversion.save_pretrained(folder, CASE.config, lora.without(drawn(adapted())), source=base)
  assert not (folder / "adapter").exists()
  conversion.save_pretrained(folder, adapted(SOME), drawn(adapted(SOME)), source=base)
  assert len(safetensors_files.tensors_in(folder / "adapter" / adapters.WEIGHTS)) == 2 * 4 * 2
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_matrices_that_do_not_fit_are_refused(base, tmp_path):
  params = drawn(adapted(SOME))
  with pytest.raises(ValueError, match="do not fit the config.*'lora'.*is None instead of"):
    conversion.save_pretrained(tmp_path / "model", adapted(), params, source=base)
  with pytest.raises(ValueError, match="do not fit the config"):
    conversion.save_pretrained(tmp_path / "model", CASE.config, params, source=base)
  assert not (tmp_path / "model").exists()


def test_a_sharded_copy_is_of_merged_weights(exported, tmp_path):
  config, params, folder = exported
  conversion.save_orbax(tmp_path / "copy", config, params)
  _, loaded = conversion.load_pretrained(tmp_path / "copy")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), loaded, conversion.load_pretrained(folder)[1])


def ours(config, params, prompts, completions):
  """Logits float32[P, G, T, V] of the LoRA forward."""
  prefix = model.prefill(config, params, prompts)
  hidden = model.completion_hidden(config, params, prefix, completions)
  return np.asarray(jnp.einsum("pgtd,vd->pgtv", hidden, model.head_weight(config, params)))


@pytest.mark.parity
def test_peft_says_the_same(exported, base):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from tests.models.qwen3_vl.oracle import Oracle

  config, params, folder = exported
  prompts, tokens, grids = CASE.prompts()
  completions = CASE.completions()
  plain, merged = (Oracle(each, CASE, prompts, tokens, grids) for each in (base, folder))
  untrained = plain.loss_and_logits(completions)[1]
  adapter = peft.PeftModel.from_pretrained(plain.model, folder / "adapter")
  assert sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in adapter.modules()) == 4 * len(
    config.lora.targets
  )
  theirs = plain.loss_and_logits(completions)[1]  # PEFT has put its layers into the model
  assert np.abs(theirs - untrained).max() > 0.1
  np.testing.assert_allclose(theirs, merged.loss_and_logits(completions)[1], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(theirs, ours(config, params, prompts, completions), rtol=1e-5, atol=1e-5)
  # And merged by PEFT, weight by weight.
  state = adapter.merge_and_unload().state_dict()
  for name, tensor in safetensors_files.stored_tensors(folder).items():
    np.testing.assert_allclose(state[name].numpy(), tensor.array(), atol=1e-6, err_msg=name)


@pytest.mark.parity
def test_peft_would_write_the_same_file(exported, base, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  from transformers import Qwen3VLForConditionalGeneration

  _, _, folder = exported
  model_of_peft = peft.PeftModel.from_pretrained(
    Qwen3VLForConditionalGeneration.from_pretrained(base), folder / "adapter"
  )
  model_of_peft.save_pretrained(tmp_path)
  mine, theirs = (safetensors_files.tensors_in(each / adapters.WEIGHTS) for each in (folder / "adapter", tmp_path))
  assert mine.keys() == theirs.keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(mine[name].array(), tensor.array(), strict=True)
  written, record = (json.loads((each / adapters.CONFIG).read_text()) for each in (tmp_path, folder / "adapter"))
  assert record.keys() <= written.keys()
  different = {name for name in record if written[name] != record[name]}
  assert different <= {"target_modules"} and set(written["target_modules"]) == set(record["target_modules"])
