"""The record beside the state in a checkpoint: config, questions, models, random numbers, versions and devices."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from kepo_jax.config import Config

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "kepo_jax")


def make(
  config: Config, identity: Mapping[str, Any], *, step: int, positions: Mapping[str, int], validated: bool
) -> dict[str, Any]:
  """Returns the record of a checkpoint, JSON-able.

  Args:
    config: of the run.
    identity: "questions": SHA-256 over everything that they are; "models": role -> hash of the checkpoint.
    step: updates done; the position in the data, which are ordered by the seed.
    positions: bytes of the files that the hooks write.
    validated: whether the validation of this step, where it has one, is done.
  """
  devices, as_json = jax.devices(), config.to_json()
  packages = (*_PACKAGES, *(("qwix",) if config.model.lora_rank else ()))
  return {
    "step": step,
    "positions": dict(positions),
    "validated": validated,
    "random": _random_identity(config.seed),
    **identity,
    "config": json.loads(as_json),
    "config_sha256": hashlib.sha256(as_json.encode()).hexdigest(),
    "made_of": {
      **{name: _version(name) for name in packages},
      "devices": f"{len(devices)} x {devices[0].device_kind}",
      "processes": str(jax.process_count()),
      "mesh": json.dumps(dict(jax.sharding.get_abstract_mesh().shape)),
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    },
  }


def check(before: Mapping[str, Any], now: Mapping[str, Any], run: str, *, allow_change: bool) -> None:
  """Compares a record with that of the process that resumes; warns of what costs equality to the bit.

  Args:
    before: of the checkpoint.
    now: of this process.
    run: its folder, for messages.
    allow_change: whether what differs is wanted.

  Raises:
    ValueError: random numbers, questions or models are not those of the run.
  """
  # The config is compared where it is stored for people to read, in config.json.
  for name, what in (("random", "random numbers"), ("questions", "questions"), ("models", "models")):
    if before[name] != now[name] and not allow_change:
      raise ValueError(
        f"the checkpoint of {run} was made with other {what} ({before[name]}) than this process has ({now[name]}); "
        f"restore them, or pass --allow_config_change to go on all the same."
      )
  old, new = before["made_of"], now["made_of"]
  if differences := [f"{name} {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]:
    logging.warning(
      "%s goes on on something else: %s. Results will equal those of one run to rounding, not to the bit.",
      run,
      ", ".join(differences),
    )


# Sections that decide what is shown and kept, and nothing of what is trained.
_INCIDENTAL = ("log.", "profile.")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Describes the fields in which two configs are different runs; "" if there are none."""
  old, new = _flat(before), _flat(now)
  names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
  names = [name for name in names if not name.startswith(_INCIDENTAL)]
  return ", ".join(f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names)


def _random_identity(seed: int) -> dict[str, list[int]]:
  """Returns the seed's key and random bits that are drawn from it."""
  key = jax.random.key(seed)
  return {"key": jax.random.key_data(key).tolist(), "bits": jax.random.bits(key, (4,)).tolist()}


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Flattens {"a": {"b": 1}} to {"a.b": 1}."""
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  items = [_flat(value, f"{prefix}.{name}" if prefix else name) for name, value in tree.items()]
  return {name: value for item in items for name, value in item.items()}
