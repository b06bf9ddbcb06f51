"""Whether all processes of a run are about to train on the same, found out before anything large is loaded.

Each of them reads config, questions and models for itself, and nothing later would notice a difference: a process draws
the order of the questions from its own list, and a batch on the mesh is made of the rows of all.
"""

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from kepo_jax import processes
from kepo_jax.config import Config
from kepo_jax.evaluation import journal
from kepo_jax.training import run_record
from kepo_jax.types import Example

Facts = Mapping[str, Any]


def check(
  config: Config,
  *,
  questions: Mapping[str, Sequence[Example]] | None = None,
  models: Mapping[str, pathlib.Path] | None = None,
) -> None:
  """Compares what the processes of a run have; all must call it at the same point. A lone process does nothing.

  Args:
    config: of the run.
    questions: split -> questions, in the order in which they were read.
    models: role -> local folder of the checkpoint; of weights evenly spread blocks are read.

  Raises:
    ValueError: processes differ; says in what and which of them, and the way out, on every process.
    OSError: a file of a model cannot be read, here or on another process.
  """
  if jax.process_count() == 1:
    return
  if said := differences(processes.gathered(lambda: facts(config, questions or {}, models or {}))):
    raise ValueError(said)


def facts(config: Config, questions: Mapping[str, Sequence[Example]], models: Mapping[str, pathlib.Path]) -> Facts:
  """What is compared of a process, JSON-able: the config, number and digest of the questions, hashes of the models."""
  return {
    "config": json.loads(config.to_json()),
    "questions": {split: [len(examples), _digest(examples)] for split, examples in questions.items()},
    "models": {role: journal.model_hash(folder) for role, folder in models.items()},
  }


def differences(found: Sequence[Facts]) -> str:
  """In words what some processes have that the first one has not, and the way out; "" where all have the same.

  Args:
    found: `facts` of each process, in their order.
  """
  who = collections.defaultdict(list)
  for number, each in enumerate(found):
    if told := _difference(found[0], each):
      who[told].append(number)
  return " ".join(f"{_named(numbers)} {what} than process 0{more}" for (what, more), numbers in who.items())


def _difference(first: Facts, other: Facts) -> tuple[str, str] | None:
  """What another process has, and the rest of the sentence, of the first thing that differs."""
  if changes := run_record.changes(first["config"], other["config"]):
    return "another config", f" ({changes}); start all of them with the same command."
  none = [0, ""]
  for split in sorted(first["questions"].keys() | other["questions"].keys()):
    here, there = (each["questions"].get(split, none) for each in (first, other))
    if here != there:
      return f"other questions of {split}", (
        f": {there[0]} against {here[0]}. All must read the same data: see that each reaches all of them, and start "
        "again. With data.lenient, what one process cannot read for a moment is left out there alone."
      )
  for role in sorted(first["models"].keys() | other["models"].keys()):
    if first["models"].get(role) != other["models"].get(role):
      return f"another {role}", "; give all of them folders with the same files."
  return None


def _named(numbers: Sequence[int]) -> str:
  if len(numbers) == 1:
    return f"process {numbers[0]} has"
  return f"processes {', '.join(map(str, numbers))} have"


def _digest(examples: Sequence[Example]) -> str:
  """SHA-256 over questions in their order; of images the number alone, as each process may have copies of its own."""
  return journal.digest(
    json.dumps([e.id, e.question, e.options, e.answer, e.modality, e.question_type, e.dataset, len(e.images)])
    for e in examples
  )
