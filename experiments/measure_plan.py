"""Checks the cost model of `experiments.plan_pod` against a step that runs here, and states its error.

  python -m experiments.measure_plan --student=medium --teacher=medium --image_tokens=64 --text_tokens=64 \
    --new_tokens=64                                                     # one device; minutes on two CPU cores
  XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m experiments.measure_plan ... \
    --config.mesh.data=1 --config.mesh.fsdp=2 --config.mesh.tensor=2    # with collectives, on virtual devices

  taskset -c 0 python -m experiments.measure_plan --clock=processor ... # where others compute on the same machine

Weights are random and prompts made up, as in `experiments.benchmark`, whose programs these are. What a data sheet says
of a TPU is measured of the devices that are here, beside every turn: products, memory, and collectives where the mesh
has several devices. docs/pods.md explains the figures.
"""

import json
import math
import pathlib
import time
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.table import Table

from experiments import environment
from kepo_jax import storage
from kepo_jax.planning import benchmark, chips, measured
from kepo_jax.reporting import progress

CONFIGS = pathlib.Path(__file__).parent / "configs"
with environment.flag_errors():
  _CONFIG = config_flags.DEFINE_config_file("config", str(CONFIGS / "kepo.py"), "of the run")
_STUDENT = flags.DEFINE_string("student", "", "Sizes of the student; by default those of the config's.")
_TEACHER = flags.DEFINE_string("teacher", "", "Sizes of the teacher; by default those of the config's.")
_IMAGE_TOKENS = flags.DEFINE_integer("image_tokens", 16, "Merged tokens of the image of each prompt.", lower_bound=0)
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 40, "Other tokens of a prompt.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 0, "Tokens of a completion; 0: as the config samples.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps, after one that warms up.", lower_bound=1)
_CLOCK = flags.DEFINE_enum(
  "clock",
  "wall",
  ["wall", "processor"],
  "Seconds of all, or those that this process computed: on one core, as if alone.",
)
_JSON = flags.DEFINE_string("json", "", "File for the figures.")

_WIDTH = 150


def main(_: list[str]) -> None:
  """Compares, prints, and keeps the figures."""
  environment.prepare()
  chips.clock = {"wall": time.perf_counter, "processor": time.process_time}[_CLOCK.value]
  console = progress.terminal(width=_WIDTH)
  config = _CONFIG.value
  config.sampling.max_new_tokens = _NEW_TOKENS.value or config.sampling.max_new_tokens
  sizes = benchmark.Sizes(_IMAGE_TOKENS.value, _TEXT_TOKENS.value, config.sampling.max_new_tokens)
  student, teacher = (
    benchmark.model_config(flag or configured)
    for flag, configured in ((_STUDENT.value, config.model.student), (_TEACHER.value, config.model.teacher))
  )

  def compiled(name: str, seconds: float) -> None:
    console.print(f"compiled {name} in {seconds:.0f} s", style="dim")

  with console.status("compiling, then running"):
    bench = benchmark.Benchmark(config, student, teacher, sizes)
    comparisons, rates = measured.compare(bench, _REPEATS.value, compiled)
  result = record(config, comparisons, rates)
  console.print(table(result))
  for line in remarks(result):
    console.print(line)
  if _JSON.value:
    storage.write_text(_JSON.value, json.dumps(result, indent=2) + "\n")


def record(config: Any, comparisons: list[measured.Comparison], rates: measured.Rates) -> dict[str, Any]:
  """Everything that was projected and measured, JSON-able."""
  place = comparisons[0].place
  link = rates.link if math.isfinite(rates.link) else None  # none on one device
  return {
    "device": {"name": place.chip.name, "count": len(place.devices), "jax": jax.__version__},
    "rates": {"products": rates.products, "bandwidth": rates.bandwidth, "link": link},
    "mesh": dict(config.mesh.items()),
    "prompts": config.batch.prompts,
    "rollouts": config.batch.rollouts,
    "dtype": config.model.compute_dtype,
    "repeats": _REPEATS.value,
    "clock": _CLOCK.value,
    "phases": {each.name: _figures(each) for each in [*comparisons, measured.step(comparisons)]},
  }


def _figures(each: measured.Comparison) -> dict[str, Any]:
  moved, sent = (
    sum(one.runs * one.calls * of(one.cost) for one in each.programs)
    for of in (lambda cost: cost.moved, lambda cost: sum(cost.sent.values()))
  )
  return {
    "flops": each.flops,
    "counted": each.counted,
    "moved": moved,
    "sent": sent,
    "floors": each.floors(),
    "projected": each.projected,
    "measured": each.measured,
    "error": each.error,
  }


def table(result: dict[str, Any]) -> Table:
  """Work of each phase on a device, its floors, projected and measured seconds, and their ratio."""
  device = result["device"]
  title = f"{result['prompts']} prompts x {result['rollouts']} rollouts; {result['dtype']}; {device['count']} x "
  made = Table(title=title + f"{device['name']}; medians of {result['repeats']}, {result['clock']} s")
  made.add_column("phase")
  columns = ("GFLOP", "of them traced", "GB moved", "GB sent", "flops s", "memory s", "links s", "projected s")
  for name in (*columns, "measured s", "projected / measured"):
    made.add_column(name, justify="right")
  for name, each in result["phases"].items():
    made.add_row(
      name,
      *(f"{each[kind] / 1e9:.3g}" for kind in ("flops", "counted", "moved", "sent")),
      *(f"{each['floors'][kind]:.3f}" for kind in ("flops", "hbm", "link")),
      *(f"{each[kind]:.3f}" for kind in ("projected", "measured")),
      f"{each['projected'] / each['measured']:.2f}",
    )
  return made


def remarks(result: dict[str, Any]) -> list[str]:
  """What the projection stands on, and its error."""
  rates, step = result["rates"], result["phases"]["step"]
  products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates["products"].items())
  memory = f"memory {rates['bandwidth'] / 1e9:.1f} GB/s"
  link = f"; collectives {rates['link'] / 1e9:.2f} GB/s sent" if result["device"]["count"] > 1 else ""
  return [
    f"each device, all of them at once: products in GFLOP/s: {products}, the fastest counts; {memory}{link}",
    f"the step: projected {step['projected']:.2f} s, measured {step['measured']:.2f} s: {100 * step['error']:+.0f} %",
  ]


if __name__ == "__main__":
  environment.run(main)
