"""A student with LoRA for others: merged, and its matrices as a folder that `peft.PeftModel.from_pretrained` loads."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax import processes, sharding
from kepo_jax.models.qwen3_vl import lora, safetensors_files
from kepo_jax.models.qwen3_vl.config import LoraConfig, Qwen3VLConfig
from kepo_jax.models.qwen3_vl.layers import Params

FOLDER = "adapter"  # inside an export
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_SUFFIXES = {lora.A: "lora_A", lora.B: "lora_B"}


def save(directory: pathlib.Path, config: LoraConfig, tensors: Mapping[str, np.ndarray], *, base: str | None) -> None:
  """Writes adapter_config.json and adapter_model.safetensors, in float32; the first process alone.

  Args:
    directory: an existing folder; `adapter/` in it is made.
    config: rank, scale and projections.
    tensors: `tensors_of` the part "lora" of the parameters.
    base: the model they were trained on, a folder or a Hub id, as PEFT records it.
  """
  if not processes.is_first():
    return
  folder = directory / FOLDER
  folder.mkdir()
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  safetensors_files.write_file(folder / WEIGHTS, shapes, np.dtype(np.float32), tensors.__getitem__)
  (folder / CONFIG).write_text(json.dumps(config_record(config, base), indent=2) + "\n")


def merged_model(config: Qwen3VLConfig, params: Params, dtype: Any) -> tuple[Qwen3VLConfig, Params]:
  """Config and parameters without LoRA: weights of `dtype`, merged and sharded as they were; else what was given."""
  if config.lora is None:
    return config, params
  params = jax.tree.map(jnp.asarray, params)
  places = jax.tree.map(lambda leaf: leaf.sharding, lora.without(params))
  return lora.base(config), jax.jit(functools.partial(lora.merged, config, dtype=dtype), out_shardings=places)(params)


def config_record(config: LoraConfig, base: str | None) -> dict[str, object]:
  """adapter_config.json."""
  return {
    "peft_type": "LORA",
    "task_type": None,  # with a task PEFT would wrap the model in a class of that task, for text alone
    "base_model_name_or_path": base,
    "r": config.rank,
    "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
    "target_modules": list(config.targets),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "inference_mode": True,
  }


def tensors_of(matrices: Params) -> dict[str, np.ndarray]:
  """PEFT's name -> float32 array on the host: lora_A [r, in] and lora_B [out, r] of every layer and projection.

  Where they lie on several hosts, all processes must take part.
  """
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(matrices):
    module, target, matrix = (part.key for part in path)
    for layer, value in enumerate(sharding.to_host(leaf)):
      name = f"base_model.model.model.language_model.layers.{layer}.{module}.{target}.{_SUFFIXES[matrix]}.weight"
      found[name] = np.ascontiguousarray(np.asarray(value, np.float32).T)
  return dict(sorted(found.items()))
