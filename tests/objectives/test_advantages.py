import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.objectives import advantages

KINDS = tuple(advantages.ESTIMATORS)


def eagerly(rewards):
  """The advantages of every kind."""
  return {kind: advantages.group_advantages(rewards, kind=kind) for kind in KINDS}


all_kinds = jax.jit(eagerly)


def test_worked_examples():
  # Means 1/2 and 1/4; the group of zeros is silent.
  rewards = jnp.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
  centred = np.array([[2, -2, -2, 2], [-1, -1, -1, 3], [0, 0, 0, 0]]) / 4
  # Sample variances 1/3 = 4 (1/4) / 3 and 1/4 = (3/16 + 9/16) / 3. All twelve rewards have mean 1/4, the squares sum
  # to 3 - 12/16 = 9/4, and the sample variance is 9/44: the group of zeros counts in it.
  group = np.array([[3**-0.5], [1 / 2], [1.0]]) + 1e-4
  expected = {
    "group_std": centred / group,
    "no_std": centred,
    # The others of a right answer have mean 1/3 and 0, those of a wrong one 2/3 and 1/3.
    "rloo": np.array([[2, -2, -2, 2], [-1, -1, -1, 3], [0, 0, 0, 0]]) / 3,
    "batch_std": centred / ((9 / 44) ** 0.5 + 1e-4),
  }
  for kind, actual in all_kinds(rewards).items():
    np.testing.assert_allclose(actual, expected[kind], rtol=1e-6, err_msg=kind)


@pytest.mark.parametrize("variant", [all_kinds, eagerly], ids=["with jit", "without jit"])
def test_dead_groups_give_exact_zeros(variant):
  # 0.1 has no exact float: the mean of equal rewards may differ from them in the last bit.
  rewards = jnp.array([[0.1] * 7, [0.3] * 7, [2.0] * 7, [0.1] * 6 + [0.2]])
  # 0.1 above the others: alone in its group it is 6/7 of that away from the mean, and 2.27 deviations.
  at_least = {"group_std": 2.2, "no_std": 0.085, "rloo": 0.099, "batch_std": 0.1}
  for kind, actual in variant(rewards).items():
    np.testing.assert_array_equal(actual[:3], 0.0, err_msg=kind)
    assert actual[3, -1] > at_least[kind], kind


def test_close_rewards_are_not_dead_and_a_single_rollout_is():
  assert advantages.group_advantages(jnp.array([[1.0, 1.0, 1.0, 1.0 + 2**-20]]))[0, -1] > 0
  for kind, actual in eagerly(jnp.array([[3.0], [0.0]])).items():
    np.testing.assert_array_equal(actual, 0.0, err_msg=kind)
