"""What a data set and its models ask of every method alike, so that configs of methods differ where the methods do.

A config file states a method; `--config=experiments/configs/kepo.py:medvqa` runs it in another setting.
"""

import ml_collections
from ml_collections import config_dict

# Peak rates: the grid that a comparison gives to every method; the defaults of the configs are among them.
LEARNING_RATES = {"phantom": (1e-4, 2e-4, 3e-4, 6e-4), "medvqa": (1e-6, 2e-6)}


def apply(config: ml_collections.ConfigDict, setting: str) -> ml_collections.ConfigDict:
  """The config of a method in a setting.

  Args:
    config: as experiments/configs/grpo.py begins: in the setting "phantom".
    setting: "phantom" (drawn images, tiny models, minutes on a CPU) or "medvqa" (OmniMedVQA, Qwen3-VL-2B and 32B).

  Raises:
    ValueError: an unknown setting.
  """
  if setting not in LEARNING_RATES:
    raise ValueError(f"setting {setting!r} is unknown; use one of {sorted(LEARNING_RATES)}.")
  return _medvqa(config) if setting == "medvqa" else config


def _medvqa(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """600 MRI questions once, 8 prompts x 8 rollouts of up to 1,024 tokens; pass --config.data.directory=DIR."""
  config.model.student = "Qwen/Qwen3-VL-2B-Instruct"
  config.model.teacher = "Qwen/Qwen3-VL-32B-Instruct"
  config.model.compute_dtype = "bfloat16"
  config.model.teacher_dtype = "bfloat16"
  config.model.remat = "full"
  with config.ignore_type():
    config.data.directory = config_dict.placeholder(str)  # not the phantom: a run without data of its own is refused
  config.data.resize = "squash384"  # 144 visual tokens, as in the released code
  config.data.templates = "standard"
  config.data.prompt_buckets = (256, 512, 1024, 2048)
  config.data.patch_buckets = (576, 1024, 2304, 4096, 16384)
  config.sampling.max_new_tokens = 1024
  config.exploration.hint_tokens = 256
  config.optimizer.learning_rate = 2e-6
  config.optimizer.warmup_steps = 0
  config.train.steps = 75  # one epoch
  config.eval.every = 25
  config.eval.max_new_tokens = 1024
  config.checkpoint.every = 10
  config.log.gradients_every = 0  # a comparison holds a second set of gradients, 8.5 GB in float32
  return config
