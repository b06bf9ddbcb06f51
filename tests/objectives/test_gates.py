import jax.numpy as jnp
import numpy as np

from kepo_jax.objectives import gates

SIGNAL = jnp.array([[0.0, 0.5, 1.0], [1.0, 0.0, 2.0]])


def test_worked_examples():
  # A rollout of exactly tau passes the positive gate and never the negative one; tau = 0 is uniform distillation.
  for threshold, mode, expected in (
    (1.0, "positive", [[0, 0, 1], [1, 0, 1]]),
    (0.5, "positive", [[0, 1, 1], [1, 0, 1]]),
    (0.0, "positive", [[1, 1, 1], [1, 1, 1]]),
    (1.0, "negative", [[1, 1, 0], [0, 1, 0]]),
    (0.5, "negative", [[1, 0, 0], [0, 1, 0]]),
    (0.0, "negative", [[0, 0, 0], [0, 0, 0]]),
    (1.0, "none", [[1, 1, 1], [1, 1, 1]]),
  ):
    gate = gates.quality_gate(SIGNAL, threshold=threshold, mode=mode)
    assert gate.dtype == bool
    np.testing.assert_array_equal(gate, np.array(expected, bool), err_msg=f"{mode} {threshold}")
