"""GRPO on OmniMedVQA with Qwen3-VL-2B, at the sizes of the paper; also the parent of `kepo_medvqa`."""

import ml_collections

from experiments.configs import grpo


def get_config() -> ml_collections.ConfigDict:
  """600 MRI questions once, 8 prompts x 8 rollouts of up to 1,024 tokens; pass --config.data.directory=DIR."""
  config = grpo.get_config()
  config.model.student = "Qwen/Qwen3-VL-2B-Instruct"
  config.model.teacher = "Qwen/Qwen3-VL-32B-Instruct"
  config.model.compute_dtype = "bfloat16"
  config.model.teacher_dtype = "bfloat16"
  config.model.remat = True
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
  return config
