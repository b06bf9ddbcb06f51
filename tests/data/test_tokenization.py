"""Which ids a model may sample, by the files of its folder."""

import dataclasses

import numpy as np
from transformers import AutoTokenizer

from kepo_jax.data.tokenization import Tokenizer
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig


def test_vision_tokens_are_banned_by_their_names_alone(checkpoint):
  tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
  tokenizer.add_tokens(["<|vision_pad|>"], special_tokens=True)  # of which no config.json knows
  spare = len(tokenizer)  # a row of the head without an entry: config.json bans nothing else
  fields = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
  config = dataclasses.replace(Qwen3VLConfig.from_directory(checkpoint), **dict.fromkeys(fields, spare))
  allowed = Tokenizer(tokenizer, config, {}, "folder").allowed
  names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
  banned = set(tokenizer.convert_tokens_to_ids(list(names)))
  assert len(banned) == 5 and max(banned) < spare
  assert set(np.flatnonzero(~allowed[:spare])) == banned
