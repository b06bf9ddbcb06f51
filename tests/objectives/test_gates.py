import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from kepo_jax.objectives import gates

SIGNAL = jnp.array([[0.0, 0.5, 1.0], [1.0, 0.0, 2.0]])


class QualityGateTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    (1.0, "positive", [[0, 0, 1], [1, 0, 1]]),
    (0.5, "positive", [[0, 1, 1], [1, 0, 1]]),
    (0.0, "positive", [[1, 1, 1], [1, 1, 1]]),  # tau = 0 is uniform distillation
    (1.0, "negative", [[1, 1, 0], [0, 1, 0]]),
    (1.0, "none", [[1, 1, 1], [1, 1, 1]]),
  )
  def test_worked_examples(self, threshold, mode, expected):
    gate = self.variant(lambda signal: gates.quality_gate(signal, threshold=threshold, mode=mode))(SIGNAL)
    chex.assert_type(gate, bool)
    np.testing.assert_array_equal(gate, np.array(expected, bool))


def test_a_threshold_of_zero_is_uniform_distillation(rng):
  accuracy = jnp.array(rng.integers(0, 2, (4, 8)), jnp.float32)
  uniform = gates.quality_gate(accuracy, threshold=1.0, mode="none")
  np.testing.assert_array_equal(gates.quality_gate(accuracy, threshold=0.0), uniform)


def test_unknown_mode_is_refused():
  with pytest.raises(ValueError, match="positive"):
    gates.quality_gate(SIGNAL, threshold=1.0, mode="Positive")
