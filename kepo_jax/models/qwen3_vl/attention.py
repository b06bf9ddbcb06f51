"""Attention: the plain implementation, and the choice of a fused kernel.

The plain implementation runs on every device, and tests take it as the truth. It holds several arrays of one score per
query and key; a fused kernel holds none. The kernels serve whole prompts, whole completions and images. A single new
token has one row of scores and uses the plain implementation.

The choice is made while a program is traced, from a static name and from the platform of the mesh in force:
`jax.lax.platform_dependent` would trace all kernels everywhere, and cuDNN's asks for the library as it is traced.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import cudnn, splash

# Keys, values and a mask that broadcasts to the scores [P, K, G, T, J, S].
KVSource = tuple[jax.Array, jax.Array, jax.Array]
# (query [P, K, G, T, J, H], kv_sources) -> [P, K, G, T, J, H].
AttentionFn = Callable[[jax.Array, Sequence[KVSource]], jax.Array]

IMPLEMENTATIONS = ("auto", "plain", "fused")

# Finite: a row that sees nothing (a padded prompt) would become NaN.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A fused kernel for the three uses in the model; `cudnn` and `splash` document the arguments."""

  prompts: Callable[..., jax.Array]
  completions: Callable[..., jax.Array]
  images: Callable[..., jax.Array]
  why_unsupported: Callable[[Any, int], str]  # (dtype, head size) -> reason, or ""


# By platform; all others have the plain implementation alone.
KERNELS = {
  "gpu": Kernel(cudnn.prompts, cudnn.completions, cudnn.images, cudnn.why_unsupported),
  "tpu": Kernel(splash.prompts, splash.completions, splash.images, splash.why_unsupported),
}


def kernel_for(implementation: str, dtype: Any, head_dim: int) -> Kernel | None:
  """Returns the fused kernel for heads of a dtype and a size under the current mesh; None: the plain implementation.

  Args:
    implementation: "plain"; "fused"; or "auto", which is fused where a kernel can serve and plain elsewhere.
    dtype: of queries, keys and values.
    head_dim: H.

  Raises:
    ValueError: the implementation is "fused", and there is no kernel or it cannot serve.
  """
  if implementation == "plain":
    return None
  platform = sharding.platform()
  kernel = KERNELS.get(platform)
  why_unsupported = (
    f"there is no fused attention for platform {platform}"
    if kernel is None
    else kernel.why_unsupported(dtype, head_dim)
  )
  if why_unsupported and implementation == "fused":
    raise ValueError(f"model.attention=fused: {why_unsupported}; use auto or plain.")
  return None if why_unsupported else kernel


def plain_attention(query: jax.Array, kv_sources: Sequence[KVSource]) -> jax.Array:
  """Computes attention with one softmax over the keys of several sources, without concatenating them.

  Args:
    query: [P, K, G, T, J, H], scaled.
    kv_sources: keys and values, shared [P, K, S, H] or per rollout [P, K, G, S, H], and bool masks.

  Returns:
    [P, K, G, T, J, H] in the dtype of the query.
  """
  scores = []
  for keys, _, mask in kv_sources:
    axes = "pksh" if keys.ndim == 4 else "pkgsh"
    raw = jnp.einsum(f"pkgtjh,{axes}->pkgtjs", query, keys, preferred_element_type=jnp.float32)
    scores.append(jnp.where(mask, raw, _HIDDEN))
  peak = scores[0].max(axis=-1, keepdims=True)
  for other in scores[1:]:
    peak = jnp.maximum(peak, other.max(axis=-1, keepdims=True))
  peak = jax.lax.stop_gradient(peak)
  total, mixed = jnp.float32(0), jnp.float32(0)
  for score, (_, values, _) in zip(scores, kv_sources, strict=True):
    axes = "pksh" if values.ndim == 4 else "pkgsh"
    weights = jnp.exp(score - peak)
    total += weights.sum(axis=-1, keepdims=True)
    mixed += jnp.einsum(
      f"pkgtjs,{axes}->pkgtjh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
  return (mixed / total).astype(query.dtype)


def prompt_attention(
  query: jax.Array, kv_sources: Sequence[KVSource], *, real: jax.Array, implementation: str
) -> jax.Array:
  """Computes causal attention of prompts.

  Args:
    query: [P, K, 1, S, J, H], scaled.
    kv_sources: the prompt's keys and values [P, K, 1, S, H], and the mask of the plain implementation.
    real: bool[P, S], true on real tokens, which come first.
    implementation: see `kernel_for`.

  Returns:
    [P, K, 1, S, J, H]; implementations differ at the pads.
  """
  kernel = kernel_for(implementation, query.dtype, query.shape[-1])
  if kernel is None:
    return plain_attention(query, kv_sources)
  ((key, value, _),) = kv_sources
  heads = ("prompt", "kv_heads", None, None)
  run = sharding.per_device(kernel.prompts, (*heads, None), heads, heads, ("prompt", None))
  return run(query[:, :, 0], key[:, :, 0], value[:, :, 0], real)[:, :, None]


def completion_attention(
  query: jax.Array, kv_sources: Sequence[KVSource], *, real: jax.Array, implementation: str
) -> jax.Array:
  """Computes attention of completions to the real tokens of their prompt and, causally, to themselves.

  Args:
    query: [P, K, G, T, J, H], scaled.
    kv_sources: keys and values of the prompts [P, K, S, H] and of the completions [P, K, G, T, H], each with the mask
      for the plain implementation.
    real: bool[P, S], true on real tokens of the prompts, which come first.
    implementation: see `kernel_for`.

  Returns:
    [P, K, G, T, J, H].
  """
  kernel = kernel_for(implementation, query.dtype, query.shape[-1])
  if kernel is None:
    return plain_attention(query, kv_sources)
  (prefix_key, prefix_value, _), (key, value, _) = kv_sources
  shared, own = ("prompt", "kv_heads", None, None), ("prompt", "kv_heads", "rollout", None, None)
  run = sharding.per_device(kernel.completions, (*own, None), shared, shared, own, own, ("prompt", None))
  return run(query, prefix_key, prefix_value, key, value, real)


def image_attention(segments: jax.Array, implementation: str) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """Returns full attention inside each image: (query, key, value) [P, N, R, H], the query scaled, -> [P, R, N, H].

  Args:
    segments: int32[P, R], the image of a patch row, -1 for padding.
    implementation: see `kernel_for`.
  """
  same_image = segments[:, :, None] == segments[:, None, :]  # once for all blocks

  def attention_fn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    kernel = kernel_for(implementation, query.dtype, query.shape[-1])
    if kernel is not None:
      heads = ("prompt", None, None, None)
      run = sharding.per_device(kernel.images, heads, heads, heads, ("prompt", None))
      return run(query, key, value, segments).swapaxes(1, 2)
    scores = jnp.einsum("pnqh,pnkh->pnqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(same_image[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("pnqk,pnkh->pqnh", weights.astype(query.dtype), value)

  return attention_fn
