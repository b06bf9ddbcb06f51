"""Supervised training on answers of the teacher that the reward accepts (rejection sampling)."""

import ml_collections

from experiments.configs import grpo


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """The likelihood of accurate, well-formed teacher answers, mean over their tokens.

  The teacher samples G answers per prompt and step; those that the reward refuses leave their rows empty.
  """
  config = grpo.get_config(setting)
  config.batch.on_policy_fraction = 0.0
  config.objective.policy_weight = 0.0
  config.objective.aggregation = "token_mean"
  config.objective.supervised_weight = 1.0
  config.supervised.source = "teacher"
  return config
