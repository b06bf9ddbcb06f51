"""KEPO as the code that its authors released runs it, without its defects."""

import ml_collections

from experiments.configs import kepo


def get_config(setting: str = "phantom") -> ml_collections.ConfigDict:
  """Reward and gate count format, one hint per failed prompt, all candidates of a prompt or none, top-p sampling.

  Not followed: trigger and acceptance look at each prompt, where the released code looks at all prompts of a device,
  so that its method depends on their number; the divergence is divided by the gated tokens of the global batch, not by
  those of a device's micro-batch, where 0 / 0 is possible; slots are distinct; hints belong to their prompts; answers
  are not parsed symbolically, which does nothing on letters. Log-probabilities of the policy term are at the
  temperature that sampled, not at 1; hints are drawn without top-p and have a budget of their own. The baselines have
  its token budget and learning rates.
  """
  config = kepo.get_config(setting)
  config.sampling.temperature = 0.9
  config.sampling.top_p = 0.95
  config.objective.gate_signal = "sum"  # at tau = 1 a wrong answer in the right format passes
  config.exploration.trigger = "reward_all_zero"
  config.exploration.hints = "once"
  config.exploration.hint_temperature = 0.9  # that of the student's sampling
  config.exploration.acceptance = "all_or_none_accurate"
  config.exploration.leak_filter = False
  return config
