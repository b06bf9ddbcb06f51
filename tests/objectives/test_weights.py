import functools

import jax
import numpy as np

from kepo_jax.objectives import weights

T, MOST = 6, 9
# Rows of all lengths, an empty one among them, and a gate that is closed for some.
LENGTHS = np.array([[0, 3, 6, 1], [2, 2, 5, 4], [6, 1, 0, 3]])
MASK = np.arange(T) < LENGTHS[..., None]
GATE = np.array([[1, 0, 1, 1], [0, 0, 0, 1], [1, 0, 1, 0]], bool)


@functools.partial(jax.jit, static_argnames="most")
def all_weights(mask, gate, most=MOST):
  """The weights of every name; only a normaliser looks at the gate."""
  return {name: weights.aggregation_weights(mask, aggregation=name, length=most) for name in weights.AGGREGATIONS} | {
    name: weights.distill_weights(mask, gate, normaliser=name) for name in weights.NORMALISERS
  }


def test_worked_examples():
  # Four prompts with one rollout each, of 1, 3, 2 and 0 tokens out of at most 5; the first and the third are gated.
  mask = np.array([[[1, 0, 0]], [[1, 1, 1]], [[1, 1, 0]], [[0, 0, 0]]], bool)
  gate = np.array([[True], [False], [True], [False]])
  expected = {
    "sequence_mean": [[1 / 4, 0, 0], [1 / 12] * 3, [1 / 8, 1 / 8, 0], [0, 0, 0]],  # the empty one counts in N
    "token_mean": mask[:, 0] / 6,
    "constant_length": mask[:, 0] / (4 * 5),  # such weights need not add to 1
    "gated_tokens": [[1 / 3, 0, 0], [0, 0, 0], [1 / 3, 1 / 3, 0], [0, 0, 0]],
    "group_mean": [[1 / 4, 0, 0], [0, 0, 0], [1 / 8, 1 / 8, 0], [0, 0, 0]],  # whether or not others are gated
  }
  for name, actual in all_weights(mask, gate, most=5).items():
    np.testing.assert_allclose(actual[:, 0], expected[name], rtol=1e-6, err_msg=name)


def test_padding_changes_nothing():
  expected = all_weights(MASK, GATE)
  for name, padded in all_weights(np.pad(MASK, ((0, 0), (0, 0), (0, 5))), GATE).items():
    np.testing.assert_array_equal(padded[..., :T], expected[name], err_msg=name)
    np.testing.assert_array_equal(padded[..., T:], 0.0, err_msg=name)


def test_a_closed_gate_is_silent_and_an_open_one_is_uniform():
  closed, opened = all_weights(MASK, np.zeros_like(GATE)), all_weights(MASK, np.ones_like(GATE))
  for normaliser, uniform in (("gated_tokens", "token_mean"), ("group_mean", "sequence_mean")):
    np.testing.assert_array_equal(closed[normaliser], 0.0)
    np.testing.assert_array_equal(opened[normaliser], opened[uniform])
