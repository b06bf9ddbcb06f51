"""Exports the student of a checkpoint of a run as a Hugging Face folder, as the run writes its own model/.

  python -m experiments.export_checkpoint --workdir=runs/paper --output=DIR                # the newest checkpoint
  python -m experiments.export_checkpoint --workdir=runs/paper --step=best --output=DIR    # the best validation's
  python -m experiments.export_checkpoint --workdir=runs/paper --step=40 --output=DIR

A run keeps its last `checkpoint.keep` checkpoints and the best validation's, by `checkpoint.best`. The checkpoint is
verified first and only its parameters are read. Of a run with LoRA the weights are merged, and the folder adapter/ in
DIR holds the matrices for PEFT. Tokenizer, processor and config come from the student that the run
started from, which must still be where the run's config.json says; give this command the same working directory.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from experiments import environment
from kepo_jax import sharding, storage
from kepo_jax.config import Config, ModelConfig
from kepo_jax.data import tokenization
from kepo_jax.models.qwen3_vl import checkpoint, model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import checkpoints, manifest, setup
from kepo_jax.training import workdir as workdir_lib

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, local or remote.", required=True)
_STEP = flags.DEFINE_string("step", "last", "Which checkpoint: last, best, or the number of its step.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write, local or remote; must not exist.", required=True)


def read_json(path: epath.Path) -> dict[str, Any]:
  """A file of the run.

  Raises:
    ValueError: it is not JSON.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from error


def complete_steps(folder: epath.Path) -> list[int]:
  """Steps with a checkpoint that was completed; one that is being written, or was cut off, does not count."""
  return [step for step in checkpoints.steps_in(folder) if (folder / str(step) / manifest.NAME).exists()]


def chosen_step(workdir: epath.Path, config: dict[str, Any], wanted: str) -> int:
  """The step that `wanted` names.

  Args:
    workdir: of the run.
    config: the run's.
    wanted: "last", "best" or a number.

  Raises:
    ValueError: there is no such checkpoint; lists those that there are.
  """
  there = complete_steps(workdir / "checkpoints")
  if not there:
    raise ValueError(f"{workdir} holds no complete checkpoint.")
  listed = f"there are {', '.join(map(str, there))}"
  if wanted == "last":
    return there[-1]
  if wanted == "best":
    figure, path = config["checkpoint"]["best"], workdir / "evaluation.json"
    best = workdir_lib.best_step(read_json(path) if path.exists() else {}, figure)
    if best is None:
      raise ValueError(f"--step=best: the run has no validation by checkpoint.best={figure} yet; {listed}.")
    if best not in there:
      raise ValueError(f"--step=best: the checkpoint of step {best}, the best by {figure}, is not there; {listed}.")
    return best
  if not wanted.isdecimal():
    raise ValueError(f"--step={wanted}: give last, best or a number; {listed}.")
  if int(wanted) not in there:
    raise ValueError(f"--step={wanted}: there is no such checkpoint; {listed}.")
  return int(wanted)


def export(
  workdir: epath.Path, step: int, fields: ModelConfig, output: epath.Path, declared: Mapping[str, str]
) -> None:
  """Writes the student of a checkpoint, its weights spread over all devices meanwhile.

  Args:
    workdir: of the run.
    step: of the checkpoint.
    fields: `config.model` of the run: the student that it started from, and what it trained of it.
    output: folder to write.
    declared: what its tokenizer_config.json says of how the student was trained, as in the run's own export.

  Raises:
    ValueError: the checkpoint is damaged, or the student is not there or another one.
    OSError: a file cannot be read or written.
  """
  student = checkpoint.resolved_folder(fields.student)
  config = dataclasses.replace(Qwen3VLConfig.from_directory(student), lora=setup.lora_config(fields))
  shapes = model.abstract_params(config, setup.student_dtype(fields))  # as the run keeps them
  mesh = sharding.make_mesh(fsdp=jax.device_count())
  places = sharding.weight_shardings(mesh, shapes, model.logical_axes(config), "train")
  like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
  params = checkpoints.restored_params(workdir / "checkpoints" / str(step), like)
  with storage.written_locally(output, last="config.json") as folder:
    checkpoint.save_pretrained(folder, config, params, source=fields.student, declared=declared)


def main(_: Sequence[str]) -> None:
  """Chooses, verifies, reads and writes."""
  environment.prepare()
  workdir, output = epath.Path(_WORKDIR.value), epath.Path(_OUTPUT.value)
  if output.exists():
    raise ValueError(f"--output={output} exists; choose a new folder.")
  if not (workdir / "config.json").exists():
    raise ValueError(f"--workdir={workdir} holds no run (no config.json).")
  config = read_json(workdir / "config.json")
  step = chosen_step(workdir, config, _STEP.value)
  export(
    workdir, step, Config.from_dict({"model": config["model"]}).model, output, tokenization.declarations(config["data"])
  )
  print(f"wrote the student of step {step} to {output}")


def run() -> None:
  """Starts the command."""
  environment.run(main)


if __name__ == "__main__":
  run()
