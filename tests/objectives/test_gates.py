import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import gates

SIGNAL = jnp.array([[0.0, 0.5, 1.0], [1.0, 0.0, 2.0]])


class QualityGateTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    (1.0, "positive", [[0, 0, 1], [1, 0, 1]]),
    (0.5, "positive", [[0, 1, 1], [1, 0, 1]]),
    (0.0, "positive", [[1, 1, 1], [1, 1, 1]]),  # tau = 0 is uniform distillation
    (1.0, "negative", [[1, 1, 0], [0, 1, 0]]),
    (0.5, "negative", [[1, 0, 0], [0, 1, 0]]),
    (0.0, "negative", [[0, 0, 0], [0, 0, 0]]),  # nothing fails to reach 0
    (1.0, "none", [[1, 1, 1], [1, 1, 1]]),
  )
  def test_worked_examples(self, threshold, mode, expected):
    gate = self.variant(lambda signal: gates.quality_gate(signal, threshold=threshold, mode=mode))(SIGNAL)
    chex.assert_type(gate, bool)
    np.testing.assert_array_equal(gate, np.array(expected, bool))


@pytest.mark.parametrize("mode", gates.MODES)
def test_equals_a_slow_loop(mode, rng):
  signal = rng.choice([0.0, 0.5, 1.0, 2.0], size=(4, 8)).astype(np.float32)
  for threshold in (0.0, 0.5, 1.0):
    expected = np.zeros((4, 8), bool)
    for i in np.ndindex(4, 8):
      # A rollout of exactly tau passes the positive gate and never the negative one.
      expected[i] = {"positive": signal[i] >= threshold, "negative": signal[i] < threshold, "none": True}[mode]
    np.testing.assert_array_equal(gates.quality_gate(signal, threshold=threshold, mode=mode), expected)


def test_a_threshold_of_zero_is_uniform_distillation(rng):
  accuracy = jnp.array(rng.integers(0, 2, (4, 8)), jnp.float32)
  uniform = gates.quality_gate(accuracy, threshold=1.0, mode="none")
  np.testing.assert_array_equal(gates.quality_gate(accuracy, threshold=0.0), uniform)


def test_every_rollout_passes_one_of_the_two_directions():
  for threshold in (0.0, 0.5, 1.0, 3.0):
    positive, negative = (gates.quality_gate(SIGNAL, threshold=threshold, mode=m) for m in ("positive", "negative"))
    np.testing.assert_array_equal(positive, ~negative)


def test_unknown_mode_is_refused():
  with pytest.raises(ValueError, match="positive"):
    gates.quality_gate(SIGNAL, threshold=1.0, mode="Positive")


@pytest.mark.parametrize("mode", gates.MODES)
def test_sharded_equals_unsharded(mode, mesh_of):
  signal = jnp.tile(SIGNAL, (4, 1))
  sharded = jax.device_put(signal, NamedSharding(mesh_of(data=8), PartitionSpec("data")))
  actual = jax.jit(lambda signal: gates.quality_gate(signal, threshold=1.0, mode=mode))(sharded)
  np.testing.assert_array_equal(actual, gates.quality_gate(signal, threshold=1.0, mode=mode))
