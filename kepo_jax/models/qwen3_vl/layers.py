"""Modules that the vision tower and the decoder share, and how a module gets its parameters.

A module is a `flax.nnx` class that is only ever built under `nnx.eval_shape`: `definition` keeps its graph, the
shapes of its parameters and their logical axes; `bind` makes it callable on a nested dict of arrays. Names of
attributes are those of Hugging Face's checkpoints, so a path in the parameter tree is a name in the file.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kepo_jax.sharding import LogicalAxes, align_with_weight

Params = Mapping[str, Any]
CosSin = tuple[jax.Array, jax.Array]  # cosine and sine of rotary angles

# Name -> checkpoint policy: the residuals of a layer that are saved besides its input. Products with weights have no
# batch dimensions; those of attention, whose size grows with the square of the length, have them.
_KEPT = {
  "full": None,  # saves nothing
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = ("none", *_KEPT)  # "none" saves all residuals


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
  """A module without its parameters."""

  graph: nnx.GraphDef
  shapes: Params  # nested dict of jax.ShapeDtypeStruct
  axes: Params  # nested dict of the same structure with a tuple of logical axes at each leaf


@functools.cache
def definition(module_type: Callable[..., nnx.Module], *arguments: Any) -> Definition:
  """Returns the definition of the module `module_type(*arguments)`; no array is allocated."""
  graph, state = nnx.split(nnx.eval_shape(lambda: module_type(*arguments)))
  axes = jax.tree.map(lambda leaf: leaf.logical_axes, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
  return Definition(graph, nnx.to_pure_dict(state), nnx.to_pure_dict(axes))


def bind(params: Params, module_type: Callable[..., nnx.Module], *arguments: Any) -> Any:
  """Builds the module `module_type(*arguments)` on `params`, those of one layer."""
  return nnx.merge(definition(module_type, *arguments).graph, params)


def _weight(shape: tuple[int, ...], axes: LogicalAxes) -> nnx.Param:
  return nnx.Param(jnp.zeros(shape), logical_axes=axes)


@jax.custom_vjp
def wide_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Computes x W^T for out > in: x [..., in], W [out, in], result [..., out].

  The gradient of W is a product over all tokens, for which a CPU transposes one operand. XLA would transpose the
  gradient of the result and recompute the operations before it. This gradient transposes x, which is smaller and shared
  by all projections of the same input.
  """
  return jnp.einsum("...i,oi->...o", x, weight)


def _wide_matmul_backward(residuals, gradient):
  x, weight = residuals
  transposed = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
  weight_gradient = jax.lax.optimization_barrier(jnp.tensordot(transposed, gradient, axes=gradient.ndim - 1))
  return jnp.einsum("...o,oi->...i", gradient, weight), weight_gradient.T


# The product itself: a rematerialisation policy does not look into a call of `wide_matmul`.
wide_matmul.defvjp(lambda x, weight: (wide_matmul.fun(x, weight), (x, weight)), _wide_matmul_backward)


class Linear(nnx.Module):
  """x W^T + b with the weight [out, in] of the checkpoint and its logical axes."""

  def __init__(self, inputs: int, outputs: int, axes: LogicalAxes, bias: bool = True):
    self.weight = _weight((outputs, inputs), axes)
    self.bias = nnx.data(_weight((outputs,), axes[:1])) if bias else None
    self.axes = axes
    self.is_wide = outputs > inputs  # see `wide_matmul`; LoRA, which makes no gradient of a weight, clears it

  def __call__(self, x: jax.Array) -> jax.Array:
    outputs, inputs = self.axes
    x = align_with_weight(x, inputs)
    if self.is_wide:
      y = wide_matmul(x, self.weight[...])
    else:
      y = jnp.einsum("...i,oi->...o", x, self.weight[...])
    y = align_with_weight(y, outputs)
    if self.bias is None:
      return y
    # In float32, so that the gradient of the bias, a sum over all tokens, accumulates in float32.
    bias = jnp.expand_dims(self.bias[...].astype(jnp.float32), tuple(range(y.ndim - 1)))
    return (y.astype(jnp.float32) + bias).astype(y.dtype)


@jax.custom_vjp
def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
  """Looks up rows of table [V, D] at int32[...]: [..., D].

  The gradient accumulates in float32: in bfloat16 the sum over a token that occurs hundreds of times stalls.
  """
  return jnp.take(table, index, axis=0)


def _lookup_forward(table, index):
  return lookup(table, index), (table, index)


def _lookup_backward(residuals, gradient):
  table, index = residuals
  total = jnp.zeros(table.shape, jnp.float32).at[index].add(gradient.astype(jnp.float32))
  return total.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def repeated(x: jax.Array, times: int) -> jax.Array:
  """Repeats each row: [P, ...] -> [P * times, ...]; the gradient accumulates in float32."""
  return jnp.repeat(x.astype(jnp.float32), times, axis=0).astype(x.dtype)


class Embedding(nnx.Module):
  """An embedding table, looked up by index."""

  def __init__(self, rows: int, width: int, axes: LogicalAxes):
    self.weight = _weight((rows, width), axes)

  def __call__(self, index: jax.Array) -> jax.Array:
    return lookup(self.weight[...], align_with_weight(index, None))


class LayerNorm(nnx.Module):
  """Normalisation to mean 0 and variance 1 in float32, scaled and shifted."""

  def __init__(self, width: int):
    self.weight = _weight((width,), (None,))
    self.bias = _weight((width,), (None,))

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    # The reference fixes this epsilon for the vision tower; it is no field of the config.
    normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    leading = tuple(range(x.ndim - 1))
    scale, shift = (jnp.expand_dims(p[...].astype(jnp.float32), leading) for p in (self.weight, self.bias))
    return (normal * scale + shift).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Division by the root mean square in float32, scaled."""

  def __init__(self, width: int, epsilon: float):
    self.weight = _weight((width,), (None,))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
    scale = jnp.expand_dims(self.weight[...].astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (normal * scale).astype(x.dtype)


def cos_sin(angles: jax.Array) -> CosSin:
  """Returns cosine and sine of rotary angles float32[..., H / 2], computed once for all layers."""
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: CosSin) -> jax.Array:
  """Applies the rotary embedding with the rotate-half convention, in float32.

  Args:
    x: [..., H].
    rope: cosine and sine float32[..., H / 2], with as many axes as x and broadcastable to its first half.

  Returns:
    float32[..., H].
  """
  cosine, sine = rope
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def checkpointed(step: Callable[..., Any], remat: str) -> Callable[..., Any]:
  """Wraps the body of a scan over layers so that its backward pass keeps what `REMAT` names.

  Raises:
    ValueError: an unknown name.
  """
  if remat not in REMAT:
    raise ValueError(f"remat={remat!r} is unknown; use one of {sorted(REMAT)}.")
  # Inside a scan nothing can merge the second computation with the first, and the barrier against it costs fusions.
  return step if remat == "none" else jax.checkpoint(step, prevent_cse=False, policy=_KEPT[remat])


def stacked(tree: Any, layers: int) -> Any:
  """Returns the shapes of `layers` layers, stacked on a new first axis."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype), tree)


def stacked_axes(tree: Any) -> Any:
  """Returns the logical axes of layers stacked on a new first axis."""
  return jax.tree.map(lambda axes: (None, *axes), tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
