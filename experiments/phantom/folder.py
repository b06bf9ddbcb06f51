"""The side files of a phantom model: tokenizer, chat template, processor and model configuration.

The tokenizer is a byte-level BPE trained on the benchmark's own wording: each benchmark word is one token, and every
other UTF-8 string falls back to pieces and bytes and round-trips.
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.phantom import corpus

SPECIAL = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<hint>", "</hint>")
# A letter with its colon is one piece (" A:"), so that the option's word follows its letter directly.
PIECES = r" ?[A-Z]:| ?[\w-]+| ?[^\s\w]+|\s+"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{%- if message.content is string -%}{{ ' ' + message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{%- endif -%}
"""
MAX_POSITIONS = 4096


def make_tokenizer() -> Tokenizer:
  """The benchmark's tokenizer, the same on every call."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=2000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
  )
  tokenizer.train_from_iterator(corpus.wording(), trainer)
  tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
  tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in TAGS])
  return tokenizer


def model_config(
  tokenizer: Tokenizer, *, width: int, mlp: int, layers: int, vision_width: int, vision_mlp: int
) -> dict:
  """`config.json` of the genuine Qwen3-VL schema; the head has a few more rows than the tokenizer has entries."""
  ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
  text = {
    "model_type": "qwen3_vl_text",
    "vocab_size": -(-tokenizer.get_vocab_size() // 32) * 32,
    "hidden_size": width,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    "max_position_embeddings": MAX_POSITIONS,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": ids["<|endoftext|>"],
    "eos_token_id": ids["<|im_end|>"],
    "dtype": "bfloat16",
  }
  vision = {
    "model_type": "qwen3_vl",
    "depth": 3,
    "hidden_size": vision_width,
    "intermediate_size": vision_mlp,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": width,
    "deepstack_visual_indexes": [0, 1],
    "hidden_act": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
  }
  return {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "image_token_id": ids["<|image_pad|>"],
    "video_token_id": ids["<|video_pad|>"],
    "vision_start_token_id": ids["<|vision_start|>"],
    "vision_end_token_id": ids["<|vision_end|>"],
    "tie_word_embeddings": True,
    "text_config": text,
    "vision_config": vision,
  }


def write_folder(directory: pathlib.Path, config: dict) -> None:
  """Every file of a model folder except the weights."""
  tokenizer = make_tokenizer()
  ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
  files = {
    "config.json": config,
    "generation_config.json": {
      "bos_token_id": ids["<|endoftext|>"],
      "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
      "pad_token_id": ids["<|endoftext|>"],
      "do_sample": True,
      "temperature": 1.0,
    },
    "preprocessor_config.json": {
      "image_processor_type": "Qwen2VLImageProcessor",
      "do_convert_rgb": True,
      "do_resize": True,
      "do_rescale": True,
      "do_normalize": True,
      "resample": 3,
      "rescale_factor": 1 / 255,
      "image_mean": [0.5, 0.5, 0.5],
      "image_std": [0.5, 0.5, 0.5],
      "min_pixels": 64 * 64,
      "max_pixels": 128 * 128,
      "size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128},
      "patch_size": 8,
      "temporal_patch_size": 2,
      "merge_size": 2,
    },
    "tokenizer_config.json": {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      "model_max_length": MAX_POSITIONS,
      "eos_token": "<|im_end|>",
      "pad_token": "<|endoftext|>",
      "additional_special_tokens": list(SPECIAL),
      "kepo_templates": "brief",  # the wordings of kepo_jax/data/prompts.py that the model knows
      "kepo_resize": "native",  # and how its images were brought to size
    },
  }
  directory.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (directory / name).write_text(json.dumps(content, indent=2) + "\n")
  (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
  tokenizer.save(str(directory / "tokenizer.json"))
