"""Memory per device of a run, estimated from shapes: nothing is loaded, so any machine plans for any other.

  python -m experiments.plan_memory --config=experiments/configs/kepo_medvqa.py --config.batch.micro_batches=8
  python -m experiments.plan_memory --config=experiments/configs/kepo_medvqa.py --compare

A row for the config as it is and, with --compare, one for each option of docs/low_memory.md and one for all of them.
Models are folders with a config.json, or published sizes that a name begins with.
"""

import copy
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments import environment
from kepo_jax.planning import memory

with environment.flag_errors():
  _CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/kepo_medvqa.py", "of the run")
_COMPARE = flags.DEFINE_bool("compare", False, "add the options that save memory")

# Option -> its fields.
OPTIONS = {
  "moments bfloat16": {"optimizer.moments": "bfloat16"},
  "moments float8": {"optimizer.moments": "float8"},
  "remat none": {"model.remat": "none"},
  "remat dots": {"model.remat": "dots"},
  "remat dots_offloaded": {"model.remat": "dots_offloaded"},
  "teacher in host memory": {"model.teacher_memory": "host"},
  "float8 and host": {"optimizer.moments": "float8", "model.teacher_memory": "host"},
}
COLUMNS = ("student and moments", "teacher", *memory.PHASES, "peak")


def rows(config: Any, *, compare: bool) -> dict[str, dict[str, int]]:
  """Name of a row -> part -> bytes.

  Args:
    config: of the run.
    compare: whether each option has a row.
  """
  found = {"as configured": memory.estimate(memory.plan(config))}
  for name, fields in OPTIONS.items() if compare else ():
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict(fields)
    found[name] = memory.estimate(memory.plan(changed))
  return found


def table(estimates: dict[str, dict[str, int]]) -> str:
  """Markdown of `rows` in GB; a teacher in host memory has no place in its column."""
  lines = [("", *COLUMNS), ("---",) + ("---:",) * len(COLUMNS)]
  for name, parts in estimates.items():
    lines.append((name, *(f"{parts[part] / 1e9:.1f}" if part in parts else "" for part in COLUMNS)))
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(_: Sequence[str]) -> None:
  """Prints the table."""
  _CONFIG.value.validate()
  print(table(rows(_CONFIG.value, compare=_COMPARE.value)))


if __name__ == "__main__":
  environment.run(main)
