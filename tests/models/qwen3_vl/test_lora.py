"""LoRA on the decoder: nothing at first, the merged weights ever after, and gradients of the matrices alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import lora, model
from kepo_jax.models.qwen3_vl.config import LoraConfig
from tests.models.qwen3_vl import cases

CASE = next(case for case in cases.CASES if case.name == "query_wider_than_hidden")
ALL = tuple(lora.TARGETS)
RANK, ALPHA = 4, 12.0


def adapted(targets=ALL, alpha=ALPHA):
  """The config of the case with LoRA."""
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
  """Prompts of the case and their completions."""
  prompts, _, _ = cases.make_prompts(CASE.config, list(CASE.layouts))
  return prompts, jnp.asarray(cases.completions(CASE))


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params, prompts, tokens, remat="full"):
  prefix = model.prefill(config, params, prompts, remat=remat)
  return model.completion_hidden(config, params, prefix, tokens, remat=remat)


@functools.partial(jax.jit, static_argnums=(0, 5))
def gradients(config, moving, fixed, prompts, tokens, remat="none"):
  """Of a loss that weights every number of the hidden states differently, by what `moving` holds."""

  def loss(moving):
    states = hidden(config, fixed | moving, prompts, tokens, remat)
    return (states * jnp.cos(jnp.arange(states.size)).reshape(states.shape)).sum()

  return jax.value_and_grad(loss)(moving)


def of_matrices(config, params, batch, **options):
  return gradients(config, {lora.PART: params[lora.PART]}, lora.without(params), *batch, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_first_forward_is_that_of_the_base_to_the_bit(batch, dtype):
  config = adapted()
  params = model.cast(drawn(config, start=True), dtype)
  np.testing.assert_array_equal(
    hidden(config, params, *batch), hidden(lora.base(config), lora.without(params), *batch), strict=True
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


@pytest.mark.parametrize("targets", [ALL, ("v_proj", "down_proj"), ("q_proj",)], ids="-".join)
def test_merged_weights_say_the_same(batch, targets):
  config = adapted(targets)
  params = drawn(config)
  mine = hidden(config, params, *batch)
  weights = lora.merged(config, params, jnp.float32)
  np.testing.assert_allclose(mine, hidden(lora.base(config), weights, *batch), rtol=1e-5, atol=1e-5)
  assert jnp.abs(mine - hidden(lora.base(config), lora.without(params), *batch)).max() > 0.1


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
  config = adapted()
  params = model.cast(drawn(config), jnp.bfloat16) | {lora.PART: drawn(config)[lora.PART]}
  half = lora.merged(config, params, jnp.bfloat16)
  full = lora.merged(config, params, jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, half, model.cast(full, jnp.bfloat16))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_follow_from_those_of_the_merged_weights(batch, remat):
  # With W' = W + s (A B)^T and G = dL/dW': dL/dA = s G^T B^T and dL/dB = s A^T G^T.
  config = adapted()
  params = drawn(config)
  value, found = of_matrices(config, params, batch, remat=remat)
  expected_value, whole = gradients(lora.base(config), lora.merged(config, params, jnp.float32), {}, *batch)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
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


def test_gradients_follow_from_differences(batch):
  config = adapted()
  params = drawn(config)
  _, found = of_matrices(config, params, batch)
  numbers = np.random.RandomState(5)
  direction = jax.tree.map(lambda x: numbers.standard_normal(x.shape).astype(np.float32), params[lora.PART])
  value = lambda step: of_matrices(  # noqa: E731
    config, params | {lora.PART: jax.tree.map(lambda x, d: x + step * d, params[lora.PART], direction)}, batch
  )[0]
  wide, narrow = ((float(value(step)) - float(value(-step))) / (2 * step) for step in (1e-3, 5e-4))
  slope = (4 * narrow - wide) / 3  # the error of either falls with the square of its step
  along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), found[lora.PART], direction)))
  assert along == pytest.approx(slope, rel=5e-3)


def products(jaxpr):
  """Shapes of all matrix products of a program, those inside of loops and calls included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation.outvars[0].aval.shape
    for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if inner := getattr(part, "jaxpr", part if hasattr(part, "eqns") else None):
        yield from products(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_a_weight_is_computed(batch, remat):
  config = adapted()
  params = drawn(config)
  weights = jax.tree.leaves(params["language_model"]["layers"])
  sides = {tuple(sorted(leaf.shape[1:])) for leaf in weights if leaf.ndim == 3}

  def of_weights(moving, fixed):
    def program(moving):
      return gradients.__wrapped__(config, moving, fixed, *batch, remat)

    return [s for s in products(jax.make_jaxpr(program)(moving).jaxpr) if tuple(sorted(s)) in sides]

  assert of_weights({lora.PART: params[lora.PART]}, lora.without(params)) == []
  # The same look at a program that has them.
  assert len(of_weights(params, {})) >= len(lora.TARGETS)


def test_the_matrices_save_the_work_of_those_gradients(batch):
  config = adapted()
  params = drawn(config)

  def work(moving, fixed):
    return gradients.lower(config, moving, fixed, *batch).compile().cost_analysis()["flops"]

  alone = work({lora.PART: params[lora.PART]}, lora.without(params))
  assert alone < 0.75 * work(lora.without(params), {lora.PART: params[lora.PART]})


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_mesh_changes_nothing(batch, mesh_of, axes):
  config = adapted()
  params = drawn(config)
  expected = of_matrices(config, params, batch)
  mesh = mesh_of(**axes)
  places = sharding.weight_shardings(mesh, params, model.logical_axes(config))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, places)
    found = of_matrices(config, placed, sharding.place(mesh, batch))
    decode = sharding.weight_shardings(mesh, lora.without(params), model.logical_axes(lora.base(config)), "decode")
    merged = jax.jit(functools.partial(lora.merged, config, dtype=jnp.float32), out_shardings=decode)(placed)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for got, wanted in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
    assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, lora.merged(config, params, "float32"))


def test_the_matrices_are_sharded_as_their_weight():
  axes = model.logical_axes(adapted())
  decoder, matrices = axes["language_model"]["layers"], axes[lora.PART]
  assert {target for module in matrices.values() for target in module} == set(ALL)
  for target, module in lora.TARGETS.items():
    stack, outputs, inputs = decoder[module][target]["weight"]
    assert matrices[module][target] == {lora.A: (stack, inputs, None), lora.B: (stack, None, outputs)}
  jax.tree.map(lambda leaf, names: _same_length(leaf.shape, names), model.abstract_params(adapted()), axes)


def _same_length(shape, names):
  assert len(shape) == len(names)


def test_weights_may_be_half_as_wide_as_the_matrices():
  shapes = model.abstract_params(adapted(), jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes[lora.PART])} == {jnp.dtype(jnp.float32)}
  assert {leaf.dtype for leaf in jax.tree.leaves(lora.without(shapes))} == {jnp.dtype(jnp.bfloat16)}
  start = jax.eval_shape(functools.partial(lora.initial, adapted()), jax.random.key(0))
  assert jax.tree.map(lambda x: x.shape, start) == jax.tree.map(lambda x: x.shape, shapes[lora.PART])


def test_a_rank_is_lower_than_both_sides():
  # Keys and values are 2 heads of 16 wide, the decoder 32, the MLP 48.
  assert lora.largest_rank(CASE.config.text, ("gate_proj", "k_proj")) == 31
  wider = dataclasses.replace(CASE.config.text, num_key_value_heads=6)
  assert lora.largest_rank(wider, ("k_proj",)) == 31
  narrow = dataclasses.replace(CASE.config.text, num_key_value_heads=1)
  assert lora.largest_rank(narrow, ("k_proj",)) == 15 and lora.largest_rank(narrow, ("q_proj",)) == 31


def test_tokens_are_decoded_from_merged_weights(batch):
  config = adapted()
  params = drawn(config)
  prefix = model.prefill(config, params, batch[0])
  cache = model.empty_cache(prefix, 2, 4)
  with pytest.raises(ValueError, match="decoded from merged weights"):
    model.decode_step(config, params, prefix, cache, jnp.ones((2, 2), jnp.int32))
