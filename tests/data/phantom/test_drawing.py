"""Drawing: equal scenes give equal pixels, every finding shows, modalities differ."""

import dataclasses
import itertools

import numpy as np
import pytest

from kepo_jax.data.phantom import drawing, scenes


@pytest.mark.parametrize("modality", scenes.MODALITIES)
def test_lesions_darken_or_brighten_their_place(modality):
  for seed, (organ, size, tone) in enumerate(itertools.product(scenes.ORGANS[modality], scenes.SIZES, scenes.TONES)):
    scene = scenes.draw_scene(np.random.default_rng(seed), modality, organ=organ, count=3, size=size, tone=tone)
    picture = drawing.draw(scene)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, drawing.draw(scene))
    healthy = drawing.draw(dataclasses.replace(scene, lesions=()))
    inside = drawing.lesion_mask(scene) > 0.9
    change = picture.astype(float).mean(axis=2) - healthy.astype(float).mean(axis=2)
    assert (change[inside].mean() > 12) if tone == "bright" else (change[inside].mean() < -12), (organ, size, tone)
    outside = drawing.lesion_mask(scene) == 0
    np.testing.assert_array_equal(picture[outside], healthy[outside])


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
