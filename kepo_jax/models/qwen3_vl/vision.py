"""The vision tower: patches and index tables in, image tokens and DeepStack features out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kepo_jax.models.qwen3_vl.attention import image_attention
from kepo_jax.models.qwen3_vl.config import VisionConfig
from kepo_jax.models.qwen3_vl.layers import (
  CosSin,
  Embedding,
  LayerNorm,
  Linear,
  Params,
  apply_rope,
  bind,
  checkpointed,
  cos_sin,
)
from kepo_jax.sharding import constrain
from kepo_jax.types import VisionInputs

# (query, key, value), each [P, N, R, H] -> [P, R, N, H].
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Attention(nnx.Module):
  """Full attention inside each image; fused query, key and value."""

  def __init__(self, config: VisionConfig):
    self.heads = config.num_heads
    self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, (None, "vision"))
    self.proj = Linear(config.hidden_size, config.hidden_size, ("vision", None))

  def __call__(self, x: jax.Array, rope: CosSin, attention_fn: AttentionFn) -> jax.Array:
    prompts, rows, width = x.shape
    head_dim = width // self.heads
    split = self.qkv(x).reshape(prompts, rows, 3, self.heads, head_dim)
    query, key, value = (split[:, :, i].swapaxes(1, 2) for i in range(3))  # [P, N, R, H]
    query = (apply_rope(query, rope) * head_dim**-0.5).astype(x.dtype)
    key = apply_rope(key, rope).astype(x.dtype)
    return self.proj(attention_fn(query, key, value).reshape(x.shape))


class MLP(nnx.Module):
  """Two layers with the tanh implementation of GELU between them."""

  def __init__(self, config: VisionConfig):
    self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size, (None, "vision"))
    self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, ("vision", None))

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=True))


class Block(nnx.Module):
  """Attention and MLP, each after its LayerNorm and around a residual."""

  def __init__(self, config: VisionConfig):
    self.norm1 = LayerNorm(config.hidden_size)
    self.norm2 = LayerNorm(config.hidden_size)
    self.attn = Attention(config)
    self.mlp = MLP(config)

  def __call__(self, x: jax.Array, rope: CosSin, attention_fn: AttentionFn) -> jax.Array:
    x = x + self.attn(self.norm1(x), rope, attention_fn)
    return constrain(x + self.mlp(self.norm2(x)), "prompt", None, None)


class PatchMerger(nnx.Module):
  """Patch rows of a merge block become one image token of the text width.

  The merger of the last block normalises rows before grouping them, those of the DeepStack layers after.
  """

  def __init__(self, config: VisionConfig, norm_after_grouping: bool):
    width = config.hidden_size * config.merge_area
    self.merge_area = config.merge_area
    self.norm_after_grouping = norm_after_grouping
    self.norm = LayerNorm(width if norm_after_grouping else config.hidden_size)
    self.linear_fc1 = Linear(width, width, (None, "vision"))
    self.linear_fc2 = Linear(width, config.out_hidden_size, (None, "vision"))

  def __call__(self, x: jax.Array) -> jax.Array:
    prompts, rows, width = x.shape
    grouped = (prompts, rows // self.merge_area, self.merge_area * width)
    x = self.norm(x.reshape(grouped)) if self.norm_after_grouping else self.norm(x).reshape(grouped)
    return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class PatchEmbed(nnx.Module):
  """A convolution whose stride is its kernel: one matrix product per flattened patch."""

  def __init__(self, config: VisionConfig):
    self.proj = Linear(config.patch_width, config.hidden_size, ("vision", None))

  def __call__(self, patches: jax.Array) -> jax.Array:
    return self.proj(patches.astype(self.proj.weight[...].dtype))


def _angles(config: VisionConfig, coordinates: jax.Array) -> jax.Array:
  """Computes rotary angles float32[P, R, H / 2]: a quarter of the head for the row, a quarter for the column."""
  quarter = config.head_dim // 4
  frequencies = (config.rope_theta ** (-np.arange(quarter) / quarter)).astype(np.float32)
  angles = coordinates.astype(jnp.float32)[..., None] * frequencies[None, None, None]
  return angles.reshape(*coordinates.shape[:2], 2 * quarter)


def _embed(config: VisionConfig, params: Params, vision: VisionInputs) -> jax.Array:
  """Adds to the patch embeddings the position table, resampled to each image's grid: [P, R, Dv]."""
  x = bind(params["patch_embed"], PatchEmbed, config)(vision.patches)
  table = bind(params["pos_embed"], Embedding, config.num_position_embeddings, config.hidden_size, (None, "vision"))
  lines = table(vision.table_index).astype(jnp.float32)  # [P, R, 4, Dv]
  positions = (lines * vision.table_weight[..., None]).sum(axis=2)
  return constrain(x + positions.astype(x.dtype), "prompt", None, None)


def encode_blocks(
  config: VisionConfig, params: Params, vision: VisionInputs, *, remat: str = "none", implementation: str = "auto"
) -> tuple[jax.Array, jax.Array]:
  """Runs the blocks: patch rows after the last one [P, R, Dv] and after every DeepStack block [n, P, R, Dv]."""
  x = _embed(config, params, vision)
  rope = cos_sin(_angles(config, vision.coordinates)[:, None])  # [P, 1, R, H / 2]
  attention_fn = image_attention(vision.segments, implementation)

  # One scan over all blocks: a DeepStack block writes its output into its slot, the others into a spare one.
  # Scanning slices of the stack instead would copy the weights.
  deepstack_layers = config.deepstack_visual_indexes
  slots = np.full(config.depth, len(deepstack_layers), np.int32)
  slots[list(deepstack_layers)] = np.arange(len(deepstack_layers))

  def step(carry, layer):
    x, deepstack = carry
    weights, slot = layer
    x = bind(weights, Block, config)(x, rope, attention_fn)
    return (x, jax.lax.dynamic_update_index_in_dim(deepstack, x, slot, axis=0)), None

  deepstack = jnp.zeros((len(deepstack_layers) + 1, *x.shape), x.dtype)
  (x, deepstack), _ = jax.lax.scan(checkpointed(step, remat), (x, deepstack), (params["blocks"], slots))
  return x, deepstack[:-1]


def encode(
  config: VisionConfig, params: Params, vision: VisionInputs, *, remat: str = "none", implementation: str = "auto"
) -> tuple[jax.Array, jax.Array]:
  """Encodes the images of every prompt; also returns the features of the DeepStack layers.

  Args:
    config: sizes of the tower.
    params: the tower's parameters, blocks stacked on axis 0.
    vision: patches [P, R, C] and their tables.
    remat: what the backward pass computes again, of `layers.REMAT`.
    implementation: of attention, see `attention.kernel_for`.

  Returns:
    features [P, M, D] and deepstack [n, P, M, D], n the number of deepstack_layers, in the dtype of the parameters.
  """
  x, deepstack = encode_blocks(config, params, vision, remat=remat, implementation=implementation)
  features = bind(params["merger"], PatchMerger, config, False)(x)
  if not config.deepstack_visual_indexes:
    return features, jnp.zeros((0, *features.shape), features.dtype)
  merge = jax.vmap(lambda weights, rows: bind(weights, PatchMerger, config, True)(rows))
  return features, merge(params["deepstack_merger_list"], deepstack)
