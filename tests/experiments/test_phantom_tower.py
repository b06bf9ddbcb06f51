"""The labels from which the vision tower learns to see lesions."""

import itertools

from experiments import phantom_tower
from kepo_jax.data.phantom import canvas, scenes


def test_labels_are_where_the_lesions_are(rng):
  for count in (*range(4), *range(4), *range(4)):
    scene = scenes.draw_scene(rng, "MRI", count=count)
    labels = phantom_tower.cell_labels(scene).reshape(4, 4, 4)
    assert labels[..., 1].sum() == scene.count and (labels[..., 3] == scene.count).all()
    assert ((labels[..., 0] > 0) == (labels[..., 1] > 0)).all()
    assert len(set(labels[..., 0][labels[..., 0] > 0])) == min(count, 1)  # one kind per scene
    mask = canvas.lesion_mask(scene).reshape(4, 16, 4, 16).max(axis=(1, 3))
    assert (mask[labels[..., 1] > 0] > 0.5).all()


def test_every_kind_has_its_own_label(rng):
  labels = []
  for kind in itertools.product(scenes.SIDES, scenes.LEVELS, scenes.SIZES, scenes.TONES):
    look = dict(zip(("side", "level", "size", "tone"), kind, strict=True))
    labels.append(phantom_tower.cell_labels(scenes.draw_scene(rng, "CT", count=1, **look))[0, 2])
  assert sorted(labels) == list(range(1, phantom_tower.KINDS))
