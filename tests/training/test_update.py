import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import layers, model
from kepo_jax.objectives import losses
from kepo_jax.training import update as update_lib
from kepo_jax.training.optimizer import initial_state, make_optimizer
from kepo_jax.training.update import UpdateSettings, make_inputs

RATE = 0.5  # of plain SGD: without Adam's division an update is as accurate as its gradient
FACTORS = (1.0, 0.0, 0.25)  # of the weight of the divergence, by step
LOSS = {"supervised_coefficient": 1.0}  # silent in batches without supervised rows
ALL_AXES = (2, 2, 2)


def factor(step):
  return jnp.array(FACTORS)[step]


@pytest.fixture(scope="module")
def teacher(tiny_config):
  return model.init_params(tiny_config, jax.random.key(9))


@pytest.fixture(scope="module")
def update(tiny_config, tiny_params, tiny_experience, teacher, allowed, mesh_of):
  """(state, figures) on the host after the updates of one step; every form of the update is compiled once."""
  optimizer = optax.sgd(RATE)

  # Each program holds thousands of memory maps, of which a process may have 65,530: few are kept.
  @functools.lru_cache(maxsize=6)
  def programs(axes, loss, settings):
    """The mesh, a fresh state, what scores the batch as often as the loss asks, and the update."""
    mesh = mesh_of(*axes)
    token_loss = losses.KepoTokenLoss(allowed=allowed, **dict(loss))
    places = sharding.weight_shardings(mesh, tiny_params, model.logical_axes(tiny_config))
    fresh = lambda: initial_state(jax.device_put(tiny_params, places), optimizer, settings.frozen)  # noqa: E731
    frozen = jax.device_put(teacher, places)
    score = functools.partial(jax.jit(functools.partial(update_lib.target, tiny_config, parts=settings.parts)), frozen)
    wanted = token_loss.distils + bool(token_loss.reference_coefficient)
    with jax.set_mesh(mesh):
      return mesh, fresh, score, wanted, update_lib.Update(tiny_config, optimizer, token_loss, settings, fresh())

  def run(experience=tiny_experience, *, axes=(), loss=None, compare=False, done=0, skipped=0, **settings):
    settings = {"compute_dtype": jnp.float32, "chunk": 4, "distill_factor": factor} | settings
    form = axes, tuple((loss or LOSS).items()), UpdateSettings(**settings)
    mesh, fresh, score, wanted, update = programs(*form)
    with jax.set_mesh(mesh):
      batch = sharding.place(mesh, experience)
      targets = tuple(score(batch.prompts, batch.tokens) for _ in range(wanted))
      state = fresh()
      state = state.replace(step=state.step + done, skipped=state.skipped + skipped)
      return jax.device_get(update(state, batch, targets, compare=compare))

  yield run
  programs.cache_clear()
  jax.clear_caches()


@pytest.fixture(scope="module")
def reference(update):
  return update()


@pytest.fixture(scope="module")
def twice(update):
  return update(updates=2)


@pytest.fixture(scope="module")
def logits_of(tiny_config):
  @jax.jit
  def logits(params, prompts, tokens):
    hidden = update_lib.hidden_of(tiny_config, params, prompts, tokens, remat="none")
    return jnp.einsum("pgtd,vd->pgtv", hidden, model.head_weight(tiny_config, params))

  return logits


def selected(logits, tokens, allowed):
  logps = jax.nn.log_softmax(jnp.where(allowed[None, None, None], logits, -jnp.inf))
  return np.asarray(jnp.take_along_axis(logps, jnp.asarray(tokens)[..., None], -1)[..., 0])


@pytest.fixture(scope="module")
def dense(tiny_params, tiny_experience, logits_of, allowed):
  """Logits of the batch, and the log-probabilities of its tokens."""
  logits = logits_of(tiny_params, tiny_experience.prompts, tiny_experience.tokens)
  return logits, selected(logits, tiny_experience.tokens, allowed)


def difference(a, b):
  """Largest relative difference in norm over the tensors of two trees."""
  ratios = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(x), 1e-3), a, b)
  return max(jax.tree.leaves(ratios))


def gradient(state, params):
  return jax.tree.map(lambda a, b: (np.asarray(b) - np.asarray(a)) / RATE, state.params, params)


def moved(a, b):
  return jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), a, b))


def sequence_means(mask):
  return mask / (mask.sum(-1, keepdims=True) * mask.shape[0] * mask.shape[1])


def test_figures(reference, tiny_experience, tiny_params):
  state, figures = reference
  own = (tiny_experience.mask & ~tiny_experience.injected[..., None]).sum()
  gated = tiny_experience.mask & tiny_experience.gate[..., None]
  assert figures["entropy"][1] == figures["ratio/clip_frac"][1] == own
  assert figures["ratio/clip_frac_injected"][1] == tiny_experience.mask.sum() - own
  assert figures["divergence/gated"][1] == gated.sum()
  assert figures["divergence/gated"][1] + figures["divergence/ungated"][1] == tiny_experience.mask.sum()
  assert figures["ratio/mean"][0] == pytest.approx(figures["ratio/mean"][1])  # on-policy: every ratio is 1
  assert 0 < figures["divergence/gated"][0] / figures["divergence/gated"][1] < np.log(2)
  assert state.step == 1 and all(moved(state.params, tiny_params))
  norm = float(optax.tree.norm(gradient(state, tiny_params)))
  assert figures["grad_norm"][0] == pytest.approx(norm, rel=1e-3)


def test_two_updates_equal_dense_gradients(
  reference, twice, tiny_config, tiny_params, tiny_experience, teacher, logits_of, dense, allowed
):
  batch = tiny_experience
  of_teacher = logits_of(teacher, batch.prompts, batch.tokens)
  given = losses.token_inputs(
    batch.tokens, batch.mask, jnp.asarray(batch.advantages), jnp.asarray(batch.gate), dense[1], injected=batch.injected
  )

  @jax.jit
  @jax.grad
  def dense_gradient(params):
    logits = logits_of(params, batch.prompts, batch.tokens)
    return losses.KepoTokenLoss(allowed=allowed)(logits, (of_teacher,), given)[0]

  def after(params):
    return jax.tree.map(lambda x, g: np.asarray(x - RATE * g), params, dense_gradient(params))

  once = after(tiny_params)
  assert difference(once, reference[0].params) < 1e-5 and difference(after(once), twice[0].params) < 1e-5


def test_two_updates_have_the_ratio_of_the_policy_that_sampled(reference, twice):
  _, figures = reference
  state, both = twice
  assert state.step == 1
  assert both["ratio/mean"][1] == 2 * figures["ratio/mean"][1]
  # In the second the policy has moved and pi_old has not.
  assert abs(both["ratio/mean"][0] / both["ratio/mean"][1] - 1) > 1e-4 and both["ratio/clip_frac"][0] > 0
  # Figures about the sampler are about the policy that sampled: both updates give the same.
  assert both["sampler/logp_gap"][0] == pytest.approx(2 * figures["sampler/logp_gap"][0], rel=1e-4)


@pytest.mark.parametrize("axes", [(), ALL_AXES], ids=["one", "eight"])
def test_neither_micro_batches_nor_the_mesh_change_an_update(update, reference, axes):
  state, figures = update(axes=axes, parts=2, skipped=3)
  assert int(state.skipped) == 0  # a finite update ends the count
  assert difference(reference[0].params, state.params) < 1e-5
  for name, value in reference[1].items():
    np.testing.assert_allclose(figures[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_neither_padding_nor_the_order_of_prompts_changes_an_update(update, reference, tiny_experience):
  mask = tiny_experience.mask
  padded = tiny_experience.replace(
    tokens=np.where(mask, tiny_experience.tokens, 5), logps=np.where(mask, tiny_experience.logps, np.float32(np.nan))
  )
  turned = jax.tree.map(lambda x: np.asarray(x)[::-1].copy(), tiny_experience)
  for name, batch in (("padding", padded), ("order", turned)):
    state, figures = update(batch)
    assert difference(reference[0].params, state.params) < 1e-5, name
    np.testing.assert_allclose(figures["hint/reliance"], reference[1]["hint/reliance"], rtol=1e-5, err_msg=name)


def test_a_frozen_tower_stays_and_bfloat16_with_remat_comes_near_float32(update, reference, tiny_params):
  state, _ = update(frozen=("visual",), compute_dtype=jnp.bfloat16, remat="full")
  assert not any(moved(state.params["visual"], tiny_params["visual"]))
  assert all(moved(state.params["language_model"], tiny_params["language_model"]))
  exact, rounded = (
    gradient(each, tiny_params)["language_model"]["embed_tokens"]["weight"] for each in (reference[0], state)
  )
  assert rounded.dtype == np.float32 and np.linalg.norm(exact - rounded) < 0.05 * np.linalg.norm(exact)


@pytest.mark.slow
def test_micro_batches_change_nothing_of_sequence_ratios(update, twice, tiny_params):
  whole, cut = (update(updates=2, sequence_ratio=True, parts=parts)[0] for parts in (1, 2))
  # The second update carries the rounding of the first.
  assert difference(whole.params, cut.params) < 1e-4
  assert difference(whole.params, twice[0].params) > 1e-3  # where each token has a ratio of its own


@pytest.mark.slow
def test_the_mesh_changes_nothing_of_the_options(update, tiny_experience):
  loss = {"reference_coefficient": 0.1, "reference_estimator": "k2", "divergence": "jsd", "top_k": 5}
  options = {"aggregation": "token_mean", "normaliser": "group_mean", "off_context": "drop_behaviour_shaped"}
  one, many = (update(tiny_experience, axes=axes, loss=loss, **options) for axes in ((), (2, 2)))
  assert difference(one[0].params, many[0].params) < 1e-5
  np.testing.assert_allclose(one[1]["loss"][0], many[1]["loss"][0], rtol=1e-5)


@pytest.mark.parametrize("form", [{"updates": 2}, {"axes": ALL_AXES, "parts": 2}], ids=["twice", "eight"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(update, tiny_params, tiny_experience, form):
  for broken in (np.nan, np.inf):
    advantages = tiny_experience.advantages.copy()
    advantages[2, 1] = broken
    state, figures = update(tiny_experience.replace(advantages=advantages), skipped=3, **form)
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny_params)
    count = form.get("updates", 1)
    assert (int(state.step), int(state.skipped)) == (1, 3 + count)
    assert figures["update/skipped"] == (count, count) and not np.isfinite(figures["grad_norm"][0])


def test_moments_stay_where_an_update_is_skipped():
  params = {"a": jnp.array([1.0, 2.0])}
  optimizer = make_optimizer(lambda step: 0.1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, clip_norm=0.1)
  before = initial_state(jax.device_put(params, sharding.replicated(sharding.make_mesh())), optimizer)
  before, figures = update_lib.apply_gradients(
    optimizer, before, {"a": jnp.array([0.3, -0.4])}, jnp.float32(1), steps=1
  )
  assert float(figures["grad_norm"]) == pytest.approx(0.5)  # before it is clipped
  for gradient, loss in (([np.nan, 1.0], 1.0), ([0.1, 0.2], np.inf), ([3e38, 3e38], 1.0)):
    gradient = {"a": jnp.array(gradient, jnp.float32)}
    after, figures = update_lib.apply_gradients(optimizer, before, gradient, jnp.float32(loss), steps=1)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert figures["update/skipped"] == 1 and int(after.step) == 2 and int(after.skipped) == 1


def test_gradients_of_the_two_terms(update, reference, tiny_params, tiny_experience):
  both, figures = update(compare=True)
  assert not any(moved(both.params, reference[0].params))  # the comparison changes nothing
  assert {name: value for name, value in figures.items() if name in reference[1]} == reference[1]
  closed = tiny_experience.replace(gate=np.zeros_like(tiny_experience.gate))
  policy_alone, alone = update(closed, compare=True)
  assert alone["divergence/gated"] == (0, 0) and alone["grad_norm/distill"][0] == 0 == alone["grad_cosine"][0]
  policy, distill, cosine = (figures[name][0] for name in ("grad_norm/policy", "grad_norm/distill", "grad_cosine"))
  assert alone["grad_norm/policy"][0] == pytest.approx(alone["grad_norm"][0], rel=1e-4)
  assert policy == pytest.approx(alone["grad_norm"][0], rel=1e-4)
  # The step is the sum of the two gradients: what the policy's leaves of it is that of the distillation.
  one = gradient(policy_alone, tiny_params)
  other = jax.tree.map(np.subtract, gradient(both, tiny_params), one)
  assert distill == pytest.approx(float(optax.tree.norm(other)), rel=1e-3)
  assert cosine == pytest.approx(float(optax.tree.vdot(one, other)) / (policy * distill), abs=1e-3)
  assert 0.01 < abs(cosine) < 0.99


def test_lambda_fades(update, reference, tiny_params, tiny_experience):
  full = gradient(reference[0], tiny_params)
  none, quarter = (gradient(update(done=done)[0], tiny_params) for done in (1, 2))
  closed = update(tiny_experience.replace(gate=np.zeros_like(tiny_experience.gate)))[0]
  assert difference(gradient(closed, tiny_params), none) < 1e-5
  expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, none, full)
  assert difference(expected, quarter) < 1e-3 and difference(full, quarter) > 0.01


def test_supervised_rows_are_imitated(update, tiny_experience, tiny_params, logits_of, dense, allowed):
  supervised = np.zeros_like(tiny_experience.supervised)
  supervised[:, 2:] = True
  nothing = np.zeros_like(supervised)
  batch = tiny_experience.replace(
    supervised=supervised, injected=nothing, gate=nothing, advantages=np.zeros_like(tiny_experience.advantages)
  )
  state, figures = update(batch)
  rows = batch.mask & supervised[..., None]
  assert figures["loss"][0] == pytest.approx(-(sequence_means(batch.mask) * dense[1])[rows].sum(), rel=1e-5)
  np.testing.assert_allclose(figures["supervised/nll"], (-dense[1][rows].sum(), rows.sum()), rtol=1e-5)
  assert figures["ratio/mean"][1] == figures["entropy"][1] == (batch.mask & ~rows).sum()
  again = selected(logits_of(state.params, batch.prompts, batch.tokens), batch.tokens, allowed)
  assert again[rows].mean() > dense[1][rows].mean()


def test_rollouts_that_are_not_kept_enter_no_term(update, tiny_experience):
  kept = np.ones_like(tiny_experience.kept)
  kept[:, 0] = False
  odd = np.where(kept, tiny_experience.advantages, 1e3).astype(np.float32)
  gate = tiny_experience.gate | ~kept
  first = update(tiny_experience.replace(kept=kept))[0]
  second = update(tiny_experience.replace(kept=kept, advantages=odd, gate=gate))[0]
  assert difference(first.params, second.params) < 1e-6


def inputs_of(config, allowed, params, batch, *, loss=None, **settings):
  token_loss = losses.KepoTokenLoss(allowed=allowed, **loss or {})
  made = make_inputs(config, token_loss, UpdateSettings(compute_dtype=jnp.float32, chunk=4, **settings))
  return jax.jit(made)(params, jnp.int32(0), batch)


def test_ratios_of_injected_rollouts_by_hand(tiny_config, tiny_params, tiny_experience, dense, allowed):
  logits, logps = dense[0], np.float64(dense[1])
  mask, injected = tiny_experience.mask, tiny_experience.injected[..., None] & tiny_experience.mask
  log_rho = logps - np.float64(tiny_experience.logps)
  gamma = np.quantile(np.exp(log_rho[injected]), 0.9)
  rho, p = np.exp(log_rho), np.exp(logps)
  cases = {
    "drop_behaviour_shaped": (rho / (rho + gamma), {}),
    "drop_unit_shaped": (p / (p + 0.1), {}),
    # A sampler that is sure of itself counts less; injected rows were sampled from another prompt.
    "drop_on_policy": (1.0, {"importance_cap": 0.5}),
  }
  for convention, (ratio, loss) in cases.items():
    loss |= {"distill_coefficient": 0}
    rows = inputs_of(tiny_config, allowed, tiny_params, tiny_experience, loss=loss, off_context=convention)
    others = np.minimum(rho, 0.5) if loss.get("importance_cap") else 1.0
    surrogate = np.where(injected, ratio, others) * tiny_experience.advantages[..., None]
    found, _ = losses.KepoTokenLoss(allowed=allowed, **loss)(logits, (), rows)
    assert float(found) == pytest.approx(-(sequence_means(mask) * surrogate)[mask].sum(), rel=1e-4), convention


def test_shaping_without_injected_rows_is_finite(tiny_config, tiny_params, tiny_experience, allowed):
  batch = tiny_experience.replace(injected=np.zeros_like(tiny_experience.injected))
  rows = inputs_of(tiny_config, allowed, tiny_params, batch, off_context="drop_behaviour_shaped")
  np.testing.assert_array_equal(rows.shaping_logps, batch.logps)


def test_a_repeated_token_adds_up_in_bfloat16():
  # 4,096 gradients of 1/64 into one row: a bfloat16 sum stops growing near 4.
  table = jnp.zeros((3, 2), jnp.bfloat16)
  index = jnp.ones(4096, jnp.int32)
  gradient = jax.grad(lambda t: (layers.lookup(t, index).astype(jnp.float32) / 64).sum())(table)
  assert gradient.dtype == jnp.bfloat16 and gradient.tolist() == [[0, 0], [64, 64], [0, 0]]


def test_micro_batches_take_equal_rows_of_every_device():
  # Eight rows on four devices (two rows each) in two parts: each part has one row of every device.
  parts = update_lib.micro_batches({"x": jnp.arange(8)}, 2)["x"]
  assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
