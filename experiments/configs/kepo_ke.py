"""KEPO without exploration: GRPO and distillation of accurate rollouts."""

import ml_collections

from experiments.configs import grpo


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """The default column of the method with K = B = 0."""
  config = grpo.get_config(setting)
  config.objective.distill_weight = 1.0
  return config
