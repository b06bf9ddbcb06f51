"""What a data set and its models ask of every method alike, so that configs of methods differ where the methods do.

A config file states a method; `--config=experiments/configs/kepo.py:medvqa` runs it in another setting.
"""

import pathlib

import ml_collections
from ml_collections import config_dict

from kepo_jax.config import Config

# Peak rates: the grid that a comparison gives to every method; the defaults of the configs are among them.
LEARNING_RATES = {"phantom": (1e-4, 2e-4, 3e-4, 6e-4), "medvqa": (1e-6, 2e-6)}
# "medvqa" (OmniMedVQA, Qwen3-VL-2B and 32B) has the defaults of `kepo_jax.Config`. These are those of "phantom": drawn
# images, tiny models, minutes on a CPU.
PHANTOM = {
  "model.student": "experiments/assets/phantom/confused",
  "model.teacher": "experiments/assets/phantom/weak",
  "model.compute_dtype": "float32",
  "model.teacher_dtype": "float32",
  "model.remat": "none",
  "data.directory": "",
  "data.resize": "native",
  "data.templates": "brief",
  "data.prompt_buckets": (56, 128, 256, 512, 1024),
  "data.patch_buckets": (64, 256, 1024, 4096, 16384),
  "sampling.max_new_tokens": 24,
  "exploration.hint_tokens": 24,
  "exploration.serial": True,  # on a CPU a batch of five rounds takes five times as long as one
  "optimizer.learning_rate": 3e-4,
  "optimizer.warmup_steps": 5,
  "train.steps": 80,
  "eval.every": 20,
  "eval.max_new_tokens": 24,
  "checkpoint.every": 20,
  "log.gradients_every": 20,
}


def editable(setting: str) -> ml_collections.ConfigDict:
  """Returns GRPO in a setting, with fields that config files and flags may assign; `typed` makes a Config of it.

  Args:
    setting: a key of `LEARNING_RATES`.

  Raises:
    ValueError: an unknown setting.
  """
  if setting not in LEARNING_RATES:
    raise ValueError(f"setting {setting!r} is unknown; use one of {sorted(LEARNING_RATES)}.")
  config = ml_collections.ConfigDict(Config().replace(PHANTOM if setting == "phantom" else {}).to_dict())
  if config.data.directory is None:
    config.data.directory = config_dict.placeholder(str)
  return config


def typed(config: ml_collections.ConfigDict) -> Config:
  """Returns the config that the library takes; the phantom's models are found from any folder.

  Raises:
    ValueError: it has a field that the library does not know.
  """
  found = Config.from_dict(config.to_dict())
  names = {"model.student": found.model.student, "model.teacher": found.model.teacher}
  return found.replace({field: _located(name) for field, name in names.items()})


def _located(name: str) -> str:
  """A model of this package by its whole path, where the working directory is not that of the checkout."""
  inside = name.startswith("experiments/assets/") and not pathlib.Path(name).exists()
  return str(pathlib.Path(__file__).parent.parent / name) if inside else name
