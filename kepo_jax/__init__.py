"""KEPO (arXiv 2602.00400) in JAX: reinforcement learning with gated distillation and hinted exploration.

import kepo_jax

config = kepo_jax.Config().replace({"model.student": "DIR", "train.steps": 20})
kepo_jax.train(config, records={"train": [kepo_jax.Example(...), ...], ...}, workdir="runs/mine")
"""

import importlib
from typing import Any

# Public name -> its module, imported when it is first used: importing one pure function should not load the rest.
_PUBLIC = {
  "Config": "config",
  "Example": "types",
  "Hook": "types",
  "Interruption": "training",
  "RunReporter": "reporting",
  "train": "training",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module 'kepo_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"kepo_jax.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
  return [*globals(), *__all__]
