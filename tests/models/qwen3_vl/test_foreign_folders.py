"""Folders of others: read as transformers reads them, or refused in one short line that names the file."""

import json
import random
import shutil

import numpy as np
import pytest
import safetensors.numpy

from kepo_jax.models.qwen3_vl import conversion, model, safetensors_files
from kepo_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from tests.models.qwen3_vl import cases

RECORD = cases.config_record()
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """A tied model as one file of float32."""
  folder = tmp_path_factory.mktemp("original") / "model"
  config = Qwen3VLConfig.from_dict(RECORD)
  params = cases.redrawn(model.abstract_params(config), seed=0)
  conversion.save_pretrained(folder, config, params, dtype=np.float32)
  (folder / "config.json").write_text(json.dumps(RECORD))
  return folder


@pytest.fixture
def folder(original, tmp_path):
  """A copy, to be changed."""
  return shutil.copytree(original, tmp_path / "copy")


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def loaded_embedding(folder):
  return conversion.load_pretrained(folder)[1]["language_model"]["embed_tokens"]["weight"]


def refusal(folder):
  """What loading says, which must be one line of moderate length; "" where it loads."""
  try:
    conversion.load_pretrained(folder)
  except ValueError as error:
    assert "\n" not in str(error) and len(str(error)) < 2000 and str(folder) in str(error), error
    return str(error)
  return ""


def test_a_single_file_counts_before_the_index_beside_it(folder):
  expected = tensors_of(folder)[EMBEDDING]
  shard = {name: 2 * tensor for name, tensor in tensors_of(folder).items()}
  index = folder / safetensors_files.INDEX
  index.write_text(json.dumps({"weight_map": dict.fromkeys(shard, "gone.safetensors")}))
  np.testing.assert_array_equal(loaded_embedding(folder), expected)
  safetensors.numpy.save_file(shard, folder / "gone.safetensors")
  np.testing.assert_array_equal(loaded_embedding(folder), expected)
  (folder / "model.safetensors").unlink()
  np.testing.assert_array_equal(loaded_embedding(folder), 2 * expected)


@pytest.mark.parametrize(
  "text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": [1]}']
)
def test_a_damaged_index_is_named(folder, text):
  (folder / "model.safetensors").unlink()
  (folder / safetensors_files.INDEX).write_text(text)
  assert safetensors_files.INDEX in refusal(folder)


def test_a_head_of_its_own_is_not_dropped(folder):
  tensors = tensors_of(folder)
  safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors[EMBEDDING]}, folder / "model.safetensors")
  assert "lm_head" not in conversion.load_pretrained(folder)[1]
  safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors[EMBEDDING] + 1}, folder / "model.safetensors")
  assert "lm_head.weight" in (said := refusal(folder)) and "tie_word_embeddings" in said


def test_an_adapter_beside_the_weights_is_told_and_not_exported(folder, tmp_path, caplog):
  (folder / "adapter_config.json").write_text("{}")
  config, params = conversion.load_pretrained(folder)
  assert "adapter_config.json" in caplog.text
  conversion.save_pretrained(tmp_path / "export", config, params, source=folder)
  assert not list((tmp_path / "export").glob("adapter*"))


def test_names_without_a_prefix_are_read(folder):
  tensors = tensors_of(folder)
  bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
  safetensors.numpy.save_file(bare, folder / "model.safetensors")
  np.testing.assert_array_equal(loaded_embedding(folder), tensors[EMBEDDING])


def test_other_names_and_quantised_weights_of_a_published_size_are_told_shortly(tmp_path):
  sizes = SIZES["Qwen3-VL-2B"]
  leaves = conversion._leaves(sizes)

  def said(rename, dtype):
    stored = {
      rename(name): safetensors_files.Stored(tmp_path, dtype, leaf.stored_shape, 0, True)
      for leaf in leaves.values()
      for name in leaf.names
    }
    with pytest.raises(ValueError) as caught:
      conversion._check_names(tmp_path, leaves, stored, sizes.tie_word_embeddings)
    assert len(str(caught.value)) < 2000
    return str(caught.value)

  assert "'base_model.model.model.'" in said(lambda name: f"base_model.model.{name}", "BF16")
  assert "quantised" in said(lambda name: name, "F8_E4M3")


VALUES = (None, True, -1, 0, 3, 10**12, 0.5, 1e308, "x", [], [1], [10**12], {}, {"rope_theta": "x"}, "é" * 3000)


def test_any_value_in_a_config_is_read_or_refused(folder):
  draw = random.Random(0)
  for _ in range(150):
    record = json.loads(json.dumps(RECORD))
    section = draw.choice([record, record["text_config"], record["vision_config"]])
    section[draw.choice([*section, "rope_scaling", "rope_parameters"])] = draw.choice(VALUES)
    (folder / "config.json").write_text(json.dumps(record))
    refusal(folder)
  for text in ("", "[]", "null", "[" * 100_000, '{"model_type": ["qwen3_vl"]}'):
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_any_header_of_a_weight_file_is_read_or_refused(folder):
  draw = random.Random(0)
  file = folder / "model.safetensors"
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  for _ in range(150):
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([*header])
    if draw.random() < 0.2:
      header[name] = draw.choice(VALUES)
    else:
      field = draw.choice(["dtype", "shape", "data_offsets"])
      header[name][field] = draw.choice([*VALUES, [0, 10**30], [5, 2], [-4, 0], [1.5, 2], "I64", [[0], [4]]])
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])
    refusal(folder)
  for start in (b"", b"\0" * 7, b"\xff" * 64, (9).to_bytes(8, "little") + b"[" * 9, (2).to_bytes(8, "little") + b"[]"):
    file.write_bytes(start)
    assert "model.safetensors" in refusal(folder)
