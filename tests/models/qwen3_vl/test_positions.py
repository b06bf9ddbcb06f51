"""Index tables and rotary axes: worked examples and slow loops."""

import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import positions, text
from kepo_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from tests.models.qwen3_vl import cases

CONFIG = Qwen3VLConfig.from_dict(cases.config_record())  # merge 2, table 5 x 5
IMAGE = CONFIG.image_token_id


def test_worked_example():
  # Two words, an image of 4 x 6 patches = 2 x 3 tokens, one word.
  # The image starts at 2 and spans 2..3 by 2..4, so the last word stands at 5 and the completion starts at 6.
  ids, next_position, slot = positions.prompt_positions([7, 8] + [IMAGE] * 6 + [9], [(1, 4, 6)], CONFIG)
  np.testing.assert_array_equal(ids[0], [0, 1, 2, 2, 2, 2, 2, 2, 5])
  np.testing.assert_array_equal(ids[1], [0, 1, 2, 2, 2, 3, 3, 3, 5])
  np.testing.assert_array_equal(ids[2], [0, 1, 2, 3, 4, 2, 3, 4, 5])
  np.testing.assert_array_equal(slot, [-1, -1, 0, 1, 2, 3, 4, 5, -1])
  assert next_position == 6


def test_slots_count_over_all_images_and_tall_images_push_by_their_height():
  tokens = [IMAGE] * 3 + [9] + [IMAGE] * 2
  ids, next_position, slot = positions.prompt_positions(tokens, [(1, 6, 2), (1, 2, 4)], CONFIG)
  np.testing.assert_array_equal(slot, [0, 1, 2, -1, 3, 4])
  np.testing.assert_array_equal(ids[0], [0, 0, 0, 3, 4, 4])
  np.testing.assert_array_equal(ids[2], [0, 0, 0, 3, 4, 5])
  assert next_position == 6


@pytest.mark.parametrize(
  ("tokens", "grids", "message"),
  [
    ([1] + [IMAGE] * 3, [(1, 4, 4)], "holds 3 image tokens, its 1 images need 4"),
    ([IMAGE] * 2 + [1] + [IMAGE] * 2, [(1, 4, 4)], "image tokens from token 0 on are fewer than the 4"),
    ([IMAGE], [(2, 2, 2)], "videos are not supported"),
    ([IMAGE], [(1, 3, 2)], "positive multiples of 2 patches"),
  ],
)
def test_prompts_that_do_not_fit_their_images_are_refused(tokens, grids, message):
  with pytest.raises(ValueError, match=message):
    positions.prompt_positions(tokens, grids, CONFIG)


def test_rows_come_in_merge_blocks():
  _, coordinates, _, _ = positions.vision_tables([(1, 2, 4)], CONFIG)
  expected = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
  np.testing.assert_array_equal(coordinates, expected)


def test_interpolation_equals_a_slow_loop():
  grids = [(1, 4, 8), (1, 6, 2)]
  table = np.random.RandomState(0).standard_normal((5, 5))
  segments, coordinates, index, weight = positions.vision_tables(grids, CONFIG)
  actual = (table.ravel()[index] * weight).sum(axis=1)
  for row, (image, (y, x)) in enumerate(zip(segments, coordinates, strict=True)):
    _, height, width = grids[image]
    source_y, source_x = 4 * y / (height - 1), 4 * x / (width - 1)  # corners of grid and table coincide
    along_x = [np.interp(source_x, np.arange(5), line) for line in table]
    assert actual[row] == pytest.approx(np.interp(source_y, np.arange(5), along_x), abs=1e-5)


def test_frequencies_are_interleaved():
  axis = text.axis_of_frequency(SIZES["Qwen3-VL-2B"].text)
  # Sections (24, 20, 20): the axes take turns up to frequency 59; 60 to 63 are temporal.
  np.testing.assert_array_equal(axis[:6], [0, 1, 2, 0, 1, 2])
  np.testing.assert_array_equal(axis[57:], [0, 1, 2, 0, 0, 0, 0])
  assert [(axis == k).sum() for k in range(3)] == [24, 20, 20]
