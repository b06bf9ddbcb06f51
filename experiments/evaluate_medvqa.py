"""Evaluates a Qwen3-VL folder on medical visual question answering, greedily or by sampling.

  python -m experiments.evaluate_medvqa --model=DIR --data=DIR [--split=test] [--output=DIR]
  python -m experiments.evaluate_medvqa --model=DIR --data=DIR --samples=8 --seed=1      # mean accuracy, pass@1 to 8
  python -m experiments.evaluate_medvqa --model=DIR --data=DIR --control=blank           # grey pictures; or text

--model is any Qwen3-VL folder (published, exported by a run, or a phantom model) or Hub id; --data data in a format of
docs/data.md, a folder that holds such data as train, validation and test, or a data set that TFDS has built; without
--data, the phantom benchmark. A single folder is cut as training cuts it, so that the default, --split=test, holds no
question that a run with the same modality, items and seed has trained on; --split=all asks every question. What is
already split is read whole, a published split (--split_files, with --data for its images) included.

Answers are read as Med-R1 reads them: the word inside the first answer block that holds one word, compared with the
gold letter; what does not parse counts as wrong. A forgiving parser is reported beside it, as are chance and the shares
of unparsed and truncated completions (docs/method.md, Evaluation). Images are brought to the size that the model's
folder names (kepo_resize in tokenizer_config.json, which a run writes with its export); --resize asks for another.

With --output, about.json says what is asked of whom, outputs.jsonl gets every completion as it comes, and
evaluation.json the metrics; --resume continues where an interrupted evaluation stopped, to the same bytes: model,
questions, images, settings, --batch and devices must be the same. `python -m experiments.compare_medvqa A B` compares
two such folders. A folder is locked by the evaluation that runs in it.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from rich.console import Console

from experiments import environment
from experiments.configs import grpo, grpo_medvqa
from kepo_jax import evaluation, sharding, storage
from kepo_jax.data import cleaning, images, prompts, splits, tokenization, usable
from kepo_jax.data import processor as processor_lib
from kepo_jax.data.readers import formats
from kepo_jax.data.tfds import folders
from kepo_jax.evaluation import outputs
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.reporting import progress, tables
from kepo_jax.training import checks, lock, programs
from kepo_jax.types import Example, Prompts, Rollouts

DATA = grpo.get_config().data  # how training cuts its data, unless flags say otherwise
# How training evaluates, by the family of wordings that a model was trained on: the longest answer, and the size of
# images where the model's folder does not tell.
TRAINED = {config.data.templates: config for config in (grpo.get_config(), grpo_medvqa.get_config())}
BUDGETS = {family: config.eval.max_new_tokens for family, config in TRAINED.items()}

_MODEL = flags.DEFINE_string("model", None, "Qwen3-VL folder or Hub id.", required=True)
_DATA = flags.DEFINE_string("data", "", "Data in a format of docs/data.md; empty: the phantom benchmark.")
_SPLIT_FILES = flags.DEFINE_string(
  "split_files", "", "Folder with the train/ and test/ of a published split, used verbatim."
)
_SPLIT = flags.DEFINE_enum(
  "split", "test", [*splits.SPLITS, "all"], "Part of the data; all: every question of a folder that is not split."
)
_TRAIN_ITEMS = flags.DEFINE_integer(
  "train_items", DATA.train_items, "Cut of a single folder: questions for training.", lower_bound=0
)
_VALIDATION_ITEMS = flags.DEFINE_integer(
  "validation_items", DATA.validation_items, "Cut of a single folder: for validation, per modality.", lower_bound=0
)
_TEST_ITEMS = flags.DEFINE_integer(
  "test_items", DATA.test_items, "Cut of a single folder: for the test, per modality.", lower_bound=0
)
_SPLIT_SEED = flags.DEFINE_integer("split_seed", DATA.split_seed, "Cut of a single folder: another seed, another cut.")
_OUTPUT = flags.DEFINE_string("output", "", "Folder for evaluation.json and outputs.jsonl; must not hold them yet.")
_RESUME = flags.DEFINE_bool("resume", False, "Continue the interrupted evaluation in --output.")
_TEMPLATES = flags.DEFINE_string(
  "templates", "", "Family of wordings in kepo_jax/data/prompts.py; empty: the one that the model names, or standard."
)
_KIND = flags.DEFINE_enum("kind", "evaluation", ["evaluation", "no_think", "think"], "Which wording of the family.")
_RESIZE = flags.DEFINE_enum(
  "resize",
  "",
  ["", *sorted(images.RESIZES)],
  "How images are brought to size; empty: as the model's folder says, else "
  f"{TRAINED['brief'].data.resize} for a phantom model and {TRAINED['standard'].data.resize} for others.",
)
_TRAIN_MODALITY = flags.DEFINE_string("train_modality", DATA.train_modality, "The in-domain modality.")
_LIMIT = flags.DEFINE_integer("limit", 0, "At most this many questions per modality; 0: all.", lower_bound=0)
_LIMIT_SEED = flags.DEFINE_integer("limit_seed", 0, "Chooses the questions under --limit.")
_CONTROL = flags.DEFINE_enum(
  "control", "none", list(evaluation.CONTROLS), "blank: every picture becomes grey; text: no picture is shown."
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Completions per question.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", None, "Divides the logits; 0: greedy. By default 0 for one sample, 1 for several.", lower_bound=0
)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the likeliest tokens of this much probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling; each question and sample has its own stream.")
_BATCH = flags.DEFINE_integer(
  "batch", 64, "Questions per batch over all devices, each with all its samples.", lower_bound=1
)
_DATASETS = flags.DEFINE_bool("datasets", False, "Show source data sets in the table even if there are many.")
_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  0,
  f"Longest answer, tokens; 0: as in training, {BUDGETS['brief']} for a phantom model, else {BUDGETS['standard']}.",
  lower_bound=0,
)
_FSDP = flags.DEFINE_integer(
  "fsdp", 1, "Devices that share every weight; every token goes to all of them.", lower_bound=1
)
_TENSOR = flags.DEFINE_integer(
  "tensor",
  1,
  "Devices that split the decoder's heads, MLP and vocabulary; the first choice for a large model.",
  lower_bound=1,
)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of the weights; empty: float32 on a CPU only.")
_LENIENT = flags.DEFINE_bool("lenient", False, "Drop and count unusable records instead of stopping at them.")


def questions(display: progress.Display) -> tuple[list[Example], cleaning.Summary, str]:
  """Returns the questions that the flags ask for, the reader's summary, and in words how they were chosen."""
  examples, summary, how = part_of_data(display)
  if _LIMIT.value:
    examples = splits.limited(examples, _LIMIT.value, _LIMIT_SEED.value)
    how += f", at most {_LIMIT.value} per modality"
  return examples, summary, f"{len(examples)} of {summary.kept} questions: {how}"


def part_of_data(display: progress.Display) -> tuple[list[Example], cleaning.Summary, str]:
  """Reads the part of the data that --split names, with the reader's summary and its description.

  Raises:
    ValueError: the data cannot be read, have no such split, or are too few for the cut.
    OSError: a remote folder cannot be read.
  """
  split, where = _SPLIT.value, _DATA.value or "the phantom benchmark"
  copying = functools.partial(display.progress, "copying data, bytes")
  data, split_files = (
    str(storage.staged(path, progress=copying)) if path else "" for path in (_DATA.value, _SPLIT_FILES.value)
  )
  if built := data and folders.find(data):
    return built_questions(built)
  image_root = None
  if split_files:
    roots, where, image_root = splits.published_parts(split_files), _SPLIT_FILES.value, data or None
  else:
    roots = splits.split_roots(data) if data else splits.phantom_roots()
  if roots and split not in roots:
    raise ValueError(f"--split={split}: {where} has {sorted(roots)}; choose one.")
  if not roots and split != "all":
    splits.refuse_published(data)
  found, summary = formats.read_any(roots.get(split, data), image_root=image_root, lenient=_LENIENT.value)
  summary.root = storage.origin(summary.root)
  if roots:
    examples, how = found, f"the part {split}"
  elif split == "all":
    examples, how = found, "the whole folder, questions for training included"
  else:
    examples = cut(found)[split]
    how = (
      f"the {split} part of a cut with --train_modality={_TRAIN_MODALITY.value} --train_items={_TRAIN_ITEMS.value} "
      f"--validation_items={_VALIDATION_ITEMS.value} --test_items={_TEST_ITEMS.value} --split_seed={_SPLIT_SEED.value}"
    )
  return examples, summary, how


def built_questions(folder: pathlib.Path) -> tuple[list[Example], cleaning.Summary, str]:
  """Reads the same of a data set that TFDS has built.

  Raises:
    ValueError: it has no such split.
  """
  from kepo_jax.data.tfds import reading  # slow to import, and seldom needed

  parts = reading.read_splits(folder)
  if not (found := parts.get(_SPLIT.value)):
    raise ValueError(
      f"--split={_SPLIT.value}: {folder} has {sorted(name for name in parts if parts[name])}; choose one."
    )
  summary = cleaning.Summary(root=storage.origin(folder), format="TFDS", records=len(found), kept=len(found))
  return found, summary, f"the part {_SPLIT.value}"


def cut(examples: list[Example]) -> dict[str, list[Example]]:
  """Splits a single folder as training does.

  Raises:
    ValueError: too few questions of the training modality.
  """
  try:
    return splits.split_by_modality(examples, flags.FLAGS)  # the flags have the names of the config's fields
  except ValueError as error:
    raise ValueError(
      f"--split={_SPLIT.value}: {_DATA.value} cannot be cut as for training: {str(error).rstrip('.')}. The flags are "
      "--train_modality, --train_items, --validation_items and --test_items; --split=all asks every question."
    ) from error


def askable(examples: list[Example], processor: processor_lib.Processor, display: progress.Display) -> list[Example]:
  """Returns the questions whose images can be read and whose prompts have room: all of them, unless --lenient.

  Raises:
    ValueError: a question cannot be asked; names it and the file.
  """
  if not (_DATA.value or _SPLIT_FILES.value):
    return examples  # the phantom's pictures were drawn here
  split = _SPLIT.value
  found = checks.with_readable_images(
    {split: examples},
    lenient=_LENIENT.value,
    progress=functools.partial(display.progress, "checking images"),
    refusals=lambda _, asked: usable.refusals(asked, processor, {_KIND.value: 0}),
  )
  return found[split]


def image_size(model: pathlib.Path) -> tuple[str, str]:
  """Returns how images are brought to size, and in words why.

  Args:
    model: its folder.

  Raises:
    ValueError: the folder names a size that does not exist.
  """
  declared, family = tokenization.declared_resize(model), tokenization.declared_templates(model)
  if _RESIZE.value:
    return _RESIZE.value, f"as --resize asks; the model's folder says {declared or 'nothing'}"
  if declared:
    return declared, "as the model's folder says, kepo_resize in tokenizer_config.json"
  config = TRAINED.get(family or "", TRAINED["standard"])
  known = f"for wordings {family}" if family in TRAINED else "for published checkpoints"
  return config.data.resize, f"the default {known}; the model's folder has no kepo_resize"


def sampling_settings(tokens: int) -> programs.SamplingSettings:
  """Returns greedy or sampled settings, as the flags say.

  Raises:
    ValueError: several greedy completions.
  """
  samples, temperature = _SAMPLES.value, _TEMPERATURE.value
  if temperature is None:
    temperature = float(samples > 1)
  if samples > 1 and not temperature:
    raise ValueError(f"--samples={samples} --temperature=0 would give {samples} times the same; raise one of them.")
  return programs.SamplingSettings(samples=samples, max_new_tokens=tokens, temperature=temperature, top_p=_TOP_P.value)


def sampler(
  model: str,
  processor: processor_lib.Processor,
  mesh: jax.sharding.Mesh,
  dtype: str,
  settings: programs.SamplingSettings,
) -> Callable[[Prompts], Rollouts]:
  """Loads the weights and returns a function from host prompts to completions."""
  # The decode layout holds weights whole over fsdp, which is what --fsdp is there to avoid.
  layout = "decode" if _FSDP.value == 1 else "train"
  # Side by side, as the token loop of a run has them: out of a stack each layer would be copied for every token.
  config, params = checkpoint.load_pretrained(model, jnp.dtype(dtype), mesh, layout=layout, unstack=True)
  program = programs.sampling_program(config, processor, settings, weight_stationary=_FSDP.value > 1)
  key = jax.random.key(_SEED.value)
  # One key for all batches: the sampler folds each question's identity into it.
  return lambda batch: program(params, sharding.place(mesh, batch), key)


def show(console: Console, result: dict[str, Any]) -> None:
  """Prints the metrics."""
  rows = tables.evaluation_rows(result, datasets=_DATASETS.value or None)
  console.print(tables.rich_table(rows, title="accuracy, %, with 95 % intervals"))
  if "pass_at_k" in result:
    title = f"pass@k, %, from {result['samples']} samples of each question, with 95 % intervals"
    console.print(tables.rich_table(tables.pass_rows(result), title=title))
  console.print(tables.rich_table(tables.rate_rows(result), title="completions, %"))
  console.print(f"format {100 * result['format']:.1f} %, {result['completion_length']:.1f} tokens on average")


@contextlib.contextmanager
def locked(output: str) -> Iterator[Callable[[], None]]:
  """Holds --output against other evaluations meanwhile: two that append to one file would mix their lines.

  Args:
    output: the folder, which is made; or "".

  Yields:
    a check that raises ValueError if another process has taken the folder.

  Raises:
    ValueError: another evaluation runs in it, or there is no such bucket.
    OSError: it cannot be written.
  """
  if not output:
    yield lambda: None
    return
  folder = epath.Path(output)
  storage.check_bucket(folder)
  made = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  try:
    with lock.WorkdirLock(folder, flag="--output") as held:
      yield held.check
  finally:
    if made and not storage.is_remote(folder):
      with contextlib.suppress(OSError):  # an evaluation that was refused leaves nothing
        pathlib.Path(folder).rmdir()


def main(_: list[str]) -> None:
  """Evaluates, with --output to itself."""
  environment.prepare()
  with locked(_OUTPUT.value) as check_lock:
    evaluate_questions(check_lock)


def evaluate_questions(check_lock: Callable[[], None]) -> None:
  """Loads, asks, counts, prints and writes.

  Args:
    check_lock: called before each write of an answer; raises ValueError if another process has taken the folder.
  """
  console = progress.terminal()
  if not _RESUME.value:
    outputs.Journal.check_fresh(_OUTPUT.value)
  display = progress.Display()
  examples, summary, how = questions(display)
  console.print(f"{summary.text()}\n{how}", soft_wrap=True)
  copying = functools.partial(display.progress, "copying the model, bytes")
  model = checkpoint.resolved_folder(_MODEL.value, progress=copying)
  declared = tokenization.declared_templates(model) or "standard"
  family = _TEMPLATES.value or declared
  if family not in prompts.TEMPLATES:
    raise ValueError(f"--templates={family} is unknown; use one of {sorted(prompts.TEMPLATES)}.")
  resize, why = image_size(model)
  console.print(f"images: {resize}, {why}", soft_wrap=True)
  mesh = environment.device_mesh(_FSDP.value, _TENSOR.value)
  processor = processor_lib.Processor.from_directory(
    model,
    templates=prompts.TEMPLATES[family],
    resize=resize,
    held_rows=functools.partial(sharding.held_rows, mesh),
  )
  examples = askable(examples, processor, display)
  dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  settings = sampling_settings(_TOKENS.value or BUDGETS.get(declared, BUDGETS["standard"]))
  asked = {
    "templates": family,
    "kind": _KIND.value,
    "control": _CONTROL.value,
    "resize": resize,
    "samples": settings.samples,
    "temperature": settings.temperature,
    "top_p": settings.top_p,
    "seed": _SEED.value,
    "max_new_tokens": settings.max_new_tokens,
    "dtype": dtype,
    # Neighbours and devices change no random number, and still the last bits of a logit, which may decide a token.
    "batch": _BATCH.value,
    "mesh": dict(mesh.shape),
    "device": jax.devices()[0].device_kind,
  }
  notes = {"model": str(_MODEL.value), "data": summary.root}
  console.print(", ".join(f"{k} {v}" for k, v in (notes | asked).items()))
  if _OUTPUT.value:  # who writes nothing does not wait for the hashes
    asked |= {"model_hash": outputs.model_hash(model)}
    asked |= outputs.questions_identity(examples, processor.templates, _KIND.value)
  record = outputs.Journal(
    _OUTPUT.value,
    asked,
    notes | {"questions": how, "summary": summary.to_dict()},
    order=[(example.id, number) for example in examples for number in range(settings.samples)],
    batch=_BATCH.value * settings.samples,
    resume=_RESUME.value,
  )
  if record.resumed:
    console.print(record.resumed)

  def write(output: dict[str, Any]) -> None:
    check_lock()
    record.write(output)

  start = time.perf_counter()
  with record, jax.set_mesh(mesh):
    if record.complete:
      result = evaluation.summarised(record.earlier, train_modality=_TRAIN_MODALITY.value)
    else:
      result = evaluation.evaluate(
        sampler(str(model), processor, mesh, dtype, settings),
        processor,
        examples,
        batch_size=_BATCH.value,
        train_modality=_TRAIN_MODALITY.value,
        kind=_KIND.value,
        control=_CONTROL.value,
        earlier=record.earlier,
        progress=lambda done, total: display.progress("evaluation", done, total),
        on_output=write,
      )
  display.close()
  record.finish(result)
  show(console, result)
  console.print(f"{len(examples)} questions in {time.perf_counter() - start:.1f} s")
  if _OUTPUT.value:
    console.print(f"written to {_OUTPUT.value}", markup=False)


def run() -> None:
  """Starts the command."""
  environment.run(main)


if __name__ == "__main__":
  run()
