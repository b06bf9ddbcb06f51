import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import losses
from tests.objectives import cases, slow_loss
from tests.objectives.cases import ALLOWED, BANNED, SETTINGS, G, P, V, setting


def test_masked_sum_leaves_padding_out():
  values, mask = jnp.array([[1.0, 2.0, jnp.nan], [4.0, 8.0, jnp.nan]]), jnp.array([[1, 0, 0], [1, 1, 0]], bool)
  assert losses.masked_sum(values, mask) == (13.0, 3.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_objective_equals_a_slow_loop_and_sees_only_what_counts(name, rng):
  # One test per program: all of this costs less than compiling it.
  case, values = SETTINGS[name], cases.batch(rng)
  (loss, aux), gradient = actual = cases.value_and_gradient(values, case)
  assert_slow_loop(case, values, actual, rng.normal(size=gradient.shape))
  assert_sensible_aux(case, values, aux)
  chex.assert_trees_all_equal(cases.value_and_gradient(values | padding_of(case, values), case), actual)
  np.testing.assert_array_equal(np.array(gradient)[~np.array(values["mask"])], 0.0)
  if "kept" in case.arrays:
    changed = cases.value_and_gradient(values | dropped_rows_of(values), case)
    np.testing.assert_array_equal(changed[0][0], loss)
    np.testing.assert_array_equal(changed[1], gradient)


def assert_slow_loop(case, values, actual, direction):
  """Loss, and slope along a random direction by differences of the slow loop, which knows nothing of our gradients."""
  (loss, _), gradient = actual
  slow = {name: np.array(x) for name, x in values.items()}
  np.testing.assert_allclose(loss, slow_loss.slow_objective(slow, case), rtol=2e-5)
  up, down = (slow_loss.slow_objective(slow, case, slow["student"] + step * direction) for step in (1e-5, -1e-5))
  assert np.linalg.norm(gradient) > 1e-3
  tolerance = 1e-4 * np.linalg.norm(gradient)
  np.testing.assert_allclose((np.float64(gradient) * direction).sum(), (up - down) / 2e-5, atol=tolerance)


def assert_sensible_aux(case, values, aux):
  """What is reported of each token: nothing off the mask, and values by the slow loop's softmax."""
  mask = np.array(values["mask"])
  assert ("divergence" in aux, "kl" in aux) == (case.token_loss.distils, case.token_loss.reference_coefficient != 0)
  for name, x in aux.items():
    np.testing.assert_array_equal(np.array(x)[~mask], 0.0, err_msg=name)
  logps = slow_loss.log_softmax(values["student"], case.token_loss.temperature)
  chosen = np.take_along_axis(logps, np.array(values["tokens"])[..., None], -1)[..., 0]
  np.testing.assert_allclose(aux["logp"], np.where(mask, chosen, 0.0), rtol=1e-5, atol=1e-6)
  entropy = -(np.exp(logps[..., ALLOWED]) * logps[..., ALLOWED]).sum(-1)
  np.testing.assert_allclose(aux["entropy"], np.where(mask, entropy, 0.0), rtol=1e-5, atol=1e-6)
  if "old_logps" in case.arrays:
    assert 0 < aux["clipped"].sum() < mask.sum()
    assert not (aux["clipped"] & values["injected"][..., None]).any() or "shaping_logps" not in case.arrays
  else:
    np.testing.assert_array_equal(aux["ratio"], mask)
    assert not aux["clipped"].any()


def padding_of(case, values):
  """The arrays of a batch with other values where nobody may look."""
  off = ~values["mask"]
  arrays = {
    # A banned token has log-probability -inf; it may serve as padding.
    "tokens": jnp.where(off, BANNED, values["tokens"]),
    "student": jnp.where(off[..., None], -50.0, values["student"]),
    **{name: jnp.where(off[..., None], 1e4, values[name]) for name in ("teacher", "reference")},
    **{name: jnp.where(off, jnp.nan, values[name]) for name in ("old_logps", "sampler_logps", "shaping_logps")},
  }
  # The sampler of an injected row saw another prompt: what it says is not used.
  if "injected" in case.arrays:
    arrays["sampler_logps"] = jnp.where(values["injected"][..., None], jnp.nan, arrays["sampler_logps"])
  return arrays


def dropped_rows_of(values):
  """The arrays of a batch with other values in the rows that are not kept."""
  out = ~values["kept"]
  assert 0 < (out & values["mask"].any(-1)).sum() < P * G
  logits = {name: jnp.where(out[..., None, None], values[name] * 3 + 1, values[name]) for name in cases.LOGITS}
  return logits | {"advantages": jnp.where(out, 1e3, values["advantages"]), "gate": values["gate"] ^ out}


def by_hand(case, **changes):
  """The loss of two rollouts of 1 and 2 tokens with advantages 1 and -2; the student gives each of ten ids 1/10."""
  zeros = jnp.zeros((1, 2, 3, V))
  values = {
    **dict.fromkeys(cases.LOGITS, zeros),
    "tokens": jnp.ones((1, 2, 3), int),
    "mask": jnp.array([[[1, 0, 0], [1, 1, 0]]], bool),
    "advantages": jnp.array([[1.0, -2.0]]),
    "gate": jnp.array([[True, False]]),
  } | changes
  return case.token_loss(values["student"], case.others(values), cases.inputs_of(values, case))[0]


def test_aggregations_by_hand():
  # -(1/2) [1 + (1/2) (-2 - 2)], -(1/3) [1 - 2 - 2], -(1/2) (1/4) [1 - 2 - 2], and with T = 3 in place of the 4.
  for aggregation, most, expected in (
    ("sequence_mean", 4, 1 / 2),
    ("token_mean", 4, 1.0),
    ("constant_length", 4, 3 / 8),
    ("constant_length", None, 1 / 2),
  ):
    case = setting(distill_coefficient=0, aggregation=aggregation, max_tokens=most)
    np.testing.assert_allclose(by_hand(case), expected, rtol=1e-6, err_msg=f"{aggregation} {most}")


def test_policy_terms_by_hand():
  # pi_old was 1/20: a ratio of 2, cut to 1.2 for the first rollout and not for the second: -(1/2) [1.2 - 2 * 2].
  old = {"old_logps": jnp.full((1, 2, 3), np.log(1 / 20))}
  np.testing.assert_allclose(by_hand(setting("old", distill_coefficient=0), **old), 1.4, rtol=1e-6)
  # The sampler had 1/20 and 1/5: weights 2, cut to 1.5, and 1/2: -(1/2) [1.5 - 2 / 2]. Injected, the first has 1.
  sampler = {"sampler_logps": jnp.log(jnp.array([[[1 / 20] * 3, [1 / 5] * 3]]))}
  sampler["injected"] = jnp.array([[True, False]])
  options = {"importance_cap": 1.5, "distill_coefficient": 0}
  np.testing.assert_allclose(by_hand(setting("sampler", **options), **sampler), -0.25, rtol=1e-5)
  np.testing.assert_allclose(by_hand(setting("sampler injected", **options), **sampler), 0.0, atol=1e-6)
  # gamma mu = 1/10, as probable as the token: half of the advantage, for the injected rollout alone: -(1/2) [1 - 1].
  shaping = {"shaping_logps": jnp.full((1, 2, 3), np.log(0.1)), "injected": jnp.array([[False, True]])}
  np.testing.assert_allclose(by_hand(setting("shaping injected", distill_coefficient=0), **shaping), 0.0, atol=1e-6)
  # The second rollout is supervised: the first keeps its half, and the likelihood is (1/2) log 10.
  case = setting("supervised", supervised_coefficient=0.3, distill_coefficient=0)
  loss = by_hand(case, supervised=jnp.array([[False, True]]))
  np.testing.assert_allclose(loss, -0.5 + 0.3 * np.log(10) / 2, rtol=1e-6)


def test_normalisers_by_hand():
  # The teacher has one id in mind, so KL(student || teacher) is large and known: sum of 1/10 (log 1/10 - log q).
  # Only the first rollout, of one token, is distilled: its whole divergence, or half of it.
  teacher = jnp.broadcast_to(jnp.zeros(V).at[1].set(3.0), (1, 2, 3, V))
  gap = -np.log(10) - (np.where(np.arange(10) == 1, 3.0, 0.0) - np.log(np.exp(3) + 9))
  for normaliser, share in (("gated_tokens", 1.0), ("group_mean", 0.5)):
    case = setting(divergence="reverse_kl", policy_coefficient=0, distill_coefficient=2.0, normaliser=normaliser)
    np.testing.assert_allclose(by_hand(case, teacher=teacher), 2 * share * gap.mean(), rtol=1e-5)


def test_gradients_in_closed_form(rng):
  values = cases.batch(rng)
  mask, lengths = np.array(values["mask"]), np.maximum(np.array(values["mask"]).sum(-1), 1.0)
  # Score: gradient of the log-probability of a token in its logits.
  shares = np.exp(slow_loss.log_softmax(values["student"], 1.0))
  score = (np.eye(V)[np.array(values["tokens"])] - shares) * mask[..., None]
  weight = (-np.array(values["advantages"]) / (lengths * P * G))[..., None]
  # pi_old is the policy itself, so no clip hides a row's gradient: advantage times score.
  _, gradient = cases.value_and_gradient(values, SETTINGS["grpo on-policy"])
  np.testing.assert_allclose(gradient, weight[..., None] * score, rtol=2e-5, atol=1e-8)
  # Of a sequence (1/|y|) A s sum of the scores, with s the same at every token of the row, or nothing where it is cut.
  (_, aux), gradient = cases.value_and_gradient(values, SETTINGS["gspo"])
  ratio, clipped = np.array(aux["ratio"]).max(-1, keepdims=True), np.array(aux["clipped"])
  np.testing.assert_allclose(aux["ratio"], ratio * mask, rtol=1e-6)
  assert 0 < clipped.sum() < mask.sum()
  np.testing.assert_array_equal(clipped, clipped.any(-1, keepdims=True) & mask)
  closed = np.where(clipped, 0.0, weight * ratio)[..., None] * score
  np.testing.assert_allclose(gradient, closed, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(np.array(gradient)[clipped], 0.0)


def test_an_annealed_coefficient_keeps_the_teacher(rng):
  values = cases.batch(rng)
  inputs = cases.inputs_of(values, setting())

  @jax.jit
  def loss(coefficient):
    token_loss = losses.KepoTokenLoss(allowed=ALLOWED, distill_coefficient=coefficient)
    return token_loss(values["student"], (values["teacher"],), inputs)[0]

  grpo = losses.KepoTokenLoss(allowed=ALLOWED, distill_coefficient=0)
  fixed = grpo(values["student"], (), inputs)[0]
  np.testing.assert_allclose(loss(jnp.float32(0.0)), fixed, rtol=1e-6)
  assert abs(loss(jnp.float32(0.5)) - fixed) > 1e-3
  with pytest.raises(ValueError, match="needs 0 other logits"):
    grpo(values["student"], (values["teacher"],), inputs)


def test_sharded_equals_unsharded(mesh_of, rng):
  values = cases.batch(rng)
  sharded = jax.device_put(values, NamedSharding(mesh_of(data=P), PartitionSpec("data")))
  actual = cases.value_and_gradient(sharded, SETTINGS["everything"])
  chex.assert_trees_all_close(actual, cases.value_and_gradient(values, SETTINGS["everything"]), rtol=1e-5, atol=1e-6)
