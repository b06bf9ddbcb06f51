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

from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from experiments import environment, settings
from kepo_jax import training
from kepo_jax.config import Config
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


def resumed_config(workdir: epath.Path) -> Config:
  """The config of the run in a folder with the fields of this command line; that of the flags alone without a run.

  --config=FILE asks for the config of the file instead, which is compared with that of the run.

  Raises:
    ValueError: config.json of the folder cannot be read.
  """
  config, path = settings.typed(_CONFIG.value), workdir / "config.json"
  if flags.FLAGS["config"].present or not path.exists():
    return config
  try:
    stored = Config.from_dict(dict(json.loads(path.read_text())))
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(f"{path} is no config ({error}); --config=FILE says what to go on with.") from error
  given = config_flags.get_override_values(flags.FLAGS["config"])
  return stored.replace({name: value for name, value in config.fields().items() if name in given})


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
  if config_flags.get_override_values(flags.FLAGS["config"]).get("data.directory") == "":
    raise ValueError("--config.data.directory= is empty; leave it out for the embedded benchmark.")
  resumes = _RESUME.value or _AUTO_RESUME.value
  config = resumed_config(epath.Path(workdir)) if resumes else settings.typed(_CONFIG.value)
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


def run() -> None:
  """Starts the command."""
  environment.run(main)


if __name__ == "__main__":
  run()
