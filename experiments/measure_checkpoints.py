"""Measures what checkpoints cost a run: how long they hold it up, and how fast they reach the disk.

  python -m experiments.measure_checkpoints                       # 40 M parameters, every 5 of 20 steps, 2 CPU cores
  python -m experiments.measure_checkpoints --parameters=4e6 --every=2 --steps=6 --workdir=DIR --json=FILE

A student with the architecture of Qwen3-VL and random float32 weights is trained by the ordinary loop on phantom
questions, with checkpoints of weights and both Adam moments. How long a save holds the loop up is `seconds/checkpoint`
of the run's timing.jsonl; a save ends when its manifest is there. Then the final state is saved with no training
beside it, and the same bytes are written as one plain file and synced, on the same disk.
"""

import contextlib
import json
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.table import Table

from experiments import environment, phantom_folder, settings
from experiments.configs import grpo
from kepo_jax import storage, training
from kepo_jax.config import Config
from kepo_jax.models.qwen3_vl import checkpoint, model, side_files
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig, TextConfig, VisionConfig
from kepo_jax.reporting import RunReporter, progress
from kepo_jax.training import checkpoints, manifest
from kepo_jax.types import Example, Hook, StepReport

_PARAMETERS = flags.DEFINE_float("parameters", 40e6, "Of the student, to the nearest decoder layer.", lower_bound=0)
_EVERY = flags.DEFINE_integer("every", 5, "Steps between checkpoints.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of the run.", lower_bound=1)
_PROMPTS = flags.DEFINE_integer("prompts", 4, "Questions per step.", lower_bound=1)
_ROLLOUTS = flags.DEFINE_integer("rollouts", 4, "Rollouts per question.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Saves without training beside them, and plain writes.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "runs", "Folder on the disk to measure; what is written in it is removed.")
_JSON = flags.DEFINE_string("json", "", "File for the figures.")

_CONSOLE_WIDTH = 120


def student_config(tokens: dict[str, int], vocabulary: int, layers: int) -> Qwen3VLConfig:
  """A small Qwen3-VL that reads the phantom's tokens and pictures.

  Args:
    tokens: name -> id, the special tokens among them.
    vocabulary: rows of the head.
    layers: of the decoder.
  """
  return Qwen3VLConfig(
    text=TextConfig(
      vocab_size=vocabulary,
      hidden_size=512,
      intermediate_size=1536,
      num_hidden_layers=layers,
      num_attention_heads=8,
      num_key_value_heads=4,
      head_dim=64,
      rope_theta=10_000.0,
      mrope_section=(12, 10, 10),
    ),
    vision=VisionConfig(
      depth=3,
      hidden_size=256,
      intermediate_size=1024,
      num_heads=4,
      out_hidden_size=512,
      num_position_embeddings=64,
      deepstack_visual_indexes=(0, 1),
      patch_size=8,
    ),
    tie_word_embeddings=True,
    image_token_id=tokens["<|image_pad|>"],
    video_token_id=tokens["<|video_pad|>"],
    vision_start_token_id=tokens["<|vision_start|>"],
    vision_end_token_id=tokens["<|vision_end|>"],
  )


def size(config: Qwen3VLConfig) -> int:
  """Parameters of a model."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params(config)))


def sized_config(parameters: float) -> Qwen3VLConfig:
  """The config whose model has about so many parameters: it differs in the number of decoder layers."""
  tokenizer = phantom_folder.make_tokenizer()
  tokens = tokenizer.get_vocab()
  vocabulary = -(-len(tokens) // 32) * 32
  fewest = 2  # as many as DeepStack feeds
  least, more = (size(student_config(tokens, vocabulary, layers)) for layers in (fewest, fewest + 1))
  layers = fewest + max(0, round((parameters - least) / (more - least)))
  return student_config(tokens, vocabulary, layers)


def write_student(folder: pathlib.Path, config: Qwen3VLConfig) -> None:
  """Writes a random student in float32, with the phantom's tokenizer."""
  source = folder.with_name(f"{folder.name}-source")
  phantom_folder.write_folder(source, side_files.config_record(config))
  params = model.init_params(config, jax.random.key(0))
  checkpoint.save_pretrained(folder, config, params, source=source, dtype=np.float32)


def run_config(student: pathlib.Path) -> Config:
  """GRPO with nothing but steps and checkpoints, all of which stay."""
  config = grpo.get_config()
  config.model.student = str(student)
  config.batch.prompts, config.batch.rollouts = _PROMPTS.value, _ROLLOUTS.value
  # A save is told of in the timing of the step after it, so one more step follows the last one that counts.
  config.train.steps = _STEPS.value + 1
  config.eval.every, config.eval.test = 0, False
  config.checkpoint.every, config.checkpoint.minutes = _EVERY.value, 0.0
  config.checkpoint.keep = _STEPS.value // _EVERY.value + 1
  config.checkpoint.best = "none"
  return settings.typed(config)


def vowels(completion: str, example: Example) -> float:
  """Share of vowels: differs between rollouts that are noise, so that there are gradients, and moments other than 0."""
  del example
  return sum(letter in "aeiou" for letter in completion) / max(1, len(completion))


class Clock(Hook):
  """Keeps when each step ended, which is when its checkpoint begins."""

  def __init__(self):
    self.ended: dict[int, float] = {}

  def step(self, report: StepReport) -> None:
    """Notes the time."""
    self.ended[report.step] = time.time()


def trained(folder: pathlib.Path) -> tuple[Any, dict[str, list[float]]]:
  """Trains in `folder`: the final state, and lists of seconds.

  "step": of every step but the first, which compiles; "step beside a save" and "step alone": those after a save and
  the others; "blocked" and "save": of every checkpoint but that of the last step.
  """
  workdir, clock = folder / "run", Clock()
  result = training.train(
    run_config(folder / "student"), workdir=workdir, rewards={"vowels": (vowels, 1.0)}, hooks=[RunReporter(), clock]
  )
  records = [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]
  records = [record for record in records if record["step"] > 1 and "seconds/step" in record]
  after_save = [record for record in records if "seconds/checkpoint" in record]
  saved = [step for step in checkpoints.steps_in(workdir / "checkpoints") if step <= _STEPS.value]
  ends = {step: (workdir / "checkpoints" / str(step) / manifest.NAME).stat().st_mtime for step in saved}
  return result.state, {
    "step": [record["seconds/step"] for record in records],
    "step beside a save": [record["seconds/step"] for record in after_save],
    "step alone": [record["seconds/step"] for record in records if record not in after_save],
    "blocked": [record["seconds/checkpoint"] for record in after_save],
    "save": [ends[step] - clock.ended[step] for step in saved],
  }


def written(folder: pathlib.Path, state: Any) -> dict[str, list[float]]:
  """Seconds of saves with no training beside them, and in turn with them of plain writes: other load hits both."""
  store = checkpoints.Checkpoints(folder / "alone", every=1, minutes=0.0, keep=1)
  arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
  found: dict[str, list[float]] = {"blocked alone": [], "save alone": [], "plain write": []}
  with contextlib.closing(store):
    for step in range(1, _REPEATS.value + 1):
      start = time.perf_counter()
      store.save(step, state, {})
      found["blocked alone"].append(time.perf_counter() - start)
      store.wait()
      found["save alone"].append(time.perf_counter() - start)
      found["plain write"].append(plain_write(folder / "plain", arrays))
  return found


def plain_write(path: pathlib.Path, arrays: Sequence[np.ndarray]) -> float:
  """Seconds of writing some arrays to one file and syncing it."""
  start = time.perf_counter()
  with path.open("wb") as file:
    for array in arrays:
      file.write(array.tobytes() if array.ndim == 0 else array.view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
  seconds = time.perf_counter() - start
  path.unlink()
  return seconds


def figures(
  seconds: dict[str, list[float]], *, every: int, parameters: int, state_bytes: int, disk_bytes: int
) -> dict[str, Any]:
  """What was measured, JSON-able.

  Args:
    seconds: what -> one entry for each time that it was done.
    every: steps between checkpoints.
    parameters: of the student.
    state_bytes: of its weights and moments.
    disk_bytes: of one checkpoint.
  """
  medians = {what: statistics.median(values) for what, values in seconds.items() if values}
  interval = every * medians["step"]
  return {
    "parameters": parameters,
    "state_bytes": state_bytes,
    "disk_bytes": disk_bytes,
    "every": every,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "cores": os.cpu_count(),
    "blocked_share": medians["blocked"] / interval,
    "longest_blocked_share": max(seconds["blocked"]) / interval,
    "megabytes_per_second": {
      what: state_bytes / 1e6 / medians[what] for what in ("save", "save alone", "plain write") if what in medians
    },
    "median_seconds": medians,
    "seconds": seconds,
  }


def table(found: dict[str, Any]) -> Table:
  """The figures as a table."""
  medians, rates, every = found["median_seconds"], found["megabytes_per_second"], found["every"]
  title = (
    f"{found['parameters'] / 1e6:.1f} M parameters, a state of {found['state_bytes'] / 1e6:.0f} MB, "
    f"{found['disk_bytes'] / 1e6:.0f} MB on the disk; {found['devices']}, {found['cores']} cores"
  )
  shown = Table("", "seconds, median", "MB/s", "times", title=title)

  def row(label: str, what: str) -> None:
    if what in medians:
      rate = f"{rates[what]:.0f}" if what in rates else ""
      shown.add_row(label, f"{medians[what]:.3f}", rate, str(len(found["seconds"][what])))

  row("step", "step")
  row("step without a save beside it", "step alone")
  row("step after a save", "step beside a save")
  row("loop blocked per save (seconds/checkpoint)", "blocked")
  row("save() to manifest, beside training", "save")
  row("save() to manifest, alone", "save alone")
  row("plain write of the same bytes, synced", "plain write")
  longest = f"longest {100 * found['longest_blocked_share']:.1f} %"
  shown.add_row(f"share of {every} steps that is blocked", f"{100 * found['blocked_share']:.1f} %, {longest}", "", "")
  return shown


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
  """A folder on the disk to measure, removed at the end."""
  parent = pathlib.Path(_WORKDIR.value)
  parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix="measure-checkpoints-", dir=parent) as name:
    yield pathlib.Path(name)


def main(_: Sequence[str]) -> None:
  """Trains, saves, writes, and shows what each took."""
  environment.prepare()
  if _STEPS.value < 2 * _EVERY.value:
    raise ValueError(f"--steps={_STEPS.value} has too few checkpoints; use {2 * _EVERY.value} or more.")
  with scratch() as folder:
    config = sized_config(_PARAMETERS.value)
    write_student(folder / "student", config)
    state, seconds = trained(folder)
    newest = folder / "run" / "checkpoints" / str(_STEPS.value + 1)
    found = figures(
      seconds | written(folder, state),
      every=_EVERY.value,
      parameters=size(config),
      state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
      disk_bytes=sum(path.stat().length for path in storage.files_under(newest)),
    )
  progress.terminal(width=_CONSOLE_WIDTH).print(table(found))
  if _JSON.value:
    storage.write_text(_JSON.value, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  environment.run(main)
