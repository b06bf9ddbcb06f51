"""Attention over several sources, rotary axes, and one layer stack in its three uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import text
from kepo_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from tests.models.qwen3_vl import cases


def test_frequencies_are_interleaved():
  axis = text.axis_of_frequency(SIZES["Qwen3-VL-2B"].text)
  # Sections (24, 20, 20): the axes take turns up to frequency 59; 60 to 63 are temporal.
  np.testing.assert_array_equal(axis[:6], [0, 1, 2, 0, 1, 2])
  np.testing.assert_array_equal(axis[57:], [0, 1, 2, 0, 0, 0, 0])
  assert [(axis == k).sum() for k in range(3)] == [24, 20, 20]


def test_prompt_angles_follow_their_axis():
  config = Qwen3VLConfig.from_dict(cases.config_record()).text  # head 16, sections (4, 2, 2), theta 100
  positions = jnp.array([[[1], [10], [100]]])
  frequencies = 100.0 ** (-np.arange(8) / 8)
  expected = frequencies * [1, 10, 100, 1, 10, 100, 1, 1]
  np.testing.assert_allclose(text.prompt_angles(config, positions)[0, 0], expected, rtol=1e-6)
  same = text.completion_angles(config, jnp.array([[7]]))
  np.testing.assert_allclose(same[0, 0], 7 * frequencies, rtol=1e-6)


def dense(query, sources):
  """Attention over concatenated keys: the slow form."""
  groups = query.shape[2]

  def per_rollout(x):
    return x if x.ndim == 5 else jnp.repeat(x[:, :, None], groups, axis=2)

  keys = jnp.concatenate([per_rollout(k) for k, _, _ in sources], axis=3)
  values = jnp.concatenate([per_rollout(v) for _, v, _ in sources], axis=3)
  shape = query.shape[:-1]
  masks = [jnp.broadcast_to(m, (*shape, k.shape[-2])) for k, _, m in sources]
  scores = jnp.einsum("pkgtjh,pkgsh->pkgtjs", query, keys)
  weights = jax.nn.softmax(jnp.where(jnp.concatenate(masks, axis=-1), scores, -jnp.inf), axis=-1)
  return jnp.einsum("pkgtjs,pkgsh->pkgtjh", weights, values)


@pytest.fixture
def attention_inputs(rng):
  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  prefix_mask = jnp.array([[True, True, False], [True, False, False]])[:, None, None, None, None]
  shared = (normal(2, 2, 3, 4) * 3, normal(2, 2, 3, 4), prefix_mask)
  own = (normal(2, 2, 2, 3, 4) * 3, normal(2, 2, 2, 3, 4), text.causal_mask(3))
  return normal(2, 2, 2, 3, 2, 4) * 3, [shared, own]


def test_joint_attention_equals_attention_over_concatenated_keys(attention_inputs):
  query, sources = attention_inputs
  np.testing.assert_allclose(text.joint_attention(query, sources), dense(query, sources), atol=1e-6)


def test_gradient_of_joint_attention(attention_inputs):
  query, sources = attention_inputs

  def total(attention, query, arrays):
    given = [(k, v, m) for (k, v), (_, _, m) in zip(arrays, sources, strict=True)]
    return (attention(query, given) ** 2).sum()

  arrays = [(k, v) for k, v, _ in sources]
  actual, expected = (jax.grad(total, (1, 2))(f, query, arrays) for f in (text.joint_attention, dense))
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5), actual, expected)


def test_a_row_that_sees_nothing_stays_finite(attention_inputs):
  query, sources = attention_inputs
  blind = [(k, v, jnp.zeros_like(m)) for k, v, m in sources]
  assert np.isfinite(text.joint_attention(query, blind)).all()
  value, gradient = jax.value_and_grad(lambda q: text.joint_attention(q, blind).sum())(query)
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_scores_far_from_zero_stay_finite(attention_inputs):
  query, sources = attention_inputs
  assert np.isfinite(text.joint_attention(query * 1e4, sources)).all()
