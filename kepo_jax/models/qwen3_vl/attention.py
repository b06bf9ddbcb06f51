"""Attention: the plain form, which every device runs and tests take as the truth, and the choice of a fused kernel.

A fused kernel never holds a score per query and key, of which the plain form holds several arrays in a layer. It
serves whole prompts, whole completions and images; a single new token has one row of scores and stays plain.

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
Source = tuple[jax.Array, jax.Array, jax.Array]
# (query [P, K, G, T, J, H], sources) -> [P, K, G, T, J, H].
Attend = Callable[[jax.Array, Sequence[Source]], jax.Array]

FORMS = ("auto", "plain", "fused")

# Finite, or a row that may see nothing (a padded prompt) turns into NaN.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A fused kernel in the three uses of the model; the modules of the kernels document the arguments."""

  prompts: Callable[..., jax.Array]
  completions: Callable[..., jax.Array]
  images: Callable[..., jax.Array]
  refusal: Callable[[Any, int], str]  # (dtype, head size) -> why it cannot serve, or nothing


# By platform; all others have the plain form alone.
KERNELS = {
  "gpu": Kernel(cudnn.prompts, cudnn.completions, cudnn.images, cudnn.refusal),
  "tpu": Kernel(splash.prompts, splash.completions, splash.images, splash.refusal),
}


def kernel_for(form: str, dtype: Any, head_dim: int) -> Kernel | None:
  """The fused kernel that serves heads of a dtype and a size under the mesh in force; None for the plain form.

  Args:
    form: "plain"; "fused"; or "auto", which is fused where a kernel can serve and plain elsewhere.
    dtype: of queries, keys and values.
    head_dim: H.

  Raises:
    ValueError: the form is "fused", and there is no kernel or it cannot serve.
  """
  if form == "plain":
    return None
  platform = sharding.platform()
  kernel = KERNELS.get(platform)
  refusal = (
    f"there is no fused attention for platform {platform}" if kernel is None else kernel.refusal(dtype, head_dim)
  )
  if refusal and form == "fused":
    raise ValueError(f"model.attention=fused: {refusal}; use auto or plain.")
  return None if refusal else kernel


def joint_attention(query: jax.Array, sources: Sequence[Source]) -> jax.Array:
  """Attention with one softmax over the keys of several sources, without concatenating them: the plain form.

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


def over_prompts(query: jax.Array, sources: Sequence[Source], *, real: jax.Array, form: str) -> jax.Array:
  """Causal attention of prompts.

  Args:
    query: [P, K, 1, S, J, H], scaled.
    sources: the prompt's keys and values [P, K, 1, S, H], and the mask of the plain form.
    real: bool[P, S], true on real tokens, which come first.
    form: see `kernel_for`.

  Returns:
    [P, K, 1, S, J, H]; the forms differ at the pads.
  """
  kernel = kernel_for(form, query.dtype, query.shape[-1])
  if kernel is None:
    return joint_attention(query, sources)
  ((key, value, _),) = sources
  heads = ("prompt", "kv_heads", None, None)
  run = sharding.per_device(kernel.prompts, (*heads, None), heads, heads, ("prompt", None))
  return run(query[:, :, 0], key[:, :, 0], value[:, :, 0], real)[:, :, None]


def over_completions(query: jax.Array, sources: Sequence[Source], *, real: jax.Array, form: str) -> jax.Array:
  """Attention of completions to the real tokens of their prompt and, causally, to themselves.

  Args:
    query: [P, K, G, T, J, H], scaled.
    sources: keys and values of the prompts [P, K, S, H] and of the completions [P, K, G, T, H], each with the mask of
      the plain form.
    real: bool[P, S], true on real tokens of the prompts, which come first.
    form: see `kernel_for`.

  Returns:
    [P, K, G, T, J, H].
  """
  kernel = kernel_for(form, query.dtype, query.shape[-1])
  if kernel is None:
    return joint_attention(query, sources)
  (prefix_key, prefix_value, _), (key, value, _) = sources
  shared, own = ("prompt", "kv_heads", None, None), ("prompt", "kv_heads", "rollout", None, None)
  run = sharding.per_device(kernel.completions, (*own, None), shared, shared, own, own, ("prompt", None))
  return run(query, prefix_key, prefix_value, key, value, real)


def inside_images(segments: jax.Array, form: str) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """Full attention inside each image, as a function of query, key and value.

  The function takes three arrays [P, N, R, H], the query scaled, and gives [P, R, N, H].

  Args:
    segments: int32[P, R], the image of a patch row, -1 for padding.
    form: see `kernel_for`.
  """
  same_image = segments[:, :, None] == segments[:, None, :]  # once for all blocks

  def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    kernel = kernel_for(form, query.dtype, query.shape[-1])
    if kernel is not None:
      heads = ("prompt", None, None, None)
      run = sharding.per_device(kernel.images, heads, heads, heads, ("prompt", None))
      return run(query, key, value, segments).swapaxes(1, 2)
    scores = jnp.einsum("pnqh,pnkh->pnqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(same_image[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("pnqk,pnkh->pqnh", weights.astype(query.dtype), value)

  return attend
