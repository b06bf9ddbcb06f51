"""Rotary axes of the decoder."""

import jax.numpy as jnp
import numpy as np

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
