"""The shipped phantom models: frozen, small, loadable, and with the answers that they were taught."""

import hashlib
import json

import numpy as np
import pytest

from experiments import phantom_folder
from experiments.phantom_recipes import RECIPES, SIZES
from kepo_jax.data import prompts
from kepo_jax.data.phantom import build, drawing, questions, scenes
from kepo_jax.data.pipeline import Processor
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from tests.conftest import ROOT

ASSETS = ROOT / "experiments" / "assets" / "phantom"
NAMES = ("confused", "noisy", "strong", "weak")


def test_they_are_frozen_with_the_benchmark_small_and_say_what_made_them():
  frozen = json.loads((ASSETS / "frozen.json").read_text())
  assert (frozen["version"], frozen["items_sha256"]) == (build.VERSION, build.ITEMS_SHA256)
  assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12e6
  for name in NAMES:
    weights = (ASSETS / name / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == frozen["weights_sha256"][name]
    record = json.loads((ASSETS / name / "record.json").read_text())
    assert record["recipe"]["seed"] == RECIPES[name].seed
    assert {"command", "parents", "seconds", "data", "measured", "note"} <= record.keys()


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
    config, params = conversion.load_pretrained(shipped)
    assert config == Qwen3VLConfig.from_directory(written)
    assert params["language_model"]["norm"]["weight"].shape == (config.text.hidden_size,)
  processor = Processor.from_directory(ASSETS / "confused", templates=prompts.BRIEF)
  assert all(processor.same_vocabulary(ASSETS / name) for name in NAMES)


@pytest.mark.parity
@pytest.mark.parametrize("name", ("confused", "weak"))
def test_transformers_writes_a_well_formed_answer(name):
  """Transformers alone: its own tokenizer, chat template and model, our pixels."""
  torch = pytest.importorskip("torch")
  from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

  from experiments import phantom_corpus, phantom_pool
  from kepo_jax import rewards

  tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
  model = Qwen3VLForConditionalGeneration.from_pretrained(ASSETS / name, dtype=torch.float32)
  rng = np.random.default_rng(5)
  scene = scenes.draw_scene(rng, "MRI", organ="brain")
  question = questions.ask("organ", scene, rng)
  text = prompts.prompt_text(phantom_corpus.as_example(scene, question), prompts.BRIEF, "think")
  turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
  rendered = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
  ids = tokenizer(rendered.replace("<|image_pad|>", "<|image_pad|>" * 16), return_tensors="pt")
  patches = torch.from_numpy(phantom_pool.patches(drawing.draw(scene)[None])[0])
  image_kinds = (ids["input_ids"] == model.config.image_token_id).int()
  out = model.generate(
    **ids, mm_token_type_ids=image_kinds, pixel_values=patches, image_grid_thw=torch.tensor([[1, 8, 8]]),
    max_new_tokens=32, do_sample=False,
  )  # fmt: skip
  answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
  assert rewards.strict_format(answer) == 1.0 and "MRI brain" in answer, answer
