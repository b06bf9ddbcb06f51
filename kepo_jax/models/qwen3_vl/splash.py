"""Splash attention, the Pallas kernel for TPU that JAX ships, in the three uses of this model.

The kernel wants lengths that are multiples of its 128 lanes: sequences are padded here, and results sliced. It
holds no score outside a block of keys, and skips blocks that a mask hides from all queries. Queries come scaled.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas

from kepo_jax.models.qwen3_vl.layers import repeated

_LANES = 128
# Under half of the lanes the kernel would mostly multiply zeros.
_SMALLEST_HEAD = 64


def why_unsupported(dtype: Any, head_dim: int) -> str:
  """Says why the kernel cannot serve heads of a dtype and a size; "" if it can."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"splash attention computes in bfloat16 or float32, not in {jnp.dtype(dtype)}"
  if head_dim < _SMALLEST_HEAD:
    return f"splash attention is for heads of {_SMALLEST_HEAD} or more, these have {head_dim}"
  return ""


def _padded_length(length: int) -> int:
  # Longer sequences are worth blocks larger than 128.
  step = _LANES if length <= 4 * _LANES else 2 * _LANES
  return -(-length // step) * step


def _padded(x: jax.Array, length: int, axis: int, fill: int = 0) -> jax.Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths, constant_values=fill)


def _block(length: int) -> int:
  return next(block for block in (512, 384, 256, 128) if length % block == 0)


def _blocks(queries: int, keys: int) -> pallas.BlockSizes:
  q, kv = _block(queries), _block(keys)
  return pallas.BlockSizes(block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv)


def _splash(
  heads: Sequence[jax.Array], segments: tuple[jax.Array, jax.Array], mask: pallas.Mask, *, interpret: bool
) -> jax.Array:
  """Computes attention between equal segments, as far as the mask allows.

  Args:
    heads: query [B, N, T, H], key and value [B, K, S, H].
    segments: int32[B, T] and int32[B, S] of queries and keys.
    mask: [T, S], the same for all rows and heads.
    interpret: emulate the kernel, for hosts without a TPU.

  Returns:
    [B, N, T, H].
  """
  query, key, value = heads
  kernel = pallas.make_splash_mha_single_device(
    pallas.MultiHeadMask([mask] * query.shape[1]), block_sizes=_blocks(*mask.shape), interpret=interpret
  )
  return jax.vmap(kernel)(query, key, value, pallas.SegmentIds(*segments))


def prompts(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """Computes causal attention of prompts.

  Args:
    query: [P, K, S, J, H].
    key: [P, K, S, H].
    value: [P, K, S, H].
    mask: bool[P, S], true on real tokens, which come first.
    interpret: emulate the kernel, for hosts without a TPU.

  Returns:
    [P, K, S, J, H]; meaningless at the pads.
  """
  rows, kv_heads, length, shared_by, head_dim = query.shape
  padded = _padded_length(length)
  heads = query.swapaxes(2, 3).reshape(rows, kv_heads * shared_by, length, head_dim)
  # Pads are a segment of their own, so that every query sees a key: the kernel divides by what a query sees.
  segments = _padded(mask.astype(jnp.int32), padded, 1)
  mixed = _splash(
    [_padded(x, padded, 2) for x in (heads, key, value)],
    (segments, segments),
    pallas.CausalMask((padded, padded)),
    interpret=interpret,
  )
  return mixed[:, :, :length].reshape(rows, kv_heads, shared_by, length, head_dim).swapaxes(2, 3)


def completions(
  query: jax.Array,
  prefix_key: jax.Array,
  prefix_value: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Computes attention of completions to the real tokens of their prompt and, causally, to themselves.

  Args:
    query: [P, K, G, T, J, H].
    prefix_key: [P, K, S, H], of the prompts.
    prefix_value: [P, K, S, H].
    key: [P, K, G, T, H], of the completions.
    value: [P, K, G, T, H].
    mask: bool[P, S], true on real tokens of the prompts.
    interpret: emulate the kernel, for hosts without a TPU.

  Returns:
    [P, K, G, T, J, H].
  """
  prompt_count, kv_heads, rollouts, length, shared_by, head_dim = query.shape
  before = prefix_key.shape[2]
  queries, keys = _padded_length(length), _padded_length(before + length)
  rows = prompt_count * rollouts

  def by_rollout(shared: jax.Array, own: jax.Array) -> jax.Array:
    own = own.swapaxes(1, 2).reshape(rows, kv_heads, length, head_dim)
    return _padded(jnp.concatenate([repeated(shared, rollouts), own], axis=2), keys, 2)

  heads = query.transpose(0, 2, 1, 4, 3, 5).reshape(rows, kv_heads * shared_by, length, head_dim)
  seen = jnp.repeat(mask.astype(jnp.int32), rollouts, axis=0)
  mixed = _splash(
    (_padded(heads, queries, 2), by_rollout(prefix_key, key), by_rollout(prefix_value, value)),
    (jnp.ones((rows, queries), jnp.int32), _padded(seen, keys, 1, fill=1)),
    pallas.CausalMask((queries, keys), offset=before),
    interpret=interpret,
  )
  mixed = mixed[:, :, :length].reshape(prompt_count, rollouts, kv_heads, shared_by, length, head_dim)
  return mixed.transpose(0, 2, 1, 4, 3, 5)


def images(
  query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """Computes full attention inside each image.

  Args:
    query: [P, N, R, H].
    key: [P, N, R, H].
    value: [P, N, R, H].
    segments: int32[P, R], the image of a patch row, -1 for padding.
    interpret: emulate the kernel, for hosts without a TPU.

  Returns:
    [P, N, R, H].
  """
  length = query.shape[2]
  padded = _padded_length(length)
  segments = _padded(segments, padded, 1, fill=-1)
  heads = [_padded(x, padded, 2) for x in (query, key, value)]
  mixed = _splash(heads, (segments, segments), pallas.FullMask((padded, padded)), interpret=interpret)
  return mixed[:, :, :length]
