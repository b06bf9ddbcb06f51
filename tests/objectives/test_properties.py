"""What must hold for every batch; masks, gates and flags are drawn one by one: a failure shrinks to few rows."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from kepo_jax.objectives import distributions, divergences
from tests.objectives import cases
from tests.objectives.cases import ALLOWED, BANNED, SETTINGS, G, P, T, V

MORE = 3
ROWS = P * G
examples = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
# Aggregations, normalisers, ratios, divergences and flags, each in at least one; each compiles programs of its own.
LONG = ("constant length, k2", "group mean, forward", "gspo, token mean", "sampled k2", "gspo, shaped")
CHOSEN = ("kepo off-policy", "everything", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG))

seeds, scales = st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.1, 1.0, 10.0, 60.0])
flags = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(lambda x: np.reshape(x, (P, G)))
lengths = st.one_of(
  st.lists(st.integers(0, T), min_size=ROWS, max_size=ROWS),
  st.sampled_from([[0] * ROWS, [T] * ROWS, [0] * (ROWS - 1) + [1]]),  # no token, all tokens, one token
).map(lambda x: np.reshape(x, (P, G)))


@st.composite
def batches(draw):
  """A batch as `cases.batch` makes it, with everything that selects rows drawn."""
  values = {name: np.array(x) for name, x in cases.batch(np.random.default_rng(draw(seeds))).items()}
  values["mask"] = np.arange(T) < draw(lengths)[..., None]
  # Few values, so that ties are common.
  values["advantages"] = np.float32([[-1.5, 0.0], [0.5, 2.0]])[draw(flags).astype(int), draw(flags).astype(int)]
  return values | {name: draw(flags) for name in ("gate", "kept", "injected", "supervised")}


def evaluated(values, name):
  """(loss, gradient) as numpy, both finite."""
  (loss, _), gradient = cases.value_and_gradient(values, SETTINGS[name])
  loss, gradient = np.float64(loss), np.float64(gradient)
  assert np.isfinite(loss) and np.isfinite(gradient).all()
  return loss, gradient


def assert_same(actual, expected):
  """Equal up to the order of sums: a loss, and a gradient in norm."""
  (loss, gradient), (expected_loss, expected_gradient) = actual, expected
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=2e-6)
  assert np.linalg.norm(gradient - expected_gradient) <= 1e-5 * np.linalg.norm(expected_gradient) + 1e-7


def padded(values):
  """Longer rows, with banned tokens, large logits and nan in what is added."""

  def longer(name, x):
    fill = {"mask": False, "tokens": BANNED, **dict.fromkeys(cases.LOGITS, -1e4)}.get(name, np.nan)
    return x if x.ndim < 3 else np.concatenate([x, np.full((P, G, MORE, *x.shape[3:]), fill, x.dtype)], axis=2)

  return {name: longer(name, x) for name, x in values.items()}


_inputs = functools.partial(jax.jit, static_argnames="case")(cases.inputs_of)


@functools.partial(jax.jit, static_argnames="case")
def _part(student, others, inputs, case):
  return jax.value_and_grad(lambda student: case.token_loss(student, others, inputs)[0])(student)


@pytest.mark.parametrize("name", CHOSEN)
@hypothesis.given(values=batches())
@examples
def test_padding_and_micro_batches_change_nothing(name, values):
  case, (loss, gradient) = SETTINGS[name], evaluated(values, name)
  more, more_gradient = evaluated(padded(values), name)
  assert_same((more, more_gradient[:, :, :T]), (loss, gradient))
  np.testing.assert_array_equal(more_gradient[:, :, T:], 0.0)
  np.testing.assert_array_equal(gradient[~values["mask"]], 0.0)
  arguments = (values["student"], case.others(values), jax.tree.map(np.array, _inputs(values, case)))
  for axis in (0, 2):  # prompts, and chunks of a token each
    size = values["student"].shape[axis]
    cut = (jax.tree.map(lambda x, i=i, axis=axis: np.take(x, [i], axis), arguments) for i in range(size))
    parts = [_part(*part, case) for part in cut]
    total = sum(np.float64(part[0]) for part in parts)
    assert_same((total, np.concatenate([np.float64(part[1]) for part in parts], axis)), (loss, gradient))


@jax.jit
def _divergences(logits, tokens):
  """(kind, weight) -> the divergence of each token, over the whole vocabulary and on the first and the first four."""
  logps = [distributions.masked_log_softmax(x, ALLOWED) for x in logits]
  return {
    (kind, weight): [
      divergences.token_divergence(*logps, tokens, kind=kind, weight=weight, top_k=top_k) for top_k in (0, 4, 1)
    ]
    for kind in divergences.KINDS
    for weight in ((0.1, 0.5, 0.9) if kind == "jsd" else (0.5,))
  }


@hypothesis.given(seed=seeds, scales=st.tuples(scales, scales), same=st.booleans())
@examples
def test_divergences_are_distances_that_coarser_ids_cannot_raise(seed, scales, same):
  # From nearly uniform policies to nearly certain ones.
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(2, 8, V)).astype(np.float32) * np.float32(scales)[:, None, None]
  logits[1] = logits[0] if same else logits[1]
  tokens = rng.choice(np.flatnonzero(ALLOWED), 8)
  actual = jax.device_get(_divergences(logits, tokens))
  for case, (whole, *coarser) in actual.items():
    # Absolute: at scale 60 a log-probability of 200 has an error of 1e-5, and a sum of shares times them as well.
    assert (whole >= -2e-5).all(), case
    assert not same or (np.abs(whole) <= 2e-5).all(), case
    for coarse in coarser:
      assert (coarse >= -2e-5).all() and (coarse <= whole * (1 + 1e-5) + 2e-5).all(), case
  jsd = actual["jsd", 0.5][0]
  assert (jsd <= np.log(2) + 1e-6).all()
  np.testing.assert_allclose(_divergences(logits[::-1], tokens)["jsd", 0.5][0], jsd, rtol=1e-5, atol=1e-6)
