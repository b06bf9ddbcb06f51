import json
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.data import prompts, tokenization
from kepo_jax.data.processor import Processor
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.training import checkpoints
from tests.training.runs import ASSETS

PLANT = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import PreTrainedTokenizerFast
class EvilTokenizer(PreTrainedTokenizerFast):
  pass
"""


class Bomb:
  """Writes the marker when it is unpickled."""

  def __init__(self, marker: pathlib.Path):
    self.marker = marker

  def __reduce__(self):
    return pathlib.Path.touch, (self.marker,)


def change(path: pathlib.Path, **fields) -> None:
  path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


@pytest.fixture
def marker(tmp_path):
  """The file that planted code writes; there is none at the end."""
  yield tmp_path / "ran"
  assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(tmp_path, marker, monkeypatch):
  """A phantom model with every kind of code beside its files, named by every file that can name code."""
  monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
  monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
  root = shutil.copytree(ASSETS / "confused", tmp_path / "model")
  for name in ("evil", "__init__", "tokenization_evil", "modeling_evil", "conftest"):
    (root / f"{name}.py").write_text(PLANT.format(marker=str(marker)))
  for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
    (root / name).write_bytes(pickle.dumps(Bomb(marker)))
  models = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")
  change(root / "config.json", auto_map={name: "evil.EvilTokenizer" for name in models})
  change(root / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.EvilTokenizer"})
  change(root / "processor_config.json", auto_map={"AutoProcessor": "evil.EvilTokenizer"})
  return root


def load(folder: pathlib.Path) -> None:
  Processor.from_directory(folder, templates=prompts.TEMPLATES["brief"])
  checkpoint.load_pretrained(folder)


def test_code_and_pickles_of_a_model_folder_are_ignored(folder, tmp_path):
  load(folder)
  config, params = checkpoint.load_pretrained(folder)
  checkpoint.save_pretrained(tmp_path / "export", config, params, source=folder)
  suffixes = {path.suffix for path in (tmp_path / "export").iterdir()}
  assert suffixes <= {".json", ".jinja", ".md", ".safetensors", ".txt"}


def test_a_tokenizer_class_of_the_folder_s_own_is_ignored(folder):
  text = "Which finding does the image show? <think>"
  genuine = tokenization.load(ASSETS / "confused", 1024)(text)["input_ids"]
  change(folder / "tokenizer_config.json", tokenizer_class="evil.EvilTokenizer")
  load(folder)  # tokenizer.json says all that is needed
  for name in ("evil.EvilTokenizer", "someone/evil--evil.EvilTokenizer"):
    auto_map = {"AutoTokenizer": [None, name]}
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    load(folder)
    assert tokenization.load(folder, 1024)(text)["input_ids"] == genuine


def test_a_chat_template_cannot_leave_its_sandbox(folder):
  classes = "{{ ''.__class__.__base__.__subclasses__() }}"
  for template in (classes, "{{ messages.append(1) }}", "{% include 'tokenizer.json' %}"):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat template"):
      load(folder)


def test_code_and_pickles_of_a_checkpoint_are_ignored(tmp_path, marker):
  place = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  state = {"params": {"w": jax.device_put(np.arange(8, dtype=np.float32), place)}}
  folder = tmp_path / "checkpoints"
  store = checkpoints.Checkpoints(folder, every=1, minutes=0.0, keep=1)
  store.save(1, state, {"step": 1})
  store.close()
  for planted in (folder, folder / "1", folder / "1" / "state"):
    (planted / "__init__.py").write_text(PLANT.format(marker=str(marker)))
    (planted / "state.pkl").write_bytes(pickle.dumps(Bomb(marker)))
  like = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=place)}
  assert checkpoints.restored_params(folder / "1", like)["w"].sum() == 28
  again = checkpoints.Checkpoints(folder, every=1, minutes=0.0, keep=1)
  found, record = again.restore(state)
  again.close()
  assert found["params"]["w"].sum() == 28 and record == {"step": 1}
