"""Plans the paper's run for the slices of docs/pods.md, and prints its tables: `make plan`.

Each plan is the command that `experiments.plan_pod` would take, so one of them can be run alone. Half an hour to an
hour on 2 cores. With --output every plan is kept as JSON as soon as it is made. A kept plan is made again if its config
is another one, or the version of jax or libtpu; --again makes all again, as a change of kepo_jax may ask for.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import tempfile
from typing import Any

import jax
from absl import flags
from rich.console import Console

from experiments import environment
from experiments.configs import kepo_medvqa
from kepo_jax import storage
from kepo_jax.planning import pods, topologies
from kepo_jax.reporting import progress

_OUTPUT = flags.DEFINE_string("output", "", "Folder for one file per plan; by default a temporary one.")
_AGAIN = flags.DEFINE_bool("again", False, "Make plans that --output has again.")

# Topology -> fields: half a prompt per chip, 4 prompts for each group of chips that splits one. On 16 chips of v5e an
# update of 4 parts is 2 % of a chip too large.
PLANS: dict[str, dict[str, Any]] = {
  "v5e:4x4": {"mesh.fsdp": 2, "mesh.tensor": 8, "batch.prompts": 8, "batch.micro_batches": 8},
  "v5e:8x8": {"mesh.fsdp": 8, "mesh.tensor": 8, "batch.prompts": 32, "batch.micro_batches": 4},
  "v5e:16x16": {"mesh.data": 4, "mesh.fsdp": 8, "mesh.tensor": 8, "batch.prompts": 128, "batch.micro_batches": 4},
  "2 x v5e:16x16": {"mesh.data": 8, "mesh.fsdp": 8, "mesh.tensor": 8, "batch.prompts": 256, "batch.micro_batches": 4},
  "v5p:4x4x4": {"mesh.fsdp": 16, "mesh.tensor": 4, "batch.prompts": 32, "batch.micro_batches": 2},
  "v6e:4x4": {"mesh.fsdp": 2, "mesh.tensor": 8, "batch.prompts": 8, "batch.micro_batches": 4},
}


def main(_: list[str]) -> None:
  """Makes what is missing of the plans, and prints all of them."""
  environment.prepare()
  jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for other devices cannot be read back
  jax.config.update("jax_platforms", "cpu")
  console = progress.terminal()
  folder = pathlib.Path(_OUTPUT.value or tempfile.mkdtemp(prefix="plans-"))
  folder.mkdir(parents=True, exist_ok=True)
  records = []
  for name, fields in PLANS.items():
    path = file_of(folder, name)
    config = kepo_medvqa.get_config()
    config.update_from_flattened_dict(fields)
    made_with = origin(config)
    kept = json.loads(path.read_text()) if path.exists() and not _AGAIN.value else {}
    if kept.get("made_with") == made_with:
      console.print(f"{name}: kept {path}", style="dim")
    else:
      kept = {"made_with": made_with, **planned(name, config, console)}
      storage.write_text(path, json.dumps(kept, indent=2) + "\n")
    records.append(kept)
  print(table(records))
  print()
  print(shares(records))


def file_of(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Where the plan of a topology is kept."""
  return folder / (name.replace(" ", "").replace(":", "_") + ".json")


def origin(config: Any) -> dict[str, str]:
  """What a plan depends on, but for the code of kepo_jax: versions, and a digest of the config."""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
  return versions | {"config": hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()[:16]}


def planned(name: str, config: Any, console: Console) -> dict[str, Any]:
  """The record of one plan."""
  with console.status(f"compiling for {name}"):

    def compiled(program: str, seconds: float) -> None:
      console.print(f"{name}: compiled {program} in {seconds:.0f} s", style="dim")

    return pods.record(config, pods.plan(config, topologies.topology(name), compiled=compiled))


def table(records: list[dict[str, Any]]) -> str:
  """Markdown: a row per plan."""
  columns = ["slices", "mesh (data, fsdp, tensor)", "prompts", "micro-batches", "peak GB per chip", "% of HBM"]
  columns += [
    "GB sent per step",
    "of it between slices",
    "longest compilation, processor s",
    "projected step s",
    "fits",
  ]
  rows = []
  for each in records:
    programs, peak = each["programs"], each["peak_bytes"]

    def total(kind: str, programs: list[dict[str, Any]] = programs) -> float:
      return sum(one["runs"] * one["calls"] * sum(one[kind].values()) for one in programs)

    rows.append(
      [
        label(each),
        ", ".join(str(size) for size in each["mesh"].values()),
        str(each["prompts"]),
        str(each["micro_batches"]),
        f"{peak / 1e9:.1f}" if peak else "does not compile",
        f"{100 * peak / each['chip_bytes']:.0f}" if peak else "",
        f"{(total('sent') + total('crossed')) / 1e9:.0f}",
        f"{total('crossed') / 1e9:.2f}",
        f"{max((one['compile_processor_seconds'] for one in programs), default=0):.0f}",
        f"{each['step_seconds']:.1f}" if peak else "",
        "yes" if each["fits"] else "no",
      ]
    )
  return markdown(columns, rows)


def shares(records: list[dict[str, Any]]) -> str:
  """Markdown: seconds of the projected step of each plan that compiles, by what they are spent on."""
  names = ("work", "tensor", "fsdp", "data")
  columns = ["slices", "arithmetic or HBM", "links, over tensor", "links, over fsdp", "over data and slices"]
  return markdown(
    columns,
    [[label(each), *(f"{spent(each)[name]:.2f}" for name in names)] for each in records if not each["failures"]],
  )


def spent(record: dict[str, Any]) -> dict[str, float]:
  """Seconds of a step of a plan: of work, and of collectives by the axis over which they extend, the outermost one."""
  seconds = {"work": 0.0, "tensor": 0.0, "fsdp": 0.0, "data": 0.0}
  for each in record["programs"]:
    times = each["runs"] * each["calls"]
    seconds["work"] += times * max(each["floors"]["flops"], each["floors"]["hbm"])
    for row in each["traffic"]:
      seconds[row["over"][0] if row["over"] else "data"] += times * row["seconds"]
  return seconds


def label(record: dict[str, Any]) -> str:
  """What a plan is for."""
  several = f"{record['slices']} x " if record["slices"] > 1 else ""
  return f"{several}{record['topology']}"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
  """A table."""
  lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
  environment.run(main)
