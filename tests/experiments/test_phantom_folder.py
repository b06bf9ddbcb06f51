"""Tokenizer and side files of the phantom models."""

import pytest
from transformers import AutoTokenizer

from experiments import phantom_corpus
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


def test_any_text_round_trips(tokenizer, rng):
  ranges = ((1, 128), (128, 2048), (2048, 0xD800), (0xE000, 0x110000))
  texts = ["  two  spaces ", "a\n\n\tb", "What? A:B: c", "Ä\u0301 ½ 🧠", "<think>x</think> <answer> B </answer>"]
  for _ in range(300):
    points = [int(rng.integers(*ranges[rng.integers(4)])) for _ in range(rng.integers(0, 30))]
    texts.append("".join(map(chr, points)))
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tags_survive_decoding_and_specials_do_not(tokenizer):
  ids = tokenizer.encode("<think> cyst</think><answer> B</answer><|im_end|>")
  assert tokenizer.decode(ids, skip_special_tokens=True) == "<think> cyst</think><answer> B</answer>"
  assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == [
    "<think>", "Ġcyst", "</think>", "<answer>", "ĠB", "</answer>", "<|im_end|>",
  ]  # fmt: skip


def test_the_benchmark_fits_a_short_prompt(tokenizer, rng):
  longest = {}
  for i in range(400):
    topic = list(questions.TOPICS)[i % len(questions.TOPICS)]
    scene = questions.scene_for(topic, scenes.MODALITIES[i % 8], rng)
    for kind in ("think", "no_think", "hint_request", "hint_only", "hint_and_answer"):
      texts = phantom_corpus.dialogue(scene, questions.ask(topic, scene, rng), kind, phantom_corpus.TRUTH, rng)
      sizes = (len(tokenizer.encode(text)) for text in texts)
      longest[kind] = tuple(map(max, sizes, longest.get(kind, (0, 0))))
  assert longest["think"][0] < 20 and longest["hint_and_answer"][0] < 33
  assert max(answer for _, answer in longest.values()) < 28
