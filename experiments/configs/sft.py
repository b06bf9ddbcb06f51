"""Supervised training on the gold answers: the answer block alone, after the no-think prompt."""

import ml_collections

from experiments.configs import grpo


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """The likelihood of the answer block, mean over its tokens.

  Differs from the other methods in its rows, of which one per prompt is enough: G equal ones have the same gradient. It
  is trained and evaluated with the no-think prompt, since its answers hold no reasoning. Learning rates and steps are
  those of all methods.
  """
  config = grpo.get_config(setting)
  config.data.prompt = "no_think"
  config.batch.rollouts = 1
  config.batch.on_policy_fraction = 0.0
  config.reward.convention = "no_think"
  config.objective.policy_weight = 0.0
  config.objective.aggregation = "token_mean"
  config.objective.supervised_weight = 1.0
  config.supervised.source = "answer"
  config.eval.prompt = "no_think"
  return config
