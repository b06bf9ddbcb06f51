"""What each term of the objective owes, beyond the slow loop of test_losses.py: closed forms and rows left out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.objectives import losses, ratios
from tests.objectives import cases
from tests.objectives.cases import ALLOWED, SETTINGS, G, P, V, setting


def score_of(values):
  """Gradient of the log-probability of every token with respect to its logits, 0 off the mask; float64."""
  shares = np.exp(np.float64(values["student"])) * ALLOWED
  score = np.eye(V)[np.array(values["tokens"])] - shares / shares.sum(-1, keepdims=True)
  return score * np.array(values["mask"])[..., None]


def lengths_of(values):
  """Tokens of each row, 1 for an empty one: float64[P, G, 1, 1]."""
  return np.maximum(np.array(values["mask"]).sum(-1), 1.0)[..., None, None]


def column(x):
  """A value per row, to be multiplied with gradients: float64[P, G, 1, 1]."""
  return np.float64(x)[..., None, None]


# ---- the policy term ----


def test_gradient_of_an_injected_row_is_advantage_times_score(rng):
  # drop_on_policy: pi_old is the policy itself without the hint, so the clip cannot hide the row's gradient.
  values = cases.batch(rng)
  _, gradient = cases.value_and_gradient(values, setting("injected", distill_coefficient=0))
  expected = -column(values["advantages"]) / (lengths_of(values) * P * G) * score_of(values)
  np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_gradient_of_a_sequence_ratio_is_that_of_the_sequence(aggregation, rng):
  # The weights of a row's objective A_i s_i: 1/N where it has tokens, or its share of all tokens.
  values = cases.batch(rng)
  shares = {
    "sequence_mean": np.array(values["mask"]).any(-1) / (P * G),
    "token_mean": np.array(values["mask"]).sum(-1) / np.array(values["mask"]).sum(),
  }[aggregation]
  # A clip so wide that it does nothing.
  case = setting(
    "old", sequence=True, inputs={"aggregation": aggregation}, distill_coefficient=0, clip_low=1.0, clip_high=1e9
  )
  (loss, aux), gradient = cases.value_and_gradient(values, case)

  @jax.jit
  @jax.value_and_grad
  def sequence_objective(student):
    logps = jax.nn.log_softmax(jnp.where(ALLOWED.reshape(1, 1, 1, V), student, -jnp.inf))
    logps = jnp.take_along_axis(logps, values["tokens"][..., None], -1)[..., 0]
    ratio = jnp.exp(ratios.sequence_log_ratio(logps - values["old_logps"], values["mask"]))
    return -(shares * values["advantages"] * ratio).sum()

  expected, by_autodiff = sequence_objective(values["student"])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, by_autodiff, rtol=1e-4, atol=1e-7)
  # (1/|y|) A s sum of the scores, with s the same at every token of the row.
  ratio = np.array(aux["ratio"]).max(-1)
  np.testing.assert_allclose(aux["ratio"], ratio[..., None] * np.array(values["mask"]), rtol=1e-6)
  closed = -column(shares * values["advantages"] * ratio) / lengths_of(values) * score_of(values)
  np.testing.assert_allclose(gradient, closed, rtol=1e-4, atol=1e-7)


def test_a_clipped_sequence_has_no_gradient(rng):
  values = cases.batch(rng)
  (_, aux), gradient = cases.value_and_gradient(values, SETTINGS["gspo"])
  mask, clipped = np.array(values["mask"]), np.array(aux["clipped"])
  assert 0 < clipped.sum() < mask.sum()
  np.testing.assert_array_equal(clipped, clipped.any(-1, keepdims=True) & mask)
  np.testing.assert_array_equal(np.array(gradient)[clipped], 0.0)
  assert (np.abs(gradient).sum(-1)[mask & ~clipped] > 0).all()


def test_a_sequence_ratio_of_one_is_grpo(rng):
  # On-policy every ratio is 1, of tokens and of sequences: the same bits.
  values = cases.batch(rng)
  (loss, _), gradient = cases.value_and_gradient(values, SETTINGS["gspo on-policy"])
  (expected, _), expected_gradient = cases.value_and_gradient(values, SETTINGS["grpo on-policy"])
  assert loss == expected
  np.testing.assert_array_equal(gradient, expected_gradient)


def test_without_a_policy_term_advantages_do_not_matter(rng):
  values = cases.batch(rng)
  case = setting(policy_coefficient=0, distill_coefficient=1.0)
  one, other = (
    cases.value_and_gradient(values | {"advantages": advantages}, case)
    for advantages in (values["advantages"], 7 - values["advantages"])
  )
  chex.assert_trees_all_equal(one, other)
  np.testing.assert_array_equal(np.array(one[1])[~np.array(values["gate"])], 0.0)


# ---- rows that are left out, and rows that somebody else wrote ----


@pytest.mark.parametrize("name", ["top-k", "group mean, forward", "constant length, k2", "everything"])
def test_rows_that_are_not_kept_do_not_matter(name, rng):
  case, values = SETTINGS[name], cases.batch(rng)
  out = ~values["kept"]
  assert 0 < (out & values["mask"].any(-1)).sum() < P * G
  expected = cases.value_and_gradient(values, case)
  changed = {name: jnp.where(out[..., None, None], x * 3 + 1, x) for name, x in values.items() if name in cases.LOGITS}
  changed |= {"advantages": jnp.where(out, 1e3, values["advantages"]), "gate": values["gate"] ^ out}
  actual = cases.value_and_gradient(values | changed, case)
  np.testing.assert_array_equal(actual[0][0], expected[0][0])
  np.testing.assert_array_equal(actual[1], expected[1])
  np.testing.assert_array_equal(np.array(actual[1])[np.array(out)], 0.0)


def test_rows_that_are_not_kept_still_count_in_n(rng):
  values = cases.batch(rng)
  kept = np.array(values["kept"])
  for aggregation in ("sequence_mean", "constant_length", "token_mean"):
    options = {"distill_coefficient": 0, "inputs": {"aggregation": aggregation}}
    gradient = np.array(cases.value_and_gradient(values, setting("kept", **options))[1])
    whole = np.array(cases.value_and_gradient(values, setting(**options))[1])
    if aggregation == "token_mean":  # its denominator counts tokens that are there
      mask = np.array(values["mask"])
      np.testing.assert_allclose(gradient[kept], whole[kept] * mask.sum() / mask[kept].sum(), rtol=1e-5, atol=1e-9)
    else:
      np.testing.assert_array_equal(gradient[kept], whole[kept])
    assert np.abs(whole[~kept]).sum() > 0


def test_supervised_rows_have_a_likelihood_and_no_policy_term(rng):
  values = cases.batch(rng)
  case = setting("supervised", supervised_coefficient=0.7, policy_coefficient=0, distill_coefficient=0)
  gradient = cases.value_and_gradient(values, case)[1]
  written = column(values["supervised"])
  assert 0 < written.sum() < P * G
  # -0.7 (1/N) (1/|y|) times the score; nothing elsewhere.
  expected = -0.7 * written / (lengths_of(values) * P * G) * score_of(values)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
  inputs = cases.inputs_of(values, case)
  rows = np.array(values["supervised"])
  for name in ("policy_weight", "reference_weight"):
    assert (np.array(inputs[name])[rows] == 0).all() and np.array(inputs[name])[~rows].sum() > 0, name
  assert (np.array(inputs["supervised_weight"])[~rows] == 0).all()
  # The divergence does not ask who wrote a row.
  np.testing.assert_array_equal(inputs["distill_weight"], cases.inputs_of(values, setting())["distill_weight"])


# ---- distillation ----


def test_without_lambda_it_is_grpo_bit_for_bit(rng):
  values = cases.batch(rng) | {"gate": jnp.zeros((P, G), bool)}
  expected = cases.value_and_gradient(values, SETTINGS["grpo on-policy"])
  # An empty gate adds nothing either: finite, and the same bits.
  for normaliser in ("gated_tokens", "group_mean"):
    for kind in ("jsd", "sampled_k2"):
      (loss, _), gradient = cases.value_and_gradient(
        values, setting(inputs={"normaliser": normaliser}, divergence=kind)
      )
      assert loss == expected[0][0]
      np.testing.assert_array_equal(gradient, expected[1])
  case = SETTINGS["grpo on-policy"]
  with pytest.raises(ValueError, match="needs 0 other logits"):
    case.token_loss(values["student"], (values["teacher"],), cases.inputs_of(values, case))


def test_an_annealed_coefficient_keeps_the_teacher(rng):
  values = cases.batch(rng)
  inputs = cases.inputs_of(values, setting())

  def loss(coefficient):
    token_loss = losses.KepoTokenLoss(allowed=ALLOWED, distill_coefficient=coefficient)
    return token_loss(values["student"], (values["teacher"],), inputs)[0]

  fixed = losses.KepoTokenLoss(allowed=ALLOWED, distill_coefficient=0)(values["student"], (), inputs)[0]
  np.testing.assert_allclose(jax.jit(loss)(jnp.float32(0.0)), fixed, rtol=1e-6)
  assert abs(jax.jit(loss)(jnp.float32(0.5)) - fixed) > 1e-3


def test_temperatures_enter_where_they_should(rng):
  values = cases.batch(rng)
  inputs = cases.inputs_of(values, setting())
  student, teacher, reference = (values[name] for name in cases.LOGITS)
  at = {"allowed": ALLOWED, "reference_coefficient": 0.5}
  loss, aux = losses.KepoTokenLoss(**at, temperature=0.5, distill_temperature=2.0)(
    student, (teacher, reference), inputs
  )
  hot, hot_aux = losses.KepoTokenLoss(**at, temperature=1.0)(student * 2, (teacher, reference * 2), inputs)
  cold_aux = losses.KepoTokenLoss(**at)(student / 2, (teacher / 2, reference), inputs)[1]
  for name in ("logp", "entropy", "kl"):
    np.testing.assert_allclose(aux[name], hot_aux[name], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(aux["divergence"], cold_aux["divergence"], rtol=1e-5, atol=1e-6)
  assert np.isfinite(loss) and np.isfinite(hot)
