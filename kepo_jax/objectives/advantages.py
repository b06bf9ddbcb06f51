"""Advantages of rollouts from their rewards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def _centred(rewards: jax.Array) -> jax.Array:
  return rewards - rewards.mean(axis=1, keepdims=True)


def _group_std(rewards: jax.Array, epsilon: float) -> jax.Array:
  return _centred(rewards) / (rewards.std(axis=1, ddof=1, keepdims=True) + epsilon)


def _batch_std(rewards: jax.Array, epsilon: float) -> jax.Array:
  return _centred(rewards) / (rewards.std(ddof=1) + epsilon)


def _no_std(rewards: jax.Array, epsilon: float) -> jax.Array:
  del epsilon
  return _centred(rewards)


def _rloo(rewards: jax.Array, epsilon: float) -> jax.Array:
  del epsilon
  others = rewards.sum(axis=1, keepdims=True) - rewards
  return rewards - others / max(1, rewards.shape[1] - 1)


ESTIMATORS = {"group_std": _group_std, "no_std": _no_std, "rloo": _rloo, "batch_std": _batch_std}


def group_advantages(rewards: jax.Array | np.ndarray, *, kind: str = "group_std", epsilon: float = 1e-4) -> jax.Array:
  """Computes advantages: rewards compared inside each group of rollouts of one prompt.

  Args:
    rewards: float32[P, G], terminal reward of each rollout.
    kind: one of
      `group_std`, (r - mean) / (std + epsilon) with the sample deviation of the group, ddof = 1 (GRPO,
      arXiv:2402.03300, section 4.1.2);
      `no_std`, r - mean (Dr.GRPO, arXiv:2503.20783);
      `rloo`, r - mean of the other rollouts of the group (arXiv:2402.14740), which is G / (G - 1) times `no_std`;
      `batch_std`, (r - mean of the group) / (std + epsilon) with the sample deviation of all P G rewards
      (arXiv:2508.08221).
    epsilon: added to the deviation, in units of reward.

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
