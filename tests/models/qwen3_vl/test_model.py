"""The three uses of one model agree with each other, whatever the padding, the batch and the mesh."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import model
from tests.models.qwen3_vl import cases, runs

CONFIG, LAYOUTS = cases.SMALL, cases.SMALL_PROMPTS
PARAMS = cases.redrawn(model.abstract_params(CONFIG), seed=5)
P, G, T = len(LAYOUTS), 4, 5
TOKENS = np.random.RandomState(1).randint(1, 90, (P, G, T)).astype(np.int32)


@jax.jit
def completion_hidden(params, prompts, tokens):
  """[P, G, T, D], and the same of completions of one token, which come from the prompt alone: [P, G, 1, D]."""
  prefix = model.prefill(CONFIG, params, prompts)
  first = model.completion_hidden(CONFIG, params, prefix, tokens[..., :1])
  return model.completion_hidden(CONFIG, params, prefix, tokens), first


@pytest.fixture(scope="module")
def prompts():
  return cases.make_prompts(CONFIG, LAYOUTS)[0]


@pytest.fixture(scope="module")
def padded():
  return cases.make_prompts(CONFIG, LAYOUTS, extra=(T, 8))


@pytest.fixture(scope="module")
def compiled(prompts):
  return completion_hidden.lower(PARAMS, prompts, TOKENS).compile()


@pytest.fixture(scope="module")
def hidden(compiled, prompts):
  return np.asarray(compiled(PARAMS, prompts, TOKENS)[0])


def test_completion_of_one_token_comes_from_the_prompt(compiled, prompts, hidden):
  np.testing.assert_array_equal(compiled(PARAMS, prompts, TOKENS)[1], hidden[:, :, :1])


def test_completions_of_a_group_equal_longer_prompts(padded, hidden):
  # Every completion is appended to its prompt, and the hidden state of the last token is read: no sharing at all.
  whole, tokens, _ = padded
  for rollout in range(G):
    ids, mask, places = (np.array(x) for x in (whole.tokens, whole.mask, whole.positions))
    for prompt, length in enumerate(len(t) for t in tokens):
      added = slice(length, length + T - 1)
      ids[prompt, added] = TOKENS[prompt, rollout, :-1]
      mask[prompt, added] = True
      places[prompt, :, added] = whole.next_position[prompt] + np.arange(T - 1)
    _, last = completion_hidden(PARAMS, whole.replace(tokens=ids, mask=mask, positions=places), TOKENS)
    np.testing.assert_allclose(last[:, 0, 0], hidden[:, rollout, -1], atol=2e-5)


@pytest.mark.parametrize("layers", ["stacked", "separate"])
def test_decoding_token_by_token_equals_the_whole(layers, prompts, hidden):
  @jax.jit
  def decoded(params, prompts, tokens):
    prefix = model.prefill(CONFIG, params, prompts)

    def step(cache, token):
      hidden, cache = model.decode_step(CONFIG, params, prefix, cache, token)
      return cache, hidden

    tokens = jnp.moveaxis(tokens, -1, 0)
    cache, early = jax.lax.scan(step, model.empty_cache(prefix, G, 2), tokens[:2])
    cache, late = jax.lax.scan(step, model.grow_cache(cache, T), tokens[2:])  # what is in a cache stays in it
    return jnp.moveaxis(jnp.concatenate([early, late]), 0, 2), cache.length

  params = PARAMS if layers == "stacked" else model.unstack_layers(PARAMS)
  later, length = decoded(params, prompts, TOKENS)
  assert length == T
  np.testing.assert_allclose(later[:, :, :-1], hidden[:, :, 1:], atol=2e-5)


def test_padding_and_what_it_holds_change_nothing(padded, hidden):
  whole, _, _ = padded
  # Padded patches hold numbers, padded tokens ids and positions: none of them may be seen.
  noise = np.where((whole.vision.segments < 0)[..., None], 7.0, whole.vision.patches)
  whole = whole.replace(
    tokens=np.where(whole.mask, whole.tokens, 5),
    positions=np.where(whole.mask[:, None], whole.positions, 9),
    vision=whole.vision.replace(patches=noise.astype(np.float32)),
  )
  np.testing.assert_allclose(completion_hidden(PARAMS, whole, TOKENS)[0], hidden, atol=2e-5)


def test_text_alone_skips_the_tower():
  alone, _, _ = cases.make_prompts(CONFIG, [LAYOUTS[2]])
  lowered = completion_hidden.lower(PARAMS, alone, TOKENS[2:3])
  assert "tensor<25x32xf32>" not in lowered.as_text()  # the position table is not even an argument


def test_bfloat16_parameters_compute_in_bfloat16(prompts, hidden):
  low, _ = completion_hidden(model.cast(PARAMS, jnp.bfloat16), prompts, TOKENS)
  assert low.dtype == jnp.bfloat16
  assert 1e-4 < runs.difference_in_norm(low, hidden) < 0.05


def test_initial_parameters():
  params = jax.jit(model.init_params, static_argnums=(0, 2))(CONFIG, jax.random.key(0), jnp.bfloat16)
  chex.assert_trees_all_equal_shapes_and_dtypes(params, model.abstract_params(CONFIG, jnp.bfloat16))
  layer = params["language_model"]["layers"]
  assert (layer["input_layernorm"]["weight"] == 1).all() and not params["visual"]["blocks"]["attn"]["qkv"]["bias"].any()
  width = CONFIG.text.intermediate_size
  assert float(layer["mlp"]["down_proj"]["weight"].std()) == pytest.approx(width**-0.5, rel=0.1)
  assert not np.array_equal(layer["mlp"]["up_proj"]["weight"], layer["mlp"]["gate_proj"]["weight"])


def test_axes_name_every_dimension():
  axes, separate = model.logical_axes(CONFIG), model.unstacked_axes(CONFIG)
  for params, names in ((PARAMS, axes), (model.unstack_layers(PARAMS), separate)):
    assert jax.tree.all(jax.tree.map(lambda leaf, names: len(names) == leaf.ndim, params, names))


@pytest.mark.parametrize(
  ("shape", "share"),
  [
    ((2, 4, 1), 1 / 8),  # four prompts go over data alone, their rollouts over fsdp
    ((1, 4, 2), 1 / 6),  # the decoder is split over tensor as well, the tower is not
  ],
)
def test_sharded_equals_unsharded_and_shares_the_work(shape, share, mesh_of, prompts, compiled, hidden):
  mesh = mesh_of(*shape)
  places = sharding.weight_shardings(mesh, PARAMS, model.logical_axes(CONFIG))
  arguments = jax.device_put(PARAMS, places), sharding.place(mesh, prompts), sharding.place(mesh, TOKENS)
  with jax.set_mesh(mesh):
    spread = completion_hidden.lower(*arguments).compile()
  np.testing.assert_allclose(spread(*arguments)[0], hidden, atol=2e-5)
  flops, whole = (program.cost_analysis()["flops"] for program in (spread, compiled))  # of one device
  assert flops < 1.35 * share * whole


@pytest.mark.parametrize("layers", ["stacked", "separate"])
def test_a_token_copies_no_cache(layers, prompts):
  params, length = model.abstract_params(CONFIG), 1024
  if layers == "separate":
    params = jax.eval_shape(model.unstack_layers, params)
  prefix = jax.eval_shape(functools.partial(model.prefill, CONFIG), params, prompts)
  cache = jax.eval_shape(lambda prefix: model.empty_cache(prefix, G, length), prefix)

  def tokens(params, prefix, cache):
    def step(carry):
      hidden, cache = model.decode_step(CONFIG, params, prefix, carry[1], carry[0])
      return jnp.argmax(hidden, axis=-1).astype(jnp.int32), cache

    start = jnp.zeros((P, G), jnp.int32), cache
    return jax.lax.while_loop(lambda carry: carry[1].length < length, step, start)

  text = jax.jit(tokens, donate_argnums=2).lower(params, prefix, cache).compile().as_text()
  whole = ",".join(map(str, jax.tree.leaves(cache.keys)[0].shape))
  assert f"f32[{whole}]" in text
  # The update itself is a fusion in place.
  assert re.findall(rf"= f32\[{whole}\]\S* (?:copy|transpose|concatenate)\(", text) == []
  # Out of a stack every weight is sliced for every token; of layers side by side none is.
  sliced = re.findall(r"= f32\[(?:1,)?64,32\]\S* (?:dynamic-slice|fusion)\(", text)
  assert bool(sliced) == (layers == "stacked")
