"""Trains a vision-language model with KEPO on medical visual question answering.

  python -m experiments.kepo_medvqa                      # phantom benchmark, tiny models, minutes on a CPU
  python -m experiments.kepo_medvqa --config=experiments/configs/grpo.py --config.train.steps=40
  python -m experiments.kepo_medvqa --config=experiments/configs/kepo_medvqa.py --config.data.directory=DIR \
    --workdir=runs/paper

Differs from arXiv 2602.00400 where docs/method.md says so, above all: the gate looks at accuracy alone, hints are
asked for when no rollout is accurate, and candidates are accepted one by one.
"""

import json
import pathlib
import sys
import time

import ml_collections
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from experiments import environment
from kepo_jax import training
from kepo_jax.planning import memory
from kepo_jax.reporting import RunReporter, progress

with environment.flag_errors():
  _CONFIG = config_flags.DEFINE_config_file(
    "config", str(environment.CONFIGS / "kepo.py"), "The experiment: a file of configs/."
  )
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; by default a new one under runs/.")
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in --workdir from its newest intact checkpoint.")
_AUTO_RESUME = flags.DEFINE_bool("auto_resume", False, "Continue the run in --workdir if there is one, else start it.")
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  "allow_config_change", False, "Continue although config or questions are not those of the run."
)
environment.define_process_flags()


def resumed_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """The config of the run in a folder with the fields of this command line; that of the flags alone without a run.

  --config=FILE asks for the config of the file instead, which is compared with that of the run.

  Raises:
    ValueError: config.json of the folder cannot be read.
  """
  config, path = _CONFIG.value, workdir / "config.json"
  if flags.FLAGS["config"].present or not path.exists():
    return config
  try:
    stored = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); --config=FILE says what to go on with") from error
  given = config_flags.get_override_values(flags.FLAGS["config"])
  fields = [
    (f"{section}.{name}", value)
    for section in stored
    if isinstance(stored[section], dict)
    for name, value in stored[section].items()
  ]
  with config.ignore_type():
    for name, value in [*fields, ("seed", stored.get("seed", config.seed))]:
      section, _, field = name.rpartition(".")
      target = config[section] if section in config else config
      if field in target and name not in given:
        target[field] = tuple(value) if isinstance(value, list) else value
  return config


def main(_: list[str]) -> None:
  """Runs the experiment that the flags describe."""
  environment.prepare()
  several = environment.join_processes()
  workdir = _WORKDIR.value
  if several and not workdir:
    raise ValueError("several processes need one --workdir=DIR that all of them see.")
  if not workdir and not (_RESUME.value or _AUTO_RESUME.value):
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = str(epath.Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
  logging.info("workdir %s", workdir)
  config = _CONFIG.value
  if _RESUME.value or _AUTO_RESUME.value:
    config = resumed_config(epath.Path(workdir))
  reporter = RunReporter(memory=memory.estimate)
  with training.Interruption() as interruption:
    try:
      training.train(
        config,
        workdir=workdir,
        hooks=[reporter],
        resume=_RESUME.value,
        auto_resume=_AUTO_RESUME.value,
        allow_config_change=_ALLOW_CONFIG_CHANGE.value,
        interruption=interruption,
      )
    except training.OutOfMemory as error:
      planned = f"; the plan's largest parts: {progress.largest_parts(reporter.memory)}" if reporter.memory else ""
      raise ValueError(f"{error}{planned}. {progress.MEMORY_FIELDS}") from error
    except training.Interrupted as error:
      resume = "--resume" if error.saved else "--auto_resume"  # without a checkpoint there may be no run to resume yet
      print(f"{error} Go on with --workdir={workdir} {resume}.", file=sys.stderr)
      sys.exit(training.EXIT_CODE)


if __name__ == "__main__":
  environment.run(main)
