"""The update: independent of micro-batches, mesh and padding; frozen parts stay; the schedule is what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import layers, model
from kepo_jax.objectives import losses
from kepo_jax.training import step
from kepo_jax.types import Experience

OPTIMIZER = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}


@pytest.fixture(scope="module")
def update_once(tiny_config, tiny_params, tiny_experience, allowed, mesh_of):
  """One update under the given settings: (state, figures), the state on the host."""
  teacher = model.init_params(tiny_config, jax.random.key(9))

  def run(*, parts=1, mesh=None, distill=1.0, freeze_vision=False, experience=tiny_experience, clip_norm=1.0):
    mesh = mesh or mesh_of()
    shardings = sharding.weight_shardings(mesh, tiny_params, model.logical_axes(tiny_config))
    params = jax.device_put(tiny_params, shardings)
    trainable = {name: not (freeze_vision and name == "visual") for name in params}
    # Without Adam's division, so that an update is as accurate as its gradient.
    optimizer = optax.masked(optax.chain(optax.clip_by_global_norm(clip_norm), optax.sgd(1.0)), trainable)
    token_loss = losses.kepo_token_loss(allowed=allowed, distill_coefficient=distill)
    update = step.make_update(
      tiny_config,
      optimizer,
      token_loss,
      compute_dtype=jnp.float32,
      freeze_vision=freeze_vision,
      remat=False,
      chunk=4,
      parts=parts,
    )
    with jax.set_mesh(mesh):
      state = step.initial_state(params, optimizer)
      batch = sharding.place(mesh, experience)
      frozen = jax.device_put(teacher, shardings)
      targets = (jax.jit(functools.partial(step.target, tiny_config, parts=parts))(frozen, batch),) if distill else ()
      state, figures = step.jit_update(update, state)(state, batch, targets)
    return jax.device_get((state, figures))

  return run


def difference(a, b):
  """Largest relative difference in norm over the tensors of two trees."""
  ratios = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-3), a, b)
  return max(jax.tree.leaves(ratios))


@pytest.fixture(scope="module")
def reference(update_once):
  """One update on one device in one part."""
  return update_once()


def test_figures(reference, tiny_experience):
  _, figures = reference
  own = tiny_experience.mask & ~tiny_experience.injected[..., None]
  gated = tiny_experience.mask & tiny_experience.gate[..., None]
  assert figures["entropy"][1] == own.sum()
  assert figures["divergence/gated"][1] == gated.sum()
  assert figures["divergence/gated"][1] + figures["divergence/ungated"][1] == tiny_experience.mask.sum()
  assert figures["ratio/mean"][0] == pytest.approx(figures["ratio/mean"][1])  # on-policy: every ratio is 1
  assert 0 < figures["divergence/gated"][0] / figures["divergence/gated"][1] < np.log(2)
  assert figures["grad_norm"] > 0


def test_step_counts_and_parameters_move(reference, tiny_params):
  state, _ = reference
  assert state.step == 1
  still = [
    path for path, d in jax.tree_util.tree_leaves_with_path(jax.tree.map(_moved, state.params, tiny_params)) if not d
  ]
  assert not still


def _moved(a, b):
  return bool((np.asarray(a) != np.asarray(b)).any())


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_change_nothing(update_once, reference, parts):
  state, figures = update_once(parts=parts)
  assert difference(reference[0].params, state.params) < 1e-5
  for name, value in reference[1].items():
    np.testing.assert_allclose(figures[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_mesh_changes_nothing(update_once, reference, mesh_of, axes):
  state, figures = update_once(mesh=mesh_of(**axes), parts=1 if axes.get("fsdp") else 2)
  assert difference(reference[0].params, state.params) < 1e-5
  np.testing.assert_allclose(figures["loss"], reference[1]["loss"], rtol=1e-5)


def test_completion_padding_changes_nothing(update_once, reference, tiny_experience):
  def longer(x, fill):
    return np.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=fill)

  fills = {"tokens": 5, "mask": False, "logps": np.nan}
  padded = Experience(**(dict(tiny_experience.items()) | {n: longer(tiny_experience[n], f) for n, f in fills.items()}))
  state, figures = update_once(experience=padded)
  assert difference(reference[0].params, state.params) < 1e-5
  np.testing.assert_allclose(figures["hint/reliance"], reference[1]["hint/reliance"], rtol=1e-5)


def test_order_of_prompts_changes_nothing(update_once, reference, tiny_experience):
  turned = jax.tree.map(lambda x: np.asarray(x)[::-1].copy(), tiny_experience)
  assert difference(reference[0].params, update_once(experience=turned)[0].params) < 1e-5


def test_an_empty_gate_is_grpo_bit_for_bit(update_once, tiny_experience):
  closed = tiny_experience.replace(gate=np.zeros_like(tiny_experience.gate))
  distilled, figures = update_once(experience=closed)
  plain, _ = update_once(experience=closed, distill=0)
  assert figures["divergence/gated"] == (0, 0)
  assert difference(distilled.params, plain.params) < 1e-6


def test_a_frozen_tower_stays(update_once, tiny_params):
  state, _ = update_once(freeze_vision=True)
  assert not any(jax.tree.leaves(jax.tree.map(_moved, state.params["visual"], tiny_params["visual"])))
  assert all(jax.tree.leaves(jax.tree.map(_moved, state.params["language_model"], tiny_params["language_model"])))


def test_gradients_are_clipped(update_once, tiny_params):
  state, figures = update_once(clip_norm=1e-3)
  assert figures["grad_norm"] > 1e-3
  moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, tiny_params)
  assert optax.tree.norm(moved) == pytest.approx(1e-3, rel=1e-3)


def test_a_repeated_token_adds_up_in_bfloat16():
  # 4,096 gradients of 1/64 into one row: a bfloat16 sum stops growing near 4.
  table = jnp.zeros((3, 2), jnp.bfloat16)
  index = jnp.ones(4096, jnp.int32)
  gradient = jax.grad(lambda t: (layers.looked_up(t, index).astype(jnp.float32) / 64).sum())(table)
  assert gradient.dtype == jnp.bfloat16
  assert gradient.tolist() == [[0, 0], [64, 64], [0, 0]]


def test_bfloat16_with_remat_comes_near_float32(tiny_config, tiny_params, tiny_experience):
  def embedding_gradient(dtype, remat):
    def loss(params):
      hidden = step.hidden_of(
        tiny_config, model.cast(params, dtype), tiny_experience.prompts, tiny_experience.tokens, remat=remat
      )
      weights = jax.random.normal(jax.random.key(4), hidden.shape)
      return (weights * hidden.astype(jnp.float32)).sum()

    return jax.jit(jax.grad(loss))(tiny_params)["language_model"]["embed_tokens"]["weight"]

  exact, rounded = embedding_gradient(jnp.float32, False), embedding_gradient(jnp.bfloat16, True)
  assert rounded.dtype == jnp.float32
  assert jnp.linalg.norm(exact - rounded) < 0.05 * jnp.linalg.norm(exact)


def test_micro_batches_take_equal_rows_of_every_device():
  # Eight rows on four devices (two rows each) in two parts: each part has one row of every device.
  parts = step.micro_batches({"x": jnp.arange(8)}, 2)["x"]
  assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedule(warmup):
  schedule = step.learning_rate_schedule(learning_rate=3e-4, warmup_steps=warmup, steps=80)
  rates = np.array([schedule(i) for i in range(81)])
  assert rates[max(0, warmup - 1)] == pytest.approx(3e-4)
  assert rates[0] == pytest.approx(3e-4 / max(1, warmup))
  assert rates[80] == 0
  assert (np.diff(rates[max(0, warmup - 1) :]) <= 0).all()
  assert rates[79] > 0


def test_the_optimizer_is_adam_without_decay_and_skips_frozen_parts():
  optimizer = step.make_optimizer(lambda _: 0.1, trainable={"a": True, "b": False}, **OPTIMIZER)
  params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
  state = optimizer.init(params)
  updates, state = optimizer.update({"a": jnp.array([0.3, -0.4]), "b": jnp.zeros(1)}, state, params)
  # The first step of Adam is lr times the sign of the gradient.
  np.testing.assert_allclose(updates["a"], [-0.1, 0.1], rtol=1e-5)
  assert updates["b"].tolist() == [0]
  assert [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim] == [(2,), (2,)]
