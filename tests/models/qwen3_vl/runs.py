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


@functools.partial(jax.jit, static_argnums=0)
def layer_outputs(config: Qwen3VLConfig, params: Any, prompts: Prompts) -> dict[str, jax.Array]:
  """`layers` [L, P, S, D] after the DeepStack addition; of a tower also `blocks`, `features` and `deepstack`."""
  found = {}
  x = model._embed(config, params, prompts.tokens)
  added = jnp.zeros((0, *x.shape))
  if prompts.vision.patches.shape[1]:
    every = dataclasses.replace(config.vision, deepstack_visual_indexes=tuple(range(config.vision.depth)))
    found["blocks"] = vision.encode_blocks(every, params["visual"], prompts.vision)[1]
    found["features"], found["deepstack"] = model.encode_images(config, params, prompts.vision)
    x, added = model.merge_image_tokens(x, prompts.image_slot, found["features"], found["deepstack"])
  angles = text.prompt_angles(config.text, prompts.positions)
  outputs = []
  for depth in range(1, config.text.num_hidden_layers + 1):  # the decoder, ended after every layer
    part = dataclasses.replace(config.text, num_hidden_layers=depth)
    layers = jax.tree.map(lambda leaf, depth=depth: leaf[:depth], params["language_model"]["layers"])
    outputs.append(text.prompt_layers(part, layers, x, angles, prompts.mask, added)[0])
  return found | {"layers": jnp.stack(outputs)}


@functools.partial(jax.jit, static_argnums=(0, 4))
def logits(config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, remat: str = "none") -> jax.Array:
  """float32[P, G, T, V]: logits that predict the tokens."""
  prefix = model.prefill(config, params, prompts, remat=remat)
  hidden = model.completion_hidden(config, params, prefix, tokens, remat=remat)
  return jnp.einsum("pgtd,vd->pgtv", hidden, model.head_weight(config, params))


@functools.partial(jax.jit, static_argnums=(0, 4))
def loss_and_gradient(config, params, prompts, tokens, remat="none"):
  """((loss, logits), gradient) of the mean negative log-likelihood of the completions."""

  def loss(params):
    found = logits(config, params, prompts, tokens, remat)
    return -jnp.take_along_axis(jax.nn.log_softmax(found), tokens[..., None], axis=-1).mean(), found

  return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(0, 3))
def greedy(config: Qwen3VLConfig, params: Any, prompts: Prompts, steps: int) -> jax.Array:
  prefix = model.prefill(config, params, prompts)
  head = model.head_weight(config, params)

  def step(carry, _):
    cache, hidden = carry
    token = jnp.argmax(hidden @ head.T, axis=-1).astype(jnp.int32)
    hidden, cache = model.decode_step(config, params, prefix, cache, token)
    return (cache, hidden), token[:, 0]

  start = model.empty_cache(prefix, 1, steps), prefix.last_hidden[:, None]
  return jax.lax.scan(step, start, length=steps)[1].T


def difference(actual: Any, expected: Any) -> float:
  """max|a - b| / max|b|."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  return float(np.abs(actual - expected).max() / np.abs(expected).max())


def difference_in_norm(actual: Any, expected: Any) -> float:
  """|a - b| / |b|."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
