import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.objectives import losses
from tests.objectives import cases
from tests.objectives.cases import BANNED, SETTINGS, P, T, V, setting
from tests.objectives.slow_loss import slow_objective


class MaskedSumTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_padding_changes_nothing(self):
    values, mask = jnp.array([[1.0, 2.0], [4.0, 8.0]]), jnp.array([[True, False], [True, True]])
    padded = jnp.pad(values, ((0, 0), (0, 3)), constant_values=jnp.nan)
    masked_sum = self.variant(losses.masked_sum)
    self.assertEqual(masked_sum(values, mask), (13.0, 3.0))
    self.assertEqual(masked_sum(padded, jnp.pad(mask, ((0, 0), (0, 3)))), (13.0, 3.0))


@pytest.mark.parametrize("name", SETTINGS)
def test_objective_equals_a_slow_loop(name, rng):
  case, values = SETTINGS[name], cases.batch(rng)
  (loss, aux), gradient = cases.value_and_gradient(values, case)
  slow = {name: np.array(x) for name, x in values.items()}
  np.testing.assert_allclose(loss, slow_objective(slow, case), rtol=2e-5)
  # The slope along a random direction, by differences of the slow loop: it knows nothing of our gradients.
  direction = rng.normal(size=gradient.shape)
  up, down = (slow_objective(slow, case, slow["student"] + step * direction) for step in (1e-5, -1e-5))
  assert np.linalg.norm(gradient) > 1e-3
  tolerance = 1e-4 * np.linalg.norm(gradient)
  np.testing.assert_allclose((np.float64(gradient) * direction).sum(), (up - down) / 2e-5, atol=tolerance)
  wanted = (case.token_loss.distils, case.token_loss.reference_coefficient != 0)
  assert ("divergence" in aux, "kl" in aux) == wanted
  for name, x in aux.items():
    np.testing.assert_array_equal(np.array(x)[~slow["mask"]], 0.0, err_msg=name)
  if "old_logps" in case.arrays:
    assert 0 < aux["clipped"].sum() < slow["mask"].sum()
    assert not (aux["clipped"] & values["injected"][..., None]).any() or "shaping_logps" not in case.arrays
  else:
    np.testing.assert_array_equal(aux["ratio"], values["mask"])
    assert not aux["clipped"].any()


def by_hand(**changes):
  """Two rollouts of 1 and 2 tokens with advantages 1 and -2, and a student that gives 1/10 to each of its ten ids."""
  zeros = jnp.zeros((1, 2, 2, V))
  return {
    **dict.fromkeys(cases.LOGITS, zeros),
    "tokens": jnp.ones((1, 2, 2), int),
    "mask": jnp.array([[[1, 0], [1, 1]]], bool),
    "advantages": jnp.array([[1.0, -2.0]]),
    "gate": jnp.array([[True, False]]),
  } | changes


class WorkedExamplesTest(chex.TestCase):
  def loss(self, case, **changes):
    values = by_hand(**changes)
    return self.variant(
      lambda values: case.token_loss(values["student"], case.others(values), cases.inputs_of(values, case))[0]
    )(values)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    # -(1/2) [1 + (1/2) (-2 - 2)], -(1/3) [1 - 2 - 2] and -(1/2) (1/4) [1 - 2 - 2].
    ("sequence_mean", 1 / 2),
    ("token_mean", 1.0),
    ("constant_length", 3 / 8),
  )
  def test_aggregations(self, aggregation, expected):
    case = setting(distill_coefficient=0, inputs={"aggregation": aggregation, "max_tokens": 4})
    np.testing.assert_allclose(self.loss(case), expected, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_ratios(self):
    # pi_old was 1/20: a ratio of 2, cut to 1.2 for the first rollout and not for the second: -(1/2) [1.2 - 2 * 2].
    old = {"old_logps": jnp.full((1, 2, 2), np.log(1 / 20))}
    np.testing.assert_allclose(self.loss(setting("old", distill_coefficient=0), **old), 1.4, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_importance_weights(self):
    # The sampler had 1/20 and 1/5: weights 2, cut to 1.5, and 1/2: -(1/2) [1.5 - 2 / 2]. Injected, the first has 1.
    arrays = {
      "sampler_logps": jnp.log(jnp.array([[[1 / 20] * 2, [1 / 5] * 2]])),
      "injected": jnp.array([[True, False]]),
    }
    options = {"importance_cap": 1.5, "distill_coefficient": 0}
    np.testing.assert_allclose(self.loss(setting("sampler", **options), **arrays), -0.25, rtol=1e-5)
    np.testing.assert_allclose(self.loss(setting("sampler injected", **options), **arrays), 0.0, atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_shaped_ratios(self):
    # gamma mu = 1/10, as probable as the token: half of the advantage, for the injected rollout alone: -(1/2) [1 - 1].
    arrays = {"shaping_logps": jnp.full((1, 2, 2), np.log(0.1)), "injected": jnp.array([[False, True]])}
    loss = self.loss(setting("shaping injected", distill_coefficient=0), **arrays)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_supervised_rows(self):
    # The second rollout is supervised: the first keeps its half, and the likelihood is (1/2) log 10.
    arrays = {"supervised": jnp.array([[False, True]])}
    case = setting("supervised", supervised_coefficient=0.3, distill_coefficient=0)
    np.testing.assert_allclose(self.loss(case, **arrays), -0.5 + 0.3 * np.log(10) / 2, rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(("gated_tokens", 1.0), ("group_mean", 0.5))
  def test_normalisers(self, normaliser, share):
    # The teacher has one id in mind, so KL(student || teacher) is large and known: sum of 1/10 (log 1/10 - log q).
    # Only the first rollout, of one token, is distilled: its whole divergence, or half of it.
    teacher = jnp.zeros(V).at[1].set(3.0)
    logits = np.where(np.arange(10) == 1, 3.0, 0.0)
    gap = -np.log(10) - (logits - np.log(np.exp(3) + 9))
    case = setting(
      divergence="reverse_kl", policy_coefficient=0, distill_coefficient=2.0, inputs={"normaliser": normaliser}
    )
    loss = self.loss(case, teacher=jnp.broadcast_to(teacher, (1, 2, 2, V)))
    np.testing.assert_allclose(loss, 2 * share * gap.mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["kepo", "sampled k2", "top-k", "importance", "gspo, shaped", "everything"])
def test_padding_may_hold_anything(name, rng):
  case, values = SETTINGS[name], cases.batch(rng)
  off = ~values["mask"]
  expected = cases.value_and_gradient(values, case)
  changed = {
    # A banned token has log-probability -inf; it may serve as padding.
    "tokens": jnp.where(off, BANNED, values["tokens"]),
    "student": jnp.where(off[..., None], -50.0, values["student"]),
    **{name: jnp.where(off[..., None], 1e4, values[name]) for name in ("teacher", "reference")},
    **{name: jnp.where(off, jnp.nan, values[name]) for name in ("old_logps", "sampler_logps", "shaping_logps")},
  }
  # The sampler of an injected row saw another prompt: what it says is not used.
  sampler = changed["sampler_logps"]
  if "injected" in case.arrays:
    changed["sampler_logps"] = jnp.where(values["injected"][..., None], jnp.nan, sampler)
  actual = cases.value_and_gradient(values | changed, case)
  chex.assert_trees_all_equal(actual, expected)
  np.testing.assert_array_equal(np.array(actual[1])[np.array(off)], 0.0)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant_length"])
def test_more_padding_changes_nothing(aggregation, rng):
  values = cases.batch(rng)
  case = setting(inputs={"aggregation": aggregation, "max_tokens": 9})
  padded = {
    name: jnp.pad(x, [(0, 0), (0, 0), (0, 5)] + [(0, 0)] * (x.ndim - 3)) if x.ndim > 2 else x
    for name, x in values.items()
  }
  (loss, _), gradient = cases.value_and_gradient(values, case)
  (more, _), more_gradient = cases.value_and_gradient(padded, case)
  np.testing.assert_allclose(more, loss, rtol=1e-6)
  np.testing.assert_allclose(more_gradient[:, :, :T], gradient, rtol=1e-6)
  if aggregation == "constant_length":
    # Without a length it is T, which padding does change: from 6 to 11.
    free = setting(inputs={"aggregation": aggregation}, distill_coefficient=0)
    short, long = (cases.value_and_gradient(x, free)[0][0] for x in (values, padded))
    np.testing.assert_allclose(short * 6, long * 11, rtol=1e-5)


class PartsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_with_and_without_jit(self):
    values, case = cases.batch(np.random.default_rng(5)), SETTINGS["everything"]
    arguments = values["student"], case.others(values), cases.inputs_of(values, case)
    expected = jax.jit(case.token_loss)(*arguments)
    chex.assert_trees_all_close(self.variant(case.token_loss)(*arguments), expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters("kepo", "constant length, k2", "everything")
  def test_parts_add_to_the_whole(self, name):
    values, case = cases.batch(np.random.default_rng(5)), SETTINGS[name]
    token_loss = jax.jit(case.token_loss)
    arguments = (values["student"], case.others(values), cases.inputs_of(values, case))
    whole = token_loss(*arguments)[0]
    by_prompt = [jax.tree.map(lambda x, p=p: x[p : p + 1], arguments) for p in range(P)]
    by_token = [jax.tree.map(lambda x, t=t: x[:, :, t : t + 2], arguments) for t in range(0, T, 2)]
    for parts in (by_prompt, by_token):
      np.testing.assert_allclose(sum(token_loss(*part)[0] for part in parts), whole, rtol=1e-5)


@pytest.mark.parametrize("name", ["kepo", "constant length, k2", "gspo, token mean", "importance", "everything"])
def test_sharded_equals_unsharded(name, mesh_of, rng):
  values = cases.batch(rng, (8, 2, T))
  sharded = jax.device_put(values, NamedSharding(mesh_of(data=8), PartitionSpec("data")))
  actual = cases.value_and_gradient(sharded, SETTINGS[name])
  chex.assert_trees_all_close(actual, cases.value_and_gradient(values, SETTINGS[name]), rtol=1e-5, atol=1e-6)
