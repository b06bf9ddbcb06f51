"""The labels from which the vision tower learns to see lesions."""

import itertools

import numpy as np

from experiments import phantom_tower
from kepo_jax.data.phantom import canvas, scenes


def test_labels_are_where_the_lesions_are():
  rng = np.random.default_rng(0)
  for _ in range(30):
    scene = scenes.draw_scene(rng, "MRI", count=int(rng.integers(1, 4)))
    labels = phantom_tower.cell_labels(scene).reshape(4, 4, 4)
    assert labels[..., 1].sum() == scene.count and (labels[..., 3] == scene.count).all()
    assert ((labels[..., 0] > 0) == (labels[..., 1] > 0)).all()
    assert len(set(labels[..., 0][labels[..., 0] > 0])) == 1  # one kind per scene
    mask = canvas.lesion_mask(scene).reshape(4, 16, 4, 16).max(axis=(1, 3))
    assert (mask[labels[..., 1] > 0] > 0.5).all()
  assert not phantom_tower.cell_labels(scenes.draw_scene(rng, "CT", count=0)).any()


def test_every_kind_has_its_own_label():
  rng = np.random.default_rng(1)
  labels = []
  for side, level, size, tone in itertools.product(scenes.SIDES, scenes.LEVELS, scenes.SIZES, scenes.TONES):
    scene = scenes.draw_scene(rng, "CT", count=1, side=side, level=level, size=size, tone=tone)
    labels.append(phantom_tower.cell_labels(scene)[0, 2])
  assert sorted(labels) == list(range(1, phantom_tower.KINDS))
