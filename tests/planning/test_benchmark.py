import dataclasses
import json

import jax
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import side_files
from kepo_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from kepo_jax.planning import benchmark
from tests.models.qwen3_vl import cases

STUDENT = Qwen3VLConfig.from_dict(cases.config_record())
SMALL = benchmark.Sizes(image_tokens=6, text_tokens=5, new_tokens=3)


def test_models_are_sizes_or_folders(tmp_path):
  for name in ("Qwen3-VL-2B", "Qwen/Qwen3-VL-2B-Instruct", "/models/Qwen3-VL-2B-Thinking"):
    assert benchmark.model_config(name) == SIZES["Qwen3-VL-2B"], name
  (tmp_path / "config.json").write_text(json.dumps(side_files.config_record(STUDENT)))
  assert benchmark.model_config(str(tmp_path)) == STUDENT
  with pytest.raises(ValueError, match="'nowhere' is neither a folder .*Qwen3-VL-2B"):
    benchmark.model_config("nowhere")


def test_prompts_have_the_sizes_that_were_asked_for():
  prompts = benchmark.made_up_prompts(STUDENT, 3, SMALL)
  assert prompts.tokens.shape == (3, 11) and prompts.mask.all()
  assert ((prompts.image_slot >= 0).sum(-1) == 6).all()
  assert prompts.vision.patches.shape == (3, 6 * 4, STUDENT.vision.patch_width)
  np.testing.assert_array_equal(prompts.vision.coordinates[0].max(0) + 1, (4, 6))  # 2 x 3 merged tokens
  assert not (prompts.tokens[0] == prompts.tokens[1]).all()
  alone = benchmark.made_up_prompts(STUDENT, 2, benchmark.Sizes(0, 5, 3))
  assert alone.tokens.shape == (2, 5) and alone.vision.patches.shape[1] == 0
  with pytest.raises(ValueError, match="2 text tokens"):
    benchmark.made_up_prompts(STUDENT, 2, benchmark.Sizes(6, 2, 3))


def test_random_weights_fit_where_they_just_fit_themselves(monkeypatch, mesh_of):
  text = dataclasses.replace(benchmark.MEDIUM.text, num_hidden_layers=16, vocab_size=1024)
  config = dataclasses.replace(benchmark.MEDIUM, text=text)
  jit = jax.jit
  monkeypatch.setattr(benchmark.jax, "jit", lambda *args, **settings: jit(*args, **settings).lower)
  lowered = benchmark.random_weights(config, mesh_of(), "bfloat16", seed=0)
  memory = lowered.compile().memory_analysis()
  stack = 16 * config.text.intermediate_size * config.text.hidden_size * 2
  # One stack that is being filled; drawn at once, in float32, they were as large as all weights.
  assert memory.temp_size_in_bytes < 2 * stack < memory.output_size_in_bytes / 2


def test_no_completion_ends_and_no_special_is_sampled():
  special = benchmark.special_tokens(STUDENT)
  assert not special.allowed[[*special.end_ids, 90, 91, 92, 93]].any()
  assert special.allowed.sum() == 96 - 5
