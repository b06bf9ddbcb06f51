import hashlib
import json

import pytest
from transformers import AutoTokenizer

from experiments.phantom import folder
from experiments.phantom.recipes import RECIPES, SIZES
from kepo_jax.data import prompts
from kepo_jax.data.phantom import build, questions, scenes
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
    folder.write_folder(written, folder.model_config(folder.make_tokenizer(), **sizes))
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


@pytest.fixture(scope="module")
def tokenizer():
  return AutoTokenizer.from_pretrained(ASSETS / "confused", trust_remote_code=False)


def test_every_word_of_the_benchmark_is_one_token(tokenizer):
  words = [*scenes.SIDES, *scenes.LEVELS, *scenes.SIZES, *scenes.TONES, *questions.NUMBERS, *questions.HEALTH]
  words += [*scenes.MODALITIES, *questions.GRADES, *questions.DISEASES.values(), "lesions", "no"]
  words += [organ for organs in scenes.ORGANS.values() for organ in organs]
  for word in words:
    assert len(tokenizer.encode(f" {word}")) == 1, word
  for topic in questions.TOPICS.values():
    for stem in topic.wordings:
      assert len(tokenizer.encode(stem)) == len(stem.split()) + 1, stem  # the question mark
  for letter in "ABCD":
    assert len(tokenizer.encode(f" {letter}:")) == len(tokenizer.encode(f" {letter}")) == 1


def test_any_text_round_trips(tokenizer, rng):
  ranges = ((1, 128), (128, 2048), (2048, 0xD800), (0xE000, 0x110000))
  texts = ["  two  spaces ", "a\n\n\tb", "What? A:B: c", "Ä\u0301 ½ 🧠", "<think>x</think> <answer> B </answer>"]
  for _ in range(300):
    points = [int(rng.integers(*ranges[rng.integers(4)])) for _ in range(rng.integers(0, 30))]
    texts.append("".join(map(chr, points)))
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text)) == text
