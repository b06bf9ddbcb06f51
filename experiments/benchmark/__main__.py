"""Times every phase of a training step beside its two floors: arithmetic over peak, bytes over bandwidth.

  python -m experiments.benchmark                                    # sizes of the embedded default, CPU
  python -m experiments.benchmark --student=medium --teacher=medium --image_tokens=64 --text_tokens=64 \
    --new_tokens=64 --against=transformers                           # and the same step in torch, in turns
  python -m experiments.benchmark --config=experiments/configs/kepo_medvqa.py --json=FILE     # paper size, one GPU

Weights are random and prompts made up, so nothing is loaded; models are sizes: "Qwen3-VL-2B", "medium", a folder with a
config.json. No completion ends early. The programs are those of `experiments.kepo_medvqa`, and every option of a config
counts. Peaks come from the chip's data sheet for bfloat16 and are measured otherwise. docs/performance.md explains.
"""

import json
import pathlib
import platform
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.progress import Progress
from rich.table import Table

from experiments import environment, settings
from experiments.benchmark import step
from kepo_jax import storage
from kepo_jax.config import Config
from kepo_jax.planning import memory
from kepo_jax.reporting import progress
from kepo_jax.types import RunPlan

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
with environment.flag_errors():
  _CONFIG = config_flags.DEFINE_config_file("config", str(CONFIGS / "kepo.py"), "The experiment: a file of configs/.")
_STUDENT = flags.DEFINE_string("student", "", "Sizes of the student; by default those of the config's.")
_TEACHER = flags.DEFINE_string("teacher", "", "Sizes of the teacher; by default those of the config's.")
_IMAGE_TOKENS = flags.DEFINE_integer("image_tokens", 16, "Merged tokens of the image of each prompt.", lower_bound=0)
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 40, "Other tokens of a prompt.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 0, "Tokens of a completion; 0: as the config samples.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps, after one that compiles.", lower_bound=1)
_AGAINST = flags.DEFINE_enum(
  "against", "", ["", "transformers", "trl"], "Run the same step in torch as well, replicated as it would be there."
)
_STEPS = flags.DEFINE_integer("steps", 0, "Multiply a step's seconds by so many steps; 0: by config.train.steps.")
_BEFORE = flags.DEFINE_string("before", "", "A file that --json wrote earlier, to print beside this run.")
_JSON = flags.DEFINE_string("json", "", "File for the figures.")

_WIDTH = 150


def main(_: list[str]) -> None:
  """Runs the benchmark that the flags describe."""
  environment.prepare()
  console = progress.terminal(width=_WIDTH)
  before = json.loads(pathlib.Path(_BEFORE.value).read_text()) if _BEFORE.value else None
  sizes = _sizes(settings.typed(_CONFIG.value))
  config = settings.typed(_CONFIG.value).replace({"sampling.max_new_tokens": sizes.new_tokens})
  student, teacher = (
    step.model_sizes(flag or configured)
    for flag, configured in ((_STUDENT.value, config.model.student), (_TEACHER.value, config.model.teacher))
  )
  ours = step.Benchmark(config, student, teacher, sizes)
  rival = _rival(ours)
  with Progress(console=console, transient=True) as bar:
    task = bar.add_task("steps, the first one compiles", total=_REPEATS.value + 1)

    def between(turn: int) -> None:
      if rival:
        rival.turn(timed=turn > 0)
      bar.update(task, completed=turn + 1)

    phases = ours.phases(_REPEATS.value, between)
  result = record(ours, phases)
  console.print(phase_table(result))
  if rival:
    result["against"] = rival.record(result)
    console.print(ratio_table(result["against"]))
  if before:
    console.print(before_table(before, result))
  for line in remarks(result):
    console.print(line)
  if _JSON.value:
    storage.write_text(_JSON.value, json.dumps(result, indent=2) + "\n")


def _sizes(config: Config) -> step.Sizes:
  return step.Sizes(_IMAGE_TOKENS.value, _TEXT_TOKENS.value, _NEW_TOKENS.value or config.sampling.max_new_tokens)


def _rival(ours: step.Benchmark) -> Any:
  """Makes the same step in torch, where it is asked for.

  Raises:
    ValueError: torch, transformers' torch models or trl are not installed.
  """
  if not _AGAINST.value:
    return None
  try:
    from experiments.benchmark import torch  # is no dependency
  except ImportError as error:
    raise ValueError(f'--against={_AGAINST.value} needs torch: pip install -e ".[oracle]" ({error})') from None
  return torch.Rival(ours, trl=_AGAINST.value == "trl")


def record(ours: step.Benchmark, phases: list[step.Phase]) -> dict[str, Any]:
  """Collects everything that was measured, JSON-able."""
  config, chip = ours.config, ours.chip
  figures = {phase.name: phase.metrics(chip, ours.devices) for phase in phases}
  peak, whose = step.peak_bytes()
  models, mesh = ours.configs | {"student": ours.adapted}, dict(ours.mesh.shape)
  plan = RunPlan(config=config, workdir="", models=models, mesh=mesh, questions={}, programs=(), start_step=0)
  step_seconds = sum(phase["seconds"] for phase in figures.values())
  steps = _STEPS.value or config.train.steps
  return {
    "device": {
      "name": chip.name,
      "count": ours.devices,
      "flops": chip.flops,
      "bandwidth": chip.bandwidth,
      "measured": chip.measured,
      "host": platform.machine(),
      "jax": jax.__version__,
    },
    "batch": {
      "prompts": config.batch.prompts,
      "rollouts": config.batch.rollouts,
      "image_tokens": ours.sizes.image_tokens,
      "text_tokens": ours.sizes.text_tokens,
      "new_tokens": ours.sizes.new_tokens,
      "dtype": config.model.compute_dtype,
    },
    "repeats": _REPEATS.value,
    "phases": figures,
    "step_seconds": step_seconds,
    "step_tokens_per_second": figures["sampling"]["tokens"] / step_seconds,
    "run": {"steps": steps, "seconds": steps * step_seconds},
    "peak_bytes": peak,
    "peak_of": whose,
    "planned_bytes": memory.estimate(plan)["peak"],
  }


def phase_table(result: dict[str, Any]) -> Table:
  """Lists seconds, rates, utilisation, floor and gap of each phase."""
  batch, device = result["batch"], result["device"]
  table = Table(
    title=f"{batch['prompts']} prompts x {batch['rollouts']} rollouts; {batch['image_tokens']} image, "
    f"{batch['text_tokens']} text and {batch['new_tokens']} new tokens; {batch['dtype']}; "
    f"{device['count']} x {device['name']}; medians of {result['repeats']}"
  )
  table.add_column("phase")
  for name in ("seconds", "tokens/s", "TFLOP", "MFU %", "GB moved", "bandwidth %", "floor s", "x floor"):
    table.add_column(name, justify="right")
  for name, phase in result["phases"].items():
    table.add_row(
      name,
      f"{phase['seconds']:.3f}",
      f"{phase['tokens_per_second']:,.0f}",
      f"{phase['flops'] / 1e12:.3g}",
      f"{100 * phase['flops_utilisation']:.1f}",
      f"{phase['bytes'] / 1e9:.3g}",
      f"{100 * phase['bandwidth_share']:.1f}",
      f"{phase['floor_seconds']:.3f}",
      f"{phase['gap']:.1f}",
    )
  return table


def ratio_table(against: dict[str, Any]) -> Table:
  """Shows how many times as long torch takes."""
  table = Table(title=f"against {against['name']}; {against['threads']} threads; turns taken alternately")
  for name in ("", "torch s", "ours s", "ratio"):
    table.add_column(name, justify="left" if not name else "right")
  for name, row in against["phases"].items():
    table.add_row(name, f"{row['torch']:.3f}", f"{row['ours']:.3f}", f"{row['ratio']:.2f}")
  return table


def before_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
  """Compares the seconds of each phase with an earlier record and with its floor."""
  table = Table(title="before, after, floor")
  for name in ("phase", "before s", "after s", "floor s", "before / after", "after / floor"):
    table.add_column(name, justify="left" if name == "phase" else "right")
  for name, phase in after["phases"].items():
    was = before["phases"].get(name, {}).get("seconds", float("nan"))
    now, floor = phase["seconds"], phase["floor_seconds"]
    table.add_row(name, f"{was:.3f}", f"{now:.3f}", f"{floor:.3f}", f"{was / now:.2f}", f"{phase['gap']:.1f}")
  return table


def remarks(result: dict[str, Any]) -> list[str]:
  """Sums up the whole step."""
  device, run = result["device"], result["run"]
  source = "measured here" if device["measured"] else "data sheet"
  return [
    f"a step: {result['step_seconds']:.2f} s, {result['step_tokens_per_second']:,.0f} completion tokens/s; "
    f"{run['steps']} of them: {run['seconds'] / 60:.1f} min, evaluations and checkpoints not counted",
    f"peaks ({source}): {device['flops'] / 1e12:.3g} TFLOP/s, {device['bandwidth'] / 1e9:,.0f} GB/s",
    f"memory: peak {result['peak_bytes'] / 1e9:.2f} GB {result['peak_of']}, "
    f"planned {result['planned_bytes'] / 1e9:.2f} GB per device",
  ]


if __name__ == "__main__":
  environment.run(main)
