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
from kepo_jax.training import forward, inputs, step
from kepo_jax.training.inputs import UpdateSettings
from kepo_jax.training.state import initial_state, make_optimizer
from kepo_jax.types import Experience, HintedRows


@pytest.fixture(scope="module")
def update_once(tiny_config, tiny_params, tiny_experience, allowed, mesh_of):
  """One step under the given settings: (state, figures), the state on the host."""
  teacher = model.init_params(tiny_config, jax.random.key(9))

  # Each program holds thousands of memory maps, of which a process may have 65,530: few are kept.
  @functools.lru_cache(maxsize=6)
  def programs(mesh, loss, settings, clip_norm):
    """A fresh state, the teacher's scoring and the update: compiled once for all tests that ask for the same."""
    token_loss = losses.KepoTokenLoss(allowed=allowed, **dict(loss))
    shardings = sharding.weight_shardings(mesh, tiny_params, model.logical_axes(tiny_config))
    # Without Adam's division, so that an update is as accurate as its gradient.
    optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optax.sgd(1.0))
    fresh = lambda: initial_state(jax.device_put(tiny_params, shardings), optimizer, settings.frozen)  # noqa: E731
    frozen = jax.device_put(teacher, shardings)
    score = functools.partial(jax.jit(functools.partial(forward.target, tiny_config, parts=settings.parts)), frozen)
    wanted = token_loss.distils + bool(token_loss.reference_coefficient)
    return fresh, score, wanted, step.Update(tiny_config, optimizer, token_loss, settings, fresh())

  def run(
    *, mesh=None, experience=tiny_experience, clip_norm=1.0, loss=None, compare=False, done=0, skipped=0, **settings
  ):
    mesh = mesh or mesh_of()
    settings = UpdateSettings(**{"compute_dtype": jnp.float32, "chunk": 4} | settings)
    with jax.set_mesh(mesh):
      fresh, score, wanted, update = programs(mesh, tuple((loss or {}).items()), settings, clip_norm)
      batch = sharding.place(mesh, experience)
      targets = tuple(score(batch.prompts, batch.tokens) for _ in range(wanted))
      state = fresh()
      state = state.replace(step=state.step + done, skipped=state.skipped + skipped)
      state, figures = update(state, batch, targets, compare=compare)
    return jax.device_get((state, figures))

  yield run
  programs.cache_clear()
  jax.clear_caches()


GRPO = {"distill_coefficient": 0}


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
  assert figures["grad_norm"][0] > 0


def test_step_counts_and_parameters_move(reference, tiny_params):
  state, _ = reference
  assert state.step == 1
  still = [
    path for path, d in jax.tree_util.tree_leaves_with_path(jax.tree.map(_moved, state.params, tiny_params)) if not d
  ]
  assert not still


def _moved(a, b):
  return bool((np.asarray(a) != np.asarray(b)).any())


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(
  update_once, tiny_params, tiny_experience, mesh_of, broken, axes
):
  advantages = tiny_experience.advantages.copy()
  advantages[2, 1] = broken
  experience = tiny_experience.replace(advantages=advantages)
  state, figures = update_once(experience=experience, mesh=mesh_of(**axes), loss=GRPO, updates=2)
  jax.tree.map(np.testing.assert_array_equal, state.params, tiny_params)
  assert (int(state.step), int(state.skipped)) == (1, 2)
  assert figures["update/skipped"] == (2, 2)
  assert not np.isfinite(figures["grad_norm"][0])


def test_a_finite_update_ends_the_count_of_skipped_ones(update_once, tiny_params):
  state, figures = update_once(skipped=3)
  assert int(state.skipped) == 0 and figures["update/skipped"] == (0, 1)
  assert any(jax.tree.leaves(jax.tree.map(_moved, state.params, tiny_params)))


def test_moments_stay_where_an_update_is_skipped():
  params = {"a": jnp.array([1.0, 2.0])}
  optimizer = make_optimizer(lambda step: 0.1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
  before = initial_state(jax.device_put(params, sharding.replicated(sharding.make_mesh())), optimizer)
  before, _ = step.apply_gradients(optimizer, before, {"a": jnp.array([0.3, -0.4])}, jnp.float32(1), steps=1)
  for gradient, loss in (([np.nan, 1.0], 1.0), ([0.1, 0.2], np.inf), ([3e38, 3e38], 1.0)):
    gradient = {"a": jnp.array(gradient, jnp.float32)}
    after, figures = step.apply_gradients(optimizer, before, gradient, jnp.float32(loss), steps=1)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert figures["update/skipped"] == 1 and int(after.step) == 2 and int(after.skipped) == 1


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
  np.testing.assert_allclose(figures["loss"][0], reference[1]["loss"][0], rtol=1e-5)


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


def test_an_empty_gate_is_grpo(update_once, tiny_experience):
  closed = tiny_experience.replace(gate=np.zeros_like(tiny_experience.gate))
  distilled, figures = update_once(experience=closed)
  plain, _ = update_once(experience=closed, loss=GRPO)
  assert figures["divergence/gated"] == (0, 0)
  assert difference(distilled.params, plain.params) < 1e-6


def test_a_frozen_tower_stays(update_once, tiny_params):
  state, _ = update_once(frozen=("visual",))
  assert not any(jax.tree.leaves(jax.tree.map(_moved, state.params["visual"], tiny_params["visual"])))
  assert all(jax.tree.leaves(jax.tree.map(_moved, state.params["language_model"], tiny_params["language_model"])))


def test_gradients_are_clipped(update_once, tiny_params):
  state, figures = update_once(clip_norm=1e-3)
  assert figures["grad_norm"][0] > 1e-3
  assert float(optax.tree.norm(moved(state, tiny_params))) == pytest.approx(1e-3, rel=1e-3)


def moved(state, params):
  """How far the parameters went."""
  return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, params)


def test_gradients_of_the_two_terms(update_once, tiny_params):
  both, figures = update_once(compare=True, clip_norm=1e9)
  policy_alone, alone = update_once(loss=GRPO, clip_norm=1e9)
  policy, distill, cosine = (figures[name][0] for name in ("grad_norm/policy", "grad_norm/distill", "grad_cosine"))
  assert policy == pytest.approx(alone["grad_norm"][0], rel=1e-4)
  # The step is the sum of the two gradients: what the policy's leaves of it is that of the distillation.
  one = moved(policy_alone, tiny_params)
  other = jax.tree.map(np.subtract, moved(both, tiny_params), one)
  assert distill == pytest.approx(float(optax.tree.norm(other)), rel=1e-3)
  assert cosine == pytest.approx(float(optax.tree.vdot(one, other)) / (policy * distill), abs=1e-3)
  assert 0.01 < abs(cosine) < 0.99


def test_the_comparison_changes_nothing(update_once, reference):
  state, figures = update_once(compare=True)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params, reference[0].params)))
  assert {name: value for name, value in figures.items() if name in reference[1]} == reference[1]


def test_the_cosine_of_an_empty_gradient_is_zero(update_once, tiny_experience):
  closed = tiny_experience.replace(gate=np.zeros_like(tiny_experience.gate))
  _, figures = update_once(experience=closed, compare=True)
  assert figures["grad_norm/distill"][0] == 0 == figures["grad_cosine"][0]
  assert figures["grad_norm/policy"][0] == pytest.approx(figures["grad_norm"][0], rel=1e-5)


# ---- several updates per batch ----


def test_two_updates_have_the_ratio_of_the_policy_that_sampled(update_once, tiny_params):
  # The first update is that of a batch used once: pi_old is scored, and equals the policy.
  once, figures = update_once(loss=GRPO)
  first = moved(once, tiny_params)
  assert optax.tree.norm(first) > 0
  twice, both = update_once(loss=GRPO, updates=2)
  assert both["ratio/mean"][1] == 2 * figures["ratio/mean"][1]
  # In the second the policy has moved and pi_old has not.
  assert abs(both["ratio/mean"][0] / both["ratio/mean"][1] - 1) > 1e-4
  assert both["ratio/clip_frac"][0] > 0
  assert twice.step == once.step == 1
  # Figures about the sampler are about the policy that sampled: both updates give the same.
  assert both["sampler/logp_gap"][0] == pytest.approx(2 * figures["sampler/logp_gap"][0], rel=1e-4)
  second = optax.tree.norm(moved(twice, once.params))
  assert second > 0


@pytest.mark.slow
def test_the_second_update_equals_one_with_the_old_log_probs(update_once, tiny_config, tiny_params, allowed, mesh_of,
                                                             tiny_experience):  # fmt: skip
  once, _ = update_once(loss=GRPO)
  twice, _ = update_once(loss=GRPO, updates=2)
  # By hand: log pi_old of the first parameters, the gradient of the second.
  old = dense_logps(tiny_config, tiny_params, tiny_experience, allowed)
  inputs = losses.token_inputs(
    tiny_experience.tokens, tiny_experience.mask, jnp.asarray(tiny_experience.advantages),
    jnp.asarray(tiny_experience.gate), old,
  )  # fmt: skip

  def loss(params):
    hidden = forward.hidden_of(tiny_config, params, tiny_experience.prompts, tiny_experience.tokens, remat="none")
    logits = jnp.einsum("pgtd,vd->pgtv", hidden, model.head_weight(tiny_config, params))
    return losses.KepoTokenLoss(allowed=allowed, distill_coefficient=0)(logits, (), inputs)[0]

  gradient = jax.device_get(jax.jit(jax.grad(loss))(once.params))
  clipped = jax.tree.map(lambda x: x * min(1.0, 1.0 / float(optax.tree.norm(gradient))), gradient)
  expected = jax.tree.map(np.subtract, once.params, clipped)
  assert difference(expected, twice.params) < 1e-5


def dense_logps(config, params, experience, allowed):
  """log pi of the rollouts' tokens, all logits at once."""
  hidden = jax.jit(functools.partial(forward.hidden_of, config, remat="none"))(
    params, experience.prompts, experience.tokens
  )
  logits = jnp.einsum("pgtd,vd->pgtv", hidden, model.head_weight(config, params))
  logps = jax.nn.log_softmax(jnp.where(allowed[None, None, None], logits, -jnp.inf))
  return jnp.take_along_axis(logps, jnp.asarray(experience.tokens)[..., None], -1)[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"sequence_ratio": True}, {"aggregation": "token_mean"}], ids=str)
def test_micro_batches_change_nothing_of_two_updates(update_once, settings):
  # Small moves: a first one of norm 1 would carry its rounding into the second, enlarged.
  whole = update_once(updates=2, clip_norm=0.1, **settings)
  cut = update_once(updates=2, parts=2, clip_norm=0.1, **settings)
  assert difference(whole[0].params, cut[0].params) < 1e-5


@pytest.mark.slow
def test_the_sequence_ratio_is_one_value_for_a_rollout(update_once):
  token, sequence = (update_once(loss=GRPO, updates=2, sequence_ratio=value)[0] for value in (False, True))
  # The first of the two updates is the same; the second differs.
  assert difference(token.params, sequence.params) > 1e-4
  once = [update_once(loss=GRPO, sequence_ratio=value)[0] for value in (False, True)]
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, once[0].params, once[1].params)))


# ---- injected rollouts ----


@pytest.fixture(scope="module")
def hinted(tiny_experience, tiny_prompts):
  """The same experience with the prompts of its injected rollouts, which happen to hold no hint."""
  found = np.argwhere(tiny_experience.injected)
  rows = np.concatenate([found, found[:1], found[:1]]).astype(np.int32)  # Q = 4, two of them padding
  prompts = jax.tree.map(lambda x: np.asarray(x)[rows[:, 0]], tiny_prompts)
  hinted = HintedRows(prompts=prompts, prompt=rows[:, 0], slot=rows[:, 1], used=np.arange(4) < len(found))
  return tiny_experience.replace(hinted=hinted)


@pytest.mark.parametrize(
  "settings",
  [{}, pytest.param({"updates": 2}, marks=pytest.mark.slow), pytest.param({"parts": 2}, marks=pytest.mark.slow)],
  ids=str,
)
def test_a_kept_hint_that_says_nothing_changes_nothing(update_once, hinted, settings):
  # The policy term of injected rows runs on prompts of its own; where these are the same, so is the update.
  dropped = update_once(**settings)
  kept = update_once(experience=hinted, off_context="keep_hint", **settings)
  assert difference(dropped[0].params, kept[0].params) < 1e-5
  assert kept[1]["loss"][0] == pytest.approx(dropped[1]["loss"][0], rel=1e-5)


def test_a_kept_hint_is_seen_by_the_policy_term_alone(update_once, hinted):
  other = hinted.replace(
    hinted=hinted.hinted.replace(prompts=hinted.hinted.prompts.replace(
      tokens=np.where(np.asarray(hinted.hinted.prompts.mask), 3, hinted.hinted.prompts.tokens)
    ))
  )  # fmt: skip
  same, changed = (update_once(experience=each, off_context="keep_hint", compare=True)[1] for each in (hinted, other))
  assert same["grad_norm/distill"] == changed["grad_norm/distill"]
  assert abs(same["grad_norm/policy"][0] - changed["grad_norm/policy"][0]) > 1e-4


def test_pi_old_of_a_kept_hint_is_given_the_hint(tiny_config, tiny_params, hinted, allowed):
  prompts = hinted.hinted.prompts
  said = np.where(np.asarray(prompts.mask) & (np.asarray(prompts.image_slot) < 0), 3, prompts.tokens)
  batch = hinted.replace(hinted=hinted.hinted.replace(prompts=prompts.replace(tokens=said)))
  settings = UpdateSettings(compute_dtype=jnp.float32, chunk=4, updates=2, off_context="keep_hint")
  make = inputs.make_inputs(tiny_config, losses.KepoTokenLoss(allowed=allowed), settings)
  made = jax.jit(make)(tiny_params, jnp.int32(0), batch)
  rows = made.hinted.mask
  as_rows = batch.replace(prompts=batch.hinted.prompts, tokens=made.hinted.tokens)
  expected = dense_logps(tiny_config, tiny_params, as_rows, allowed)
  np.testing.assert_allclose(made.hinted.old_logps[rows], expected[rows], rtol=1e-5)
  # Dropped or kept, the hint makes a difference: the row of the batch has other log-probabilities.
  dropped = made.rows.old_logps[hinted.hinted.prompt, hinted.hinted.slot][:, None]
  assert np.abs(made.hinted.old_logps - dropped)[rows].max() > 1e-3


@pytest.mark.parametrize("convention", ["drop_behaviour_shaped", "drop_unit_shaped"])
def test_shaped_ratios_by_hand(update_once, tiny_config, tiny_params, tiny_experience, allowed, convention):
  logps = np.float64(dense_logps(tiny_config, tiny_params, tiny_experience, allowed))
  mask, injected = tiny_experience.mask, tiny_experience.injected[..., None] & tiny_experience.mask
  behaviour = np.float64(tiny_experience.logps) if convention == "drop_behaviour_shaped" else np.zeros(mask.shape)
  rho = np.exp(logps - behaviour)
  # Interpolated between logs, as the code does; numpy's own quantile of rho lies beside it.
  gamma = np.exp(np.quantile(np.log(rho)[injected], 0.9)) if convention == "drop_behaviour_shaped" else 0.1
  shaped = np.where(injected, rho / (rho + gamma), 1.0)  # other rows have the ratio 1
  weights = mask / (mask.sum(-1, keepdims=True) * mask.shape[0] * mask.shape[1])
  expected = -(weights * shaped * tiny_experience.advantages[..., None]).sum()
  _, figures = update_once(loss=GRPO, off_context=convention)
  assert figures["loss"][0] == pytest.approx(expected, rel=1e-4)
  assert figures["ratio/clip_frac_injected"][0] == 0


@pytest.mark.slow
def test_shaping_without_injected_rows_is_grpo(update_once, tiny_experience):
  none = tiny_experience.replace(injected=np.zeros_like(tiny_experience.injected))
  plain = update_once(loss=GRPO, experience=none)[0]
  shaped = update_once(loss=GRPO, experience=none, off_context="drop_behaviour_shaped")[0]
  assert difference(plain.params, shaped.params) < 1e-6


# ---- rows that a term does not see ----


def test_supervised_rows_are_imitated(update_once, tiny_experience, tiny_config, tiny_params, allowed):
  supervised = np.zeros_like(tiny_experience.supervised)
  supervised[:, 2:] = True
  batch = tiny_experience.replace(supervised=supervised, injected=np.zeros_like(supervised))
  loss = {"policy_coefficient": 0.0, "distill_coefficient": 0, "supervised_coefficient": 1.0}
  state, figures = update_once(experience=batch, loss=loss, aggregation="token_mean")
  logps = np.asarray(dense_logps(tiny_config, tiny_params, batch, allowed))
  rows = batch.mask & supervised[..., None]
  assert figures["loss"][0] == pytest.approx(-logps[rows].mean(), rel=1e-5)
  assert figures["supervised/nll"][1] == rows.sum()
  assert figures["ratio/mean"][1] == figures["entropy"][1] == (batch.mask & ~rows).sum()
  again = dense_logps(tiny_config, state.params, batch, allowed)
  assert np.asarray(again)[rows].mean() > logps[rows].mean()


def test_rollouts_that_are_not_kept_enter_no_term(update_once, tiny_experience):
  kept = np.ones_like(tiny_experience.kept)
  kept[:, 0] = False
  odd = np.where(kept, tiny_experience.advantages, 1e3).astype(np.float32)
  gate = tiny_experience.gate | ~kept
  first = update_once(experience=tiny_experience.replace(kept=kept))[0]
  second = update_once(experience=tiny_experience.replace(kept=kept, advantages=odd, gate=gate))[0]
  assert difference(first.params, second.params) < 1e-6


def test_lambda_fades(update_once, tiny_experience):
  full, none = update_once(), update_once(distill_factor=lambda step: 0.0 * step)
  assert difference(none[0].params, update_once(loss=GRPO)[0].params) < 1e-6
  half = update_once(distill_factor=lambda step: 0.5 + step)
  later = update_once(distill_factor=lambda step: 0.1 * step, done=5)
  assert difference(half[0].params, later[0].params) < 1e-6
  same = update_once(loss={"distill_coefficient": 0.5})
  assert difference(half[0].params, same[0].params) < 1e-6
  assert difference(full[0].params, half[0].params) > 1e-5


def test_a_sampler_that_is_sure_of_itself_counts_less(update_once, tiny_experience, tiny_config, tiny_params, allowed):
  logps = np.asarray(dense_logps(tiny_config, tiny_params, tiny_experience, allowed))
  mask = tiny_experience.mask
  weights = mask / (mask.sum(-1, keepdims=True) * mask.shape[0] * mask.shape[1])
  importance = np.minimum(np.exp(logps - tiny_experience.logps), 0.5)
  importance = np.where(tiny_experience.injected[..., None], 1.0, importance)
  expected = -(weights * importance * tiny_experience.advantages[..., None])[mask].sum()
  _, figures = update_once(loss=GRPO | {"importance_cap": 0.5})
  assert figures["loss"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {"aggregation": "token_mean", "normaliser": "group_mean"},
    {"aggregation": "constant_length", "max_tokens": 32, "updates": 2, "sequence_ratio": True},
    {"off_context": "drop_behaviour_shaped"},
    {"off_context": "keep_hint"},
  ],
  ids=str,
)
def test_the_mesh_changes_nothing_of_the_options(update_once, mesh_of, hinted, options):
  loss = {"reference_coefficient": 0.1, "reference_estimator": "k2", "divergence": "jsd", "top_k": 5}
  batch = hinted if options.get("off_context") == "keep_hint" else hinted.replace(hinted=None)
  # Small moves: a first one of norm 1 would carry its rounding into the second, enlarged.
  clip = 0.1 if options.get("updates") else 1.0
  one, many = (
    update_once(experience=batch, mesh=mesh, loss=loss, clip_norm=clip, **options)
    for mesh in (mesh_of(), mesh_of(data=2, fsdp=2))
  )
  assert difference(one[0].params, many[0].params) < 1e-5
  np.testing.assert_allclose(one[1]["loss"][0], many[1]["loss"][0], rtol=1e-5)


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
      hidden = forward.hidden_of(
        tiny_config, model.cast(params, dtype), tiny_experience.prompts, tiny_experience.tokens, remat=remat
      )
      weights = jax.random.normal(jax.random.key(4), hidden.shape)
      return (weights * hidden.astype(jnp.float32)).sum()

    return jax.jit(jax.grad(loss))(tiny_params)["language_model"]["embed_tokens"]["weight"]

  exact, rounded = embedding_gradient(jnp.float32, "none"), embedding_gradient(jnp.bfloat16, "full")
  assert rounded.dtype == jnp.float32
  assert jnp.linalg.norm(exact - rounded) < 0.05 * jnp.linalg.norm(exact)


def test_micro_batches_take_equal_rows_of_every_device():
  # Eight rows on four devices (two rows each) in two parts: each part has one row of every device.
  parts = forward.micro_batches({"x": jnp.arange(8)}, 2)["x"]
  assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
