"""Teaches the vision tower to see lesions before words: a throw-away linear head names what lies in each cell.

From words alone the tower learns modality and organ at once and the lesions, a few pixels each, hardly at all. Told
cell by cell (16 x 16 pixels, one image token) it learns them in minutes; the head is then dropped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from experiments import phantom_pool
from kepo_jax.data.phantom import drawing
from kepo_jax.data.phantom.scenes import Scene
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig

CELLS = 4  # per side
KINDS = 17  # no lesion, or one of side x level x size x tone
CLASSES = (KINDS, 4, KINDS, 4)
BATCH = 64  # pictures


def cell_labels(scene: Scene) -> np.ndarray:
  """int32[16, 4]: kind and number of the lesions whose centre lies in a cell; then kind and number in the picture.

  The last two are the same in every cell: each image token learns to carry the findings of the whole picture, so
  that the decoder finds them wherever it looks.
  """
  bits = (scene.side == "right", scene.level == "lower", scene.size == "large", scene.tone == "bright")
  kind = 1 + sum(int(bit) << i for i, bit in enumerate(bits)) if scene.count else 0
  labels = np.zeros((CELLS, CELLS, 4), np.int32)
  labels[:, :, 2:] = kind, scene.count
  for lesion in scene.lesions:
    row = int((31.5 + scene.shift[1] + lesion.y) // 16)
    column = int((31.5 + scene.shift[0] + lesion.x) // 16)
    labels[row, column, 0] = kind
    labels[row, column, 1] += 1
  return labels.reshape(-1, 4)


def cell_loss(config: Qwen3VLConfig, learnt, vision, labels: jax.Array):
  """Mean cross-entropy of the four labels int32[P, 16, 4] over output and taps; the output's accuracy for each.

  The accuracy of the first two counts cells with lesions only.
  """
  visual, heads = learnt
  features, taps = model.encode_images(config, {"visual": visual}, vision)
  stages = jnp.concatenate([features[None], taps])  # [stages, P, cells, D]
  logits = jnp.split(jnp.einsum("npcd,ndk->npck", stages, heads), np.cumsum(CLASSES)[:-1], axis=-1)
  loss, hits = 0.0, []
  for i, part in enumerate(logits):
    truth = labels[..., i]
    loss += optax.softmax_cross_entropy_with_integer_labels(part, jnp.broadcast_to(truth, part.shape[:-1])).mean()
    counted = (truth > 0) | (i > 1)
    hits.append(jnp.sum((part[0].argmax(-1) == truth) & counted) / jnp.maximum(1, counted.sum()))
  return loss, jnp.stack(hits)


def trained_tower(config: Qwen3VLConfig, visual, vision_of, *, seed: int, steps: int, pictures: int = 8000):
  """The tower's parameters after `steps` steps.

  Args:
    config: sizes.
    visual: parameters of the tower.
    vision_of: uint8[P, 64, 64, 3] -> VisionInputs.
    seed: of pictures, head and order.
    steps: 64 pictures each.
    pictures: in the pool.
  """
  rng = np.random.default_rng((seed, 77))
  drawn = [phantom_pool.draw_training_scene(rng) for _ in range(pictures)]
  images = np.stack([drawing.draw(scene) for scene in drawn])
  labels = np.stack([cell_labels(scene) for scene in drawn])
  stages, width = 1 + len(config.vision.deepstack_visual_indexes), config.text.hidden_size
  heads = 0.02 * jax.random.normal(jax.random.key(seed), (stages, width, sum(CLASSES)))
  rate = optax.join_schedules(
    [
      optax.linear_schedule(0.0, 3e-3, 30),
      optax.linear_schedule(3e-3, 3e-3, 1),
      optax.linear_schedule(3e-3, 0.0, steps // 3),
    ],
    [30, steps - steps // 3],
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01))

  def update(learnt, moments, vision, labels):
    loss = lambda learnt: cell_loss(config, learnt, vision, labels)  # noqa: E731
    (value, hit), gradient = jax.value_and_grad(loss, has_aux=True)(learnt)
    updates, moments = optimizer.update(gradient, moments, learnt)
    return optax.apply_updates(learnt, updates), moments, value, hit

  update = jax.jit(update)
  learnt = (visual, heads)
  moments = optimizer.init(learnt)
  for step in range(steps):
    rows = rng.integers(0, pictures, BATCH)
    learnt, moments, value, hit = update(learnt, moments, vision_of(images[rows]), labels[rows])
    if (step + 1) % 25 == 0:
      logging.info("tower step %d loss %.4f cells %.3f %.3f pictures %.3f %.3f", step + 1, value, *hit)
  return learnt[0]
