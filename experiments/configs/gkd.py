"""Uniform distillation alone (GKD, arXiv:2306.13649): every token of every rollout, whatever its reward."""

import ml_collections

from experiments.configs import grpo


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """All rollouts are the student's own (fraction 1); the rest of a smaller fraction are the teacher's accepted answers.

  --config.batch.on_policy_fraction=0.5 is what TRL calls lmbda; 0 trains on the teacher's answers alone. Those that the
  reward refuses leave their rows empty.
  """
  config = grpo.get_config(setting)
  config.objective.policy_weight = 0.0
  config.objective.distill_weight = 1.0
  config.objective.gate_mode = "none"
  config.supervised.source = "teacher"  # idle at fraction 1
  return config
