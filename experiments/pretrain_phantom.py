"""Makes the small checkpoints of the embedded benchmark by supervised training on drawn pictures.

  python -m experiments.pretrain_phantom --model=student_base --workdir=runs/phantom
  python -m experiments.pretrain_phantom --model=confused --workdir=runs/phantom   # continues from student_base

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

from experiments import environment, phantom_corpus, phantom_folder, phantom_pool, phantom_tower
from experiments.phantom_pool import Pool
from experiments.phantom_recipes import RECIPES, SIZES, Recipe
from kepo_jax.models.qwen3_vl import checkpoint, model, positions
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.types import Prompts, VisionInputs

_MODEL = flags.DEFINE_enum("model", None, sorted(RECIPES), "Which recipe to run.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/phantom", "Where models and progress are kept.")
_SAVE_EVERY = flags.DEFINE_integer("save_every", 100, "Steps between two saves of the progress.")


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
    vision=VisionInputs(patches=phantom_pool.patches(images), **{k: repeat(table) for k, table in tables.items()}),
  )


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
      pool = phantom_pool.make_pool(
        tokenizer,
        seed=recipe.seed * 10 + number,
        size=phase.pictures,
        group=phase.group,
        drills=phase.drills,
        kinds=phantom_corpus.KINDS[recipe.role],
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
  tokenizer = phantom_folder.make_tokenizer()
  config = Qwen3VLConfig.from_dict(phantom_folder.model_config(tokenizer, **SIZES[recipe.role]))
  if recipe.parent:
    config, params = checkpoint.load_pretrained(workdir / recipe.parent)
  else:
    params = fresh_params(config, recipe.seed)
  steps = sum(phase.steps for phase in recipe.phases)
  optimizer = make_optimizer(recipe, steps)
  progress = workdir / f"{name}.npz"
  prefix_ids = tokenizer.encode(phantom_pool.prefix_text()).ids

  begun = time.monotonic()
  if recipe.sight and not progress.exists():
    vision_of = lambda images: prefix_prompts(config, prefix_ids, images).vision  # noqa: E731
    visual = phantom_tower.trained_tower(config, params["visual"], vision_of, seed=recipe.seed, steps=recipe.sight)
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
      figures = "loss %.4f words %.3f conclusion %.3f letter %.3f, %.0f s"
      logging.info(f"%s step %d {figures}", name, step + 1, value, *shares, seconds)
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
  phantom_folder.write_folder(
    source, phantom_folder.model_config(phantom_folder.make_tokenizer(), **SIZES[recipe.role])
  )
  checkpoint.save_pretrained(workdir / name, config, params, source=source, dtype=jnp.bfloat16)
  record = {
    "model": name,
    "command": f"python -m experiments.pretrain_phantom --model={name}",
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
