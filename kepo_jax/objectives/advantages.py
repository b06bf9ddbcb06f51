"""Advantages of rollouts from their rewards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def _group_std(rewards: jax.Array, epsilon: float) -> jax.Array:
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + epsilon)


ESTIMATORS = {"group_std": _group_std}


def group_advantages(rewards: jax.Array | np.ndarray, *, kind: str = "group_std", epsilon: float = 1e-4) -> jax.Array:
  """Rewards compared inside each group of rollouts of one prompt (GRPO, arXiv:2402.03300, section 4.1.2).

  Args:
    rewards: float32[P, G], terminal reward of each rollout.
    kind: `group_std`, (r - mean) / (std + epsilon) with the sample standard deviation (ddof = 1).
    epsilon: added to the standard deviation, in units of reward.

  Returns:
    float32[P, G]; exact zeros for a group whose rewards are all equal.

  Raises:
    ValueError: an unknown kind.
  """
  chex.assert_rank(rewards, 2)
  if kind not in ESTIMATORS:
    raise ValueError(f"advantage kind {kind!r} is unknown; choose one of {sorted(ESTIMATORS)}.")
  # By equality, not by a small spread: the mean of equal rewards may round (0.1 summed over 8), and the noise
  # divided by epsilon would be a signal. It also covers G = 1, where the sample deviation is 0 / 0.
  rewards = jnp.asarray(rewards)
  dead = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
  return jnp.where(dead, 0.0, ESTIMATORS[kind](rewards, epsilon))
