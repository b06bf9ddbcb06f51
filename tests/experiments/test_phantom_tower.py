"""The labels from which the vision tower learns to see lesions."""

from experiments import phantom_tower
from kepo_jax.data.phantom import canvas, scenes


def test_labels_are_where_the_lesions_are(rng):
  for count in (*range(4), *range(4), *range(4)):
    scene = scenes.draw_scene(rng, "MRI", count=count)
    labels = phantom_tower.cell_labels(scene).reshape(4, 4, 4)
    assert labels[..., 1].sum() == scene.count and (labels[..., 3] == scene.count).all()
    assert ((labels[..., 0] > 0) == (labels[..., 1] > 0)).all()
    kinds = set(labels[..., 0][labels[..., 0] > 0])
    assert len(kinds) == min(count, 1) and kinds <= set(range(1, phantom_tower.KINDS))  # one kind per scene
    mask = canvas.lesion_mask(scene).reshape(4, 16, 4, 16).max(axis=(1, 3))
    assert (mask[labels[..., 1] > 0] > 0.5).all()
