"""What the backward pass keeps of a layer changes its memory, never its result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import layers, model
from tests.models.qwen3_vl import cases, runs

CONFIG = cases.SMALL
SOME = [name for name in layers.REMAT if name != "none"]
ONE = 64 * 32 * 4  # bytes of a float32 activation of a layer of `residuals`


@pytest.mark.slow
def test_the_gradients_are_those_of_a_pass_that_keeps_everything(mesh_of):
  params = cases.redrawn(model.abstract_params(CONFIG), seed=5)
  prompts = cases.make_prompts(CONFIG, cases.SMALL_PROMPTS)[0]
  tokens = np.random.RandomState(1).randint(1, 90, (len(cases.SMALL_PROMPTS), 2, 5)).astype(np.int32)
  (expected, _), gradients = runs.loss_and_gradient(CONFIG, params, prompts, tokens, "none")
  mesh = mesh_of(fsdp=2)
  params = jax.device_put(params, sharding.weight_shardings(mesh, params, model.logical_axes(CONFIG)))
  for remat in SOME:
    with jax.set_mesh(mesh):
      (loss, _), gradient = runs.loss_and_gradient(CONFIG, params, sharding.place(mesh, prompts), tokens, remat)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, err_msg=remat)
    for mine, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradients), strict=True):
      assert np.linalg.norm(mine - theirs) <= 1e-5 * np.linalg.norm(theirs), remat


def over_layers(remat, layer, x, weights):
  body = layers.checkpointed(lambda x, w: (layer(x, w), None), remat)
  return jax.lax.scan(body, x, weights)[0].sum()


def residuals(remat, layer):
  """Bytes that a scan over 6 layers keeps for its backward pass, besides its weights."""
  weights = jnp.zeros((6, 32, 32))
  _, backward = jax.vjp(functools.partial(over_layers, remat, layer), jnp.zeros((64, 32)), weights)
  held = [leaf for leaf in jax.tree.leaves(backward) if isinstance(leaf, jax.Array) and leaf.shape != weights.shape]
  return sum(leaf.nbytes for leaf in held)


def test_what_is_kept_by_hand():
  def layer(x, w):
    return jnp.sin(jnp.cos(x) @ w.T)

  # Six inputs; with "dots" six products besides. Without any, sin(x), cos(x) and the cosine of the product.
  for remat, count in (("full", 6), ("dots", 12), ("none", 18)):
    assert residuals(remat, layer) == count * ONE, remat


def test_what_is_kept_changes_no_gradient(rng):
  x, weights = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((5, 8), (3, 8, 8)))

  def gradients(remat):
    layer = functools.partial(over_layers, remat, lambda x, w: jnp.sin(layers.wide_matmul(jnp.cos(x), w)))
    return jax.jit(jax.grad(layer, (0, 1)))(x, weights)

  expected = gradients("none")
  for remat in SOME:
    for mine, theirs in zip(gradients(remat), expected, strict=True):
      np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6, err_msg=remat)


def test_the_product_of_a_widening_projection_is_kept():
  assert residuals("dots", lambda x, w: jnp.sin(layers.wide_matmul(jnp.cos(x), w))) == 12 * ONE


def test_products_of_attention_are_not_kept():
  def attention(x, w):
    rows = (x @ w).reshape(16, 4, 32)
    return jnp.einsum("pqk,pkd->pqd", jnp.einsum("pqd,pkd->pqk", rows, rows), rows).reshape(64, 32)

  # The product with the weight, and neither scores nor what they mix.
  assert residuals("dots", attention) == 12 * ONE


def test_the_model_keeps_less_from_none_to_dots_to_full():
  params = model.abstract_params(CONFIG)
  prompts = cases.make_prompts(CONFIG, cases.SMALL_PROMPTS)[0]
  tokens = np.ones((len(cases.SMALL_PROMPTS), 2, 5), np.int32)

  def kept(remat):
    forward = functools.partial(runs.logits, CONFIG, prompts=prompts, tokens=tokens, remat=remat)
    backward = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(backward))

  none, dots, full = (kept(remat) for remat in ("none", "dots", "full"))
  assert none > 1.3 * dots > 1.3 * 1.3 * full
