"""Qwen3-VL as pure functions of a parameter tree: prompts once, completions and tokens on top of them.

The tree mirrors the names of Hugging Face's checkpoint: `visual`, `language_model` and, when the head is not the
embedding, `lm_head`; layers are stacked on axis 0, or in a tuple after `unstack_layers`. Caches are then
tuples as well, documented as [L, ...] all the same. A config with `lora` adds the part `lora`. Activations have the
dtype of the parameters; norms, softmax and rotary angles are float32. `Cache` and `Prefix` hold keys after the rotary
embedding.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from kepo_jax.models.qwen3_vl import lora, text, vision
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.models.qwen3_vl.layers import (
  Embedding,
  Linear,
  Params,
  RMSNorm,
  bind,
  definition,
  stacked,
  stacked_axes,
)
from kepo_jax.sharding import constrain
from kepo_jax.types import Prompts, VisionInputs


@chex.dataclass(frozen=True)
class Prefix:
  """What completions need of their prompts."""

  keys: Any  # [L, P, K, S, H], after the rotary embedding; stacked or unstacked as the layers
  values: Any  # [L, P, K, S, H], likewise
  mask: jax.Array  # bool[P, S], true on real tokens
  next_position: jax.Array  # int32[P], position of the first completion token on all axes
  last_hidden: jax.Array  # [P, D], final-normed hidden state of the last real token: predicts completion token 0


@chex.dataclass(frozen=True)
class Cache:
  """Keys and values of the completion tokens so far."""

  keys: Any  # [L, P, K, G, T, H], after the rotary embedding; stacked or unstacked as the layers
  values: Any  # [L, P, K, G, T, H], likewise
  length: jax.Array  # int32[], completion tokens written


def _modules(config: Qwen3VLConfig) -> dict[tuple[str, ...], tuple[Any, int]]:
  """Returns path in the tree -> (definition, number of stacked layers; 0 for a single module)."""
  tower, decoder = config.vision, config.text
  modules: dict[tuple[str, ...], tuple[Any, int]] = {
    ("visual", "patch_embed"): (definition(vision.PatchEmbed, tower), 0),
    ("visual", "pos_embed"): (
      definition(Embedding, tower.num_position_embeddings, tower.hidden_size, (None, "vision")),
      0,
    ),
    ("visual", "blocks"): (definition(vision.Block, tower), tower.depth),
    ("visual", "merger"): (definition(vision.PatchMerger, tower, False), 0),
    ("language_model", "embed_tokens"): (
      definition(Embedding, decoder.vocab_size, decoder.hidden_size, ("vocab", "embed")),
      0,
    ),
    ("language_model", "layers"): (definition(text.DecoderLayer, decoder), decoder.num_hidden_layers),
    ("language_model", "norm"): (definition(RMSNorm, decoder.hidden_size, decoder.rms_norm_eps), 0),
  }
  deepstack_layers = len(tower.deepstack_visual_indexes)
  if deepstack_layers:
    modules["visual", "deepstack_merger_list"] = (definition(vision.PatchMerger, tower, True), deepstack_layers)
  if not config.tie_word_embeddings:
    head = definition(Linear, decoder.hidden_size, decoder.vocab_size, ("vocab", "embed"), False)
    modules[("lm_head",)] = (head, 0)
  if config.lora is not None:
    modules[(lora.PART,)] = (lora.matrices(decoder, config.lora), decoder.num_hidden_layers)
  return modules


def _tree(config: Qwen3VLConfig, leaf_of) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, (module, layers) in _modules(config).items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf_of(module, layers)
  return tree


def abstract_params(config: Qwen3VLConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
  """Returns the parameter tree as jax.ShapeDtypeStruct of `dtype`; the matrices of LoRA are float32 in any case."""
  shapes = _tree(config, lambda module, layers: stacked(module.shapes, layers) if layers else module.shapes)
  base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), lora.without(shapes))
  return base | {name: part for name, part in shapes.items() if name == lora.PART}


def logical_axes(config: Qwen3VLConfig) -> dict[str, Any]:
  """Returns the parameter tree with a tuple of logical axis names at each leaf, for `sharding.weight_shardings`."""
  return _tree(config, lambda module, layers: stacked_axes(module.axes) if layers else module.axes)


def unstacked_axes(config: Qwen3VLConfig) -> dict[str, Any]:
  """Returns `logical_axes` after `unstack_layers`."""
  axes = logical_axes(config)
  layer = definition(text.DecoderLayer, config.text).axes
  return axes | {"language_model": axes["language_model"] | {"layers": (layer,) * config.text.num_hidden_layers}}


def init_params(
  config: Qwen3VLConfig, key: jax.Array, dtype: Any = jnp.float32, *, by_layer: bool = False
) -> dict[str, Any]:
  """Draws random parameters: matrices and tables normal with deviation 1/sqrt(width), norms 1, biases 0.

  Args:
    config: sizes, without `lora`, whose matrices `lora.initial` draws.
    key: jax.random key.
    dtype: of the parameters.
    by_layer: draw stacked layers one by one, with other random numbers. The float32 numbers of a stack need more memory
      than the bfloat16 weights of a large model.
  """
  axes = logical_axes(config)
  numbered = iter(range(10**6))

  def draw(path, leaf, names):
    leaf_key = jax.random.fold_in(key, next(numbered))
    if path[-1].key == "bias":
      return jnp.zeros(leaf.shape, leaf.dtype)
    if len(names) - _is_stacked(path) == 1:
      return jnp.ones(leaf.shape, leaf.dtype)

    def matrix(key, shape):
      return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(leaf.dtype)

    if by_layer and _is_stacked(path):
      return jax.lax.map(lambda layer_key: matrix(layer_key, leaf.shape[1:]), jax.random.split(leaf_key, leaf.shape[0]))
    return matrix(leaf_key, leaf.shape)

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config, dtype), axes)


def _is_stacked(path) -> bool:
  return any(part.key in ("blocks", "layers", "deepstack_merger_list") for part in path)


def cast(params: Params, dtype: Any) -> Any:
  """Casts the parameters to another dtype."""
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def head_weight(config: Qwen3VLConfig, params: Params) -> jax.Array:
  """Returns [V, D], the weight of the logits: the embedding when the head is tied to it."""
  module = params["language_model"]["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
  return module["weight"]


def _embed(config: Qwen3VLConfig, params: Params, tokens: jax.Array) -> jax.Array:
  weights = params["language_model"]["embed_tokens"]
  return bind(weights, Embedding, config.text.vocab_size, config.text.hidden_size, ("vocab", "embed"))(tokens)


def _decoder_layers(config: Qwen3VLConfig, params: Params) -> tuple[Params, Any]:
  """Returns the parameters of the decoder's layers and the factory of their module, both with LoRA if there is any."""
  layers = params["language_model"]["layers"]
  return lora.joined(layers, params[lora.PART]) if config.lora else layers, lora.layer_factory(config.lora)


def _final_norm(config: Qwen3VLConfig, params: Params, x: jax.Array) -> jax.Array:
  norm = bind(params["language_model"]["norm"], RMSNorm, config.text.hidden_size, config.text.rms_norm_eps)
  return norm(x)


def encode_images(
  config: Qwen3VLConfig, params: Params, inputs: VisionInputs, *, remat: str = "none"
) -> tuple[jax.Array, jax.Array]:
  """Encodes images: image tokens [P, M, D] of every prompt and DeepStack features [n, P, M, D]."""
  chex.assert_shape(inputs.patches, (None, None, config.vision.patch_width))
  return vision.encode(config.vision, params["visual"], inputs, remat=remat, implementation=config.attention)


def merge_image_tokens(
  x: jax.Array, image_slot: jax.Array, features: jax.Array, deepstack: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Puts image tokens into embeddings [P, S, D], and DeepStack features into [n, P, S, D], zero elsewhere.

  Args:
    x: [P, S, D], embedded tokens.
    image_slot: int32[P, S], merged image row that replaces the token, -1 elsewhere.
    features: [P, M, D], and deepstack [n, P, M, D], as `encode_images` gives them.
    deepstack: see features.
  """
  slot = jnp.maximum(image_slot, 0)[..., None]
  is_image = (image_slot >= 0)[..., None]
  x = jnp.where(is_image, jnp.take_along_axis(features, slot, axis=1), x)
  spread = jax.vmap(lambda feature: jnp.take_along_axis(feature, slot, axis=1))(deepstack)
  return x, jnp.where(is_image[None], spread, jnp.zeros_like(spread))


def prefill(config: Qwen3VLConfig, params: Params, prompts: Prompts, *, remat: str = "none") -> Prefix:
  """Computes keys and values of prompts, once for all their rollouts. Gradients flow through.

  Args:
    config: sizes.
    params: parameter tree; its dtype is that of the computation.
    prompts: P right-padded prompts; without images R = 0 and the tower is skipped.
    remat: what the backward pass computes again, of `layers.REMAT`.
  """
  chex.assert_rank([prompts.tokens, prompts.mask, prompts.positions], [2, 2, 3])
  x = _embed(config, params, prompts.tokens)
  deepstack = jnp.zeros((0, *x.shape), x.dtype)
  if prompts.vision.patches.shape[1]:
    x, deepstack = merge_image_tokens(
      x, prompts.image_slot, *encode_images(config, params, prompts.vision, remat=remat)
    )
  x, deepstack = constrain(x, "prompt", None, None), constrain(deepstack, None, "prompt", None, None)
  angles = text.prompt_angles(config.text, prompts.positions)
  layers, make_layer = _decoder_layers(config, params)
  x, keys, values = text.prompt_layers(
    config.text,
    layers,
    x,
    angles,
    prompts.mask,
    deepstack,
    make_layer=make_layer,
    remat=remat,
    implementation=config.attention,
  )
  last = jnp.maximum(prompts.mask.sum(axis=-1) - 1, 0)
  last_hidden = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
  return Prefix(
    keys=keys,
    values=values,
    mask=prompts.mask,
    next_position=prompts.next_position,
    last_hidden=_final_norm(config, params, last_hidden),
  )


def extend(
  config: Qwen3VLConfig, params: Params, prefix: Prefix, tokens: jax.Array, *, remat: str = "none"
) -> jax.Array:
  """Computes final-normed hidden states of completions, which see their prompt and themselves. Gradients flow through.

  Args:
    config: sizes.
    params: parameter tree.
    prefix: of P prompts.
    tokens: int32[P, G, T], G completions of each prompt; what follows an end token changes nothing before it.
    remat: what the backward pass computes again, of `layers.REMAT`.

  Returns:
    [P, G, T, D]; the state at t has seen token t and predicts token t + 1.
  """
  chex.assert_rank(tokens, 3)
  x = constrain(_embed(config, params, tokens), "prompt", "rollout", None, None)
  positions = prefix.next_position[:, None] + jnp.arange(tokens.shape[-1])[None]
  angles = text.completion_angles(config.text, positions)
  source = (prefix.keys, prefix.values, prefix.mask)
  layers, make_layer = _decoder_layers(config, params)
  x = text.completion_layers(
    config.text, layers, x, angles, source, make_layer=make_layer, remat=remat, implementation=config.attention
  )
  return _final_norm(config, params, x)


def completion_hidden(
  config: Qwen3VLConfig, params: Params, prefix: Prefix, tokens: jax.Array, *, remat: str = "none"
) -> jax.Array:
  """Computes [P, G, T, D]: hidden states that predict the tokens int32[P, G, T], the first one from the prompt."""
  prompts, rollouts, length = tokens.shape
  first = jnp.broadcast_to(prefix.last_hidden[:, None, None], (prompts, rollouts, 1, prefix.last_hidden.shape[-1]))
  if length == 1:
    return first
  later = extend(config, params, prefix, tokens[..., :-1], remat=remat)
  return constrain(jnp.concatenate([first, later], axis=2), "prompt", "rollout", None, None)


def unstack_layers(params: Params) -> Any:
  """Unstacks the decoder's layers into a tuple, for loops over tokens: see `text`."""
  decoder = params["language_model"]
  depth = jax.tree.leaves(decoder["layers"])[0].shape[0]
  layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], decoder["layers"]) for i in range(depth))
  return {**params, "language_model": {**decoder, "layers": layers}}


def empty_cache(prefix: Prefix, rollouts: int, length: int) -> Cache:
  """Makes a cache for `length` tokens of `rollouts` completions of each prompt of `prefix`."""

  def blank(shared):
    *rows, _, head_dim = shared.shape
    axes = (None,) * (len(rows) - 2) + ("prompt", "kv_heads", "rollout", None, None)
    return constrain(jnp.zeros((*rows, rollouts, length, head_dim), shared.dtype), *axes)

  keys, values = jax.tree.map(blank, (prefix.keys, prefix.values))
  return Cache(keys=keys, values=values, length=jnp.zeros((), jnp.int32))


def grow_cache(cache: Cache, length: int) -> Cache:
  """Grows the cache to `length` completion tokens."""

  def pad(x):
    return jnp.pad(x, [(0, length - n if axis == x.ndim - 2 else 0) for axis, n in enumerate(x.shape)])

  keys, values = jax.tree.map(pad, (cache.keys, cache.values))
  return Cache(keys=keys, values=values, length=cache.length)


def decode_step(
  config: Qwen3VLConfig, params: Params, prefix: Prefix, cache: Cache, token: jax.Array
) -> tuple[jax.Array, Cache]:
  """Decodes one more token for every rollout.

  Args:
    config: sizes.
    params: parameter tree.
    prefix: of P prompts.
    cache: of the completion tokens so far.
    token: int32[P, G], the completion token at position `cache.length`.

  Returns:
    Final-normed hidden states [P, G, D], which predict the next token, and the cache with the token in it.
  """
  chex.assert_rank(token, 2)
  if config.lora is not None:
    raise ValueError("tokens are decoded from merged weights: use lora.merged, and lora.base for the config.")
  x = constrain(_embed(config, params, token[..., None]), "prompt", "rollout", None, "embed")
  angles = text.completion_angles(config.text, (prefix.next_position + cache.length)[:, None])
  x, keys, values = text.token_layers(
    config.text,
    params["language_model"]["layers"],
    x,
    angles,
    (prefix.keys, prefix.values, prefix.mask),
    (cache.keys, cache.values, cache.length),
  )
  cache = Cache(keys=keys, values=values, length=cache.length + 1)
  return _final_norm(config, params, x)[:, :, 0], cache
