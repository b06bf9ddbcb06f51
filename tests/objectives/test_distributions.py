import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import distributions


class MaskedLogSoftmaxTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example(self):
    # Without the banned 9 the masses at temperature 2 are e^0 and e^(log 9 / 2) = 3: shares 1/4 and 3/4.
    logits = jnp.array([[0.0, 9.0, np.log(9.0)]])
    actual = self.variant(distributions.masked_log_softmax, static_argnums=2)(
      logits, jnp.array([True, False, True]), 2.0
    )
    np.testing.assert_allclose(jnp.exp(actual), [[0.25, 0.0, 0.75]], rtol=1e-6)
    self.assertEqual(actual[0, 1], -jnp.inf)

  @chex.variants(with_jit=True, without_jit=True)
  def test_entropy_ignores_banned_ids(self):
    logits = jnp.zeros((3, 8))
    logps = distributions.masked_log_softmax(logits, jnp.arange(8) < 4)
    np.testing.assert_allclose(self.variant(distributions.entropy)(logps), np.log(4.0), rtol=1e-6)


def test_float32_inside(rng):
  logits = jnp.array(rng.normal(size=(4, 50)) * 8, jnp.bfloat16)
  allowed = jnp.ones(50, bool)
  actual = distributions.masked_log_softmax(logits, allowed)
  assert actual.dtype == jnp.float32
  exact = np.asarray(logits, np.float64)
  exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
  np.testing.assert_allclose(actual, exact, atol=2e-6)


def test_gradients_are_finite_and_zero_at_banned_ids(rng):
  logits = jnp.array(rng.normal(size=(2, 3, 10)), jnp.float32)
  allowed = jnp.arange(10) % 3 > 0
  tokens = jnp.array([[1, 2, 4], [5, 7, 8]])

  @jax.jit
  def objective(logits):
    logps = distributions.masked_log_softmax(logits, allowed, 0.7)
    return distributions.select_token(logps, tokens).sum() + distributions.entropy(logps).sum()

  gradient = jax.grad(objective)(logits)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[..., ~allowed], 0.0)
  assert (np.abs(gradient[..., allowed]) > 0).all()
  direction = jnp.array(rng.normal(size=logits.shape), jnp.float32)
  difference = objective(logits + 1e-2 * direction) - objective(logits - 1e-2 * direction)
  np.testing.assert_allclose((gradient * direction).sum(), difference / 2e-2, rtol=2e-3)


def test_select_token_is_a_gather(rng):
  values = jnp.array(rng.normal(size=(3, 2, 7)), jnp.float32)
  tokens = jnp.array(rng.integers(0, 7, (3, 2)))
  expected = jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_array_equal(distributions.select_token(values, tokens), expected)


# Shares 0.1 0.4 0 0.2 0.2 0.1, the third id banned; 0.2 and 0.1 are tied.
SHARES = np.float32([0.1, 0.4, 0.0, 0.2, 0.2, 0.1])
LOGPS = jnp.log(jnp.array(SHARES))


class TopIdsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_worked_example(self):
    for k, expected in (
      (1, [0, 1, 0, 0, 0, 0]),
      (2, [0, 1, 0, 1, 1, 0]),  # the second and the third are equal: both stay
      (3, [0, 1, 0, 1, 1, 0]),
      (4, [1, 1, 0, 1, 1, 1]),
      (5, [1, 1, 0, 1, 1, 1]),
    ):
      actual = self.variant(functools.partial(distributions.top_ids, k=k))(LOGPS)
      np.testing.assert_array_equal(actual, np.array(expected, bool), err_msg=f"k = {k}")
    # More than there are: every allowed id, whatever is said of the banned one.
    beyond = self.variant(functools.partial(distributions.top_ids, k=9))(LOGPS)
    self.assertTrue(beyond[SHARES > 0].all())

  @chex.variants(with_jit=True, without_jit=True)
  def test_tail_worked_example(self):
    # 0.4 + 0.2 + 0.2 first reach 0.7; what is wanted exactly is kept, and no more.
    tail = self.variant(distributions.tail_ids)
    np.testing.assert_array_equal(tail(LOGPS, SHARES, 0.7), np.array([1, 0, 1, 0, 0, 1], bool))
    np.testing.assert_array_equal(tail(LOGPS, SHARES, 0.3), np.array([1, 0, 1, 1, 1, 1], bool))

  @chex.variants(with_jit=True, without_jit=True)
  def test_bucket_worked_example(self):
    # The two ids of share 0.2 and the one of 0.4 stay; the bucket holds 0.1 + 0.1.
    top = jnp.array([0, 1, 0, 1, 1, 0], bool)
    kept, tail = self.variant(distributions.with_tail)(LOGPS, top)
    np.testing.assert_allclose(np.exp(kept), [0, 0.4, 0, 0.2, 0.2, 0], rtol=1e-6)
    np.testing.assert_allclose(np.exp(tail), [0.2], rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_bucket_with_nothing_left(self):
    # All allowed ids stay: the bucket is impossible, and neither it nor the banned id makes a nan.
    top = jnp.array(SHARES > 0)
    kept, tail = self.variant(distributions.with_tail)(LOGPS, top)
    np.testing.assert_array_equal(kept, LOGPS)
    np.testing.assert_array_equal(tail, [-np.inf])


@pytest.mark.parametrize("k", [1, 2, 5, 9, 40])
def test_top_ids_equal_sorting(k, rng):
  # Rounded to tenths, so that ties are many; every fourth id is banned.
  logps = np.where(np.arange(12) % 4 > 0, np.round(rng.normal(size=(30, 12)), 1), -np.inf).astype(np.float32)
  actual = np.array(distributions.top_ids(jnp.array(logps), k))
  for row, chosen in zip(logps, actual, strict=True):
    threshold = sorted(row[np.isfinite(row)], reverse=True)[:k][-1]
    np.testing.assert_array_equal(chosen[np.isfinite(row)], row[np.isfinite(row)] >= threshold)
    assert k > 9 or not chosen[~np.isfinite(row)].any()


def test_bucket_equals_a_slow_loop(rng):
  allowed = np.arange(12) % 4 > 0
  logps = distributions.masked_log_softmax(jnp.array(rng.normal(size=(20, 12)) * 3, jnp.float32), jnp.array(allowed))
  top = rng.integers(0, 2, (20, 12)).astype(bool)
  kept, tail = distributions.with_tail(logps, jnp.array(top))
  for row, chosen, stays, bucket in zip(np.float64(logps), top, kept, tail, strict=True):
    outside = sum(np.exp(logp) for logp, inside in zip(row, chosen, strict=True) if not inside)
    np.testing.assert_allclose(bucket, np.log(outside), rtol=1e-5)
    np.testing.assert_array_equal(stays, np.where(chosen, row, -np.inf))
  np.testing.assert_allclose(np.exp(kept).sum(-1) + np.exp(tail[:, 0]), 1.0, rtol=1e-6)


def test_gradient_of_the_bucket(rng):
  allowed, top = np.arange(8) != 2, np.arange(8) % 3 == 1
  logits = jnp.array(rng.normal(size=8), jnp.float32)

  @jax.jit
  @jax.grad
  def gradient(logits):
    return distributions.with_tail(distributions.masked_log_softmax(logits, jnp.array(allowed)), jnp.array(top))[1][0]

  # d log sum over the rest of p = p restricted to the rest and normalised, minus p.
  p = np.exp(np.float64(logits)) * allowed / (np.exp(np.float64(logits)) * allowed).sum()
  rest = p * ~top / (p * ~top).sum()
  np.testing.assert_allclose(gradient(logits), rest - p, rtol=1e-5, atol=1e-7)


def test_gradient_with_nothing_left(rng):
  # log 0 has a gradient of nan, which a zero weight later would not remove. Of the five kept: 1 - 5 p.
  top, logits = SHARES > 0, jnp.array(rng.normal(size=6), jnp.float32)

  @jax.jit
  @jax.grad
  def gradient(logits):
    kept, tail = distributions.with_tail(distributions.masked_log_softmax(logits, jnp.array(top)), jnp.array(top))
    return jnp.where(jnp.isneginf(tail), 0.0, tail).sum() + jnp.where(top, kept, 0.0).sum()

  p = np.exp(np.float64(logits)) * top / (np.exp(np.float64(logits)) * top).sum()
  np.testing.assert_allclose(gradient(logits), top - 5 * p, rtol=1e-5, atol=1e-6)


def test_sharded_equals_unsharded(mesh_of, rng):
  logits, allowed = jnp.array(rng.normal(size=(4, 2, 16)), jnp.float32), jnp.arange(16) != 3

  def everything(logits, allowed):
    logps = distributions.masked_log_softmax(logits, allowed)
    top = distributions.top_ids(logps, 5)
    return logps, top, distributions.with_tail(logps, top), distributions.entropy(logps)

  # Rows and vocabulary over devices: the threshold needs sums over shards, not a sort.
  mesh = mesh_of(data=4, tensor=2)
  sharded = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
  actual = jax.jit(everything)(sharded, jax.device_put(allowed, NamedSharding(mesh, PartitionSpec("tensor"))))
  chex.assert_trees_all_close(actual, everything(logits, allowed), rtol=2e-6)
