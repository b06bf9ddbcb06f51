"""The text decoder: one layer serves prompts, teacher-forced completions and single new tokens.

Activations are [P, G, T, D]; a prompt is the case G = 1. Heads are [K, J]: J = N / K query heads share a key head.
Keys and values are [P, K, S, H] when all rollouts share them and [P, K, G, T, H] when each has its own, so that
every product is a batched matrix product as it stands, without a transpose of a cache.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kepo_jax.models.qwen3_vl.attention import (
  AttentionFn,
  KVSource,
  completion_attention,
  plain_attention,
  prompt_attention,
)
from kepo_jax.models.qwen3_vl.config import TextConfig
from kepo_jax.models.qwen3_vl.layers import CosSin, Linear, Params, RMSNorm, apply_rope, bind, checkpointed, cos_sin
from kepo_jax.sharding import constrain

# New keys and values -> those that the tokens attend to, with their mask. Decoding writes its cache here.
KVWriter = Callable[[jax.Array, jax.Array], KVSource]


class Attention(nnx.Module):
  """Grouped-query attention with RMSNorm of queries and keys before the rotary embedding."""

  def __init__(self, config: TextConfig):
    width, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
    self.kv_heads = config.num_key_value_heads
    self.shared_by = config.num_attention_heads // config.num_key_value_heads
    self.q_proj = Linear(width, config.num_attention_heads * head_dim, ("heads", "embed"), bias)
    self.k_proj = Linear(width, config.num_key_value_heads * head_dim, ("kv_heads", "embed"), bias)
    self.v_proj = Linear(width, config.num_key_value_heads * head_dim, ("kv_heads", "embed"), bias)
    self.o_proj = Linear(config.num_attention_heads * head_dim, width, ("embed", "heads"), bias)
    self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
    self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

  def __call__(
    self,
    x: jax.Array,
    rope: CosSin,
    kv_sources: Sequence[KVSource],
    write_kv: KVWriter,
    attention_fn: AttentionFn = plain_attention,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = x.shape[:3]
    query = self.q_norm(self.q_proj(x).reshape(*rows, self.kv_heads, self.shared_by, -1))
    key = self.k_norm(self.k_proj(x).reshape(*rows, self.kv_heads, -1))
    value = self.v_proj(x).reshape(*rows, self.kv_heads, -1).transpose(0, 3, 1, 2, 4)
    query = apply_rope(query, _with_head_axes(rope, 2)) * query.shape[-1] ** -0.5
    query = query.astype(x.dtype).transpose(0, 3, 1, 2, 4, 5)
    key = apply_rope(key, _with_head_axes(rope, 1)).astype(x.dtype).transpose(0, 3, 1, 2, 4)
    query = constrain(query, "prompt", "kv_heads", "rollout", None, None, None)
    key = constrain(key, "prompt", "kv_heads", "rollout", None, None)
    value = constrain(value, "prompt", "kv_heads", "rollout", None, None)
    key, value, mask = write_kv(key, value)
    mixed = attention_fn(query, [*kv_sources, (key, value, mask)])
    return self.o_proj(mixed.transpose(0, 2, 3, 1, 4, 5).reshape(*rows, -1)), key, value


class MLP(nnx.Module):
  """SwiGLU."""

  def __init__(self, config: TextConfig):
    self.gate_proj = Linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"), bias=False)
    self.up_proj = Linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"), bias=False)
    self.down_proj = Linear(config.intermediate_size, config.hidden_size, ("embed", "mlp"), bias=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    inner = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(constrain(inner, "prompt", "rollout", None, "mlp"))


class DecoderLayer(nnx.Module):
  """Attention and MLP, each after its RMSNorm and around a residual."""

  def __init__(self, config: TextConfig):
    self.self_attn = Attention(config)
    self.mlp = MLP(config)
    self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

  def __call__(
    self,
    x: jax.Array,
    rope: CosSin,
    kv_sources: Sequence[KVSource],
    write_kv: KVWriter,
    attention_fn: AttentionFn = plain_attention,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    mixed, key, value = self.self_attn(self.input_layernorm(x), rope, kv_sources, write_kv, attention_fn)
    x = x + mixed
    x = constrain(x + self.mlp(self.post_attention_layernorm(x)), "prompt", "rollout", None, "embed")
    return x, key, value


def _with_head_axes(rope: CosSin, axes: int) -> CosSin:
  """Inserts axes for heads into cosine and sine [P, G, T, H / 2]."""
  return jax.tree.map(lambda x: jnp.expand_dims(x, tuple(range(3, 3 + axes))), rope)


def _frequencies(config: TextConfig) -> np.ndarray:
  half = config.head_dim // 2
  return (config.rope_theta ** (-np.arange(half) / half)).astype(np.float32)


def axis_of_frequency(config: TextConfig) -> np.ndarray:
  """Returns int32[H / 2]: the position axis (0 temporal, 1 height, 2 width) of each rotary frequency.

  The axes are interleaved: frequency j belongs to axis k in (1, 2) if j % 3 == k and j < 3 * section[k].
  """
  frequency = np.arange(config.head_dim // 2)
  axis = np.zeros(config.head_dim // 2, np.int32)
  for k in (1, 2):
    axis[(frequency % 3 == k) & (frequency < 3 * config.mrope_section[k])] = k
  return axis


def prompt_angles(config: TextConfig, positions: jax.Array) -> jax.Array:
  """Computes rotary angles float32[P, S, H / 2] of int32[P, 3, S] positions."""
  per_frequency = jnp.take(positions, axis_of_frequency(config), axis=1).swapaxes(1, 2)
  return per_frequency.astype(jnp.float32) * _frequencies(config)[None, None]


def completion_angles(config: TextConfig, positions: jax.Array) -> jax.Array:
  """Computes rotary angles float32[P, T, H / 2] of int32[P, T] positions, equal on all axes."""
  return positions.astype(jnp.float32)[..., None] * _frequencies(config)[None, None]


def _scan_layers(step: Callable, x: jax.Array, layers: Any, *others: Any, remat: str = "none") -> tuple[jax.Array, Any]:
  """Runs step(x, (layer, *others of the layer)) -> (x, output) over all layers.

  Stacked layers are scanned: one body to compile, and rematerialisation keeps memory small. Unstacked layers, in
  tuples, run one after the other: slicing a stack inside a loop over tokens would copy every weight for every token.

  Returns:
    x, and the outputs of all layers, stacked or in tuples as the layers.
  """
  step = checkpointed(step, remat)
  if not isinstance(layers, tuple):
    return jax.lax.scan(step, x, (layers, *others))
  outputs = []
  for layer in zip(layers, *others, strict=True):
    x, output = step(x, layer)
    outputs.append(output)
  return x, jax.tree.map(lambda *leaves: leaves, *outputs)


def _prefix_mask(mask: jax.Array) -> jax.Array:
  return mask[:, None, None, None, None, :]


def own_kv(mask: jax.Array) -> KVWriter:
  """Returns a writer for tokens that see each other where the mask is true, without a cache."""
  return lambda key, value: (key, value, mask)


def causal_mask(length: int) -> jax.Array:
  """Returns bool[1, 1, 1, T, 1, T], true where a token may see a token."""
  return jnp.tri(length, dtype=bool)[None, None, None, :, None, :]


def prompt_layers(
  config: TextConfig,
  layers: Params,
  x: jax.Array,
  angles: jax.Array,
  mask: jax.Array,
  deepstack: jax.Array,
  *,
  make_layer: Callable[[TextConfig], nnx.Module] = DecoderLayer,
  remat: str = "none",
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Runs all layers over prompts, with DeepStack feature i added after layer i.

  Args:
    config: sizes.
    layers: parameters stacked on axis 0, or a tuple with those of each layer.
    x: [P, S, D], embedded prompts.
    angles: float32[P, S, H / 2].
    mask: bool[P, S], true on real tokens.
    deepstack: [n, P, S, D], zero away from the images; n = 0 without images.
    make_layer: builds the module of one layer.
    remat: what the backward pass computes again, of `layers.REMAT`.
    implementation: of attention, see `attention.kernel_for`.

  Returns:
    x [P, S, D] before the final norm, keys and values [L, P, K, S, H], stacked or unstacked as the layers.
  """
  deepstack_layers = deepstack.shape[0]
  rope = cos_sin(angles[:, None])
  visible = causal_mask(x.shape[1]) & _prefix_mask(mask)
  attention_fn = functools.partial(prompt_attention, real=mask, implementation=implementation)

  def step(x, layer):
    weights, number = layer
    x, key, value = bind(weights, make_layer, config)(x, rope, (), own_kv(visible), attention_fn)
    if deepstack_layers:
      # Inside the scan rather than unrolled: slices of the stack would copy nearly all weights.
      added = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(number, deepstack_layers - 1), keepdims=False)
      x = x + jnp.where(number < deepstack_layers, added, jnp.zeros_like(added))[:, None]
    return x, (key[:, :, 0], value[:, :, 0])

  numbers = jnp.arange(config.num_hidden_layers)
  x, (keys, values) = _scan_layers(step, x[:, None], layers, numbers, remat=remat)
  return x[:, 0], keys, values


def completion_layers(
  config: TextConfig,
  layers: Params,
  x: jax.Array,
  angles: jax.Array,
  prefix: KVSource,
  *,
  make_layer: Callable[[TextConfig], nnx.Module] = DecoderLayer,
  remat: str = "none",
  implementation: str = "auto",
) -> jax.Array:
  """Runs all layers over completions [P, G, T, D] that see their prompt and themselves.

  Args:
    config: sizes.
    layers: parameters stacked on axis 0, or a tuple with those of each layer.
    x: [P, G, T, D], embedded completions.
    angles: float32[P, T, H / 2].
    prefix: keys and values [L, P, K, S, H] of the prompts, stacked or unstacked as the layers, and their mask
      bool[P, S].
    make_layer: builds the module of one layer.
    remat: what the backward pass computes again, of `layers.REMAT`.
    implementation: of attention, see `attention.kernel_for`.

  Returns:
    [P, G, T, D] before the final norm.
  """
  keys, values, mask = prefix
  rope = cos_sin(angles[:, None])
  visible = causal_mask(x.shape[2])
  attention_fn = functools.partial(completion_attention, real=mask, implementation=implementation)

  def step(x, layer):
    weights, key, value = layer
    kv_sources = ((key, value, _prefix_mask(mask)),)
    return bind(weights, make_layer, config)(x, rope, kv_sources, own_kv(visible), attention_fn)[0], None

  return _scan_layers(step, x, layers, keys, values, remat=remat)[0]


def token_layers(
  config: TextConfig,
  layers: Params,
  x: jax.Array,
  angles: jax.Array,
  prefix: KVSource,
  cache: tuple[Any, Any, jax.Array],
) -> tuple[jax.Array, Any, Any]:
  """Runs all layers over one new token per rollout.

  Args:
    config: sizes.
    layers: parameters stacked on axis 0, or a tuple with those of each layer.
    x: [P, G, 1, D], embedded tokens.
    angles: float32[P, 1, H / 2].
    prefix: keys and values [L, P, K, S, H] of the prompts, stacked or unstacked as the layers, and their mask
      bool[P, S].
    cache: keys and values [L, P, K, G, T, H] of earlier completion tokens, likewise, and the number int32[] of them.

  Returns:
    x [P, G, 1, D] before the final norm, keys and values with the token in them.
  """
  prefix_keys, prefix_values, prefix_mask = prefix
  *cached, length = cache
  slots = jnp.arange(jax.tree.leaves(cached)[0].shape[-2])[None, None, None, None, None, :]
  rope = cos_sin(angles[:, None])
  unstacked = isinstance(layers, tuple)

  def put(old, new):
    return jax.lax.dynamic_update_slice_in_dim(old, new, length, axis=old.ndim - 2)

  def step(x, layer):
    weights, shared_key, shared_value, key, value = layer
    kv_sources = [(shared_key, shared_value, _prefix_mask(prefix_mask))]
    if unstacked:
      # Write, then read: the other way round, XLA copies the cache.
      write_kv = lambda new_key, new_value: (put(key, new_key), put(value, new_value), slots <= length)  # noqa: E731
    else:
      # Read only: a scan would copy every layer of a stack that it writes twice.
      kv_sources.append((key, value, slots < length))
      write_kv = own_kv(jnp.ones((1,) * 6, bool))
    x, key, value = bind(weights, DecoderLayer, config)(x, rope, kv_sources, write_kv)
    return x, (key, value)

  x, (keys, values) = _scan_layers(step, x, layers, prefix_keys, prefix_values, *cached)
  return (x, keys, values) if unstacked else (x, *map(put, cached, (keys, values)))
