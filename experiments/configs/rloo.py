"""REINFORCE with a leave-one-out baseline (arXiv:2402.14740): GRPO with another advantage."""

import ml_collections

from experiments.configs import grpo


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """Each reward against the mean of the other rollouts of its group."""
  config = grpo.get_config(setting)
  config.objective.advantage = "rloo"
  return config
