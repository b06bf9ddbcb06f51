"""Plans a run for TPU slices that are not rented yet: compiles its programs for them, and says whether it fits.

  make plan                                                                  # the topologies of docs/pods.md
  python -m experiments.plan_pod --topology=v5e:8x8 --config=experiments/configs/kepo_medvqa.py \
    --config.mesh.fsdp=8 --config.mesh.tensor=8
  python -m experiments.plan_pod --topology=v5e:16x16 --slices=2 --json=FILE

Needs libtpu (requirements-tpu.txt) and no TPU: the compiler of the TPU runs on this machine, in up to 7 GB and about a
minute per program. Of each program it prints memory per chip, the floors of arithmetic, HBM, links and network, and
collectives by kind and axes of the mesh; then the projected step, and the verdict. Where the run does not fit, the
exit status is 3, and the smallest change that makes it fit is looked for and compiled as well (--nosuggest: not).
Models are folders with a config.json, or published sizes that a name begins with; batches fill the second bucket of
prompts and the first one of images. docs/pods.md explains the figures.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from experiments import environment
from kepo_jax import storage
from kepo_jax.planning import memory, pods, topologies
from kepo_jax.reporting import progress

with environment.flag_errors():
  _CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/kepo_medvqa.py", "of the run")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:8x8", "Generation and chips along each axis of a slice.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices, joined by the data-centre network.", lower_bound=1)
_STUDENT = flags.DEFINE_string("student", "", "Sizes of the student; by default those of the config's.")
_TEACHER = flags.DEFINE_string("teacher", "", "Sizes of the teacher; by default those of the config's.")
_HINT_ROUNDS = flags.DEFINE_float("hint_rounds", 1.0, "Rounds of exploration in a step, with a quarter of its prompts.")
_SUGGEST = flags.DEFINE_bool("suggest", True, "Look for the smallest change that makes a run fit.")
_JSON = flags.DEFINE_string("json", "", "File for the figures.")

_WIDTH = 160
_DOES_NOT_FIT = 3  # exit status, which errors do not have
_TRIES = 3  # suggestions that are compiled before giving up


def main(_: list[str]) -> None:
  """Prints the plan that the flags describe; the exit status is 3 where it does not fit."""
  environment.prepare()
  jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for other devices cannot be read back
  jax.config.update("jax_platforms", "cpu")  # what is here runs nothing
  console = progress.terminal(width=_WIDTH)
  place = topologies.topology(_TOPOLOGY.value, _SLICES.value)
  config = _CONFIG.value
  config.model.student = _STUDENT.value or config.model.student
  config.model.teacher = _TEACHER.value or config.model.teacher
  plan = planned(config, place, console)
  result = pods.record(config, plan)
  keep(result)
  for table in (memory_table(plan), time_table(plan), traffic_table(plan)):
    console.print(table)
  for line in verdict(plan):
    console.print(line)
  if not plan.fits:
    if _SUGGEST.value:
      keep(result | {"suggestion": suggested(config, plan, console)})
    sys.exit(_DOES_NOT_FIT)


def keep(result: dict[str, Any]) -> None:
  """Writes the figures where --json says."""
  if _JSON.value:
    storage.write_text(_JSON.value, json.dumps(result, indent=2) + "\n")


def planned(config: Any, place: topologies.Topology, console: Console) -> pods.PodPlan:
  """Compiles the programs of a config for a topology, showing how far it is."""
  with console.status(f"compiling for {place.label}"):

    def compiled(name: str, seconds: float) -> None:
      console.print(f"compiled {name} in {seconds:.0f} s", style="dim")

    return pods.plan(config, place, hint_rounds=_HINT_ROUNDS.value, compiled=compiled)


def suggested(config: Any, plan: pods.PodPlan, console: Console) -> dict[str, Any] | None:
  """The smallest change that makes a run fit, compiled; says so. None: none was found."""
  place = plan.topology

  def estimated(changed: Any) -> Any:
    return memory.plan(changed, devices=len(place.devices))

  tries = 0
  for fields, changed in itertools.islice(pods.suggestion(config, estimated, plan), _TRIES):
    words = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    console.print(f"trying {words}")
    tried = planned(changed, place, console)
    if tried.fits:
      console.print(f"fits with {words}: {gigabytes(tried.peak)} of {gigabytes(place.chip.memory)} per chip")
      return {"fields": fields, **pods.record(changed, tried)}
    tries += 1
  what = f"none of the {tries} changes that were tried is enough" if tries else "no change should be enough by estimate"
  console.print(f"{what}; take more chips, or fewer prompts, rollouts or new tokens.")
  return None


def _title(plan: pods.PodPlan) -> str:
  place = plan.topology
  mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  return f"{place.label}, {len(place.devices)} x {place.chip.name}; {mesh}"


def _program_rows(plan: pods.PodPlan, title: str, columns: Sequence[str]) -> Table:
  table = Table(title=title)
  table.add_column("program", no_wrap=True)
  for name in columns:
    table.add_column(name, justify="right")
  return table


def memory_table(plan: pods.PodPlan) -> Table:
  """Seconds of compilation and bytes per chip of each program."""
  columns = ("compile s", "arguments GB", "temporaries GB", "results GB", "code GB", "total GB", "% of HBM")
  table = _program_rows(
    plan, f"{_title(plan)}; memory per chip; in all, with everything that is there and all code", columns
  )
  for each in plan.programs:
    total = each.total + plan.code
    sizes = (each.arguments, each.temporaries, each.results, each.code, total)
    share = 100 * total / plan.topology.chip.memory
    row = (f"{each.seconds:.0f}", *(f"{size / 1e9:.2f}" for size in sizes), f"{share:.0f}")
    table.add_row(f"{each.name} ({each.phase})", *row)
  return table


def time_table(plan: pods.PodPlan) -> Table:
  """Work of one call of each program on a chip, its floors, and projected seconds in a step."""
  columns = ("TFLOP", "GB moved", "GB sent", "flops s", "HBM s", "links s", "network s", "calls", "step s")
  table = _program_rows(plan, "per chip and call; floors; seconds of all calls in a step", columns)
  for each in plan.programs:
    floors = each.floors(plan.topology)
    table.add_row(
      f"{each.name} ({each.phase})",
      f"{each.cost.flops / 1e12:.3g}",
      f"{each.cost.moved / 1e9:.3g}",
      f"{(sum(each.cost.sent.values()) + sum(each.cost.crossed.values())) / 1e9:.3g}",
      *(f"{floors[name]:.3f}" for name in ("flops", "hbm", "link", "network")),
      f"{each.runs * each.calls:g}",
      f"{each.runs * each.projected(plan.topology):.2f}",
    )
  return table


def traffic_table(plan: pods.PodPlan) -> Table:
  """What a chip sends in one call of each program, by kind of collective and axes of the mesh, the longest first."""
  between = ("GB between slices",) if plan.topology.slices > 1 else ()
  table = _program_rows(plan, "collectives of a call", ("kind", "over", "GB sent", *between, "s"))
  for each in plan.programs:
    for row in pods.traffic(each, plan.topology, plan.mesh):
      sent = [f"{row.sent / 1e9:.3f}"] + ([f"{row.crossed / 1e9:.3f}"] if between else [])
      table.add_row(
        f"{each.name} ({each.phase})", row.kind, ", ".join(row.over) or "slices", *sent, f"{row.seconds:.3f}"
      )
  return table


def verdict(plan: pods.PodPlan) -> list[str]:
  """Whether it fits, and why not; and what a step takes."""
  place = plan.topology
  room = f"{pods.LIMIT:.0%} of the {gigabytes(place.chip.memory)} of a chip"
  lines = [f"does not compile: {phase}: {' '.join(reason.split())[:600]}" for phase, reason in plan.failures.items()]
  if plan.fits:
    lines.append(f"fits: at most {gigabytes(plan.peak)} per chip, within {room}")
  elif not plan.failures:
    fullest = max(plan.programs, key=lambda each: each.total)
    sizes = {"that is there": fullest.resident, "of its own": fullest.temporaries, "of results": fullest.results}
    sizes["of code of all programs"] = plan.code
    parts = ", ".join(f"{gigabytes(size)} {what}" for what, size in sizes.items())
    lines.append(f"does not fit: {fullest.name} needs {gigabytes(plan.peak)} per chip ({parts}), more than {room}")
  if not plan.failures:
    lines.append(f"a step takes {plan.step_seconds:.1f} s by this model; nothing overlapped, nothing measured")
    lines.append(f"not compiled: {'; '.join(pods.NOT_COMPILED)}")
  return lines


def gigabytes(size: float) -> str:
  """A number of bytes in words."""
  return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
  environment.run(main)
