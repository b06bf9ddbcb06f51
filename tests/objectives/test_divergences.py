import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import advantages, distributions, divergences, gate, losses, weights
from tests.objectives import slow_loss
from tests.objectives.cases import ALLOWED, BANNED, V

# Kind, weight of the Jensen-Shannon divergence, k of top-k. Ten ids are allowed: the bucket holds some of them, one at
# k = 9, and none at k = 10.
CASES = (
  *(("jsd", weight, 0) for weight in (0.0, 0.1, 0.5, 0.9, 1.0)),
  *(("jsd", weight, k) for weight, k in ((0.0, 1), (0.3, 1), (0.3, 3), (0.3, 9), (0.3, 10), (0.5, 40), (1.0, 3))),
  *((kind, 0.5, k) for kind in ("forward_kl", "reverse_kl") for k in (0, 3)),
  ("sampled_k2", 0.5, 0),
)


def slow_divergences(teacher_logits, logits, tokens, case):
  """Token by token in float64."""
  kind, weight, top_k = case
  loss = losses.KepoTokenLoss(allowed=ALLOWED, divergence=kind, jsd_weight=weight, top_k=top_k)
  rows = zip(slow_loss.log_softmax(teacher_logits, 1.0), slow_loss.log_softmax(logits, 1.0), tokens, strict=True)
  return np.array([slow_loss.divergence(*row, loss) for row in rows])


@jax.jit
def values_and_gradients(teacher_logits, logits, tokens):
  """Divergence of each token, and its gradient in the student's logits, for every case."""
  teacher = distributions.masked_log_softmax(teacher_logits, ALLOWED)
  out = {}
  for case in CASES:
    kind, weight, top_k = case

    def divergence(logits, kind=kind, weight=weight, top_k=top_k):
      student = distributions.masked_log_softmax(logits, ALLOWED)
      return divergences.token_divergence(teacher, student, tokens, kind=kind, weight=weight, top_k=top_k)

    values, pullback = jax.vjp(divergence, logits)
    out[case] = values, pullback(jnp.ones_like(values))[0]
  return out


def test_values_and_gradients_equal_a_slow_loop(rng):
  teacher_logits, logits = np.float32(rng.normal(size=(2, 5, V)) * 2)
  tokens, step = rng.choice(np.flatnonzero(ALLOWED), 5), 1e-5 * rng.normal(size=(5, V))
  for case, (values, gradient) in values_and_gradients(teacher_logits, logits, tokens).items():
    slow = lambda z, case=case: slow_divergences(teacher_logits, z, tokens, case)  # noqa: E731
    np.testing.assert_allclose(values, slow(logits), rtol=5e-6, atol=1e-7, err_msg=case)
    difference = (slow(logits + step) - slow(logits - step)) / 2
    slope = (np.float64(gradient) * step).sum(-1)
    np.testing.assert_allclose(slope, difference, rtol=1e-4, atol=3e-11, err_msg=case)
    # A banned id has no gradient, not even nan times zero.
    np.testing.assert_array_equal(gradient[:, BANNED], 0.0, err_msg=case)


def test_worked_examples():
  # Teacher (1/2, 1/2), student (1/4, 3/4), mixture of equal parts (3/8, 5/8).
  teacher, student = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
  for weight, expected in (
    (0.0, 0.5 * np.log(2) + 0.5 * np.log(2 / 3)),
    (1.0, 0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2)),
    (0.5, (0.5 * np.log(4 / 3) + 0.5 * np.log(4 / 5)) / 2 + (0.25 * np.log(2 / 3) + 0.75 * np.log(6 / 5)) / 2),
  ):
    actual = divergences.generalised_jsd(teacher, student, weight=weight)
    np.testing.assert_allclose(actual, [expected], rtol=2e-6, err_msg=weight)
    np.testing.assert_allclose(divergences.generalised_jsd(teacher, teacher, weight=weight), 0.0, atol=3e-7)
  # Distributions that share no id reach the bound of log 2, and stay finite.
  one_hot = distributions.masked_log_softmax(jnp.eye(2) * 1e4, jnp.ones(2, bool))
  np.testing.assert_allclose(divergences.generalised_jsd(one_hot, one_hot[::-1], weight=0.5), np.log(2), rtol=1e-6)


def test_top_k_worked_examples():
  # Teacher 1/2 1/4 1/4, student 1/4 1/2 1/4.
  examples = {
    (0.0, 1): 0.5 * np.log(2) + 0.5 * np.log(2 / 3),  # (1/2, 1/2) against (1/4, 3/4)
    (1.0, 1): 0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2),
    # The second and the third are equally likely, so both stay and nothing is left: 1/2 log 2 - 1/4 log 2.
    (0.0, 2): 0.25 * np.log(2),
    # The mixture is 3/8 3/8 1/4, and both sides are equally far from it.
    (0.5, 2): 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3),
  }
  teacher, student = jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
  actual = jax.jit(
    lambda *logps: {case: divergences.top_k_jsd(*logps, weight=case[0], top_k=case[1])[0] for case in examples}
  )(teacher, student)
  assert jax.device_get(actual) == pytest.approx(examples, rel=3e-6)


def test_mean_gradient_of_sampled_k2_is_that_of_the_reverse_kl(rng):
  logits, teacher = rng.normal(size=7), np.log(rng.dirichlet(np.ones(7)))

  @jax.jit
  @jax.grad
  def gradient(logits):
    # Every token of the vocabulary, weighted with its share under the student as data: an exact mean over its samples.
    student = jnp.tile(jax.nn.log_softmax(logits)[None], (7, 1))
    each = divergences.token_divergence(
      jnp.tile(jnp.float32(teacher)[None], (7, 1)), student, jnp.arange(7), kind="sampled_k2", weight=0.5
    )
    return (jax.lax.stop_gradient(jnp.exp(student[0])) * each).sum()

  # In the logits d KL(p || q) = p (log p - log q - KL).
  logps = logits - np.log(np.exp(logits).sum())
  gap = logps - teacher
  expected = np.exp(logps) * (gap - (np.exp(logps) * gap).sum())
  np.testing.assert_allclose(gradient(np.float32(logits)), expected, rtol=1e-4, atol=1e-6)


def test_what_is_no_option_is_refused():
  logps, mask = jnp.log(jnp.array([[0.5, 0.5]])), jnp.ones((1, 1, 1), bool)
  for refused, message in (
    (lambda: divergences.generalised_jsd(logps, logps, weight=1.5), "1.5"),
    (lambda: divergences.token_divergence(logps, logps, jnp.array([0]), kind="k2", weight=0.5), "sampled_k2"),
    (lambda: advantages.group_advantages(logps, kind="group-std"), "group_std"),
    (lambda: gate.quality_gate(logps, threshold=1.0, mode="Positive"), "positive"),
    (lambda: weights.aggregation_weights(mask, aggregation="mean", length=1), "sequence_mean"),
    (lambda: weights.distill_weights(mask, mask[0], normaliser="group"), "gated_tokens"),
  ):
    with pytest.raises(ValueError, match=message):
      refused()


def test_sharded_equals_unsharded(mesh_of, rng):
  # Rows and vocabulary over devices: the threshold of top-k needs sums over shards, not a sort.
  logits, tokens = np.float32(rng.normal(size=(2, 4, 12))), np.array([0, 11, 5, 6])

  @jax.jit
  def several(logits, tokens):
    logps = [distributions.masked_log_softmax(x, np.arange(12) != 4) for x in logits]
    sampled = divergences.token_divergence(*logps, tokens, kind="sampled_k2", weight=0.3)
    return sampled, divergences.token_divergence(*logps, tokens, kind="jsd", weight=0.3, top_k=3)

  mesh = mesh_of(data=4, tensor=2)
  places = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "data", "tensor"), ("data",))]
  actual = several(*jax.device_put((logits, tokens), tuple(places)))
  np.testing.assert_allclose(actual, several(logits, tokens), rtol=2e-5, atol=1e-6)
