"""Measures how good a teacher's hints are for a student, per modality, without training anything.

  python -m experiments.measure_hints --output=FILE.json                       # the phantom's `confused` and `weak`
  python -m experiments.measure_hints --student=DIR --teacher=DIR --data=DIR --output=FILE.json --hint_prompt=hint_only

1. The student samples --samples rollouts of every question at temperature 1. Cliffs are the questions on which every
   one is wrong.
2. For each cliff the teacher writes a new hint in each of --rounds rounds, and the student samples --candidates under
   it. Every cliff goes through all rounds, so rates are the same in expectation in each of them.
3. The teacher answers the same questions without a hint; answers that are accurate and well formed are kept.
4. The student scores, with the hint in its prompt and without, accepted candidates (`reliance`) and the teacher's
   answers (`gain`, and `letter_gain` of the token that says the letter): docs/results.md has the definitions.

Settings are those of experiments/configs/kepo.py for the wordings that the student was trained on, and random numbers
those of a run's first step. A folder that is not split is cut as such a run cuts it. Figures of a modality without
cliffs are null.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from experiments import environment, hints, settings
from experiments.configs import kepo
from kepo_jax import sharding, storage
from kepo_jax.config import Config
from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts, splits, tokenization, usable
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.reporting import progress, tables
from kepo_jax.training import checks
from kepo_jax.training.batched_model import BatchedModel
from kepo_jax.types import Example

DEFAULT = kepo.get_config()

_STUDENT = flags.DEFINE_string("student", DEFAULT.model.student, "Qwen3-VL folder or Hub id.")
_TEACHER = flags.DEFINE_string("teacher", DEFAULT.model.teacher, "The same, with the student's tokenizer.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the metrics.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --output if it exists.")
_DATA = flags.DEFINE_string("data", "", "Data in a format of docs/data.md; empty: the phantom benchmark.")
_SPLIT_FILES = flags.DEFINE_string(
  "split_files", "", "Folder with the train/ and test/ of a published split, used verbatim."
)
_SPLIT = flags.DEFINE_enum("split", "test", list(splits.SPLITS), "Part of the data.")
_LENIENT = flags.DEFINE_bool("lenient", False, "Drop and count unusable records instead of stopping at them.")
_LIMIT = flags.DEFINE_integer("limit", 0, "At most this many questions per modality; 0: all.", lower_bound=0)
_LIMIT_SEED = flags.DEFINE_integer("limit_seed", 0, "Chooses the questions under --limit.")
_HINT_PROMPT = flags.DEFINE_enum(
  "hint_prompt",
  DEFAULT.exploration.hint_prompt,
  ["hint_and_answer", "hint_only"],
  "What a hinted student is shown: the hint and the right answer, or the hint alone.",
)
_SAMPLES = flags.DEFINE_integer(
  "samples", DEFAULT.batch.rollouts, "Rollouts per question, and teacher's answers per cliff.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", DEFAULT.exploration.rounds, "Hints per cliff.", lower_bound=1)
_CANDIDATES = flags.DEFINE_integer(
  "candidates", DEFAULT.exploration.replacements, "Hinted completions per cliff and round.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of all sampling; each question and sample has its own stream.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch", 64, "Questions per batch over all devices.", lower_bound=1)
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share every weight.", lower_bound=1)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that split heads, MLP and vocabulary.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of the weights; empty: float32 on a CPU only.")


def settings_for(student: pathlib.Path) -> Config:
  """The config of a run with this student, with what the flags ask for.

  Args:
    student: its folder, which may name the wordings it was trained on and the size of its images.
  """
  family = tokenization.declared_templates(student) or "standard"
  config = kepo.get_config("phantom" if family == "brief" else "medvqa")
  config.model.student, config.model.teacher = _STUDENT.value, _TEACHER.value
  config.data.templates = family
  config.data.resize = tokenization.declared_resize(student) or config.data.resize
  config.data.directory, config.data.split_files = _DATA.value, _SPLIT_FILES.value
  config.data.lenient = _LENIENT.value
  config.batch.rollouts = _SAMPLES.value
  config.exploration.hint_prompt = _HINT_PROMPT.value
  config.exploration.rounds, config.exploration.candidates = _ROUNDS.value, _CANDIDATES.value
  config.seed = _SEED.value
  return settings.typed(config)


def questions(config: Config, processor: processor_lib.Processor, display: progress.Display) -> list[Example]:
  """The questions that the flags ask for, each of which can be asked in all wordings.

  Raises:
    ValueError: the data cannot be read, or, unless --lenient, a question cannot be asked.
    OSError: a remote folder cannot be read.
  """
  found = splits.load(config.data, progress=functools.partial(display.progress, "copying data, bytes"))
  examples = splits.limited(found[_SPLIT.value], _LIMIT.value or None, _LIMIT_SEED.value)
  kinds = checks.prompt_wordings(config, "train")  # those of exploration, whatever the split
  asked = checks.with_readable_images(
    {_SPLIT.value: examples},
    lenient=_LENIENT.value,
    progress=functools.partial(display.progress, "checking images"),
    refusals=lambda _, asked: usable.refusals(asked, processor, kinds),
  )[_SPLIT.value]
  if not asked:
    raise ValueError(f"--split={_SPLIT.value}: no question in {_DATA.value or 'the phantom benchmark'}.")
  return asked


def check_output(path: str) -> None:
  """Refuses to write over metrics, and makes their folder, before anything is computed for them.

  Raises:
    ValueError: the file exists, and --overwrite does not say that it may go; or there is no such bucket.
    OSError: it cannot be looked at, or its folder cannot be made.
  """
  storage.check_bucket(path)
  with storage.reaching(path):
    file = epath.Path(path)
    if file.exists() and not _OVERWRITE.value:
      raise ValueError(f"{path} exists; choose another --output, or pass --overwrite.")
    file.parent.mkdir(parents=True, exist_ok=True)


def described(config: Config, dtype: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """What was asked of whom, JSON-able."""
  flat = {name: flags.FLAGS[name].value for name in ("split", "limit", "limit_seed", "samples", "rounds", "candidates")}
  return flat | {
    "student": config.model.student,
    "teacher": config.model.teacher,
    "data": config.data.directory or "the phantom benchmark",
    "split_files": config.data.split_files,
    "hint_prompt": config.exploration.hint_prompt,
    "seed": config.seed,
    "templates": config.data.templates,
    "resize": config.data.resize,
    "sampling": dataclasses.asdict(config.sampling),
    "reward": dataclasses.asdict(config.reward),
    "exploration": dataclasses.asdict(config.exploration),
    "answer_temperature": config.supervised.temperature,
    "dtype": dtype,
    # They change no random number, and still the last bits of a logit, which may decide a token.
    "batch": _BATCH.value,
    "mesh": dict(mesh.shape),
    "device": jax.devices()[0].device_kind,
  }


def main(_: list[str]) -> None:
  """Loads, measures, prints and writes."""
  environment.prepare()
  check_output(_OUTPUT.value)
  begun, display = time.perf_counter(), progress.Display()
  folders = {
    role: checkpoint.resolved_folder(name, progress=functools.partial(display.progress, f"copying {role}, bytes"))
    for role, name in (("student", _STUDENT.value), ("teacher", _TEACHER.value))
  }
  config = settings_for(folders["student"])
  if config.data.templates not in prompts.TEMPLATES:
    raise ValueError(f"{_STUDENT.value} names the wordings {config.data.templates}, which are unknown.")
  mesh = environment.device_mesh(_FSDP.value, _TENSOR.value)
  processor = processor_lib.Processor.from_directory(
    folders["student"],
    templates=prompts.TEMPLATES[config.data.templates],
    resize=config.data.resize,
    prompt_buckets=tuple(config.data.prompt_buckets),
    patch_buckets=tuple(config.data.patch_buckets),
    held_rows=functools.partial(sharding.held_rows, mesh),
  )
  checks.check_teacher(config, processor, folders["teacher"])
  examples = questions(config, processor, display)
  dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

  def loaded(role: str) -> BatchedModel:
    tell = functools.partial(display.progress, f"loading {role}")
    parts = checkpoint.load_pretrained(
      folders[role], jnp.dtype(dtype), mesh, layout="decode", unstack=True, progress=tell
    )
    return BatchedModel(*parts, processor, mesh, size=_BATCH.value, chunk=config.objective.chunk)

  with jax.set_mesh(mesh):
    records = hints.measured(config, loaded("student"), loaded("teacher"), examples, progress=display.progress)
  display.close()
  names = {role: epath.Path(getattr(config.model, role)).name for role in ("student", "teacher")}
  records = [names | {"hint_prompt": _HINT_PROMPT.value} | record for record in records]
  result = {"settings": described(config, dtype, mesh), "records": records}
  storage.write_text(_OUTPUT.value, json.dumps(result, indent=2, allow_nan=False) + "\n")
  console = progress.terminal()
  title = f"{names['student']} helped by {names['teacher']}, {_HINT_PROMPT.value}"
  console.print(tables.rich_table(tables.hint_rows(records), title=title))
  console.print(f"{len(examples)} questions in {time.perf_counter() - begun:.0f} s")
  console.print(f"written to {_OUTPUT.value}")


def run() -> None:
  """Starts the command."""
  environment.run(main)


if __name__ == "__main__":
  run()
