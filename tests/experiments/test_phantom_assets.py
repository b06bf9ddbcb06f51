"""The shipped phantom models: frozen, small, loadable, and with the answers that they were taught."""

import hashlib
import json

from transformers import AutoConfig

from experiments import phantom_folder
from experiments.phantom_recipes import RECIPES, SIZES
from kepo_jax.data import prompts
from kepo_jax.data.phantom import build
from kepo_jax.data.processor import Processor
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from tests.conftest import ROOT

ASSETS = ROOT / "experiments" / "assets" / "phantom"
NAMES = ("confused", "noisy", "strong", "weak")


def test_they_are_frozen_with_the_benchmark_small_and_say_what_made_them():
  frozen = json.loads((ASSETS / "frozen.json").read_text())
  assert (frozen["version"], frozen["items_sha256"]) == (build.VERSION, build.ITEMS_SHA256)
  found = {name: hashlib.sha256((ASSETS / name / "model.safetensors").read_bytes()).hexdigest() for name in NAMES}
  assert found == frozen["weights_sha256"]
  assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6


def test_they_load_and_their_side_files_are_those_that_the_code_writes(tmp_path):
  for name in NAMES:
    written, shipped = tmp_path / name, ASSETS / name
    written.mkdir()
    sizes = SIZES[RECIPES[name].role]
    phantom_folder.write_folder(written, phantom_folder.model_config(phantom_folder.make_tokenizer(), **sizes))
    for path in written.iterdir():
      if path.name == "config.json":
        assert Qwen3VLConfig.from_directory(written) == Qwen3VLConfig.from_directory(shipped)
      else:
        read = json.loads if path.suffix == ".json" else str
        assert read(path.read_text()) == read((shipped / path.name).read_text()), path.name
    config, params = checkpoint.load_pretrained(shipped)
    assert config == Qwen3VLConfig.from_directory(written)
    assert params["language_model"]["norm"]["weight"].shape == (config.text.hidden_size,)
  processor = Processor.from_directory(ASSETS / "confused", templates=prompts.BRIEF)
  assert all(processor.same_vocabulary(ASSETS / name) for name in NAMES)


def test_transformers_reads_the_folder():
  config = AutoConfig.from_pretrained(ASSETS / "confused")
  assert type(config).__name__ == "Qwen3VLConfig" and config.text_config.head_dim == 32
