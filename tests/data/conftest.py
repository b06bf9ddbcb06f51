"""A checkpoint folder without weights, and questions with drawn images."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts
from kepo_jax.types import Example

SMALL = {"templates": prompts.BRIEF, "prompt_buckets": (72, 128, 512), "patch_buckets": (16, 48, 128)}
NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = tuple(f"<|{name}|>" for name in NAMES)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEMPLATE = (
  "{% for message in messages %}<|im_start|>{{ message.role }}\n"
  "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(directory: pathlib.Path, *, opening: str = "", special_tags: bool = False) -> pathlib.Path:
  """A Qwen3-VL folder without weights: 8-pixel patches merged 2 x 2, a head with 40 rows to spare.

  `opening` is what the assistant begins with; with `special_tags`, decoding drops the tags of the answer.
  """
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(["Which organ is shown in this image? Brain Chest user assistant"] * 4, trainer)
  tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
  tokenizer.add_tokens([AddedToken(name, special=special_tags, normalized=False) for name in TAGS])
  ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
  text = {
    "vocab_size": tokenizer.get_vocab_size() + 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rope_theta": 100.0,
    "rope_scaling": {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
  }  # fmt: skip
  vision = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "spatial_merge_size": 2,
  }  # fmt: skip
  sizes = {"min_pixels": 32 * 32, "max_pixels": 64 * 64, "patch_size": 8, "merge_size": 2}
  names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": list(SPECIAL)}
  files = {
    "config.json": {
      "model_type": "qwen3_vl", "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
      "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
      "tie_word_embeddings": True, "text_config": text, "vision_config": vision,
    },
    "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]},
    "preprocessor_config.json": sizes | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "tokenizer_config.json": names | {
      "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
    },
  }  # fmt: skip
  directory.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (directory / name).write_text(json.dumps(content))
  (directory / "chat_template.jinja").write_text(TEMPLATE.replace("assistant\n", f"assistant\n{opening}"))
  tokenizer.save(str(directory / "tokenizer.json"))
  return directory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  """The folder of images that came as bytes, not yet there."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "kepo_jax" / "images"


@pytest.fixture(scope="session")
def make_checkpoint():
  """`write_checkpoint`, for tests that need a folder of their own."""
  return write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def processor(checkpoint) -> processor_lib.Processor:
  return processor_lib.Processor.from_directory(checkpoint, **SMALL)


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> list[Example]:
  """Five questions: with one image, square and wide, with two, with none."""
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(5)
  sizes = {"square": (32, 32), "wide": (96, 32), "tall": (20, 60)}
  for name, (width, height) in sizes.items():
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
  paths = [["square"], ["wide"], ["square", "tall"], [], ["tall"]]
  texts = {"options": ("Brain", "Chest", "Knee"), "question_type": "Anatomy Identification", "dataset": "set"}
  return [
    Example(
      id=f"set/{i}",
      question="Which organ is shown in this image?" + " Look twice." * i,
      answer="ABC"[i % 3],
      images=tuple(str(folder / f"{name}.png") for name in names),
      modality=("MRI", "CT")[i % 2],
      **texts,
    )
    for i, names in enumerate(paths)
  ]
