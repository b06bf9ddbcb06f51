"""Tokenizer and side files of the phantom models."""

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from kepo_jax.data.phantom import questions, scenes
from tests.experiments.test_phantom_assets import ASSETS


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


def test_any_text_round_trips(tokenizer):
  rng = np.random.default_rng(0)
  ranges = ((1, 128), (128, 2048), (2048, 0xD800), (0xE000, 0x110000))
  for _ in range(300):
    points = [int(rng.integers(*ranges[rng.integers(4)])) for _ in range(rng.integers(0, 30))]
    text = "".join(map(chr, points))
    assert tokenizer.decode(tokenizer.encode(text)) == text
  for text in ("  two  spaces ", "a\n\n\tb", "What? A:B: c", "Ä\u0301 ½ 🧠", "<think>x</think> <answer> B </answer>"):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_reads_the_folder():
  config = AutoConfig.from_pretrained(ASSETS / "confused")
  assert type(config).__name__ == "Qwen3VLConfig" and config.text_config.head_dim == 32
