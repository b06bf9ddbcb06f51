"""GRPO, group-relative policy optimisation alone: the parent of every other config."""

import ml_collections

from experiments import settings


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """No teacher in the loss, no hints.

  Args:
    setting: "phantom", or "medvqa" for the sizes of the paper (--config=experiments/configs/grpo.py:medvqa); see
      experiments/settings.py.
  """
  return settings.editable(setting)
