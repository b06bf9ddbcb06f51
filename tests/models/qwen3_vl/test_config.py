"""Sizes from config.json: both schemas, the named sizes, and one clear refusal for everything else."""

import dataclasses
import json

import jax
import pytest

from kepo_jax.models.qwen3_vl import model, side_files
from kepo_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from tests.models.qwen3_vl import cases


@pytest.mark.parametrize(
  ("name", "text_billions", "vision_billions"),
  # Computed from the sizes; the published counts are 8.19 and 32.76 with the head.
  [
    ("Qwen3-VL-2B", 1.7206, 0.4070),
    ("Qwen3-VL-4B", 4.0225, 0.4153),
    ("Qwen3-VL-8B", 8.1907, 0.5764),
    ("Qwen3-VL-32B", 32.7621, 0.5953),
  ],
)
def test_named_sizes_have_the_published_number_of_parameters(name, text_billions, vision_billions):
  shapes = model.abstract_params(SIZES[name])
  vision = sum(leaf.size for leaf in jax.tree.leaves(shapes.pop("visual")))
  text = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert text / 1e9 == pytest.approx(text_billions, abs=1e-4)
  assert vision / 1e9 == pytest.approx(vision_billions, abs=1e-4)


def test_both_schemas_mean_the_same():
  theirs = next(case for case in cases.CASES if case.name == "schema_of_transformers")
  record = json.loads(cases.as_json(theirs.record))
  assert "rope_scaling" not in record["text_config"] and "rope_theta" not in record["text_config"]
  assert Qwen3VLConfig.from_dict(record) == Qwen3VLConfig.from_dict(cases.config_record())


@pytest.mark.parametrize("config", [*SIZES.values(), cases.GOLDEN[0].config], ids=str)
def test_a_written_record_is_read_back(config):
  assert Qwen3VLConfig.from_dict(json.loads(json.dumps(side_files.config_record(config)))) == config


def test_how_attention_is_computed_is_not_written():
  config = cases.GOLDEN[0].config
  assert "attention" not in side_files.config_record(dataclasses.replace(config, attention="plain"))


def test_fields_change_what_they_name():
  config = Qwen3VLConfig.from_dict(cases.config_record(text={"head_dim": 16, "rms_norm_eps": 1e-5}))
  assert config.text.rms_norm_eps == 1e-5
  assert config.vision.patch_width == 3 * 2 * 4 * 4 and config.vision.merge_area == 4 and config.vision.table_side == 5
  assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (cases.config_record(model_type="qwen3_vl_moe"), "'qwen3_vl_moe' .a relative that is not supported"),
    (cases.config_record(model_type="qwen2_vl"), "'qwen2_vl' .a relative that is not supported"),
    (cases.config_record(model_type="qwen2_5_vl"), "'qwen2_5_vl' .a relative that is not supported"),
    (cases.config_record(model_type="llama"), "model_type is 'llama'; supported is 'qwen3_vl'"),
    ({"model_type": "qwen3_vl"}, "text_config is missing"),
    (cases.config_record(text={"hidden_size": None, "head_dim": None}), "missing hidden_size, head_dim"),
    (cases.config_record(text={"hidden_act": "gelu"}), "hidden_act is 'gelu', supported is 'silu'"),
    (cases.config_record(vision={"hidden_act": "gelu"}), "hidden_act is 'gelu'"),
    (cases.config_record(text={"rope_scaling": {"rope_type": "yarn"}}), "rope_type is 'yarn'"),
    (cases.config_record(text={"rope_scaling": {"mrope_interleaved": False}}), "mrope_interleaved is False"),
    (cases.config_record(text={"num_key_value_heads": 3}), "no multiple of num_key_value_heads"),
    (cases.config_record(text={"head_dim": 32}), "mrope_section does not hold three numbers that sum to head_dim / 2"),
    (cases.config_record(vision={"deepstack_visual_indexes": [1, 4]}), "not ascending block numbers"),
    (cases.config_record(text={"num_hidden_layers": 2}), "fewer decoder layers than deepstack_visual_indexes"),
    (cases.config_record(vision={"num_position_embeddings": 24}), "no square"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_said(record, message):
  with pytest.raises(ValueError, match=message):
    Qwen3VLConfig.from_dict(record)


def test_a_damaged_file_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not JSON"):
    Qwen3VLConfig.from_directory(tmp_path)
