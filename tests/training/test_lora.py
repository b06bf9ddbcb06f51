import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import kepo
from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import checkpoint, lora, model
from kepo_jax.models.qwen3_vl.config import LoraConfig
from kepo_jax.objectives import losses
from kepo_jax.training import compiling, programs, setup
from kepo_jax.training import update as update_lib
from kepo_jax.training.optimizer import initial_state
from kepo_jax.training.signals import Interruption
from tests.training.runs import ASSETS, changed, equal, lines, shrunk, small, train

FROZEN = ("visual", "language_model", "lm_head")


@pytest.fixture(scope="module")
def student(tiny_config):
  """The tiny model with matrices beside its projections."""
  return dataclasses.replace(tiny_config, lora=LoraConfig(rank=2, alpha=8.0, targets=tuple(lora.TARGETS)))


@pytest.fixture(scope="module")
def params(student, tiny_params):
  """Its parameters in the middle of a training, on the host."""
  matrices = lora.initial(student, jax.random.key(5))
  numbers = np.random.default_rng(6)
  matrices = jax.tree.map(lambda x: np.asarray(x + 0.1 * numbers.normal(size=x.shape), np.float32), matrices)
  return tiny_params | {lora.PART: matrices}


@pytest.fixture(scope="module")
def update(student, params, tiny_experience, allowed, mesh_of):
  """`update(axes=..., **settings)`: (state on the host, figures, text of the compiled gradients) of one update."""

  def run(axes=(), *, frozen=FROZEN, calls=True, **settings):
    mesh, optimizer = mesh_of(*axes), optax.sgd(1.0)
    token_loss = losses.KepoTokenLoss(allowed=allowed, distill_coefficient=0)
    settings = update_lib.UpdateSettings(compute_dtype=jnp.float32, chunk=4, frozen=frozen, **settings)
    places = sharding.weight_shardings(mesh, params, model.logical_axes(student))
    seen = []
    with jax.set_mesh(mesh):
      state = initial_state(jax.device_put(params, places), optimizer, frozen)
      made = update_lib.Update(student, optimizer, token_loss, settings, state)
      batch = sharding.place(mesh, tiny_experience)
      with compiling.watched(seen.append):
        made.compile(compiling.shapes_of(state), compiling.shapes_of(batch), (), compare=False)
      (text,) = (each.executable.as_text() for each in seen if each.name == "the gradients")
      return *(jax.device_get(made(state, batch, ())) if calls else (None, None)), text

  return run


@pytest.fixture(scope="module")
def reference(update):
  return update()


def assert_equal_updates(found, expected):
  for mine, wanted in zip(*(jax.tree.leaves(each[0].params[lora.PART]) for each in (found, expected)), strict=True):
    assert np.linalg.norm(mine - wanted) < 1e-5 * np.linalg.norm(wanted)
  np.testing.assert_allclose(found[1]["loss"][0], expected[1]["loss"][0], rtol=1e-5)


def test_the_matrices_move_and_nothing_else(reference, params):
  state, figures, _ = reference
  jax.tree.map(np.testing.assert_array_equal, lora.without(state.params), lora.without(params))
  moved = jax.tree.map(lambda a, b: bool((a != b).all()), state.params[lora.PART], params[lora.PART])
  assert all(jax.tree.leaves(moved))
  assert figures["grad_norm"][0] > 0 and figures["ratio/mean"][0] == pytest.approx(figures["ratio/mean"][1])


def test_micro_batches_change_nothing_and_no_gradient_of_the_head_is_computed(update, reference):
  cut = update(parts=2, remat="full")
  assert_equal_updates(cut, reference)
  # The loss sums it over chunks, in one part per shard of the rows: [1, 1, D, V].
  summed = "f32[1,1,16,40]"
  assert summed not in reference[2] and summed not in cut[2]
  assert summed in update(parts=2, frozen=("visual",), calls=False)[2]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1, 4), (2, 2, 2)], ids=str)
def test_the_mesh_changes_nothing(update, reference, axes):
  assert_equal_updates(update(axes, parts=2 if len(axes) == 3 else 1), reference)


def test_tokens_are_sampled_from_merged_weights(student, params, mesh_of):
  mesh = mesh_of(fsdp=2, tensor=2)
  placed = jax.device_put(params, sharding.weight_shardings(mesh, params, model.logical_axes(student)))
  merged = programs.decode_weights_program(student, placed, jnp.dtype("bfloat16"))(placed)
  expected = model.unstack_layers(lora.merged(student, params, "bfloat16"))
  assert jax.tree.structure(merged) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(*map(np.float32, (a, b)), rtol=0.01), merged, expected)
  axes = model.unstacked_axes(lora.base(student))
  wanted = sharding.weight_shardings(mesh, expected, axes, "decode")
  assert all(jax.tree.leaves(jax.tree.map(lambda x, s: s.is_equivalent_to(x.sharding, x.ndim), merged, wanted)))


@pytest.mark.parametrize("adapted", [False, True])
def test_no_second_copy_is_there_while_decode_weights_are_made(student, params, mesh_of, adapted):
  config = student if adapted else lora.base(student)
  chosen = params if adapted else lora.without(params)
  placed = jax.device_put(chosen, sharding.weight_shardings(mesh_of(), chosen, model.logical_axes(config)))
  dtype = jnp.dtype("float32" if adapted else "bfloat16")  # what a CPU does to small floats would count with products
  seen, decode_weights = [], programs.decode_weights_program(config, placed, dtype)
  with compiling.watched(seen.append):
    decode_weights(compiling.shapes_of(placed))
  memory = {each.name: each.executable.memory_analysis().temp_size_in_bytes for each in seen}
  stacks = jax.tree.leaves(placed["language_model"]["layers"])
  layer = sum(x.size * dtype.itemsize for x in stacks) / len(stacks[0])
  assert len(memory) == 2  # of all layers one program
  assert memory["the decode weights of a layer"] < 2 * layer
  assert memory["the decode weights but for the layers"] < layer
  if adapted:  # merged also where neither dtype nor layout would ask for more than layers side by side
    expected = model.unstack_layers(lora.merged(student, params, "float32"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), decode_weights(placed), expected)


def prepared(mesh, seed=0, **changes):
  """The config of a run, and its student on a mesh."""
  config = shrunk(changed(kepo), model__compute_dtype="bfloat16", seed=seed, **changes)
  loaded = setup.load_models(config, mesh, {"student": ASSETS / "confused"}, (), Interruption())
  return config, loaded["student"]


def dtypes(params):
  return {leaf.dtype.name for leaf in jax.tree.leaves(params)}


def test_a_run_loads_the_base_in_the_compute_dtype(mesh_of):
  changes = {"model__lora_rank": 4, "model__lora_targets": ("q_proj",)}
  config, loaded = prepared(mesh_of(fsdp=2), **changes)
  assert loaded.config.lora == LoraConfig(rank=4, alpha=32.0, targets=("q_proj",))
  matrices = loaded.params[lora.PART]["self_attn"]["q_proj"]
  assert dtypes(lora.without(loaded.params)) == {"bfloat16"} and dtypes(matrices) == {"float32"}
  # A [L, in, r] is divided as the width of the weight is.
  a = matrices[lora.A]
  assert a.sharding.shard_shape(a.shape) == (a.shape[0], a.shape[1] // 2, 4)
  assert config.frozen_parts == FROZEN
  # The matrices of a seed do not depend on the mesh; another seed draws others.
  same, other = (
    prepared(mesh_of(), seed, **changes)[1].params[lora.PART]["self_attn"]["q_proj"][lora.A] for seed in (0, 1)
  )
  np.testing.assert_array_equal(a, same)
  assert (np.asarray(a) != other).all()
  config, loaded = prepared(mesh_of())
  assert loaded.config.lora is None and lora.PART not in loaded.params
  assert dtypes(loaded.params) == {"float32"} and config.frozen_parts == ()


def settings(**changes):
  """KEPO with LoRA in a size that runs in seconds."""
  matrices = {"model__lora_rank": 8, "objective__reference_weight": 0.04}
  return small(train__steps=3, optimizer__warmup_steps=1, **matrices | changes)


@pytest.mark.slow
def test_a_run_trains_the_matrices_and_exports_them_merged(tmp_path):
  workdir, result = tmp_path / "run", train(settings(), tmp_path / "run")
  config, base = checkpoint.load_pretrained(ASSETS / "confused")
  described = dataclasses.replace(config, lora=setup.lora_config(settings().model))
  params = result.state.params
  assert equal(lora.without(params), base)
  assert all(bool(leaf.any()) for leaf in jax.tree.leaves(params[lora.PART]))  # B left zero
  # Adam's two moments and its counter, of the matrices alone.
  assert len(jax.tree.leaves(result.state.opt_state)) == 2 * len(jax.tree.leaves(params[lora.PART])) + 1
  loaded_config, loaded = checkpoint.load_pretrained(workdir / "model", np.float32)
  assert loaded_config == lora.base(described)
  assert equal(loaded, model.cast(lora.merged(described, params, jnp.bfloat16), "float32"))
  assert not equal(loaded, model.cast(model.cast(base, jnp.bfloat16), "float32"))
  record = json.loads((workdir / "model" / "adapter" / "adapter_config.json").read_text())
  assert (record["r"], record["base_model_name_or_path"]) == (8, settings().model.student)
  steps = [record for record in lines(workdir / "metrics.jsonl") if "reward/mean" in record]
  assert all(record["grad_norm"] > 0 and record["sampler/logp_gap"] < 1e-4 for record in steps)
  assert all(record["ratio/mean"] == pytest.approx(1, abs=1e-5) for record in steps)
  # The reference stays the base, which the student is before its first update.
  assert abs(steps[0]["kl/ref"]) < 1e-7 and steps[-1]["kl/ref"] > 1e-6
