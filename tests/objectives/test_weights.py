import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import weights

P, G, T, MOST = 3, 4, 6, 9
# Rows of all lengths, an empty one among them, and a gate that is closed for some.
LENGTHS = np.array([[0, 3, 6, 1], [2, 2, 5, 4], [6, 1, 0, 3]])
MASK = jnp.array(np.arange(T) < LENGTHS[..., None])
GATE = jnp.array([[1, 0, 1, 1], [0, 0, 0, 1], [1, 0, 1, 0]], bool)

NAMES = weights.AGGREGATIONS + weights.NORMALISERS


def weigh(mask, gate, *, name):
  """The weights of any name; only a normaliser looks at the gate."""
  if name in weights.NORMALISERS:
    return weights.distill_weights(mask, gate, normaliser=name)
  return weights.aggregation_weights(mask, aggregation=name, length=MOST)


def slow_weights(mask, gate, name):
  """Token by token, in float64."""
  mask, gate = np.array(mask), np.array(gate)
  out = np.zeros(mask.shape)
  rows = mask.shape[0] * mask.shape[1]
  gated = sum(mask[row].sum() for row in np.ndindex(gate.shape) if gate[row])
  for p, g, t in zip(*np.nonzero(mask), strict=True):
    out[p, g, t] = {
      "sequence_mean": 1 / rows / mask[p, g].sum(),
      "token_mean": 1 / mask.sum(),
      "constant_length": 1 / rows / MOST,
      "gated_tokens": gate[p, g] / max(1, gated),
      "group_mean": gate[p, g] / rows / mask[p, g].sum(),
    }[name]
  return out


class WeightsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_sequence_mean_worked_example(self):
    # Two rollouts of 1 and 3 tokens: 1/2 * 1 and 1/2 * 1/3 each; an empty one has none, and still counts in N.
    mask = jnp.array([[[1, 0, 0], [1, 1, 1]]], bool)
    np.testing.assert_allclose(
      self.variant(weights.sequence_mean_weights)(mask), [[[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]], rtol=1e-6
    )
    empty = self.variant(weights.sequence_mean_weights)(mask.at[0, 0].set(False))
    np.testing.assert_allclose(empty, [[[0, 0, 0], [1 / 6, 1 / 6, 1 / 6]]], rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_token_mean_worked_example(self):
    # 1 + 3 tokens over both prompts: a quarter each, however they are spread.
    mask = jnp.array([[[1, 0, 0]], [[1, 1, 1]]], bool)
    actual = self.variant(weights.token_mean_weights)(mask)
    np.testing.assert_allclose(actual, np.array([[[1, 0, 0]], [[1, 1, 1]]]) / 4, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_constant_length_worked_example(self):
    # Two rollouts of at most 5 tokens: every token weighs 1/10, and the weights need not add to 1.
    mask = jnp.array([[[1, 0, 0], [1, 1, 1]]], bool)
    actual = self.variant(functools.partial(weights.constant_length_weights, length=5))(mask)
    np.testing.assert_allclose(actual, np.array([[[1, 0, 0], [1, 1, 1]]]) / 10, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_gated_tokens_worked_example(self):
    mask = jnp.array([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]]], bool)
    gated = self.variant(weights.gated_token_weights)
    actual = gated(mask, jnp.array([[True, True], [True, False]]))
    np.testing.assert_allclose(actual, np.array([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]) / 6, rtol=1e-6)
    np.testing.assert_array_equal(gated(mask, jnp.zeros((2, 2), bool)), 0.0)

  @chex.variants(with_jit=True, without_jit=True)
  def test_group_mean_worked_example(self):
    # Four rollouts: a gated one has 1/4 over its length, whether or not others are gated; an empty gate has nothing.
    mask = jnp.array([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]]], bool)
    group_mean = self.variant(functools.partial(weights.distill_weights, normaliser="group_mean"))
    actual = group_mean(mask, jnp.array([[True, False], [True, False]]))
    expected = [[[1 / 4, 0, 0], [0, 0, 0]], [[1 / 8, 1 / 8, 0], [0, 0, 0]]]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_array_equal(group_mean(mask, jnp.zeros((2, 2), bool)), 0.0)

  @parameterized.parameters(*NAMES)
  def test_nothing_to_weigh_gives_exact_zeros(self, name):
    np.testing.assert_array_equal(weigh(jnp.zeros_like(MASK), GATE, name=name), 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_equals_a_slow_loop(name):
  actual = weigh(MASK, GATE, name=name)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, slow_weights(MASK, GATE, name), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
  padded = weigh(jnp.pad(MASK, ((0, 0), (0, 0), (0, 5))), GATE, name=name)
  np.testing.assert_array_equal(padded[..., :T], weigh(MASK, GATE, name=name))
  np.testing.assert_array_equal(padded[..., T:], 0.0)


def test_the_sums_say_what_a_mean_is():
  # A loss of 1 per token: both means are 1 where every row has a token; a constant length gives the share that is used.
  full = jnp.array(np.arange(T) < np.maximum(LENGTHS, 1)[..., None])
  total = {name: float(weigh(full, GATE, name=name).sum()) for name in NAMES}
  expected = {
    "sequence_mean": 1.0,
    "token_mean": 1.0,
    "constant_length": np.maximum(LENGTHS, 1).sum() / (P * G * MOST),
    "gated_tokens": 1.0,
    "group_mean": GATE.sum() / (P * G),
  }
  chex.assert_trees_all_close(total, jax.tree.map(float, expected), rtol=1e-6)


@pytest.mark.parametrize("normaliser", weights.NORMALISERS)
def test_a_closed_gate_is_silent_and_an_open_one_is_uniform(normaliser):
  distil = functools.partial(weights.distill_weights, normaliser=normaliser)
  np.testing.assert_array_equal(np.array(distil(MASK, GATE))[~np.array(GATE)], 0.0)
  np.testing.assert_array_equal(distil(MASK, jnp.zeros_like(GATE)), 0.0)
  uniform = {"gated_tokens": weights.token_mean_weights, "group_mean": weights.sequence_mean_weights}[normaliser]
  np.testing.assert_array_equal(distil(MASK, jnp.ones_like(GATE)), uniform(MASK))


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="sequence_mean"):
    weights.aggregation_weights(MASK, aggregation="mean", length=T)
  with pytest.raises(ValueError, match="gated_tokens"):
    weights.distill_weights(MASK, GATE, normaliser="group")


@pytest.mark.parametrize("name", NAMES)
def test_sharded_equals_unsharded(name, mesh_of):
  arguments = jnp.tile(MASK, (8, 1, 1))[:8], jnp.tile(GATE, (8, 1))[:8]
  sharded = jax.device_put(arguments, NamedSharding(mesh_of(data=8), PartitionSpec("data")))
  np.testing.assert_allclose(
    jax.jit(functools.partial(weigh, name=name))(*sharded), weigh(*arguments, name=name), rtol=1e-6
  )
