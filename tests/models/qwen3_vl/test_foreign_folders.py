"""Folders of others: read as transformers reads them, or refused in one short line that names the file."""

import json
import random
import shutil

import numpy as np
import pytest
import safetensors.numpy

from kepo_jax.models.qwen3_vl import checkpoint, model, safetensors_files
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from tests.models.qwen3_vl import cases

RECORD = cases.config_record()
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """A tied model as one file of float32."""
  folder = tmp_path_factory.mktemp("original") / "model"
  config = Qwen3VLConfig.from_dict(RECORD)
  params = cases.redrawn(model.abstract_params(config), seed=0)
  checkpoint.save_pretrained(folder, config, params, dtype=np.float32)
  (folder / "config.json").write_text(json.dumps(RECORD))
  return folder


@pytest.fixture
def folder(original, tmp_path):
  """A copy, to be changed."""
  return shutil.copytree(original, tmp_path / "copy")


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def loaded_embedding(folder):
  return checkpoint.load_pretrained(folder)[1]["language_model"]["embed_tokens"]["weight"]


def why_unsupported(folder):
  """What loading says, which must be one line of moderate length; "" where it loads what safetensors reads."""
  try:
    config, params = checkpoint.load_pretrained(folder)
  except ValueError as error:
    assert "\n" not in str(error) and len(str(error)) < 2000 and str(folder) in str(error), error
    return str(error)
  checkpoint.save_pretrained(folder / "export", config, params, dtype=np.float32)
  written, expected = tensors_of(folder / "export"), tensors_of(folder)
  assert written.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)
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
  assert safetensors_files.INDEX in why_unsupported(folder)


def test_a_head_of_its_own_is_not_dropped(folder):
  tensors = tensors_of(folder)
  safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors[EMBEDDING]}, folder / "model.safetensors")
  assert "lm_head" not in checkpoint.load_pretrained(folder)[1]
  safetensors.numpy.save_file(tensors | {"lm_head.weight": tensors[EMBEDDING] + 1}, folder / "model.safetensors")
  assert "lm_head.weight" in (said := why_unsupported(folder)) and "tie_word_embeddings" in said


def test_an_adapter_beside_the_weights_is_told_and_not_exported(folder, tmp_path, caplog):
  (folder / "adapter_config.json").write_text("{}")
  config, params = checkpoint.load_pretrained(folder)
  assert "adapter_config.json" in caplog.text
  checkpoint.save_pretrained(tmp_path / "export", config, params, source=folder)
  assert not list((tmp_path / "export").glob("adapter*"))


def test_names_without_a_prefix_are_read(folder):
  tensors = tensors_of(folder)
  bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
  safetensors.numpy.save_file(bare, folder / "model.safetensors")
  np.testing.assert_array_equal(loaded_embedding(folder), tensors[EMBEDDING])


def header_of(file):
  """The header of a weight file and the bytes of its tensors."""
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file, header, data):
  encoded = json.dumps(header).encode()
  file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


@pytest.mark.parametrize(
  ("rename", "said"),
  [
    (lambda name: f"base_model.model.{name}", ("merge the adapter", "unknown: 'base_model.model.model.language")),
    (lambda name: f"vlm.{name}", ("begin with 'vlm.model.'", "transformers 5")),
    (lambda name: name.replace("model.language_model.", "language_model.model."), ("'language_model.model.embed",)),
    (lambda name: name.removesuffix("weight") + "qweight", ("quantised weights ('F32': 'model.", "bfloat16")),
    (lambda name: f"{name}\n" + "x" * 10**5, ("unknown: 'model.language_model",)),
  ],
)
def test_other_names_are_told_as_they_stand_in_the_file(folder, rename, said):
  renamed = {rename(name): tensor for name, tensor in tensors_of(folder).items()}
  safetensors.numpy.save_file(renamed, folder / "model.safetensors")
  found = why_unsupported(folder)
  assert all(part in found for part in said), found


@pytest.mark.parametrize("name", ["", "..", "x" * 5000, "a\nb", "a\0b", "folder"])
def test_what_an_index_names_must_be_a_file(folder, name):
  (folder / "model.safetensors").rename(folder / "other.safetensors")
  for place in ("folder", "model.safetensors"):
    (folder / place).mkdir()
  assert "only safetensors weights are read" in why_unsupported(folder)
  (folder / safetensors_files.INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
  assert safetensors_files.INDEX in why_unsupported(folder)


def test_bytes_of_another_tensor_are_not_read(folder):
  file = folder / "model.safetensors"
  header, data = header_of(file)
  one, other = (f"model.language_model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
  write_header(file, header | {one: header[one] | {"data_offsets": header[other]["data_offsets"]}}, data)
  assert "expected" in why_unsupported(folder) and "model.safetensors" in why_unsupported(folder)
  write_header(file, header, data + bytes(8))
  assert "8 bytes behind its last tensor" in why_unsupported(folder)
  write_header(file, {"empty": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}} | header, data)
  assert "model.safetensors" in why_unsupported(folder)


VALUES = (None, True, -1, 0, 3, 10**12, 0.5, 1e308, "x", [], [1], [10**12], {}, {"rope_theta": "x"}, "é\n" * 3000)


def test_any_value_in_a_config_is_read_or_refused(folder):
  draw = random.Random(0)
  for _ in range(150):
    record = json.loads(json.dumps(RECORD))
    section = draw.choice([record, record["text_config"], record["vision_config"]])
    section[draw.choice([*section, "rope_scaling", "rope_parameters"])] = draw.choice(VALUES)
    (folder / "config.json").write_text(json.dumps(record))
    said = why_unsupported(folder)
    assert not said or "config.json" in said
  record = RECORD | {"vision_config": RECORD["vision_config"] | {"patch_size": [8, 9] * 10**4}}
  (folder / "config.json").write_text(json.dumps(record))
  assert "patch_size is [8, 9," in why_unsupported(folder)
  for text in ("", "[]", "null", "[" * 100_000, '{"model_type": ["qwen3_vl"]}'):
    (folder / "config.json").write_text(text)
    assert "config.json" in why_unsupported(folder)


def test_any_header_of_a_weight_file_is_read_or_refused(folder):
  draw, loaded = random.Random(0), 0
  file = folder / "model.safetensors"
  whole, data = header_of(file)
  for _ in range(200):
    header = json.loads(json.dumps(whole))
    name = draw.choice([*header])
    if (kind := draw.random()) < 0.2:
      header[name] = draw.choice(VALUES)
    elif kind < 0.4:
      header[name]["data_offsets"] = header[draw.choice([*header])]["data_offsets"]
    else:
      field = draw.choice(["dtype", "shape", "data_offsets"])
      header[name][field] = draw.choice([*VALUES, [0, 10**30], [5, 2], [-4, 0], [1.5, 2], "I64", [[0], [4]]])
    write_header(file, header, data)
    said = why_unsupported(folder)
    assert "model.safetensors" in said or "config.json" in said or not said
    loaded += not said
  assert loaded < 40
  for start in (b"", b"\0" * 7, b"\xff" * 64, (9).to_bytes(8, "little") + b"[" * 9, (2).to_bytes(8, "little") + b"[]"):
    file.write_bytes(start)
    assert "model.safetensors" in why_unsupported(folder)
