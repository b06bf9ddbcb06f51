import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from kepo_jax.objectives import losses

P, G, T, V = 3, 4, 6, 11
ALLOWED = np.arange(V) != 7


def batch(rng, **changes):
  """Logits of student, teacher and reference, and token inputs of a small batch with ragged rows."""
  student, teacher, reference = (jnp.array(rng.normal(size=(P, G, T, V)), jnp.float32) for _ in range(3))
  fields = {
    "tokens": jnp.array(rng.choice(np.flatnonzero(ALLOWED), (P, G, T))),
    "mask": jnp.array(np.arange(T) < rng.integers(1, T + 1, (P, G, 1))),
    "advantages": jnp.array(rng.normal(size=(P, G)), jnp.float32),
    "gate": jnp.array(rng.integers(0, 2, (P, G)), bool),
  } | changes
  return student, teacher, reference, losses.token_inputs(**fields), fields


def slow_objective(student, teacher, reference, fields, *, coefficient=1.0, weight=0.5, beta=0.0, clip=(0.2, 0.2)):
  """The equation of METHOD.md in float64, token by token."""

  def log_softmax(logits):
    logits = np.where(ALLOWED, np.float64(logits), -np.inf)
    return logits - np.log(np.exp(logits).sum())

  policy = anchor = distill = gated = 0.0
  for p, g in np.ndindex(P, G):
    length = int(fields["mask"][p, g].sum())
    for t in range(length):
      token, s = int(fields["tokens"][p, g, t]), log_softmax(student[p, g, t])
      r, q = log_softmax(reference[p, g, t])[token], log_softmax(teacher[p, g, t])
      old = s[token] if fields.get("old_logps") is None else float(fields["old_logps"][p, g, t])
      ratio, advantage = np.exp(s[token] - old), float(fields["advantages"][p, g])
      surrogate = min(ratio * advantage, np.clip(ratio, 1 - clip[0], 1 + clip[1]) * advantage)
      policy -= surrogate / (length * P * G)
      anchor += (np.exp(r - s[token]) - (r - s[token]) - 1) / (length * P * G)
      if fields["gate"][p, g]:
        m = (1 - weight) * np.exp(s[ALLOWED]) + weight * np.exp(q[ALLOWED])
        s, q = s[ALLOWED], q[ALLOWED]
        distill += weight * (np.exp(q) * (q - np.log(m))).sum() + (1 - weight) * (np.exp(s) * (s - np.log(m))).sum()
        gated += 1
  return policy + coefficient * distill / max(1, gated) + beta * anchor


class MaskedSumTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_padding_changes_nothing(self):
    values, mask = jnp.array([[1.0, 2.0], [4.0, 8.0]]), jnp.array([[True, False], [True, True]])
    padded = jnp.pad(values, ((0, 0), (0, 3)), constant_values=jnp.nan)
    masked_sum = self.variant(losses.masked_sum)
    self.assertEqual(masked_sum(values, mask), (13.0, 3.0))
    self.assertEqual(masked_sum(padded, jnp.pad(mask, ((0, 0), (0, 3)))), (13.0, 3.0))


class WeightsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_sequence_mean_worked_example(self):
    # Two rollouts of 1 and 3 tokens: 1/2 * 1 and 1/2 * 1/3 each; an empty one has none, and still counts in N.
    mask = jnp.array([[[1, 0, 0], [1, 1, 1]]], bool)
    np.testing.assert_allclose(
      self.variant(losses.sequence_mean_weights)(mask), [[[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]], rtol=1e-6
    )
    empty = self.variant(losses.sequence_mean_weights)(mask.at[0, 0].set(False))
    np.testing.assert_allclose(empty, [[[0, 0, 0], [1 / 6, 1 / 6, 1 / 6]]], rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_gated_tokens_worked_example(self):
    mask = jnp.array([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]]], bool)
    gated = self.variant(losses.gated_token_weights)
    actual = gated(mask, jnp.array([[True, True], [True, False]]))
    np.testing.assert_allclose(actual, np.array([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]) / 6, rtol=1e-6)
    np.testing.assert_array_equal(gated(mask, jnp.zeros((2, 2), bool)), 0.0)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"coefficient": 0.3, "weight": 0.1},
    {"beta": 0.2},
    {"coefficient": 0.0, "beta": 0.2, "clip": (0.1, 0.4)},
    {"coefficient": 0.0},
  ],
)
@pytest.mark.parametrize("off_policy", [False, True])
def test_objective_equals_a_slow_loop(options, off_policy, rng):
  old = jnp.array(rng.normal(size=(P, G, T)) * 0.5 - 2, jnp.float32) if off_policy else None
  student, teacher, reference, inputs, fields = batch(rng, old_logps=old)
  coefficient, beta, clip = options.get("coefficient", 1.0), options.get("beta", 0.0), options.get("clip", (0.2, 0.2))
  token_loss = losses.kepo_token_loss(
    allowed=ALLOWED, distill_coefficient=coefficient, jsd_weight=options.get("weight", 0.5),
    reference_coefficient=beta, clip_low=clip[0], clip_high=clip[1],
  )  # fmt: skip
  others = (teacher,) * (coefficient != 0) + (reference,) * (beta != 0)
  loss, aux = jax.jit(token_loss)(student, others, inputs)
  expected = slow_objective(*(np.array(x) for x in (student, teacher, reference)), fields, **options)
  np.testing.assert_allclose(loss, expected, rtol=2e-5)
  assert ("divergence" in aux, "kl" in aux) == (coefficient != 0, beta != 0)
  if off_policy:
    assert 0 < aux["clipped"].sum() < inputs.mask.sum()
  else:
    np.testing.assert_array_equal(aux["ratio"], inputs.mask)
    assert not aux["clipped"].any()


def gradient_of(token_loss, student, others, inputs):
  return jax.jit(jax.grad(lambda logits: token_loss(logits, others, inputs)[0]))(student)


def test_gradient_against_finite_differences(rng):
  student, teacher, reference, inputs, _ = batch(rng, old_logps=jnp.full((P, G, T), -2.3))
  token_loss = losses.kepo_token_loss(allowed=ALLOWED, reference_coefficient=0.5)
  direction = jnp.array(rng.normal(size=student.shape), jnp.float32)

  @jax.jit
  def along(step):
    return token_loss(student + step * direction, (teacher, reference), inputs)[0]

  slope = (gradient_of(token_loss, student, (teacher, reference), inputs) * direction).sum()
  np.testing.assert_allclose(slope, (along(2e-3) - along(-2e-3)) / 4e-3, rtol=1e-2)


def test_gradient_of_an_injected_row_is_advantage_times_score(rng):
  # drop_on_policy: pi_old is the policy itself without the hint, so the clip cannot hide the row's gradient.
  student, *_, inputs, fields = batch(rng)
  token_loss = losses.kepo_token_loss(allowed=ALLOWED, distill_coefficient=0)
  actual = gradient_of(token_loss, student, (), inputs)
  p = jax.nn.softmax(jnp.where(ALLOWED.reshape(1, 1, 1, V), student, -jnp.inf))
  score = jax.nn.one_hot(fields["tokens"], V) - p
  lengths = fields["mask"].sum(-1)
  expected = -(fields["advantages"] / (lengths * P * G))[..., None, None] * score * fields["mask"][..., None]
  np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-8)


def test_without_lambda_it_is_grpo_bit_for_bit(rng):
  student, teacher, _, inputs, _ = batch(rng, gate=jnp.zeros((P, G), bool))
  kepo = losses.kepo_token_loss(allowed=ALLOWED, distill_coefficient=1.0)
  grpo = losses.kepo_token_loss(allowed=ALLOWED, distill_coefficient=0)
  # An empty gate adds nothing either: finite, and the same bits.
  assert kepo(student, (teacher,), inputs)[0] == grpo(student, (), inputs)[0]
  np.testing.assert_array_equal(gradient_of(kepo, student, (teacher,), inputs), gradient_of(grpo, student, (), inputs))
  with pytest.raises(ValueError, match="needs 0 other logits"):
    grpo(student, (teacher,), inputs)


def test_an_annealed_coefficient_keeps_the_teacher(rng):
  student, teacher, _, inputs, _ = batch(rng)

  def loss(coefficient):
    return losses.kepo_token_loss(allowed=ALLOWED, distill_coefficient=coefficient)(student, (teacher,), inputs)[0]

  fixed = losses.kepo_token_loss(allowed=ALLOWED, distill_coefficient=0)(student, (), inputs)[0]
  np.testing.assert_allclose(jax.jit(loss)(jnp.float32(0.0)), fixed, rtol=1e-6)
  assert abs(jax.jit(loss)(jnp.float32(0.5)) - fixed) > 1e-3


def test_temperatures_enter_where_they_should(rng):
  student, teacher, reference, inputs, _ = batch(rng)
  at = {"allowed": ALLOWED, "reference_coefficient": 0.5}
  loss, aux = losses.kepo_token_loss(**at, temperature=0.5, distill_temperature=2.0)(
    student, (teacher, reference), inputs
  )
  hot, hot_aux = losses.kepo_token_loss(**at, temperature=1.0)(student * 2, (teacher, reference * 2), inputs)
  cold_aux = losses.kepo_token_loss(**at)(student / 2, (teacher / 2, reference), inputs)[1]
  for name in ("logp", "entropy", "kl"):
    np.testing.assert_allclose(aux[name], hot_aux[name], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(aux["divergence"], cold_aux["divergence"], rtol=1e-5, atol=1e-6)
  assert np.isfinite(loss) and np.isfinite(hot)


def test_padding_may_hold_anything(rng):
  student, teacher, reference, inputs, _ = batch(rng)
  off = ~inputs.mask
  token_loss = jax.jit(losses.kepo_token_loss(allowed=ALLOWED, reference_coefficient=0.5))
  expected = token_loss(student, (teacher, reference), inputs)
  # A banned token has log-probability -inf; it may serve as padding.
  odd = inputs.replace(tokens=jnp.where(off, 7, inputs.tokens))
  other = tuple(jnp.where(off[..., None], 1e4, x) for x in (teacher, reference))
  actual = token_loss(jnp.where(off[..., None], -50.0, student), other, odd)
  chex.assert_trees_all_equal(actual, expected)
  gradient = gradient_of(token_loss, student, (teacher, reference), odd)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[np.array(off)], 0.0)


class PartsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_with_and_without_jit(self):
    student, teacher, reference, inputs, _ = batch(np.random.default_rng(5))
    token_loss = losses.kepo_token_loss(allowed=ALLOWED, reference_coefficient=0.1)
    expected = jax.jit(token_loss)(student, (teacher, reference), inputs)
    actual = self.variant(token_loss)(student, (teacher, reference), inputs)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters("micro-batches", "order", "padding")
  def test_parts_order_and_padding_change_nothing(self, change):
    student, teacher, reference, inputs, fields = batch(np.random.default_rng(5))
    token_loss = jax.jit(losses.kepo_token_loss(allowed=ALLOWED, reference_coefficient=0.1))
    whole = token_loss(student, (teacher, reference), inputs)[0]
    if change == "micro-batches":
      arguments = (student, (teacher, reference), inputs)
      parts = [jax.tree.map(lambda x, p=p: x[p : p + 1], arguments) for p in range(P)]
      changed = sum(token_loss(*part)[0] for part in parts)
    elif change == "order":
      order = jnp.array([2, 0, 1])
      fields = {name: x[order] for name, x in fields.items()}
      changed = token_loss(student[order], (teacher[order], reference[order]), losses.token_inputs(**fields))[0]
    else:
      more = ((0, 0), (0, 0), (0, 5))
      for name in ("tokens", "mask"):
        fields[name] = jnp.pad(fields[name], more)
      logits = [jnp.pad(x, (*more, (0, 0))) for x in (student, teacher, reference)]
      changed = token_loss(logits[0], tuple(logits[1:]), losses.token_inputs(**fields))[0]
    np.testing.assert_allclose(changed, whole, rtol=1e-5)


def test_sharded_equals_unsharded(mesh_of, rng):
  student, teacher, reference, inputs, _ = jax.tree.map(lambda x: jnp.concatenate([x] * 8)[:8], batch(rng))
  token_loss = losses.kepo_token_loss(allowed=ALLOWED, reference_coefficient=0.5)
  arguments = (student, (teacher, reference), inputs)
  sharding = jax.sharding.NamedSharding(mesh_of(data=8), jax.sharding.PartitionSpec("data"))
  sharded = jax.jit(token_loss)(*jax.device_put(arguments, sharding))
  chex.assert_trees_all_close(sharded, jax.jit(token_loss)(*arguments), rtol=1e-5, atol=1e-6)
