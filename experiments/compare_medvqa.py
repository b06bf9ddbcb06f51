"""Compares two evaluations of the same questions, question by question.

  python -m experiments.compare_medvqa A B [--field=lenient_correct] [--json=FILE] [--markdown=FILE]

A and B are --output folders of experiments.evaluate_medvqa, or their outputs.jsonl, finished ones: two models, a model
and itself under a control, greedy against sampled. Differences are B less A with a paired bootstrap 95 % interval that
draws the questions about one image together; p-values are of the exact McNemar's test, which takes questions as
independent, those of the modalities also corrected after Holm for their number. Where an evaluation has several
completions per question, means per question are compared, and there are no p-values.
"""

import json
import pathlib
from typing import Any

from absl import flags

from experiments import environment
from kepo_jax import evaluation
from kepo_jax.evaluation import comparison
from kepo_jax.evaluation import outputs as outputs_lib
from kepo_jax.reporting import progress, tables

_FIELD = flags.DEFINE_enum("field", "correct", list(comparison.FIELDS), "Strict or forgiving parser.")
_TRAIN_MODALITY = flags.DEFINE_string(
  "train_modality", "", "The in-domain modality; empty: that of A's evaluation.json, or MRI."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.")
_JSON = flags.DEFINE_string("json", "", "File for all figures.")
_MARKDOWN = flags.DEFINE_string("markdown", "", "File for the table.")

# What may explain a difference besides the model, and is worth a line where it differs.
SETTINGS = (
  "templates", "kind", "control", "resize", "samples", "temperature", "top_p", "seed", "max_new_tokens", "dtype",
)  # fmt: skip
METHOD = (
  "Difference: B less A, percentage points, paired bootstrap, 95 %; questions about one image are drawn together. "
  "Out of domain: each modality counts the same."
)
TESTS = "p: exact McNemar's test, two-sided; Holm: the same corrected for the {count} modalities."
SHARED = (
  "There are fewer images than questions: McNemar's test takes questions as independent, and p is too small where "
  "answers about one image agree."
)
NO_TESTS = "Means of several completions per question are compared; McNemar's test needs one."


def reservations(found: dict[str, Any], paths: list[str], settings: list[dict[str, Any]]) -> list[str]:
  """What else the two may differ in, and what could not be checked, in sentences.

  Args:
    found: of `evaluation.compared`.
    paths: of the two evaluations.
    settings: of the two, as `outputs.read_settings` gives them.
  """
  notes = [f"The two differ in {text}." for text in [", ".join(differing(*settings))] if text]
  if all("prompts_hash" in each for each in settings) and len({each["prompts_hash"] for each in settings}) > 1:
    notes.append("The two were asked in different words.")
  if found["other_images"]:
    notes.append(f"{found['other_images']} questions have other image files in B.")
  lacking = [path for path, each in zip(paths, settings, strict=True) if not {"count", "whole"} & each.keys()]
  return notes + [f"{path} has no about.json beside it: whether it is whole is not known." for path in lacking]


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
  """Settings that both folders name and that differ: "control none / blank"."""
  return [
    f"{name} {first[name]} / {second[name]}"
    for name in SETTINGS
    if name in first and name in second and first[name] != second[name]
  ]


def main(argv: list[str]) -> None:
  """Reads, compares, prints and writes.

  Raises:
    ValueError: not two finished evaluations, or of different questions.
  """
  if len(argv) != 3:
    raise ValueError("give two evaluations: python -m experiments.compare_medvqa A B")
  paths = argv[1:]
  outputs = [outputs_lib.read_outputs(path) for path in paths]
  settings = [outputs_lib.read_settings(path) for path in paths]
  modality = _TRAIN_MODALITY.value or settings[0].get("train_modality", "MRI")
  try:
    found = evaluation.compared(*outputs, train_modality=modality, field=_FIELD.value, seed=_SEED.value)
  except ValueError as error:
    raise ValueError(f"{paths[0]} (first) and {paths[1]} (second): {error}") from error
  tested = found["overall"]["p_value"] is not None
  notes = [METHOD, TESTS.format(count=len(found["modalities"])) if tested else NO_TESTS]
  if tested and 0 < found["overall"]["images"] < found["overall"]["count"]:
    notes.append(SHARED)
  notes += reservations(found, paths, settings)
  rows = tables.comparison_rows(found)
  named = [f"{letter}: {path}" for letter, path in zip("AB", paths, strict=True)]
  if _JSON.value:
    _write(_JSON.value, json.dumps({"first": paths[0], "second": paths[1], "notes": notes, **found}, indent=2) + "\n")
  if _MARKDOWN.value:
    _write(_MARKDOWN.value, "\n\n".join([*named, tables.markdown_table(rows), *notes]) + "\n")
  console = progress.terminal()
  for line in named:
    console.print(line, soft_wrap=True)
  console.print(tables.rich_table(rows, title=f"accuracy, %, {_FIELD.value}"))
  console.print("\n".join(notes), soft_wrap=True)


def _write(path: str, text: str) -> None:
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)


def run() -> None:
  """Starts the command."""
  environment.run(main, arguments=True)


if __name__ == "__main__":
  run()
