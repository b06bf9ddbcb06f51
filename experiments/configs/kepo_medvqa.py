"""KEPO on OmniMedVQA with Qwen3-VL-2B taught by Qwen3-VL-32B, at the sizes of the paper: short for kepo.py:medvqa."""

import ml_collections

from experiments.configs import kepo


def get_config() -> ml_collections.ConfigDict:
  """The paper's setting with the default objective; pass --config.data.directory=DIR."""
  return kepo.get_config("medvqa")
