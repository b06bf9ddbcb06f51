"""cuDNN's flash attention, which JAX ships as `jax.nn.dot_product_attention`, in the three uses of this model.

Prompts and completions are described by causality and lengths alone: a mask would become a bias, which cuDNN reads
for every head, whose gradient it always writes, and under which it skips no block. Queries come scaled.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kepo_jax.models.qwen3_vl.layers import repeated

Implementation = Literal["cudnn", "xla"]

_LARGEST_HEAD = 128
_OLDEST = 8.0  # compute capability of Ampere


def why_unsupported(dtype: Any, head_dim: int) -> str:
  """Says why the kernel cannot serve heads of a dtype and a size on the devices of the current mesh; "" if it can."""
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"cuDNN's attention computes in bfloat16 or float16, not in {jnp.dtype(dtype)}"
  if head_dim % 8 or head_dim > _LARGEST_HEAD:
    return f"cuDNN's attention is for heads of a multiple of 8 up to {_LARGEST_HEAD}, these have {head_dim}"
  planned = jax.sharding.get_abstract_mesh().abstract_device
  if jax.default_backend() != "gpu" and planned and "NVIDIA" in planned.device_kind:
    return ""  # a plan for GPUs that are not here, all of them newer than Ampere
  device = jax.local_devices()[0]
  # Other makers' GPUs are of platform "gpu" too.
  if "cuda" not in device.client.platform_version:
    return f"cuDNN is for NVIDIA's GPUs, this is {device.device_kind}"
  if float(device.compute_capability) < _OLDEST:
    return f"cuDNN's attention needs compute capability {_OLDEST}, {device.device_kind} has {device.compute_capability}"
  return ""


def _causal(
  query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, implementation: Implementation
) -> jax.Array:
  """Computes causal attention [B, S, N, H] over the first `lengths` int32[B] tokens of each row; zero after them."""
  odd = query.shape[1] % 2  # JAX refuses a gradient over an odd length
  query, key, value = (jnp.pad(x, [(0, 0), (0, odd), (0, 0), (0, 0)]) for x in (query, key, value))
  mixed = jax.nn.dot_product_attention(
    query,
    key,
    value,
    scale=1.0,
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )
  return mixed[:, : mixed.shape[1] - odd]


def prompts(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, implementation: Implementation = "cudnn"
) -> jax.Array:
  """Computes causal attention of prompts.

  Args:
    query: [P, K, S, J, H].
    key: [P, K, S, H].
    value: [P, K, S, H].
    mask: bool[P, S], true on real tokens, which come first.
    implementation: that of `jax.nn.dot_product_attention`.

  Returns:
    [P, K, S, J, H]; zero at the pads.
  """
  rows, kv_heads, length, shared_by, head_dim = query.shape
  heads = query.swapaxes(1, 2).reshape(rows, length, kv_heads * shared_by, head_dim)
  # A prompt of pads alone (a filler row) has no softmax; its first pad stands for a token.
  lengths = jnp.maximum(mask.sum(axis=-1, dtype=jnp.int32), 1)
  mixed = _causal(heads, key.swapaxes(1, 2), value.swapaxes(1, 2), lengths, implementation)
  return mixed.reshape(rows, length, kv_heads, shared_by, head_dim).swapaxes(1, 2)


def completions(
  query: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  implementation: Implementation = "cudnn",
) -> jax.Array:
  """Computes attention of completions to the real tokens of their prompt and, causally, to themselves.

  Each completion is written behind the last real token of its prompt, over the pads. What it sees is then what a
  causal mask and a length say; the rows of the prompt have queries of zero, and what they get is dropped.

  Args:
    query: [P, K, G, T, J, H].
    prefix_key: [P, K, S, H], of the prompts.
    prefix_value: [P, K, S, H].
    key: [P, K, G, T, H], of the completions.
    value: [P, K, G, T, H].
    mask: bool[P, S], true on real tokens of the prompts, which come first.
    implementation: that of `jax.nn.dot_product_attention`.

  Returns:
    [P, K, G, T, J, H].
  """
  prompt_count, kv_heads, rollouts, length, shared_by, head_dim = query.shape
  before = prefix_key.shape[2]
  rows = prompt_count * rollouts
  starts = jnp.repeat(mask.sum(axis=-1, dtype=jnp.int32), rollouts)

  def behind(shared: jax.Array, own: jax.Array) -> jax.Array:
    """Returns [B, S + T, ...] of prompts [P, S, ...] and completions [B, T, ...]."""
    room = jnp.pad(shared, [(0, 0), (0, length), (0, 0), (0, 0)])
    return jax.vmap(lambda x, y, start: jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=0))(
      repeated(room, rollouts), own, starts
    )

  def of_rollouts(own: jax.Array) -> jax.Array:
    return own.transpose(0, 2, 3, 1, 4).reshape(rows, length, kv_heads, head_dim)

  heads = query.transpose(0, 2, 3, 1, 4, 5).reshape(rows, length, kv_heads * shared_by, head_dim)
  nothing = jnp.zeros((prompt_count, before, *heads.shape[2:]), heads.dtype)
  mixed = _causal(
    behind(nothing, heads),
    behind(prefix_key.swapaxes(1, 2), of_rollouts(key)),
    behind(prefix_value.swapaxes(1, 2), of_rollouts(value)),
    starts + length,
    implementation,
  )
  mixed = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, length, axis=0))(mixed, starts)
  return mixed.reshape(prompt_count, rollouts, length, kv_heads, shared_by, head_dim).transpose(0, 3, 1, 2, 4, 5)


def images(
  query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, implementation: Implementation = "cudnn"
) -> jax.Array:
  """Computes full attention inside each image.

  Where images begin and end is data, so a mask says it: one [R, R] for all heads of a prompt, in 16 bits.

  Args:
    query: [P, N, R, H].
    key: [P, N, R, H].
    value: [P, N, R, H].
    segments: int32[P, R], the image of a patch row, -1 for padding.
    implementation: that of `jax.nn.dot_product_attention`.

  Returns:
    [P, N, R, H].
  """
  same_image = segments[:, None, :, None] == segments[:, None, None, :]
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  mixed = jax.nn.dot_product_attention(query, key, value, mask=same_image, scale=1.0, implementation=implementation)
  return mixed.swapaxes(1, 2)
