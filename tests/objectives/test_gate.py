import jax.numpy as jnp
import numpy as np

from kepo_jax.objectives import gate


def test_gates_worked_examples():
  signal = jnp.array([[0.0, 0.5, 1.0], [1.0, 0.0, 2.0]])
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
    distilled = gate.quality_gate(signal, threshold=threshold, mode=mode)
    assert distilled.dtype == bool
    np.testing.assert_array_equal(distilled, np.array(expected, bool), err_msg=f"{mode} {threshold}")
