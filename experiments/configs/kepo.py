"""KEPO on the phantom benchmark, the embedded default: GRPO, gated distillation and hinted exploration."""

import ml_collections

from experiments.configs import grpo


def get_config() -> ml_collections.ConfigDict:
  """The default column of the method: distil accurate rollouts, hint at prompts on which every rollout fails."""
  config = grpo.get_config()
  config.objective.distill_weight = 1.0
  config.exploration.replacements = 2
  config.exploration.rounds = 5
  return config
