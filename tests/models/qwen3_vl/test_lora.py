"""LoRA on the decoder: nothing at first, the merged weights ever after, and gradients of the matrices alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import lora, model
from kepo_jax.models.qwen3_vl.config import LoraConfig
from tests.models.qwen3_vl import cases

CASE = next(case for case in cases.CASES if case.name == "query_wider_than_hidden")
ALL = tuple(lora.TARGETS)
RANK, ALPHA = 4, 12.0


def adapted(targets=ALL, alpha=ALPHA):
  return dataclasses.replace(CASE.config, lora=LoraConfig(rank=RANK, alpha=alpha, targets=targets))


@functools.cache
def _initial(config):
  return lora.initial(config, jax.random.key(2))


def drawn(config, *, start=False):
  """Parameters with matrices: as at the start, or with B as large as A."""
  params = cases.redrawn(model.abstract_params(lora.base(config)), 1)
  if start:
    return params | {lora.PART: _initial(config)}
  numbers = np.random.RandomState(3)
  shapes = model.abstract_params(config)[lora.PART]
  return params | {lora.PART: jax.tree.map(lambda x: np.float32(0.2 * numbers.standard_normal(x.shape)), shapes)}


@pytest.fixture(scope="module")
def batch():
  prompts, _, _ = CASE.prompts()
  return prompts, jnp.asarray(CASE.completions())


def states(config, params, prompts, tokens):
  prefix = model.prefill(config, params, prompts, remat="full")
  return model.completion_hidden(config, params, prefix, tokens, remat="full")


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, moving, fixed, prompts, tokens):
  """Hidden states, and gradients by what `moving` holds of a loss that weights every number of them differently."""

  def loss(moving):
    hidden = states(config, fixed | moving, prompts, tokens)
    return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum(), hidden

  found, hidden = jax.grad(loss, has_aux=True)(moving)
  return hidden, found


def test_the_first_forward_is_that_of_the_base_to_the_bit(batch):
  config = adapted()
  params = model.cast(drawn(config, start=True), jnp.bfloat16)
  hidden = jax.jit(states, static_argnums=0)
  np.testing.assert_array_equal(
    hidden(config, params, *batch), hidden(CASE.config, lora.without(params), *batch), strict=True
  )


def test_the_start_depends_on_the_seed():
  config = adapted()
  one, same, other = (lora.initial(config, jax.random.key(seed)) for seed in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  a, b = one["mlp"]["down_proj"][lora.A], one["mlp"]["down_proj"][lora.B]
  assert a.shape == (4, 48, RANK) and b.shape == (4, RANK, 32) and a.dtype == b.dtype == jnp.float32
  assert not b.any() and (a != other["mlp"]["down_proj"][lora.A]).all()
  assert len(np.unique(a)) > 0.99 * a.size  # no two layers share their draws
  gate, up = (one["mlp"][target][lora.A] for target in ("gate_proj", "up_proj"))
  assert (gate != up).all()  # and no two projections
  assert 0.9 * 48**-0.5 < jnp.abs(a).max() <= 48**-0.5
  assert float(a.std()) == pytest.approx((48 * 3) ** -0.5, rel=0.1)  # uniform


def test_merging_by_hand():
  config = adapted(("k_proj",), alpha=6.0)
  params = drawn(config)
  weights = lora.merged(config, params, jnp.float32)
  before, after = (tree["language_model"]["layers"] for tree in (params, weights))
  a, b = (np.asarray(params[lora.PART]["self_attn"]["k_proj"][name], np.float64) for name in (lora.A, lora.B))
  for layer in range(4):
    expected = np.asarray(before["self_attn"]["k_proj"]["weight"][layer]) + 6.0 / RANK * (a[layer] @ b[layer]).T
    np.testing.assert_allclose(after["self_attn"]["k_proj"]["weight"][layer], expected, atol=1e-6)
  after["self_attn"]["k_proj"] = before["self_attn"]["k_proj"]
  jax.tree.map(np.testing.assert_array_equal, weights, lora.without(params))


def test_merging_rounds_once():
  config = adapted(("k_proj",))
  params = model.cast(drawn(config), jnp.bfloat16) | {lora.PART: drawn(config)[lora.PART]}
  half, full = (lora.merged(config, params, dtype) for dtype in (jnp.bfloat16, jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, half, model.cast(full, jnp.bfloat16))


def test_states_and_gradients_follow_from_the_merged_weights(batch):
  # With W' = W + s (A B)^T and G = dL/dW': dL/dA = s G^T B^T and dL/dB = s A^T G^T.
  config = adapted()
  params = drawn(config)
  hidden, found = gradients(config, {lora.PART: params[lora.PART]}, lora.without(params), *batch)
  expected, whole = gradients(CASE.config, lora.merged(config, params, jnp.float32), {}, *batch)
  np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-5)
  for target, module in lora.TARGETS.items():
    outer = np.asarray(whole["language_model"]["layers"][module][target]["weight"], np.float64)
    a, b = (np.asarray(params[lora.PART][module][target][name], np.float64) for name in (lora.A, lora.B))
    mine = found[lora.PART][module][target]
    for got, closed in (
      (mine[lora.A], np.einsum("loi,lro->lir", outer, b)),
      (mine[lora.B], np.einsum("lir,loi->lro", a, outer)),
    ):
      closed = ALPHA / RANK * closed
      assert np.linalg.norm(got - closed) < 1e-5 * np.linalg.norm(closed), target


def test_no_gradient_of_a_weight_is_computed(batch):
  config = adapted()
  params = drawn(config)
  shapes = {leaf.shape[1:] for leaf in jax.tree.leaves(params["language_model"]["layers"]) if leaf.ndim == 3}

  def of_size_of_weights(moving, fixed):
    program = str(jax.make_jaxpr(functools.partial(gradients, config))(moving, fixed, *batch))
    products = {tuple(map(int, sizes)) for sizes in re.findall(r":f32\[(\d+),(\d+)\] = dot_general", program)}
    return products & (shapes | {shape[::-1] for shape in shapes})

  assert of_size_of_weights({lora.PART: params[lora.PART]}, lora.without(params)) == set()
  # The same look at a program that has them.
  assert {tuple(sorted(shape)) for shape in of_size_of_weights(params, {})} == {tuple(sorted(s)) for s in shapes}


def test_the_matrices_are_sharded_as_their_weight():
  axes = model.logical_axes(adapted())
  decoder, matrices = axes["language_model"]["layers"], axes[lora.PART]
  assert {target for module in matrices.values() for target in module} == set(ALL)
  for target, module in lora.TARGETS.items():
    stack, outputs, inputs = decoder[module][target]["weight"]
    assert matrices[module][target] == {lora.A: (stack, inputs, None), lora.B: (stack, None, outputs)}
  lengths = jax.tree.map(lambda leaf, names: len(leaf.shape) == len(names), model.abstract_params(adapted()), axes)
  assert jax.tree.all(lengths)


def test_weights_may_be_half_as_wide_as_the_matrices():
  shapes = model.abstract_params(adapted(), jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes[lora.PART])} == {jnp.dtype(jnp.float32)}
  assert {leaf.dtype for leaf in jax.tree.leaves(lora.without(shapes))} == {jnp.dtype(jnp.bfloat16)}
  start = jax.eval_shape(functools.partial(lora.initial, adapted()), jax.random.key(0))
  assert start == shapes[lora.PART]


def test_a_rank_is_lower_than_both_sides():
  # Keys and values are 2 heads of 16 wide, the decoder 32, the MLP 48.
  assert lora.largest_rank(CASE.config.text, ("gate_proj", "k_proj")) == 31
  narrow = dataclasses.replace(CASE.config.text, num_key_value_heads=1)
  assert lora.largest_rank(narrow, ("k_proj",)) == 15 and lora.largest_rank(narrow, ("q_proj",)) == 31
