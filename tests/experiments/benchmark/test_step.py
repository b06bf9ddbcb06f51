import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmark import peaks, step
from experiments.benchmark.step import MEDIUM, Sizes
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.planning import chips
from tests.models.qwen3_vl import cases

STUDENT = Qwen3VLConfig.from_dict(cases.config_record())


def test_prompts_have_the_sizes_that_were_asked_for():
  prompts = step.made_up_prompts(STUDENT, 3, Sizes(image_tokens=6, text_tokens=5, new_tokens=3))
  assert prompts.tokens.shape == (3, 11) and prompts.mask.all() and ((prompts.image_slot >= 0).sum(-1) == 6).all()
  assert prompts.vision.patches.shape == (3, 6 * 4, STUDENT.vision.patch_width)
  np.testing.assert_array_equal(prompts.vision.coordinates[0].max(0) + 1, (4, 6))  # 2 x 3 merged tokens
  assert not (prompts.tokens[0] == prompts.tokens[1]).all()
  alone = step.made_up_prompts(STUDENT, 2, Sizes(0, 5, 3))
  assert alone.tokens.shape == (2, 5) and alone.vision.patches.shape[1] == 0
  with pytest.raises(ValueError, match="2 text tokens"):
    step.made_up_prompts(STUDENT, 2, Sizes(6, 2, 3))


def test_random_weights_fit_where_they_just_fit_themselves(monkeypatch, mesh_of):
  text = dataclasses.replace(MEDIUM.text, num_hidden_layers=16, vocab_size=1024)
  config = dataclasses.replace(MEDIUM, text=text)
  jit = jax.jit
  monkeypatch.setattr(step.jax, "jit", lambda *args, **settings: jit(*args, **settings).lower)
  lowered = step.random_weights(config, mesh_of(), "bfloat16", seed=0)
  memory = lowered.compile().memory_analysis()
  stack = 16 * config.text.intermediate_size * config.text.hidden_size * 2
  # One stack that is being filled; drawn at once, in float32, they were as large as all weights.
  assert memory.temp_size_in_bytes < 2 * stack < memory.output_size_in_bytes / 2


def test_peaks_are_work_over_the_shortest_time(monkeypatch):
  calls = []
  monkeypatch.setattr(peaks, "seconds", lambda function, *arguments: calls.append(arguments) or float(len(calls)))
  monkeypatch.setattr(peaks, "_sweeps", lambda rows: [4.0, 2.0])
  chip = peaks.chip_of(jax.devices()[0], "float32")
  assert (chip.flops, chip.bandwidth, chip.measured) == (2 * 2048**3, 2 * 4 * 2**24 / 2, True)
  # A data sheet is for bfloat16.
  monkeypatch.setattr(peaks, "data_sheet", lambda device: chips.CHIPS["H100"])
  assert peaks.chip_of(jax.devices()[0], "bfloat16") is chips.CHIPS["H100"]
  assert peaks.chip_of(jax.devices()[0], "float32").measured
