"""Evaluates a Qwen3-VL folder on medical visual question answering, greedily.

  python -m experiments.evaluate_medvqa --model=DIR --data=DIR [--split=test] [--output=DIR]

--model is any Qwen3-VL folder (published, exported by a run, or a phantom model) or Hub id; --data a folder in
OmniMedVQA's layout, or one that holds such folders as train, validation and test; without --data, the phantom
benchmark. With --output, evaluation.json holds the figures and outputs.jsonl every completion.
"""

import json
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from rich.console import Console

from experiments import environment
from kepo_jax import evaluation, sharding
from kepo_jax.data import images, omnimedvqa, pipeline, prompts, splits, tokenization
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.reporting import progress, tables
from kepo_jax.training import programs
from kepo_jax.types import Example

_MODEL = flags.DEFINE_string("model", None, "Qwen3-VL folder or Hub id.", required=True)
_DATA = flags.DEFINE_string("data", "", "Folder in OmniMedVQA's layout; empty: the phantom benchmark.")
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test, where --data is split; else ignored.")
_OUTPUT = flags.DEFINE_string("output", "", "Folder for evaluation.json and outputs.jsonl; must not hold them yet.")
_TEMPLATES = flags.DEFINE_string(
  "templates", "", "Family of wordings in kepo_jax/data/prompts.py; empty: the one that the model names, or standard."
)
_KIND = flags.DEFINE_enum("kind", "evaluation", ["evaluation", "no_think", "think"], "Which wording of the family.")
_RESIZE = flags.DEFINE_enum("resize", "native", sorted(images.RESIZES), "How images are brought to size.")
_TRAIN_MODALITY = flags.DEFINE_string("train_modality", "MRI", "The in-domain modality.")
_LIMIT = flags.DEFINE_integer("limit", 0, "At most this many questions per modality; 0: all.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the questions under --limit.")
_BATCH = flags.DEFINE_integer("batch", 64, "Questions per batch over all devices.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 0, "Budget of an answer; 0: 32 for phantom models, else 1024.")
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of the weights; empty: float32 on a CPU only.")
_LENIENT = flags.DEFINE_bool("lenient", False, "Drop and count unusable records instead of stopping at them.")


def questions() -> tuple[list[Example], omnimedvqa.Summary]:
  """The questions that the flags ask for, and what the reader found.

  Raises:
    ValueError: the data cannot be read, or have no such split.
  """
  roots = splits.split_roots(_DATA.value) if _DATA.value else splits.phantom_roots()
  if roots and _SPLIT.value not in roots:
    raise ValueError(f"--split={_SPLIT.value}: {_DATA.value} has {sorted(roots)}.")
  examples, summary = omnimedvqa.read(roots.get(_SPLIT.value, _DATA.value), lenient=_LENIENT.value)
  return splits.limited(examples, _LIMIT.value, _SEED.value) if _LIMIT.value else examples, summary


def output_folder() -> epath.Path | None:
  """The folder of --output, made; None without the flag.

  Raises:
    ValueError: it holds an evaluation already.
  """
  if not _OUTPUT.value:
    return None
  folder = epath.Path(_OUTPUT.value)
  if (folder / "evaluation.json").exists():
    raise ValueError(f"{folder} holds an evaluation already; choose another --output.")
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def main(_: list[str]) -> None:
  """Loads, asks, counts, prints and writes."""
  environment.prepare()
  console = Console()
  folder = output_folder()
  examples, summary = questions()
  console.print(summary.text(), markup=False, highlight=False)
  model = conversion.resolved_folder(_MODEL.value)
  family = _TEMPLATES.value or tokenization.declared_templates(model) or "standard"
  if family not in prompts.TEMPLATES:
    raise ValueError(f"--templates={family} is unknown; use one of {sorted(prompts.TEMPLATES)}.")
  processor = pipeline.Processor.from_directory(model, templates=prompts.TEMPLATES[family], resize=_RESIZE.value)
  mesh = sharding.make_mesh(data=-1)
  dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  config, params = conversion.load_pretrained(model, jnp.dtype(dtype), mesh, layout="decode")
  tokens = _TOKENS.value or (32 if family == "brief" else 1024)
  settings = programs.SamplingSettings(samples=1, max_new_tokens=tokens, temperature=0.0)
  program = programs.sampling_program(config, processor, settings)
  about = {
    "model": str(_MODEL.value),
    "data": summary.root,
    "templates": family,
    "kind": _KIND.value,
    "resize": _RESIZE.value,
    "max_new_tokens": tokens,
    "dtype": dtype,
  }
  console.print(", ".join(f"{name} {value}" for name, value in about.items()), markup=False, highlight=False)

  display, start = progress.Display(), time.perf_counter()
  outputs: list[dict] = []
  with jax.set_mesh(mesh):
    result = evaluation.evaluate(
      lambda batch: program(params, sharding.place(mesh, batch), jax.random.key(0)),
      processor,
      examples,
      batch_size=_BATCH.value,
      train_modality=_TRAIN_MODALITY.value,
      kind=_KIND.value,
      progress=lambda done, total: display.progress("evaluation", done, total),
      on_output=outputs.append,
    )
  display.close()
  console.print(tables.rich_table(tables.accuracy_rows({"accuracy": result}), title="accuracy, %, with 95 % intervals"))
  lenient = result["lenient"]["overall"]["accuracy"]
  console.print(f"forgiving parser {100 * lenient:.1f} %, strict format {100 * result['format']:.1f} %")
  console.print(f"{len(examples)} questions in {time.perf_counter() - start:.1f} s", highlight=False)
  if folder:
    record = about | {"summary": summary.to_dict()} | result
    (folder / "outputs.jsonl").write_text("".join(json.dumps(output) + "\n" for output in outputs))
    (folder / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"written to {folder}", highlight=False)


if __name__ == "__main__":
  app.run(environment.reporting_errors(main))
