import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import distributions, divergences

WEIGHTS = (0.0, 0.1, 0.5, 0.9, 1.0)
BRANCHES = (0.0, 0.3, 1.0)


def logps_of(rng, shape=(5, 12), scale=2.0, allowed=None):
  logits = jnp.array(rng.normal(size=shape) * scale, jnp.float32)
  return distributions.masked_log_softmax(logits, jnp.ones(shape[-1], bool) if allowed is None else allowed)


def slow_jsd(teacher_logps, student_logps, weight):
  """Id by id in float64, from the definition."""
  out = []
  for teacher, student in zip(np.exp(np.float64(teacher_logps)), np.exp(np.float64(student_logps)), strict=True):

    def kl(p, q):
      return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    mixture = (1 - weight) * student + weight * teacher
    inner = weight * kl(teacher, mixture) + (1 - weight) * kl(student, mixture)
    out.append({0.0: kl(teacher, student), 1.0: kl(student, teacher)}.get(weight, inner))
  return np.array(out)


class GeneralisedJsdTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(*WEIGHTS)
  def test_worked_example(self, weight):
    # Teacher (1/2, 1/2), student (1/4, 3/4).
    t, s = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    m = (1 - weight) * s + weight * t
    expected = {
      0.0: 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75),
      1.0: 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5),
    }.get(weight, weight * (t * np.log(t / m)).sum() + (1 - weight) * (s * np.log(s / m)).sum())
    jsd = self.variant(functools.partial(divergences.generalised_jsd, weight=weight))
    np.testing.assert_allclose(jsd(jnp.log(jnp.array([t])), jnp.log(jnp.array([s]))), [expected], rtol=2e-6)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(*BRANCHES)
  def test_equal_inputs_give_zero(self, weight):
    logps = logps_of(np.random.default_rng(0), allowed=jnp.arange(12) > 2)
    jsd = self.variant(functools.partial(divergences.generalised_jsd, weight=weight))
    np.testing.assert_allclose(jsd(logps, logps), 0.0, atol=3e-7)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_equals_a_slow_loop(weight, rng):
  allowed = jnp.arange(12) != 4
  teacher, student = logps_of(rng, allowed=allowed), logps_of(rng, allowed=allowed)
  actual = divergences.generalised_jsd(teacher, student, weight=weight)
  np.testing.assert_allclose(actual, slow_jsd(teacher, student, weight), rtol=3e-6)


def test_symmetric_and_bounded_at_one_half(rng):
  for scale in (0.1, 2.0, 60.0):
    teacher, student = logps_of(rng, scale=scale), logps_of(rng, scale=scale)
    jsd = divergences.generalised_jsd(teacher, student, weight=0.5)
    np.testing.assert_allclose(jsd, divergences.generalised_jsd(student, teacher, weight=0.5), rtol=1e-5, atol=1e-7)
    assert (jsd >= -1e-7).all() and (jsd <= np.log(2) + 1e-6).all()
  # Distributions that share no id reach the bound, and stay finite.
  one_hot = distributions.masked_log_softmax(jnp.eye(2) * 1e4, jnp.ones(2, bool))
  np.testing.assert_allclose(divergences.generalised_jsd(one_hot, one_hot[::-1], weight=0.5), np.log(2), rtol=1e-6)


def test_limits_are_the_kls(rng):
  teacher, student = logps_of(rng, scale=1.0), logps_of(rng, scale=1.0)
  for weight, share, p, q in ((1e-3, 1e-3, teacher, student), (1 - 1e-3, 1e-3, student, teacher)):
    limit = divergences.generalised_jsd(teacher, student, weight=weight) / share
    np.testing.assert_allclose(limit, divergences.kl(p, q), rtol=1e-2)


@pytest.mark.parametrize("weight", BRANCHES)
def test_banned_ids_are_safe_in_value_and_gradient(weight, rng):
  allowed = jnp.arange(12) % 4 > 0
  teacher_logits, logits = (jnp.array(rng.normal(size=(3, 12)), jnp.float32) for _ in range(2))

  def divergence(logits, allowed, teacher_logits):
    teacher = distributions.masked_log_softmax(teacher_logits, allowed)
    student = distributions.masked_log_softmax(logits, allowed)
    return divergences.generalised_jsd(teacher, student, weight=weight).sum()

  value_and_grad = jax.jit(jax.value_and_grad(divergence))
  value, gradient = value_and_grad(logits, allowed, teacher_logits)
  # The same as if the banned ids did not exist.
  small = [x[:, np.array(allowed)] for x in (logits, teacher_logits)]
  every = jnp.ones(small[0].shape[1], bool)
  expected, small_gradient = value_and_grad(small[0], every, small[1])
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient[:, np.array(allowed)], small_gradient, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(gradient[:, ~np.array(allowed)], 0.0)


@pytest.mark.parametrize("weight", BRANCHES)
def test_gradient_against_finite_differences(weight, rng):
  teacher = logps_of(rng, (2, 5), 1.0)
  logits, direction = (jnp.array(rng.normal(size=(2, 5)), jnp.float32) for _ in range(2))

  @jax.jit
  def divergence(logits):
    student = distributions.masked_log_softmax(logits, jnp.ones(5, bool))
    return divergences.generalised_jsd(teacher, student, weight=weight).sum()

  slope = (jax.grad(divergence)(logits) * direction).sum()
  difference = divergence(logits + 1e-2 * direction) - divergence(logits - 1e-2 * direction)
  np.testing.assert_allclose(slope, difference / 2e-2, rtol=2e-3, atol=1e-4)


def test_weight_outside_the_unit_interval_is_refused(rng):
  with pytest.raises(ValueError, match="1.5"):
    divergences.generalised_jsd(logps_of(rng), logps_of(rng), weight=1.5)


def slow_top_k(teacher_logps, student_logps, weight, k):
  """`slow_jsd` of distributions over k + 1 buckets; no ties."""
  buckets = []
  for row in range(len(teacher_logps)):
    order = sorted(range(teacher_logps.shape[1]), key=lambda i: -teacher_logps[row, i])
    for logps in (teacher_logps, student_logps):
      shares = np.exp(np.float64(logps[row]))
      buckets.append([*shares[order[:k]], sum(shares[order[k:]])])
  return slow_jsd(np.log(buckets[::2]), np.log(buckets[1::2]), weight)


class TopKTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    # Teacher 1/2 1/4 1/4, student 1/4 1/2 1/4. k = 1: (1/2, 1/2) against (1/4, 3/4).
    (0.0, 1, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
    (1.0, 1, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
    # k = 2: the second and the third are equally likely, so both stay and nothing is left: 1/2 log 2 - 1/4 log 2.
    (0.0, 2, 0.25 * math.log(2)),
    # The mixture is 3/8 3/8 1/4, and both sides are equally far from it.
    (0.5, 2, 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)),
  )
  def test_worked_examples(self, weight, k, expected):
    teacher, student = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    divergence = self.variant(functools.partial(divergences.top_k_jsd, weight=weight, top_k=k))
    np.testing.assert_allclose(divergence(jnp.array(teacher), jnp.array(student)), [expected], rtol=3e-6)


@pytest.mark.parametrize("k", [1, 3, 8, 10])
@pytest.mark.parametrize("weight", BRANCHES)
def test_top_k_equals_a_slow_loop(weight, k, rng):
  allowed = np.arange(12) != 4
  teacher, student = (logps_of(rng, allowed=jnp.array(allowed)) for _ in range(2))
  actual = divergences.top_k_jsd(teacher, student, weight=weight, top_k=k)
  expected = slow_top_k(np.array(teacher)[:, allowed], np.array(student)[:, allowed], weight, k)
  np.testing.assert_allclose(actual, expected, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_top_k_grows_to_the_whole_divergence(weight, rng):
  # Merging ids cannot raise a divergence. 11 ids are allowed: with 10 of them the bucket is the eleventh.
  allowed = jnp.arange(12) != 4
  teacher, student = (logps_of(rng, (40, 12), allowed=allowed) for _ in range(2))
  whole = divergences.generalised_jsd(teacher, student, weight=weight)
  before = jnp.zeros(40)
  for k in (1, 2, 5, 9, 10, 11, 30):
    coarse = divergences.top_k_jsd(teacher, student, weight=weight, top_k=k)
    assert (coarse >= before - 1e-6).all() and (coarse <= whole + 1e-6).all()
    assert coarse.sum() > before.sum() + 1e-3 or k > 10
    before = coarse
    if k >= 10:
      np.testing.assert_allclose(coarse, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3, 9, 12])
@pytest.mark.parametrize("weight", BRANCHES)
def test_top_k_is_safe_with_banned_ids(weight, top_k, rng):
  # Nine of twelve ids are allowed: the bucket holds some, and none at 9 and 12.
  allowed = np.arange(12) % 4 > 0
  teacher_logits, logits, direction = (jnp.array(rng.normal(size=(3, 12)), jnp.float32) for _ in range(3))

  @jax.jit
  @jax.value_and_grad
  def divergence(logits, allowed, teacher_logits):
    logps = [distributions.masked_log_softmax(x, allowed) for x in (teacher_logits, logits)]
    return divergences.top_k_jsd(*logps, weight=weight, top_k=top_k).sum()

  value, gradient = divergence(logits, jnp.array(allowed), teacher_logits)
  # The same as if the banned ids did not exist.
  expected, small = divergence(logits[:, allowed], jnp.ones(9, bool), teacher_logits[:, allowed])
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient[:, allowed], small, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(gradient[:, ~allowed], 0.0)
  # Against differences of the slow loop: in float64, so that the step can be small.
  slow = lambda z: slow_top_k(teacher[:, allowed], masked(z)[:, allowed], weight, min(top_k, 8)).sum()  # noqa: E731

  def masked(z):
    z = np.where(allowed, np.float64(z), -np.inf)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))

  teacher, step = masked(teacher_logits), 1e-5 * np.float64(direction)
  difference = (slow(np.float64(logits) + step) - slow(np.float64(logits) - step)) / 2e-5
  np.testing.assert_allclose((np.float64(gradient) * direction).sum(), difference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", BRANCHES)
def test_a_tie_at_the_kth_id_keeps_both(weight, rng):
  student = logps_of(rng, (4, 6))
  teacher = jnp.log(jnp.tile(jnp.array([[0.3, 0.2, 0.2, 0.1, 0.1, 0.1]]), (4, 1)))
  by_k = [divergences.top_k_jsd(teacher, student, weight=weight, top_k=k) for k in range(1, 7)]
  np.testing.assert_array_equal(by_k[1], by_k[2])
  for more in by_k[3:]:  # from the fourth on all are tied: nothing is left for the bucket
    np.testing.assert_allclose(more, divergences.generalised_jsd(teacher, student, weight=weight), rtol=1e-6)
  assert (by_k[1] > by_k[0]).all() and (by_k[3] > by_k[2]).all()


def tokens_and_logps(rng, shape=(5, 12)):
  allowed = jnp.arange(shape[-1]) != 4
  teacher, student = (logps_of(rng, shape, allowed=allowed) for _ in range(2))
  return teacher, student, jnp.array(rng.choice(np.flatnonzero(allowed), shape[:-1]))


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("kind", divergences.KINDS)
def test_kinds_are_what_their_names_say(kind, top_k, rng):
  teacher, student, tokens = tokens_and_logps(rng)
  actual = divergences.token_divergence(teacher, student, tokens, kind=kind, weight=0.3, top_k=top_k)
  weight = {"jsd": 0.3, "forward_kl": 0.0, "reverse_kl": 1.0}.get(kind)
  allowed = np.isfinite(teacher[0])
  teacher, student = np.float64(teacher), np.float64(student)
  if kind == "sampled_k2":
    rows = np.arange(5)
    expected = (student[rows, np.array(tokens)] - teacher[rows, np.array(tokens)]) ** 2 / 2
  elif top_k:
    expected = slow_top_k(teacher[:, allowed], student[:, allowed], weight, top_k)
  else:
    expected = slow_jsd(teacher, student, weight)
  np.testing.assert_allclose(actual, expected, rtol=5e-6, atol=1e-7)


def test_unknown_kind_is_refused(rng):
  with pytest.raises(ValueError, match="sampled_k2"):
    divergences.token_divergence(*tokens_and_logps(rng), kind="k2", weight=0.5)


def test_mean_gradient_of_sampled_k2_is_that_of_the_reverse_kl(rng):
  teacher, logits = logps_of(rng, (7,)), jnp.array(rng.normal(size=7), jnp.float32)

  @jax.jit
  @jax.grad
  def gradient(logits):
    # Every token of the vocabulary, weighted with its share under the student as data: an exact mean over its samples.
    student = jnp.tile(jax.nn.log_softmax(logits)[None], (7, 1))
    each = divergences.token_divergence(
      jnp.tile(teacher[None], (7, 1)), student, jnp.arange(7), kind="sampled_k2", weight=0.5
    )
    return (jax.lax.stop_gradient(jnp.exp(student[0])) * each).sum()

  # In the logits d KL(p || q) = p (log p - log q - KL).
  logps = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum())
  gap = logps - np.float64(teacher)
  expected = np.exp(logps) * (gap - (np.exp(logps) * gap).sum())
  np.testing.assert_allclose(gradient(logits), expected, rtol=1e-4, atol=1e-6)


def test_sharded_equals_unsharded(mesh_of, rng):
  allowed = jnp.arange(16) != 4
  teacher, student = (logps_of(rng, (4, 3, 16), allowed=allowed) for _ in range(2))
  tokens = jnp.array(rng.choice(np.flatnonzero(allowed), (4, 3)))
  mesh = mesh_of(data=4, tensor=2)
  sharded = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None, "tensor"))) for x in (teacher, student)]
  for kind in divergences.KINDS:
    for top_k in (0, 3):
      divergence = functools.partial(divergences.token_divergence, kind=kind, weight=0.5, top_k=top_k)
      actual = jax.jit(divergence)(*sharded, jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data"))))
      np.testing.assert_allclose(actual, divergence(teacher, student, tokens), rtol=2e-5, atol=1e-6)
