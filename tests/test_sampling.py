import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sampling, sharding
from kepo_jax.models import scoring
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from tests.models.qwen3_vl import cases

G, T = 4, 8
END, PAD = (7, 11), cases.PAD
TEXTS = [(5,), (3, 2), (9,), (6,), (2,), (7,), (4,), (12,)]
IMAGES = [((4, 4), 5), (3, (4, 8), 2), (9,)]
CONFIG = Qwen3VLConfig.from_dict(cases.config_record())
ALLOWED = np.arange(96) < 90  # vision specials are 90 and above
ALLOWED[PAD] = False
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def params():
  return cases.redrawn(model.abstract_params(CONFIG), seed=0)


def sampler(**settings):
  fixed = {"samples": G, "max_new_tokens": T, "end_ids": END, "pad_id": PAD, "allowed": ALLOWED} | settings
  return functools.partial(sampling.sample, CONFIG, **fixed)


@functools.cache
def program(**settings):
  """`sampler` compiled, once for each mesh and shape."""
  return jax.jit(sampler(**settings))


def prompts_of(layouts, extra=(0, 0)):
  return cases.make_prompts(CONFIG, layouts, seed=3, extra=extra)[0]


@pytest.fixture(scope="module")
def rollouts(params):
  return jax.device_get(program()(params, prompts_of(TEXTS), KEY))


def assert_same_rollouts(actual, expected):
  np.testing.assert_array_equal(actual.tokens, expected.tokens)
  np.testing.assert_array_equal(actual.mask, expected.mask)
  np.testing.assert_allclose(actual.logps, expected.logps, atol=2e-5)


def test_masks_end_with_the_end_token(rollouts):
  tokens, mask = rollouts.tokens, rollouts.mask
  assert tokens.shape == mask.shape == (len(TEXTS), G, T)
  np.testing.assert_array_equal(tokens[~mask], PAD)
  np.testing.assert_array_equal(rollouts.logps[~mask], 0.0)
  assert (rollouts.logps[mask] < 0).all()
  ended = np.isin(tokens, END)
  assert 0 < ended.any(-1).sum() < ended[..., 0].size  # rows of both kinds
  # Valid until a token after the end: the mask holds at t when no end came before t.
  np.testing.assert_array_equal(mask, np.cumsum(ended, -1) - ended == 0)
  assert ALLOWED[tokens[mask]].all()


@jax.jit
def uncached(params, prompts, tokens):
  """Logits float32[P, G, T, V] of the forward pass that knows no cache, and what scoring makes of them."""
  hidden = model.completion_hidden(CONFIG, params, model.prefill(CONFIG, params, prompts), tokens)
  head = model.head_weight(CONFIG, params)
  scored = [scoring.token_logps(hidden, head, tokens, jnp.array(ALLOWED), temperature=t)[0] for t in (1.0, 0.7)]
  return jnp.einsum("pgtd,vd->pgtv", hidden, head), dict(zip((1.0, 0.7), scored, strict=True))


@pytest.mark.parametrize(
  "settings", [{}, {"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"temperature": 0.0}], ids=str
)
def test_each_token_is_drawn_from_the_full_forward_with_its_own_key(settings, params):
  prompts = prompts_of(TEXTS)
  rollouts = jax.device_get(program(**settings)(params, prompts, KEY))
  logits, scored = uncached(params, prompts, rollouts.tokens)
  scored = scored[settings.get("temperature") or 1.0]
  np.testing.assert_allclose(rollouts.logps, np.where(rollouts.mask, scored, 0.0), atol=1e-5)
  if settings.get("temperature") == 0.0:
    expected = np.where(ALLOWED, logits, -np.inf).argmax(-1)
  else:

    @jax.jit
    @jax.vmap
    def chosen(logits, t):
      fold = jax.random.fold_in
      keys = jax.vmap(lambda row: jax.vmap(lambda g: fold(fold(fold(KEY, row), g), t))(jnp.arange(G)))(prompts.row)
      return sampling.choose_tokens(logits, keys, ALLOWED, **{"temperature": 1.0} | settings)[0]

    expected = np.moveaxis(chosen(jnp.moveaxis(logits, 2, 0), jnp.arange(T)), 0, 2)
  np.testing.assert_array_equal(rollouts.tokens, np.where(rollouts.mask, expected, PAD))


@pytest.fixture(scope="module")
def pictured(params):
  return jax.device_get(program()(params, prompts_of(IMAGES), KEY))


EVERY_AXIS = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(("layout", "axes", "layouts"), [
  ("decode", EVERY_AXIS, TEXTS),
  ("train", {"fsdp": 4, "tensor": 2}, IMAGES),  # three prompts, which do not divide
  pytest.param("decode", {"data": 8}, TEXTS, marks=pytest.mark.slow),
  pytest.param("train", EVERY_AXIS, TEXTS, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_same_tokens_on_every_mesh(layout, axes, layouts, params, mesh_of, rollouts, pictured):
  mesh = mesh_of(**axes)
  placed = jax.device_put(params, sharding.weight_shardings(mesh, params, model.logical_axes(CONFIG), layout))
  with jax.set_mesh(mesh):
    run = jax.jit(sampler(weight_stationary=layout == "train"))
    actual = jax.device_get(run(placed, sharding.place(mesh, prompts_of(layouts)), KEY))
  assert_same_rollouts(actual, rollouts if layouts is TEXTS else pictured)


def test_padding_and_the_rest_of_the_batch_change_nothing(params, pictured):
  padded = jax.tree.map(lambda x: x[np.array([1, 0])], prompts_of(IMAGES, extra=(5, 8)))
  actual = program(samples=2)(params, padded, KEY)
  assert_same_rollouts(actual, jax.tree.map(lambda x: x[np.array([1, 0]), :2], pictured))


def test_a_key_per_prompt_or_per_completion_draws_as_calls_of_their_own(params):
  prompts, keys = prompts_of(TEXTS), jax.random.split(KEY, len(TEXTS))
  alone = [program(samples=1)(params, prompts, key) for key in keys[:G]]
  together = program()(params, prompts, keys[:G][None])
  for g, rollouts in enumerate(alone):
    assert_same_rollouts(jax.tree.map(lambda x, g=g: x[:, g : g + 1], together), rollouts)
  by_prompt = program()(params, prompts, keys[:, None])
  for row in (0, 5):
    assert_same_rollouts(
      jax.tree.map(lambda x, row=row: x[row], by_prompt),
      jax.tree.map(lambda x, row=row: x[row], program()(params, prompts, keys[row])),
    )


def test_a_cache_that_grows_gives_the_same_tokens(params, rollouts, monkeypatch):
  lengths = {}
  for segment in (3, 4, 7, 8):
    monkeypatch.setattr(sampling, "SEGMENT", segment)
    lengths[segment] = sampling.cache_lengths(T)
  assert lengths == {3: (3, 6, 8), 4: (4, 8), 7: (7, 8), 8: (8,)}
  monkeypatch.setattr(sampling, "SEGMENT", 3)
  assert_same_rollouts(jax.jit(sampler())(params, prompts_of(TEXTS), KEY), rollouts)


def test_the_loop_stops_when_every_row_has_ended(params, monkeypatch):
  steps = []
  decode_step = model.decode_step

  def counted(*arguments):
    jax.debug.callback(lambda: steps.append(1))
    return decode_step(*arguments)

  monkeypatch.setattr(model, "decode_step", counted)
  run = jax.jit(lambda allowed: sampler(allowed=allowed)(params, prompts_of([(3,), (4,)]), KEY))
  for allowed, length in ((np.isin(np.arange(96), END), 1), (ALLOWED & ~np.isin(np.arange(96), END), T)):
    steps.clear()
    rollouts = run(allowed)
    np.testing.assert_array_equal(rollouts.mask.sum(-1), length)
    jax.effects_barrier()
    assert len(steps) == length - 1  # the first token comes from the prompt


@pytest.mark.parametrize(("settings", "kept"), [
  ({"temperature": 0.5}, [0, 1, 3, 4, 5]),
  ({"temperature": 1.0, "top_k": 2}, [0, 3]),
  ({"temperature": 1.0, "top_p": 0.75}, [0, 1, 3]),
  ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 3]),  # of 40 : 30 : 15 the first two hold 82 %
], ids=str)  # fmt: skip
def test_frequencies(settings, kept):
  # Id 2 is banned, however likely; the shares of the others are 40, 15, -, 30, 10, 5 per cent at temperature 1.
  logits, draws = np.log([0.40, 0.15, 9.0, 0.30, 0.10, 0.05]), 20_000
  choose = jax.jit(functools.partial(sampling.choose_tokens, allowed=jnp.arange(6) != 2, **settings))
  keys = jax.random.split(jax.random.key(0), (draws, 1))
  tokens, logps = jax.device_get(choose(jnp.broadcast_to(jnp.float32(logits), (draws, 1, 6)), keys))
  shares = np.exp(logits / settings["temperature"]) * (np.arange(6) != 2)
  shares /= shares.sum()
  filtered = np.where(np.isin(np.arange(6), kept), shares, 0.0)
  filtered /= filtered.sum()
  frequencies = np.bincount(tokens.ravel(), minlength=6) / draws
  np.testing.assert_array_equal(np.flatnonzero(frequencies), kept)
  np.testing.assert_allclose(frequencies, filtered, atol=4 * 0.5 / draws**0.5)
  np.testing.assert_allclose(np.exp(logps), shares[tokens], rtol=1e-5)  # before top_k and top_p


@pytest.mark.parametrize("size", [96, 13])  # 32 rows of 3 columns, and one of 13
def test_draws_follow_the_distribution(size, rng):
  shares, draws = rng.dirichlet(np.full(size, 0.5)), 40_000
  keys = jax.random.split(jax.random.key(1), (draws, 1))
  logps = jnp.broadcast_to(jnp.log(jnp.array(shares, jnp.float32)), (draws, 1, size))
  counts = np.bincount(np.array(jax.jit(sampling._draw)(logps, keys)).ravel(), minlength=size)
  often = shares * draws > 5
  statistic = ((counts - shares * draws) ** 2 / (shares * draws))[often].sum()
  freedom = often.sum() - 1
  assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_what_is_kept_equals_sorting(rng):
  logps = np.float32(np.log(rng.dirichlet(np.full(60, 0.3), size=8)))
  logps[:, 10:20] = -np.inf
  settings = [(0.9, 0), (0.3, 0), (1e-6, 0), (1.0, 1), (1.0, 17), (1.0, 500), (0.8, 9)]
  kept = jax.jit(lambda logps: [sampling._truncate(logps, top_p, top_k) for top_p, top_k in settings])(logps)
  for (top_p, top_k), actual in zip(settings, np.isfinite(kept), strict=True):
    for row, keep in zip(logps.astype(np.float64), actual, strict=True):
      order = np.argsort(-row)
      order = order[np.isfinite(row[order])][: top_k or None]
      p = np.exp(row[order]) / np.exp(row[order]).sum()
      before = np.cumsum(p) - p  # probability of what is more likely
      expected = np.sort(order[before < top_p])
      np.testing.assert_array_equal(np.flatnonzero(keep), expected, err_msg=f"{top_p=} {top_k=}")


def test_impossible_settings_are_refused(params):
  for name, value in (("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("samples", 0)):
    with pytest.raises(ValueError, match=f"{name}={value}"):
      sampler(**{name: value})(params, None, KEY)
