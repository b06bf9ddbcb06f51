import functools
import re

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
LAYOUTS = [((4, 4), 5), (3, (4, 8), 2), (9,), (2, (8, 4), 4), (6,), ((4, 4), 1), (4, (4, 4), 3), (12,)]
CONFIG = Qwen3VLConfig.from_dict(cases.config_record())
ALLOWED = np.arange(96) < 90  # vision specials are 90 and above
ALLOWED[PAD] = False


@pytest.fixture(scope="module")
def params():
  return cases.redrawn(model.abstract_params(CONFIG), seed=0)


@functools.cache
def program(**settings):
  """`sample` compiled for some settings, one program per mesh and shape."""
  fixed = {"samples": G, "max_new_tokens": T, "end_ids": END, "pad_id": PAD, "allowed": ALLOWED} | settings
  return jax.jit(functools.partial(sampling.sample, CONFIG, **fixed))


def prompts_of(layouts=LAYOUTS, extra=(0, 0)):
  return cases.make_prompts(CONFIG, layouts, seed=3, extra=extra)[0]


def take(prompts, rows):
  return jax.tree.map(lambda x: x[np.array(rows)], prompts)


KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def rollouts(params):
  return jax.device_get(program()(params, prompts_of(), KEY))


def assert_same_rollouts(actual, expected):
  np.testing.assert_array_equal(actual.tokens, expected.tokens)
  np.testing.assert_array_equal(actual.mask, expected.mask)
  np.testing.assert_allclose(actual.logps, expected.logps, atol=2e-5)


def test_masks_end_with_the_end_token(rollouts):
  tokens, mask = rollouts.tokens, rollouts.mask
  assert tokens.shape == mask.shape == (len(LAYOUTS), G, T)
  np.testing.assert_array_equal(tokens[~mask], PAD)
  np.testing.assert_array_equal(rollouts.logps[~mask], 0.0)
  assert (rollouts.logps[mask] < 0).all()
  ended = np.isin(tokens, END)
  assert 0 < ended.any(-1).sum() < ended[..., 0].size  # rows of both kinds
  # Valid until a token after the end: the mask holds at t when no end came before t.
  np.testing.assert_array_equal(mask, np.cumsum(ended, -1) - ended == 0)
  assert ALLOWED[tokens[mask]].all()


def test_rows_of_a_group_differ(rollouts):
  assert len({tuple(row) for row in rollouts.tokens.reshape(-1, T)}) > 0.9 * len(LAYOUTS) * G


@pytest.mark.parametrize(
  "settings", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0, "samples": 1}, {"top_k": 5}], ids=str
)
def test_sampled_logps_equal_scored_logps(settings, params):
  prompts = prompts_of()
  rollouts = program(**settings)(params, prompts, KEY)

  @jax.jit
  def score(params, prompts, tokens):
    hidden = model.completion_hidden(CONFIG, params, model.prefill(CONFIG, params, prompts), tokens)
    temperature = settings.get("temperature", 1.0) or 1.0
    head = model.head_weight(CONFIG, params)
    return scoring.token_logps(hidden, head, tokens, jnp.array(ALLOWED), temperature=temperature, chunk=4)[0]

  scored = np.where(rollouts.mask, score(params, prompts, rollouts.tokens), 0.0)
  np.testing.assert_allclose(rollouts.logps, scored, atol=1e-5)


def test_greedy_takes_the_most_likely_token_of_the_full_forward(params):
  prompts = prompts_of()
  greedy = program(temperature=0.0, samples=1)(params, prompts, KEY)

  @jax.jit
  def most_likely(params, prompts, tokens):
    hidden = model.completion_hidden(CONFIG, params, model.prefill(CONFIG, params, prompts), tokens)
    logits = jnp.einsum("pgtd,vd->pgtv", hidden, model.head_weight(CONFIG, params))
    return jnp.where(ALLOWED.reshape(1, 1, 1, -1), logits, -jnp.inf).argmax(-1)

  expected = np.where(greedy.mask, most_likely(params, prompts, greedy.tokens), PAD)
  np.testing.assert_array_equal(greedy.tokens, expected)


@pytest.mark.parametrize(
  "axes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=lambda axes: "x".join(axes)
)
def test_same_tokens_on_every_mesh(axes, params, rollouts, mesh_of):
  mesh = mesh_of(**axes)
  shardings = sharding.weight_shardings(mesh, params, model.logical_axes(CONFIG), "decode")
  with jax.set_mesh(mesh):
    actual = program()(jax.device_put(params, shardings), sharding.place(mesh, prompts_of()), KEY)
  assert_same_rollouts(jax.device_get(actual), rollouts)


def test_same_tokens_with_more_padding(params, rollouts):
  assert_same_rollouts(program()(params, prompts_of(extra=(5, 8)), KEY), rollouts)


def test_same_tokens_in_another_batch(params, rollouts):
  order = [6, 1, 3]
  actual = program(samples=2)(params, take(prompts_of(), order), KEY)
  expected = jax.tree.map(lambda x: x[np.array(order), :2], rollouts)
  assert_same_rollouts(actual, expected)


def test_keys_and_rows_change_the_tokens(params, rollouts):
  prompts = prompts_of()
  other = program()(params, prompts, jax.random.key(6))
  assert (other.tokens != rollouts.tokens).any((1, 2)).all()
  renamed = program()(params, prompts.replace(row=prompts.row + 100), KEY)
  assert (renamed.tokens != rollouts.tokens).any((1, 2)).all()


@pytest.mark.parametrize(("ends", "expected"), [(tuple(range(96)), 0), ((), T - 1)], ids=["all end at once", "no end"])
def test_the_loop_stops_when_every_row_has_ended(ends, expected, params, monkeypatch):
  steps = []
  decode_step = model.decode_step

  def counted(*arguments):
    jax.debug.callback(lambda: steps.append(1))
    return decode_step(*arguments)

  monkeypatch.setattr(model, "decode_step", counted)
  settings = {"samples": G, "max_new_tokens": T, "end_ids": ends, "pad_id": PAD, "allowed": ALLOWED}
  rollouts = jax.jit(functools.partial(sampling.sample, CONFIG, **settings))(params, take(prompts_of(), [2, 4]), KEY)
  np.testing.assert_array_equal(rollouts.mask.sum(-1), expected + 1)
  jax.effects_barrier()
  assert len(steps) == expected


def test_one_token_needs_no_loop(params, rollouts):
  actual = program(max_new_tokens=1)(params, prompts_of(), KEY)
  np.testing.assert_array_equal(actual.tokens[..., 0], rollouts.tokens[..., 0])


def drawn(logits, rows=20_000, **settings):
  """How often each id is chosen."""
  keys = jax.random.split(jax.random.key(0), (rows, 1))
  choose = jax.jit(functools.partial(sampling.choose_tokens, allowed=jnp.arange(len(logits)) != 2, **settings))
  tokens, logps = choose(jnp.broadcast_to(jnp.array(logits), (rows, 1, len(logits))), keys)
  return np.bincount(np.array(tokens).ravel(), minlength=len(logits)) / rows, np.array(logps)[:, 0], tokens[:, 0]


@pytest.mark.parametrize(
  ("settings", "kept"),
  [
    ({"temperature": 1.0}, [0, 1, 3, 4, 5]),
    ({"temperature": 0.5}, [0, 1, 3, 4, 5]),
    ({"temperature": 1.0, "top_k": 2}, [0, 3]),
    ({"temperature": 1.0, "top_p": 0.75}, [0, 1, 3]),
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, [0, 3]),  # of 40 : 30 : 15 the first two hold 82 %
  ],
  ids=str,
)
def test_frequencies(settings, kept):
  # Id 2 is banned, however likely; the shares of the others are 40, 15, -, 30, 10, 5 per cent at temperature 1.
  logits = np.log([0.40, 0.15, 9.0, 0.30, 0.10, 0.05])
  frequencies, logps, tokens = drawn(logits, **settings)
  shares = np.exp(logits / settings["temperature"])
  shares[2] = 0.0
  shares /= shares.sum()
  filtered = np.where(np.isin(np.arange(6), kept), shares, 0.0)
  filtered /= filtered.sum()
  np.testing.assert_array_equal(np.flatnonzero(frequencies), kept)
  np.testing.assert_allclose(frequencies, filtered, atol=4 * 0.5 / 20_000**0.5)
  np.testing.assert_allclose(logps, np.log(shares)[tokens], rtol=1e-5)  # before top_k and top_p


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (0.3, 0), (1e-6, 0), (1.0, 1), (1.0, 17), (1.0, 500), (0.8, 9)])
def test_what_is_kept_equals_sorting(top_p, top_k, rng):
  logps = np.float32(np.log(rng.dirichlet(np.full(60, 0.3), size=8)))
  logps[:, 10:20] = -np.inf
  actual = np.isfinite(sampling._kept(jnp.array(logps), top_p, top_k))
  for row, keep in zip(logps.astype(np.float64), actual, strict=True):
    order = np.argsort(-row)
    order = order[np.isfinite(row[order])][: top_k or None]
    p = np.exp(row[order]) / np.exp(row[order]).sum()
    before = np.cumsum(p) - p  # probability of what is more likely
    expected = order[before < top_p]
    np.testing.assert_array_equal(np.flatnonzero(keep), np.sort(expected))


@pytest.mark.parametrize(
  ("name", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("samples", 0)]
)
def test_impossible_settings_are_refused(name, value, params):
  settings = {"samples": G, "max_new_tokens": T, "end_ids": END, "pad_id": PAD, "allowed": ALLOWED} | {name: value}
  with pytest.raises(ValueError, match=f"{name}={value}"):
    sampling.sample(CONFIG, params, prompts_of(), KEY, **settings)


def loop_computations(text):
  """Text of every computation of a compiled program that a while loop runs, directly or through calls."""
  bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S))
  pending = set(re.findall(r"body=%?([\w.\-]+)", text)) | set(re.findall(r"condition=%?([\w.\-]+)", text))
  reached = set()
  while pending:
    name = pending.pop()
    reached.add(name)
    called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", bodies.get(name, ""))
    pending |= set(called) & bodies.keys() - reached
  return "\n".join(bodies[name] for name in reached if name in bodies)


def gathered_sizes(text):
  """Elements of every all-gather result."""
  found = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
  return [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in found]


def compiled(params, mesh, layout):
  shardings = sharding.weight_shardings(mesh, params, model.logical_axes(CONFIG), layout)
  with jax.set_mesh(mesh):
    placed = sharding.place(mesh, prompts_of())
    return program().lower(jax.device_put(params, shardings), placed, KEY).compile().as_text()


def test_no_weight_is_gathered_inside_the_loop(params, mesh_of):
  smallest = 32 * 32  # the smallest matrix of a layer
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  inside = loop_computations(compiled(params, mesh, "decode"))
  assert "dot(" in inside  # the parser found the loop
  assert max(gathered_sizes(inside), default=0) < smallest
  # The same program over weights in the training layout does gather, so the check can fail.
  assert max(gathered_sizes(loop_computations(compiled(params, mesh, "train")))) >= smallest
