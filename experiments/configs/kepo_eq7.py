"""KEPO as Eq. 7 and Algorithm 1 of arXiv:2602.00400 can be read."""

import ml_collections

from experiments.configs import kepo


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """A binary reward a f, also signal of the gate and trigger; forward KL, means over groups, a reference KL.

  The paper leaves open what the divergence is (it names the teacher first), the weight of the reference KL and the
  number of hints: forward KL, 1e-3 and 5 here.
  """
  config = kepo.get_config(setting)
  config.reward.combination = "product"
  config.objective.gate_signal = "product"
  config.objective.divergence = "forward_kl"
  config.objective.distill_normaliser = "group_mean"
  config.objective.reference_weight = 1e-3
  config.exploration.trigger = "reward_all_zero"
  return config
