"""KEPO on OmniMedVQA with Qwen3-VL-2B taught by Qwen3-VL-32B, at the sizes of the paper."""

import ml_collections

from experiments.configs import grpo_medvqa


def get_config() -> ml_collections.ConfigDict:
  """The paper's setting with the default objective; pass --config.data.directory=DIR."""
  config = grpo_medvqa.get_config()
  config.objective.distill_weight = 1.0
  config.exploration.replacements = 2
  config.exploration.rounds = 5
  return config
