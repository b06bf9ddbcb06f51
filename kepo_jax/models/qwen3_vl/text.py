"""The text decoder: one layer serves prompts, teacher-forced completions and single new tokens.

Activations are [P, G, T, D]; a prompt is the case G = 1. Heads are [K, J]: J = N / K query heads share a key head.
Keys and values are [P, K, S, H] when all rollouts share them and [P, K, G, T, H] when each has its own, so that
every product is a batched matrix product as it stands, without a transpose of a cache.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kepo_jax.models.qwen3_vl.config import TextConfig
from kepo_jax.models.qwen3_vl.layers import Linear, Params, RMSNorm, Turn, bind, rotated, turn
from kepo_jax.sharding import constrain

# Keys, values and a mask that broadcasts to the scores [P, K, G, T, J, S].
Source = tuple[jax.Array, jax.Array, jax.Array]

# Finite, or a row that may see nothing (a padded prompt) turns into NaN.
_HIDDEN = -1e30


def joint_attention(query: jax.Array, sources: Sequence[Source]) -> jax.Array:
  """Attention with one softmax over the keys of several sources, without concatenating them.

  Args:
    query: [P, K, G, T, J, H], scaled.
    sources: keys and values, shared [P, K, S, H] or per rollout [P, K, G, S, H], and bool masks.

  Returns:
    [P, K, G, T, J, H] in the dtype of the query.
  """
  scores = []
  for keys, _, mask in sources:
    axes = "pksh" if keys.ndim == 4 else "pkgsh"
    raw = jnp.einsum(f"pkgtjh,{axes}->pkgtjs", query, keys, preferred_element_type=jnp.float32)
    scores.append(jnp.where(mask, raw, _HIDDEN))
  peak = scores[0].max(axis=-1, keepdims=True)
  for other in scores[1:]:
    peak = jnp.maximum(peak, other.max(axis=-1, keepdims=True))
  peak = jax.lax.stop_gradient(peak)
  total, mixed = jnp.float32(0), jnp.float32(0)
  for score, (_, values, _) in zip(scores, sources, strict=True):
    axes = "pksh" if values.ndim == 4 else "pkgsh"
    weights = jnp.exp(score - peak)
    total += weights.sum(axis=-1, keepdims=True)
    mixed += jnp.einsum(
      f"pkgtjs,{axes}->pkgtjh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
  return (mixed / total).astype(query.dtype)


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
    self, x: jax.Array, by: Turn, sources: Sequence[Source], own_mask: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = x.shape[:3]
    query = self.q_norm(self.q_proj(x).reshape(*rows, self.kv_heads, self.shared_by, -1))
    key = self.k_norm(self.k_proj(x).reshape(*rows, self.kv_heads, -1))
    value = self.v_proj(x).reshape(*rows, self.kv_heads, -1).transpose(0, 3, 1, 2, 4)
    query = rotated(query, _over_heads(by, 2)) * query.shape[-1] ** -0.5
    query = query.astype(x.dtype).transpose(0, 3, 1, 2, 4, 5)
    key = rotated(key, _over_heads(by, 1)).astype(x.dtype).transpose(0, 3, 1, 2, 4)
    query = constrain(query, "prompt", "kv_heads", "rollout", None, None, None)
    key = constrain(key, "prompt", "kv_heads", "rollout", None, None)
    value = constrain(value, "prompt", "kv_heads", "rollout", None, None)
    mixed = joint_attention(query, [*sources, (key, value, own_mask)])
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
    self, x: jax.Array, by: Turn, sources: Sequence[Source], own_mask: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    mixed, key, value = self.self_attn(self.input_layernorm(x), by, sources, own_mask)
    x = x + mixed
    x = constrain(x + self.mlp(self.post_attention_layernorm(x)), "prompt", "rollout", None, None)
    return x, key, value


def _over_heads(by: Turn, axes: int) -> Turn:
  """Cosine and sine [P, G, T, H / 2] with axes for heads before the last."""
  return jax.tree.map(lambda x: jnp.expand_dims(x, tuple(range(3, 3 + axes))), by)


def _frequencies(config: TextConfig) -> np.ndarray:
  half = config.head_dim // 2
  return (config.rope_theta ** (-np.arange(half) / half)).astype(np.float32)


def axis_of_frequency(config: TextConfig) -> np.ndarray:
  """int32[H / 2]: the position axis (0 temporal, 1 height, 2 width) that turns each rotary frequency.

  The axes are interleaved: frequency j belongs to axis k in (1, 2) if j % 3 == k and j < 3 * section[k].
  """
  frequency = np.arange(config.head_dim // 2)
  axis = np.zeros(config.head_dim // 2, np.int32)
  for k in (1, 2):
    axis[(frequency % 3 == k) & (frequency < 3 * config.mrope_section[k])] = k
  return axis


def prompt_angles(config: TextConfig, positions: jax.Array) -> jax.Array:
  """Rotary angles float32[P, S, H / 2] of int32[P, 3, S] positions."""
  per_frequency = jnp.take(positions, axis_of_frequency(config), axis=1).swapaxes(1, 2)
  return per_frequency.astype(jnp.float32) * _frequencies(config)[None, None]


def completion_angles(config: TextConfig, positions: jax.Array) -> jax.Array:
  """Rotary angles float32[P, T, H / 2] of int32[P, T] positions that are equal on all axes."""
  return positions.astype(jnp.float32)[..., None] * _frequencies(config)[None, None]


def _scan(step, x, layers, remat):
  step = jax.checkpoint(step, prevent_cse=False) if remat else step
  return jax.lax.scan(step, x, layers)


def _prefix_mask(mask: jax.Array) -> jax.Array:
  return mask[:, None, None, None, None, :]


def causal_mask(length: int) -> jax.Array:
  """bool[1, 1, 1, T, 1, T], true where a token may see a token."""
  return jnp.tri(length, dtype=bool)[None, None, None, :, None, :]


def prompt_layers(
  config: TextConfig,
  layers: Params,
  x: jax.Array,
  angles: jax.Array,
  mask: jax.Array,
  deepstack: jax.Array,
  *,
  kind: Callable[[TextConfig], nnx.Module] = DecoderLayer,
  remat: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """All layers over prompts, with DeepStack feature i added after layer i.

  Args:
    config: sizes.
    layers: parameters stacked on axis 0.
    x: [P, S, D], embedded prompts.
    angles: float32[P, S, H / 2].
    mask: bool[P, S], true on real tokens.
    deepstack: [n, P, S, D], zero away from the images; n = 0 without images.
    kind: makes the module of one layer.
    remat: recompute layers in the backward pass.

  Returns:
    x [P, S, D] before the final norm, keys and values [L, P, K, S, H].
  """
  taps = deepstack.shape[0]
  by = turn(angles[:, None])
  visible = causal_mask(x.shape[1]) & _prefix_mask(mask)

  def step(x, layer):
    weights, number = layer
    x, key, value = bind(weights, kind, config)(x, by, (), visible)
    if taps:
      # Inside the scan rather than unrolled: slices of the stack would copy nearly all weights.
      added = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(number, taps - 1), keepdims=False)
      x = x + jnp.where(number < taps, added, jnp.zeros_like(added))[:, None]
    return x, (key[:, :, 0], value[:, :, 0])

  numbers = jnp.arange(config.num_hidden_layers)
  x, (keys, values) = _scan(step, x[:, None], (layers, numbers), remat)
  return x[:, 0], keys, values


def completion_layers(
  config: TextConfig,
  layers: Params,
  x: jax.Array,
  angles: jax.Array,
  prefix: Source,
  *,
  kind: Callable[[TextConfig], nnx.Module] = DecoderLayer,
  remat: bool = False,
) -> jax.Array:
  """All layers over completions [P, G, T, D] that see their prompt and themselves.

  Args:
    config: sizes.
    layers: parameters stacked on axis 0.
    x: [P, G, T, D], embedded completions.
    angles: float32[P, T, H / 2].
    prefix: keys and values [L, P, K, S, H] of the prompts, and their mask bool[P, S].
    kind: makes the module of one layer.
    remat: recompute layers in the backward pass.

  Returns:
    [P, G, T, D] before the final norm.
  """
  keys, values, mask = prefix
  by = turn(angles[:, None])
  visible = causal_mask(x.shape[2])

  def step(x, layer):
    weights, key, value = layer
    sources = ((key, value, _prefix_mask(mask)),)
    return bind(weights, kind, config)(x, by, sources, visible)[0], None

  return _scan(step, x, (layers, keys, values), remat)[0]


def token_layers(
  config: TextConfig,
  layers: Params,
  x: jax.Array,
  angles: jax.Array,
  prefix: Source,
  cache: Source,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """All layers over one new token per rollout.

  The cache is read, never written: the caller stores the new keys and values of all layers at once, so that no
  copy of the cache is carried through the layers.

  Args:
    config: sizes.
    layers: parameters stacked on axis 0.
    x: [P, G, 1, D], embedded tokens.
    angles: float32[P, 1, H / 2].
    prefix: keys and values [L, P, K, S, H] of the prompts, and their mask bool[P, S].
    cache: keys and values [L, P, K, G, T, H] of earlier completion tokens, and a mask bool[T] of those written.

  Returns:
    x [P, G, 1, D] before the final norm, new keys and values [L, P, K, G, 1, H].
  """
  prefix_keys, prefix_values, prefix_mask = prefix
  cache_keys, cache_values, written = cache
  written = written[None, None, None, None, None, :]
  own = jnp.ones((1,) * 6, bool)
  by = turn(angles[:, None])

  def step(x, layer):
    weights, shared_key, shared_value, key, value = layer
    sources = ((shared_key, shared_value, _prefix_mask(prefix_mask)), (key, value, written))
    x, key, value = bind(weights, DecoderLayer, config)(x, by, sources, own)
    return x, (key, value)

  x, (keys, values) = jax.lax.scan(step, x, (layers, prefix_keys, prefix_values, cache_keys, cache_values))
  return x, keys, values
