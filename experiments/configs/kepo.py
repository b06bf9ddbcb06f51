"""KEPO, the embedded default: GRPO, gated distillation and hinted exploration."""

import ml_collections

from experiments.configs import kepo_ke


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """The default column of the method: distil accurate rollouts, hint at prompts on which every rollout fails."""
  config = kepo_ke.get_config(setting)
  config.exploration.replacements = 2
  config.exploration.rounds = 5
  return config
