"""GRPO on OmniMedVQA with Qwen3-VL-2B, at the sizes of the paper: short for grpo.py:medvqa."""

import ml_collections

from experiments.configs import grpo


def get_config() -> ml_collections.ConfigDict:
  """600 MRI questions once, 8 prompts x 8 rollouts of up to 1,024 tokens; pass --config.data.directory=DIR."""
  return grpo.get_config("medvqa")
