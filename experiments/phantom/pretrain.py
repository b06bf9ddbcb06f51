"""Makes the small checkpoints of the embedded benchmark by supervised training on drawn pictures.

  python -m experiments.phantom.pretrain --model=student_base --workdir=runs/phantom
  python -m experiments.phantom.pretrain --model=confused --workdir=runs/phantom   # continues from student_base

A model is written to WORKDIR/<model> as a Hugging Face folder with a `record.json`; progress is kept in
WORKDIR/<model>.npz and an interrupted command continues from it. `docs/data.md` says what was planted and why.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from experiments import environment
from experiments.phantom import corpus
from experiments.phantom import folder as folder_lib
from experiments.phantom.corpus import Pool
from experiments.phantom.recipes import RECIPES, SIZES, Recipe
from kepo_jax.data.phantom import drawing
from kepo_jax.data.phantom.scenes import Scene
from kepo_jax.models.qwen3_vl import checkpoint, model, positions
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.types import Prompts, VisionInputs

_MODEL = flags.DEFINE_enum("model", None, sorted(RECIPES), "Which recipe to run.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/phantom", "Where models and progress are kept.")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 100, "Steps between two saves of the progress.")

# The vision tower learns to see lesions before words: a throw-away linear head names the lesion in each cell of 16 x 16
# pixels, one image token. From words alone it learns modality and organ at once, and lesions hardly at all.
CELLS = 4  # per side
KINDS = 17  # no lesion, or one of side x level x size x tone
CLASSES = (KINDS, 4, KINDS, 4)
TOWER_BATCH = 64  # pictures


def prefix_prompts(config: Qwen3VLConfig, token_ids: list[int], images: np.ndarray) -> Prompts:
  """The prompt up to and including the picture, for uint8[P, 64, 64, 3] pictures."""
  rows, grids = len(images), [(1, 8, 8)]
  position, following, slot = positions.prompt_positions(token_ids, grids, config)
  names = ("segments", "coordinates", "table_index", "table_weight")
  tables = dict(zip(names, positions.vision_tables(grids, config), strict=True))

  def repeat(array) -> np.ndarray:
    return np.broadcast_to(np.asarray(array), (rows, *np.shape(array)))

  return Prompts(
    tokens=repeat(np.asarray(token_ids, np.int32)),
    mask=np.ones((rows, len(token_ids)), bool),
    positions=repeat(position),
    next_position=np.full(rows, following, np.int32),
    image_slot=repeat(slot),
    row=np.arange(rows, dtype=np.uint32),
    vision=VisionInputs(patches=corpus.patches(images), **{k: repeat(table) for k, table in tables.items()}),
  )


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
  drawn = [corpus.draw_training_scene(rng) for _ in range(pictures)]
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
    rows = rng.integers(0, pictures, TOWER_BATCH)
    learnt, moments, value, hit = update(learnt, moments, vision_of(images[rows]), labels[rows])
    if (step + 1) % 25 == 0:
      logging.info("tower step %d loss %.4f cells %.3f %.3f pictures %.3f %.3f", step + 1, value, *hit)
  return learnt[0]


def answer_loss(config: Qwen3VLConfig, params, prompts: Prompts, tokens, answer_index, weights, kinds):
  """Weighted cross-entropy of the answer tokens, and the share of them predicted right by kind."""
  prefix = model.prefill(config, params, prompts)
  hidden = model.completion_hidden(config, params, prefix, tokens)
  hidden = jnp.take_along_axis(hidden, answer_index[..., None], axis=2)
  targets = jnp.take_along_axis(tokens, answer_index, axis=2)
  logits = (hidden @ model.head_weight(config, params).T).astype(jnp.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  right = (logits.argmax(-1) == targets) & (weights > 0)
  shares = [
    jnp.sum(right & (kinds == kind)) / jnp.maximum(1, jnp.sum((weights > 0) & (kinds == kind))) for kind in (0, 1, 2)
  ]
  return jnp.sum(losses * weights) / jnp.sum(weights), jnp.stack(shares)


def fresh_params(config: Qwen3VLConfig, seed: int):
  """Random weights from which the look-up of an option's letter is learnt in minutes instead of hours.

  Keys start out like queries, so that a token attends to its equals; attention starts sharp; layers start small, so
  that words stay recognisable in the residual stream.
  """
  params = model.init_params(config, jax.random.key(seed))
  text = config.text
  layers = params["language_model"]["layers"]
  attention = layers["self_attn"]
  keys, queries = attention["k_proj"]["weight"], attention["q_proj"]["weight"]
  per_head = (text.num_hidden_layers, text.num_key_value_heads, -1, text.head_dim, text.hidden_size)
  mixed = 0.9 * keys.reshape(per_head) + 0.44 * queries.reshape(per_head)
  attention["q_proj"]["weight"] = mixed.reshape(queries.shape)
  for norm in ("q_norm", "k_norm"):
    attention[norm]["weight"] *= 2.0
  attention["o_proj"]["weight"] *= 0.1
  layers["mlp"]["down_proj"]["weight"] *= 0.1
  return params


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
  """AdamW: a short rise, a plateau, and a linear fall to zero over the last two fifths."""
  rise, fall = min(40, steps // 8), int(0.4 * steps)
  schedule = optax.join_schedules(
    [
      optax.linear_schedule(0.0, recipe.learning_rate, rise),
      optax.constant_schedule(recipe.learning_rate),
      optax.linear_schedule(recipe.learning_rate, 0.0, fall),
    ],
    [rise, steps - fall],
  )
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def save_progress(path: pathlib.Path, step: int, seconds: float, state) -> None:
  """Step, time spent and all arrays, replaced in one move."""
  arrays: dict[str, Any] = {f"leaf_{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
  partial = path.with_suffix(".partial.npz")
  np.savez(partial, step=step, seconds=seconds, **arrays)
  partial.replace(path)


def load_progress(path: pathlib.Path, state):
  """What `save_progress` wrote, in the structure of `state`; step 0 and `state` itself where nothing was written."""
  if not path.exists():
    return 0, 0.0, state
  with np.load(path) as file:
    leaves = [jnp.asarray(file[f"leaf_{i:04d}"]) for i in range(len(jax.tree.leaves(state)))]
    return int(file["step"]), float(file["seconds"]), jax.tree.unflatten(jax.tree.structure(state), leaves)


def batches(recipe: Recipe, tokenizer, start: int):
  """(step, prompts' pictures, dialogues) from `start` on; random access by step, pools drawn when needed."""
  first = 0
  for number, phase in enumerate(recipe.phases):
    last = first + phase.steps
    if start < last:
      pool = corpus.make_pool(
        tokenizer,
        seed=recipe.seed * 10 + number,
        size=phase.pictures,
        group=phase.group,
        drills=phase.drills,
        kinds=corpus.KINDS[recipe.role],
        beliefs=recipe.beliefs,
      )
      for step in range(max(start, first), last):
        yield step, pool, picks(recipe.seed, phase.batch, len(pool.images), step - first)
    first = last


def picks(seed: int, batch: int, size: int, step: int) -> np.ndarray:
  """Rows of the pool for one step: epochs over a fresh permutation each."""
  per_epoch = size // batch
  epoch, place = divmod(step, per_epoch)
  order = np.random.default_rng((seed, epoch)).permutation(size)
  return order[place * batch : (place + 1) * batch]


def train(name: str, recipe: Recipe, workdir: pathlib.Path):
  """(configuration, parameters, seconds) of a model trained by its recipe."""
  tokenizer = folder_lib.make_tokenizer()
  config = Qwen3VLConfig.from_dict(folder_lib.model_config(tokenizer, **SIZES[recipe.role]))
  if recipe.parent:
    config, params = checkpoint.load_pretrained(workdir / recipe.parent)
  else:
    params = fresh_params(config, recipe.seed)
  steps = sum(phase.steps for phase in recipe.phases)
  optimizer = make_optimizer(recipe, steps)
  progress = workdir / f"{name}.npz"
  prefix_ids = tokenizer.encode(corpus.prefix_text()).ids

  begun = time.monotonic()
  if recipe.sight and not progress.exists():
    vision_of = lambda images: prefix_prompts(config, prefix_ids, images).vision  # noqa: E731
    visual = trained_tower(config, params["visual"], vision_of, seed=recipe.seed, steps=recipe.sight)
    params = {**params, "visual": visual}

  def update(params, moments, prompts: Prompts, *dialogues):
    def loss(params):
      return answer_loss(config, params, prompts, *dialogues)

    (value, shares), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value, shares

  update = jax.jit(update, donate_argnums=(0, 1))
  start, before, (params, moments) = load_progress(progress, (params, optimizer.init(params)))
  seconds = before
  for step, pool, rows in batches(recipe, tokenizer, start):
    prompts = prefix_prompts(config, prefix_ids, pool.images[rows])
    params, moments, value, shares = update(params, moments, prompts, *_dialogues(pool, rows))
    seconds = before + time.monotonic() - begun
    if (step + 1) % 20 == 0:
      line = "loss %.4f words %.3f conclusion %.3f letter %.3f, %.0f s"
      logging.info(f"%s step %d {line}", name, step + 1, value, *shares, seconds)
    if (step + 1) % _SAVE_EVERY.value == 0 or step + 1 == steps:
      save_progress(progress, step + 1, seconds, (params, moments))
  return config, params, seconds


def _dialogues(pool: Pool, rows: np.ndarray) -> tuple[np.ndarray, ...]:
  return pool.tokens[rows], pool.answer_index[rows], pool.weights[rows], pool.kinds[rows]


def write_model(
  name: str, recipe: Recipe, config: Qwen3VLConfig, params, seconds: float, workdir: pathlib.Path
) -> None:
  """The Hugging Face folder and the record of how it was made."""
  source = workdir / f"{name}.side"
  folder_lib.write_folder(source, folder_lib.model_config(folder_lib.make_tokenizer(), **SIZES[recipe.role]))
  checkpoint.save_pretrained(workdir / name, config, params, source=source, dtype=jnp.bfloat16)
  record = {
    "model": name,
    "command": f"python -m experiments.phantom.pretrain --model={name}",
    "recipe": dataclasses.asdict(recipe),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "seconds": round(seconds),
    "jax": jax.__version__,
  }
  card = f"# {name}\n\nA Qwen3-VL of {record['parameters']:,} parameters for the drawn benchmark PhantomVQA.\n"
  card += "See docs/data.md for what it was taught, and record.json for how. It knows nothing about medicine.\n"
  (workdir / name / "README.md").write_text(card)
  (workdir / name / "record.json").write_text(json.dumps(record, indent=2) + "\n")


def main(argv: list[str]) -> None:
  """Trains one model and writes its folder."""
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  recipe = RECIPES[_MODEL.value]
  config, params, seconds = train(_MODEL.value, recipe, workdir)
  write_model(_MODEL.value, recipe, config, params, seconds, workdir)


if __name__ == "__main__":
  environment.run(main)
