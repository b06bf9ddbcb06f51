"""Plans a run before its devices are rented: memory from shapes at once, or programs compiled for TPUs or GPUs.

  python -m experiments.plan --config=experiments/configs/kepo_medvqa.py --config.batch.micro_batches=8 --compare
  python -m experiments.plan --topology=v5e:8x8 --config=experiments/configs/kepo_medvqa.py \
    --config.mesh.fsdp=8 --config.mesh.tensor=8 --config.batch.prompts=32
  python -m experiments.plan --table --output=FOLDER

Without a topology it prints the estimate of `memory.estimate` and, with --compare, a row for each option of
docs/operations.md. With one, a compiler compiles every program of a step on this machine, up to 7 GB and about a minute
per program: libtpu (the extra `tpu`) for TPU slices, JAX's plugin for CUDA (the extra `plan-gpu`) for H200 or H100:8.
No TPU or GPU is needed. It prints memory per chip, floors, kernels, what one token of a sampler costs, and
collectives by kind and axes of the mesh. Where the run does not fit, the exit status is 3, and the smallest change that
makes it fit is looked for and compiled as well (--nosuggest: not). --table plans the paper's run for the slices of
docs/operations.md, which takes half an hour to an hour on 2 cores; a plan that --output has is kept unless its config,
jax or libtpu is another one, or with --again. Models are folders with a config.json, or published sizes that a name
begins with; batches fill the second bucket of prompts and the first one of images. docs/operations.md explains the
figures.
"""

import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from experiments import environment, settings
from experiments.configs import kepo_medvqa
from kepo_jax import storage
from kepo_jax.config import Config
from kepo_jax.planning import compile as compiler
from kepo_jax.planning import memory
from kepo_jax.reporting import progress

with environment.flag_errors():
  _CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/kepo_medvqa.py", "of the run")
_COMPARE = flags.DEFINE_bool("compare", False, "Add the options that save memory to the estimate.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "Slice of TPUs, such as v5e:8x8, or GPUs of a host, such as H100:8.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, joined by the data-centre network.", lower_bound=1)
_STUDENT = flags.DEFINE_string("student", "", "Sizes of the student; by default those of the config's.")
_TEACHER = flags.DEFINE_string("teacher", "", "Sizes of the teacher; by default those of the config's.")
_SUGGEST = flags.DEFINE_bool("suggest", True, "Look for the smallest change that makes a run fit.")
_JSON = flags.DEFINE_string("json", "", "File for the figures of --topology.")
_TABLE = flags.DEFINE_bool("table", False, "Plan the slices of docs/operations.md.")
_OUTPUT = flags.DEFINE_string("output", "", "Folder for one file per plan of --table; by default a temporary one.")
_AGAIN = flags.DEFINE_bool("again", False, "Make plans again that --output has.")

_WIDTH = 160
_DOES_NOT_FIT = 3  # exit status, which errors do not have
_TRIES = 3  # suggestions that are compiled before giving up

# Option -> its fields.
OPTIONS: dict[str, dict[str, Any]] = {
  "moments bfloat16": {"optimizer.moments": "bfloat16"},
  "remat none": {"model.remat": "none"},
  "remat dots": {"model.remat": "dots"},
  "teacher in host memory": {"model.teacher_memory": "host"},
  "bfloat16 and host": {"optimizer.moments": "bfloat16", "model.teacher_memory": "host"},
}
COLUMNS = ("student and moments", "teacher", *memory.PHASES, "peak")

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
  """Prints the plan that the flags describe."""
  named = {"model.student": _STUDENT.value, "model.teacher": _TEACHER.value}
  config = settings.typed(_CONFIG.value).replace({name: value for name, value in named.items() if value})
  if not (_TABLE.value or _TOPOLOGY.value):
    config.validate()
    print(estimates(config, compare=_COMPARE.value))
    return
  environment.prepare()
  jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for other devices cannot be read back
  jax.config.update("jax_platforms", "cpu")  # what is here runs nothing
  console = progress.terminal(width=_WIDTH)
  if _TABLE.value:
    print(table(list(kept_plans(console))))
  else:
    plan_one(config, compiler.topology(_TOPOLOGY.value, _SLICES.value), console)


def estimates(config: Config, *, compare: bool) -> str:
  """Markdown of the estimate in GB; a teacher in host memory has no place in its column.

  Args:
    config: of the run.
    compare: whether each option has a row.
  """
  rows = []
  options: dict[str, dict[str, Any]] = {"as configured": {}} | (OPTIONS if compare else {})
  for name, fields in options.items():
    parts = memory.estimate(memory.plan(config.replace(fields)))
    rows.append([name, *(f"{parts[part] / 1e9:.1f}" if part in parts else "" for part in COLUMNS)])
  return markdown(["", *COLUMNS], rows)


def plan_one(config: Config, topology: compiler.Topology, console: Console) -> None:
  """Prints one plan and keeps its figures; where it does not fit, suggests a change and exits with status 3."""
  plan = compiled(config, topology, console)
  result = compiler.record(config, plan)
  keep(result)
  for part in (*tables(plan), *verdict(plan)):
    console.print(part)
  if not plan.fits:
    if _SUGGEST.value:
      keep(result | {"suggestion": suggested(config, plan, console)})
    sys.exit(_DOES_NOT_FIT)


def keep(result: dict[str, Any]) -> None:
  """Writes the figures where --json says."""
  if _JSON.value:
    storage.write_text(_JSON.value, json.dumps(result, indent=2) + "\n")


def compiled(config: Config, topology: compiler.Topology, console: Console) -> compiler.Plan:
  """Compiles the programs of a config for a topology, showing how far it is."""
  with console.status(f"compiling for {topology.label}"):

    def seen(name: str, seconds: float) -> None:
      console.print(f"{topology.label}: compiled {name} in {seconds:.0f} s", style="dim")

    return compiler.plan(config, topology, seen)


def suggested(config: Config, plan: compiler.Plan, console: Console) -> dict[str, Any] | None:
  """Compiles the smallest changes that should make a run fit, and returns the first that does; None: none was found."""
  topology, tries = plan.topology, 0
  for fields, smaller in itertools.islice(should_fit(config, plan), _TRIES):
    words = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    console.print(f"trying {words}")
    tried = compiled(smaller, topology, console)
    if tried.fits:
      console.print(f"fits with {words}: {gigabytes(tried.peak)} of {gigabytes(topology.chip.memory)} per chip")
      return {"fields": fields, **compiler.record(smaller, tried)}
    tries += 1
  what = f"none of the {tries} changes that were tried is enough" if tries else "no change should be enough by estimate"
  console.print(f"{what}; take more chips, or fewer prompts, rollouts or new tokens.")
  return None


def should_fit(config: Config, plan: compiler.Plan) -> Iterator[tuple[dict[str, Any], Any]]:
  """Yields the changes that should make a plan fit, by the estimate from shapes."""
  devices, slices = len(plan.topology.devices), plan.topology.slices
  now = memory.estimate(memory.plan(config, devices=devices))["peak"]
  # The estimate is off by what the compiler shows, where everything compiled.
  factor = 1.0 if plan.failures else plan.peak / now
  for fields in smaller_fields(config, devices, slices):
    smaller = config.replace(fields)
    if factor * memory.estimate(memory.plan(smaller, devices=devices))["peak"] <= plan.limit:
      yield fields, smaller


def smaller_fields(config: Config, devices: int, slices: int = 1) -> Iterator[dict[str, Any]]:
  """Yields changes that make a run smaller on each device, the least first.

  Args:
    config: of the run.
    devices: of the topology.
    slices: of it, over which only the data axis may extend.
  """
  mesh, batch = config.mesh, config.batch
  split = [2**n for n in range(1, 4) if devices % 2**n == 0 and 2**n > mesh.tensor]
  meshes = [
    {"mesh.data": devices // (fsdp * tensor), "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    for tensor in (mesh.tensor, *split)
    for fsdp in (2**n for n in range(12))
    if devices % (fsdp * tensor * slices) == 0 and fsdp * tensor > mesh.fsdp * mesh.tensor
  ]
  parts = [n for n in (2, 4, 8, 16, 32, 64) if batch.micro_batches < n <= batch.prompts and batch.prompts % n == 0]
  steps: list[dict[str, Any]] = [{"batch.micro_batches": n} for n in parts]
  steps += [{"model.remat": "full"}] if config.model.remat == "none" else []
  steps += meshes
  steps += [{"optimizer.moments": "bfloat16"}] if config.optimizer.moments == "float32" else []
  steps += [{"model.teacher_memory": "host"}] if config.model.teacher_memory == "device" else []
  yield from steps
  yield from (mesh | step for mesh in meshes for step in steps if "mesh.fsdp" not in step)


def tables(plan: compiler.Plan) -> Iterator[Table]:
  """Makes the tables of memory, of floors and of collectives of each program."""
  topology, chip = plan.topology, plan.topology.chip
  mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  title = f"{topology.label}, {len(topology.devices)} x {chip.name}; {mesh}; GB per chip; total with all that is there"

  def sizes(program: compiler.ProgramPlan) -> Iterator[list[str]]:
    total = program.total + plan.code
    parts = (program.arguments, program.temporaries, program.results, program.code, total)
    yield [
      f"{program.compile_seconds:.0f}",
      *(f"{size / 1e9:.2f}" for size in parts),
      f"{100 * total / chip.memory:.0f}",
    ]

  def floors(program: compiler.ProgramPlan) -> Iterator[list[str]]:
    cost, seconds = program.cost, program.floors(chip)
    sent, crossed = sum(cost.sent.values()), sum(cost.crossed.values())
    counts = (cost.flops / 1e12, cost.moved / 1e9, sent / 1e9, crossed / 1e9, cost.kernels, cost.exchanges)
    highest = program.runs * max(seconds.values())
    yield [
      *(f"{count:.3g}" for count in counts),
      *(f"{value:.3f}" for value in seconds.values()),
      f"{program.runs:g}",
      f"{highest:.2f}",
    ]

  def per_token(program: compiler.ProgramPlan) -> Iterator[list[str]]:
    token = program.token
    yield [f"{token.moved / 1e9:.2f}", f"{token.kernels:.0f}", f"{token.exchanges:.0f}"]

  def collectives(program: compiler.ProgramPlan) -> Iterator[list[str]]:
    for row in compiler.traffic(program.cost, plan.mesh):
      yield [row["kind"], ", ".join(row["over"]) or "slices", *(f"{row[to] / 1e9:.3f}" for to in ("sent", "crossed"))]

  yield _table(plan, title, "compile s, arguments, temporaries, results, code, total, % of HBM", sizes)
  columns = (
    "TFLOP, GB moved, GB sent, between slices, kernels, collectives, FLOP s, HBM s, ICI s, network s, calls, floor s"
  )
  yield _table(plan, "work and floors of a call, per chip; the highest floor, of all calls", columns, floors)
  if sampled := [program for program in plan.programs if program.token.kernels]:
    columns = "GB moved, kernels, collectives"
    yield _table(plan, "one token of every row", columns, per_token, sampled)
  yield _table(plan, "collectives of a call", "kind, over, GB sent, between slices", collectives)


def _table(
  plan: compiler.Plan,
  title: str,
  columns: str,
  rows: Callable[[compiler.ProgramPlan], Iterable[list[str]]],
  programs: Iterable[compiler.ProgramPlan] | None = None,
) -> Table:
  made = Table(title=title)
  made.add_column("program", no_wrap=True)
  for column in columns.split(", "):
    made.add_column(column, justify="right")
  for program in plan.programs if programs is None else programs:
    for row in rows(program):
      made.add_row(f"{program.name} ({program.phase})", *row)
  return made


def verdict(plan: compiler.Plan) -> list[str]:
  """Says whether a plan fits, and why not; and what a step takes at least."""
  room = f"{compiler.LIMIT:.0%} of the {gigabytes(plan.topology.chip.memory)} of a chip"
  lines = [f"does not compile: {phase}: {' '.join(reason.split())[:600]}" for phase, reason in plan.failures.items()]
  if plan.fits:
    lines.append(f"fits: at most {gigabytes(plan.peak)} per chip, within {room}")
  elif not plan.failures:
    fullest = max(plan.programs, key=lambda program: program.total)
    sizes = {"that is there": fullest.resident, "of its own": fullest.temporaries, "of results": fullest.results}
    sizes["of code of all programs"] = plan.code
    parts = ", ".join(f"{gigabytes(size)} {what}" for what, size in sizes.items())
    lines.append(f"does not fit: {fullest.name} needs {gigabytes(plan.peak)} per chip ({parts}), more than {room}")
  if not plan.failures:
    lines.append(f"floor of a step: {plan.floor:.1f} s at the peaks of the data sheet; a step takes longer")
    lines.append(f"not compiled: {'; '.join(compiler.NOT_COMPILED)}")
  return lines


def gigabytes(size: float) -> str:
  """Writes a number of bytes in GB."""
  return f"{size / 1e9:.1f} GB"


def kept_plans(console: Console) -> Iterator[dict[str, Any]]:
  """Yields the record of every plan of the table, compiling those that --output does not have."""
  folder = pathlib.Path(_OUTPUT.value or tempfile.mkdtemp(prefix="plans-"))
  folder.mkdir(parents=True, exist_ok=True)
  for name, fields in PLANS.items():
    path = folder / (name.replace(" ", "").replace(":", "_") + ".json")
    config = settings.typed(kepo_medvqa.get_config()).replace(fields)
    made_with = origin(config)
    kept = json.loads(path.read_text()) if path.exists() and not _AGAIN.value else {}
    if kept.get("made_with") == made_with:
      console.print(f"{name}: kept {path}", style="dim")
    else:
      kept = {"made_with": made_with, **compiler.record(config, compiled(config, compiler.topology(name), console))}
      storage.write_text(path, json.dumps(kept, indent=2) + "\n")
    yield kept


def origin(config: Config) -> dict[str, str]:
  """Says what a plan depends on, but for the code of kepo_jax: versions, and a digest of the config."""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
  return versions | {"config": hashlib.sha256(config.to_json().encode()).hexdigest()[:16]}


def table(records: list[dict[str, Any]]) -> str:
  """Markdown: a row per plan."""
  columns = ["slices", "mesh (data, fsdp, tensor)", "prompts", "micro-batches", "peak GB per chip", "% of HBM"]
  columns += ["TFLOP per step", "GB moved", "GB sent over tensor", "over fsdp", "over data", "between slices"]
  columns += ["floor s", "fits"]
  rows = []
  for plan in records:
    label = f"{plan['slices']} x {plan['topology']}" if plan["slices"] > 1 else plan["topology"]
    peak, sent = plan["peak_bytes"], {"tensor": 0.0, "fsdp": 0.0, "data": 0.0, "slices": 0.0}
    flops, moved = (sum(one["runs"] * one[kind] for one in plan["programs"]) for kind in ("flops", "moved"))
    for program in plan["programs"]:
      for row in program["traffic"]:
        # A collective counts once, for the outermost axis of the mesh over which it extends.
        sent[row["over"][0] if row["over"] else "data"] += program["runs"] * row["sent"]
        sent["slices"] += program["runs"] * row["crossed"]
    rows.append(
      [
        label,
        ", ".join(map(str, plan["mesh"].values())),
        str(plan["prompts"]),
        str(plan["micro_batches"]),
        f"{peak / 1e9:.1f}" if peak else "does not compile",
        f"{100 * peak / plan['chip_bytes']:.0f}" if peak else "",
        f"{flops / 1e12:.0f}",
        f"{moved / 1e9:,.0f}",
        *(f"{size / 1e9:.2f}" for size in sent.values()),
        f"{plan['floor_seconds']:.1f}" if peak else "",
        "yes" if plan["fits"] else "no",
      ]
    )
  return markdown(columns, rows)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
  """Formats a table."""
  lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run() -> None:
  """Starts the command."""
  environment.run(main)


if __name__ == "__main__":
  run()
