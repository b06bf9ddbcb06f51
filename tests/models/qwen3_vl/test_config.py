"""Sizes from config.json: both schemas, the named sizes, and one clear why_unsupported for everything else."""

import dataclasses
import json

import jax
import pytest

from kepo_jax.models.qwen3_vl import model, side_files
from kepo_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from tests.models.qwen3_vl import cases

CONFIG = Qwen3VLConfig.from_dict(cases.config_record())  # its theta is 100
ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2]}


@pytest.mark.parametrize(
  ("name", "text_billions", "vision_billions"),
  # Computed from the sizes; the published counts are 8.19 and 32.76 with the head.
  [("2B", 1.7206, 0.4070), ("4B", 4.0225, 0.4153), ("8B", 8.1907, 0.5764), ("32B", 32.7621, 0.5953)],
)
def test_named_sizes_have_the_published_number_of_parameters(name, text_billions, vision_billions):
  shapes = model.abstract_params(SIZES[f"Qwen3-VL-{name}"])
  vision = sum(leaf.size for leaf in jax.tree.leaves(shapes.pop("visual")))
  text = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert text / 1e9 == pytest.approx(text_billions, abs=1e-4)
  assert vision / 1e9 == pytest.approx(vision_billions, abs=1e-4)


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_parameters": ROPE | {"rope_theta": 100.0}},
    {"rope_parameters": ROPE | {"rope_theta": 100.0}, "rope_theta": 7.0},
    {"rope_scaling": ROPE | {"rope_theta": 100.0}, "rope_theta": 7.0},
    {"rope_parameters": ROPE, "rope_theta": 100.0},
  ],
  ids=["new", "new_beside_old_theta", "old_beside_old_theta", "new_with_old_theta"],
)
def test_both_schemas_mean_the_same(rope):
  """As in transformers 5, a rope_theta beside the parameters of RoPE loses against the one among them."""
  record = cases.config_record()
  text = {key: value for key, value in record["text_config"].items() if not key.startswith("rope")}
  assert Qwen3VLConfig.from_dict(record | {"text_config": text | rope}) == CONFIG


def test_tied_embeddings_may_be_said_by_either_section():
  record = cases.config_record(text={"tie_word_embeddings": True})
  assert not Qwen3VLConfig.from_dict(record | {"tie_word_embeddings": False}).tie_word_embeddings
  del record["tie_word_embeddings"]
  assert Qwen3VLConfig.from_dict(record).tie_word_embeddings


def test_a_written_record_is_read_back():
  turned = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, rope_theta=500.0))
  for config in (*SIZES.values(), cases.GOLDEN[0].config, turned):
    # How attention is computed belongs to a run and is not written.
    record = side_files.config_record(dataclasses.replace(config, attention="plain"))
    assert Qwen3VLConfig.from_dict(json.loads(json.dumps(record))) == config


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (cases.config_record(model_type="qwen3_vl_moe"), "'qwen3_vl_moe' .a relative that is not supported"),
    (cases.config_record(model_type="llama"), "model_type is 'llama'; supported is 'qwen3_vl'"),
    ({"model_type": "qwen3_vl"}, "text_config is missing"),
    (cases.config_record(text={"hidden_size": None, "head_dim": None}), "missing hidden_size, head_dim"),
    (cases.config_record(text={"hidden_act": "gelu"}), "text_config: hidden_act is 'gelu'"),
    (cases.config_record(text={"rope_scaling": {"rope_type": "yarn"}}), "rope_type is 'yarn'"),
    (cases.config_record(text={"rope_scaling": ROPE | {"mrope_interleaved": False}}), "mrope_interleaved is False"),
    (cases.config_record(text={"num_key_value_heads": 3}), "no multiple of num_key_value_heads"),
    (cases.config_record(text={"head_dim": 32}), "mrope_section does not hold three numbers"),
    (cases.config_record(vision={"deepstack_visual_indexes": [1, 4]}), "not ascending block numbers"),
    (cases.config_record(text={"num_hidden_layers": 2}), "fewer decoder layers than deepstack_visual_indexes"),
    (cases.config_record(vision={"num_position_embeddings": 24}), "no square"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_said(record, message):
  with pytest.raises(ValueError, match=message):
    Qwen3VLConfig.from_dict(record)
