"""Scenes: findings are kept, lesions are where the words say, equal seeds give equal scenes."""

import itertools

import numpy as np

from kepo_jax.data.phantom import scenes


def test_lesions_lie_where_the_words_say():
  rng = np.random.default_rng(0)
  for side, level, size, count in itertools.product(scenes.SIDES, scenes.LEVELS, scenes.SIZES, (1, 2, 3)):
    lesions = scenes.place_lesions(rng, count, side, level, size)
    assert len(lesions) == count
    low, high = scenes.RADII[size]
    for i, lesion in enumerate(lesions):
      assert (lesion.x < -3) == (side == "left") and (lesion.x > 3) == (side == "right")
      assert (lesion.y < -3) == (level == "upper") and (lesion.y > 3) == (level == "lower")
      assert low - 1e-5 <= lesion.radius <= high + 1e-5
      for other in lesions[:i]:
        free = np.hypot(lesion.x - other.x, lesion.y - other.y) - lesion.radius - other.radius
        assert free >= scenes.GAP - 1e-5


def test_a_scene_without_lesions_has_no_findings():
  scene = scenes.draw_scene(np.random.default_rng(1), "OCT", count=0, side="left")
  assert (scene.count, scene.side, scene.level, scene.size, scene.tone) == (0, "", "", "", "")
