"""LoRA: low-rank matrices beside frozen projections of the decoder.

qwix adds them to the module of one layer, while it is built under `nnx.eval_shape` as all modules are; the layer is
then bound, scanned and recomputed like any other. The matrices are the top-level part "lora" of a parameter tree, in
float32 and stacked on axis 0: A [L, in, r], B [L, r, out], with the weight W [L, out, in] that they belong to

  y = W x + alpha / r * B^T A^T x

Nothing but this part is trained, so no gradient of a weight is ever computed. Sampling runs on `merged` weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from kepo_jax.models.qwen3_vl.config import LoraConfig, Qwen3VLConfig, TextConfig
from kepo_jax.models.qwen3_vl.layers import Definition, Params, cos_sin, definition, stacked
from kepo_jax.models.qwen3_vl.text import DecoderLayer, own_kv

PART = "lora"
# Projections that may have matrices, and the module of a layer that they lie in.
TARGETS: Mapping[str, str] = {
  "q_proj": "self_attn",
  "k_proj": "self_attn",
  "v_proj": "self_attn",
  "o_proj": "self_attn",
  "gate_proj": "mlp",
  "up_proj": "mlp",
  "down_proj": "mlp",
}
A, B = "weight_lora_a", "weight_lora_b"  # as qwix names them


@functools.cache
def layer_factory(lora: LoraConfig | None) -> Callable[[TextConfig], nnx.Module]:
  """Returns the factory of a decoder layer: with matrices, or without where `lora` is None."""
  if lora is None:
    return DecoderLayer
  path = "|".join(f"{TARGETS[target]}/{target}" for target in lora.targets)

  def adapted(config: TextConfig) -> nnx.Module:
    # qwix finds the products to add to while the layer runs once; one token is enough.
    x = jnp.zeros((1, 1, 1, config.hidden_size))
    rope = cos_sin(jnp.zeros((1, 1, 1, config.head_dim // 2)))
    provider = qwix.LoraProvider(module_path=path, rank=lora.rank, alpha=lora.alpha)
    layer = DecoderLayer(config)
    for target, module in TARGETS.items():
      getattr(getattr(layer, module), target).is_wide = False  # qwix does not see through `wide_matmul`
    return qwix.apply_lora_to_model(layer, provider, x, rope, (), own_kv(jnp.ones((1,) * 6, bool)), rngs=nnx.Rngs(0))

  return adapted


@functools.cache
def matrices(config: TextConfig, lora: LoraConfig) -> Definition:
  """Returns shapes and logical axes of the matrices of one layer; axes follow those of the weight."""
  layer = definition(layer_factory(lora), config)
  modules = [(TARGETS[target], target) for target in TARGETS if target in lora.targets]
  shapes: dict[str, Any] = {}
  axes: dict[str, Any] = {}
  for module, target in modules:
    outputs, inputs = layer.axes[module][target]["weight"]
    shapes.setdefault(module, {})[target] = {name: layer.shapes[module][target][name] for name in (A, B)}
    axes.setdefault(module, {})[target] = {A: (inputs, None), B: (None, outputs)}
  return Definition(layer.graph, shapes, axes)


def largest_rank(config: TextConfig, targets: tuple[str, ...]) -> int:
  """Returns the largest rank below the smaller side of every target."""
  shapes = definition(DecoderLayer, config).shapes
  return min(min(shapes[TARGETS[target]][target]["weight"].shape) for target in targets) - 1


def initial(config: Qwen3VLConfig, key: jax.Array) -> dict[str, Any]:
  """Draws the part "lora" before training: A uniform within 1/sqrt(in) as in PEFT, B zero, so that nothing changes yet.

  Args:
    config: with `lora`.
    key: jax.random key.
  """
  assert config.lora is not None
  shapes = stacked(matrices(config.text, config.lora).shapes, config.text.num_hidden_layers)
  numbered = iter(range(10**6))

  def draw(path, leaf):
    leaf_key = jax.random.fold_in(key, next(numbered))
    if path[-1].key == B:
      return jnp.zeros(leaf.shape, jnp.float32)
    bound = leaf.shape[-2] ** -0.5
    return jax.random.uniform(leaf_key, leaf.shape, jnp.float32, -bound, bound)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def joined(layers: Params, lora: Params) -> dict[str, Any]:
  """Merges the two trees: layers with their matrices, as `layer_factory` wants them."""
  both = layers.keys() & lora.keys()
  return {**layers, **lora, **{name: joined(layers[name], lora[name]) for name in both}}


def without(params: Params) -> dict[str, Any]:
  """Returns the parameters without the matrices, as they were loaded."""
  return {name: part for name, part in params.items() if name != PART}


def base(config: Qwen3VLConfig) -> Qwen3VLConfig:
  """Returns the config without LoRA, which is also that of merged weights."""
  return dataclasses.replace(config, lora=None)


def merged(config: Qwen3VLConfig, params: Params, dtype: Any) -> dict[str, Any]:
  """Merges: W + alpha / r * (A B)^T, added in float32, in the tree and the dtype of a model without LoRA.

  Args:
    config: of the student; without `lora` the weights are cast and nothing else.
    params: with the part "lora" where config has `lora`, stacked; the layers are stacked or in a tuple.
    dtype: of the result.
  """
  weights = without(params)
  if config.lora is not None:
    decoder = weights["language_model"]
    merge = functools.partial(_merged_weight, scale=config.lora.alpha / config.lora.rank, dtype=dtype)
    if isinstance(decoder["layers"], tuple):
      matrices = [jax.tree.map(lambda x, i=i: x[i], params[PART]) for i in range(len(decoder["layers"]))]
      layers: Any = tuple(_merged_modules(*parts, merge) for parts in zip(decoder["layers"], matrices, strict=True))
    else:
      # Layer by layer: the products of all layers at once would be as large as the weights, in float32.
      layers = _merged_modules(
        decoder["layers"], params[PART], lambda *leaves: jax.lax.map(lambda x: merge(*x), leaves)
      )
    weights["language_model"] = {**decoder, "layers": layers}
  return jax.tree.map(lambda leaf: leaf.astype(dtype), weights)


def _merged_modules(layers: Params, lora: Params, merge: Callable[..., jax.Array]) -> dict[str, Any]:
  if A in lora:
    return {**layers, "weight": merge(layers["weight"], lora[A], lora[B])}
  return {**layers, **{name: _merged_modules(layers[name], part, merge) for name, part in lora.items()}}


def _merged_weight(weight: jax.Array, a: jax.Array, b: jax.Array, *, scale: float, dtype: Any) -> jax.Array:
  # In full precision on every device: the default of a TPU would round the matrices to bfloat16.
  product = jnp.einsum("ir,ro->oi", a, b, precision="highest", preferred_element_type=jnp.float32)
  return (weight.astype(jnp.float32) + scale * product).astype(dtype)
