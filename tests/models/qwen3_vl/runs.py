"""What the tests of this folder run on a model: jitted, as arrays by name."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax.models.qwen3_vl import model, text, vision
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.types import Prompts

# Tiny programs that run once: most of their time is LLVM's, half of which this saves.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def layer_outputs(config: Qwen3VLConfig, params: Any, prompts: Prompts) -> dict[str, np.ndarray]:
  """Hidden states after every layer of decoder and tower, and what the tower hands over.

  Returns:
    `layers` [L, P, S, D], after the DeepStack addition; with images also `blocks` [depth, P, R, Dv],
    `features` [P, M, D] and `deepstack` [n, P, M, D].
  """
  found = tower_outputs(config, params, prompts) if prompts.vision.patches.shape[1] else {}
  layers = decoder_outputs(config, params, prompts, found.get("features"), found.get("deepstack"))
  return {name: np.asarray(value) for name, value in (found | {"layers": layers}).items()}


@functools.partial(fast_jit, static_argnums=0)
def tower_outputs(config: Qwen3VLConfig, params: Any, prompts: Prompts) -> dict[str, jax.Array]:
  """`blocks`, `features` and `deepstack` of `layer_outputs`."""
  every = dataclasses.replace(config.vision, deepstack_visual_indexes=tuple(range(config.vision.depth)))
  _, blocks = vision.tower_blocks(every, params["visual"], prompts.vision)
  features, deepstack = model.encode_images(config, params, prompts.vision)
  return {"blocks": blocks, "features": features, "deepstack": deepstack}


@functools.partial(fast_jit, static_argnums=0)
def decoder_outputs(config: Qwen3VLConfig, params: Any, prompts: Prompts, features: Any, deepstack: Any) -> jax.Array:
  """`layers` of `layer_outputs`: the decoder cut after every layer, on given outputs of the tower."""
  x = model._embedded(config, params, prompts.tokens)
  added = jnp.zeros((0, *x.shape))
  if features is not None:
    x, added = model.with_images(x, prompts.image_slot, features, deepstack)
  angles = text.prompt_angles(config.text, prompts.positions)
  layers = params["language_model"]["layers"]
  outputs = []
  for depth in range(1, config.text.num_hidden_layers + 1):
    part = dataclasses.replace(config.text, num_hidden_layers=depth)
    first = jax.tree.map(lambda leaf, depth=depth: leaf[:depth], layers)
    outputs.append(text.prompt_layers(part, first, x, angles, prompts.mask, added)[0])
  return jnp.stack(outputs)


def completion_logits(config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, remat: str) -> jax.Array:
  """float32[P, G, T, V]: logits that predict the tokens."""
  prefix = model.prefill(config, params, prompts, remat=remat)
  hidden = model.completion_hidden(config, params, prefix, tokens, remat=remat)
  return jnp.einsum("pgtd,vd->pgtv", hidden, model.head_weight(config, params))


def loss(
  config: Qwen3VLConfig, remat: str, params: Any, prompts: Prompts, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean negative log-likelihood of the completions, and their logits."""
  logits = completion_logits(config, params, prompts, tokens, remat)
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
  return -picked.mean(), logits


@functools.partial(fast_jit, static_argnums=(0, 4))
def loss_and_gradient(
  config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, remat: str = "none"
) -> Any:
  """((loss, logits), gradient) of `loss`."""
  return jax.value_and_grad(functools.partial(loss, config, remat), has_aux=True)(params, prompts, tokens)


@functools.partial(fast_jit, static_argnums=(0, 3))
def greedy(config: Qwen3VLConfig, params: Any, prompts: Prompts, steps: int) -> jax.Array:
  """int32[P, steps]: the likeliest tokens, one after the other."""
  prefix = model.prefill(config, params, prompts)
  head = model.head_weight(config, params)
  cache = model.empty_cache(prefix, 1, steps)

  def step(carry, _):
    cache, hidden = carry
    token = jnp.argmax(hidden @ head.T, axis=-1).astype(jnp.int32)
    hidden, cache = model.decode_step(config, params, prefix, cache, token)
    return (cache, hidden), token[:, 0]

  _, tokens = jax.lax.scan(step, (cache, prefix.last_hidden[:, None]), length=steps)
  return tokens.T


def difference(actual: Any, expected: Any) -> float:
  """max|a - b| / max|b|."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  return float(np.abs(actual - expected).max() / np.abs(expected).max())


def difference_in_norm(actual: Any, expected: Any) -> float:
  """|a - b| / |b|."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
