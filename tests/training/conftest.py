"""A tiny model and a batch of it, drawn from seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.data import splits
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from kepo_jax.types import Experience
from tests.models.qwen3_vl.cases import make_prompts
from tests.training import runs

P, G, T, VOCABULARY = 4, 4, 6, 40


@pytest.fixture(scope="session")
def tiny_config() -> Qwen3VLConfig:
  """Two decoder layers, one of them with DeepStack, and two vision blocks."""
  return Qwen3VLConfig(
    text=TextConfig(
      vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
      num_key_value_heads=1, head_dim=8, rope_theta=100.0, mrope_section=(2, 1, 1),
    ),
    vision=VisionConfig(
      depth=2, hidden_size=8, intermediate_size=16, num_heads=2, out_hidden_size=16, num_position_embeddings=16,
      deepstack_visual_indexes=(0,), patch_size=2,
    ),
    tie_word_embeddings=True, image_token_id=30, video_token_id=31, vision_start_token_id=32, vision_end_token_id=33,
  )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
  """float32 parameters, on the host: updates consume what lies on a device."""
  return jax.device_get(model.init_params(tiny_config, jax.random.key(1)))


@pytest.fixture(scope="session")
def tiny_experience(tiny_config) -> Experience:
  """Rollouts of four prompts with an image of 2 x 2 patches each; gated and injected here and there."""
  prompts = make_prompts(tiny_config, [(1, (2, 2), size) for size in (1, 4, 2, 3)], seed=2)[0]
  rng = np.random.default_rng(3)
  lengths = rng.integers(1, T + 1, (P, G, 1))
  mask = np.arange(T) < lengths
  injected = np.zeros((P, G), bool)
  injected[1, 2] = injected[3, 0] = True
  return Experience(
    prompts=prompts, tokens=np.where(mask, rng.integers(2, 20, (P, G, T)), 0).astype(np.int32), mask=mask,
    logps=np.where(mask, -rng.random((P, G, T)), 0).astype(np.float32),
    advantages=rng.normal(size=(P, G)).astype(np.float32), gate=rng.random((P, G)) < 0.5, injected=injected,
    supervised=np.zeros((P, G), bool), kept=np.ones((P, G), bool),
  )  # fmt: skip


@pytest.fixture(scope="session")
def allowed() -> jnp.ndarray:
  """bool[V], everything but the vision specials."""
  return jnp.arange(VOCABULARY) < 30


@pytest.fixture(scope="session")
def questions():
  """Few questions, a quarter of them of the kind that the student believes wrong things about."""
  return splits.load(runs.small().data)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, questions):
  """(workdir, result, recorder) of a run that nothing disturbed and nothing may change; copy it first."""
  workdir, recorder = tmp_path_factory.mktemp("run") / "whole", runs.Recorder()
  return workdir, runs.train(runs.small(), workdir, records=questions, hooks=[recorder]), recorder
