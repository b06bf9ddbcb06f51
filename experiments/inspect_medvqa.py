"""Checks a download of medical questions before anything is trained on it.

  python -m experiments.inspect_medvqa PATH... [--json] [--decode] [--images_root=DIR] [--access=NAME] [--lenient]

A PATH is a folder in OmniMedVQA's layout, Med-R1's or MedVLM-R1's split files, a Hugging Face folder of parquet files
or saved to disk, or one file of these; docs/data.md describes them. Prints what was kept, repaired and dropped by
which rule, what the questions are, and what their images are: every file's header is opened, and with --decode every
pixel. With several PATHs, how many images each has in common with those before it. --json writes the same to standard
output for machines.

The exit status is 0 if nothing was found that stops a run: what rules repair, note or drop does not, and with --lenient
neither does what they call an error, as long as a question is left. It is 1 at the first PATH that a run would stop at,
with one line on standard error that names the file and the record. Pixels are looked at with --decode alone, images not
at all with --noimages; whether the questions are enough for a split, training says.
"""

import functools
import itertools
import json
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from rich.console import Console, RenderableType
from rich.table import Table

from experiments import environment
from kepo_jax import storage
from kepo_jax.data import cleaning, inspection, splits
from kepo_jax.data.readers import formats
from kepo_jax.reporting import progress
from kepo_jax.types import Example

_JSON = flags.DEFINE_bool("json", False, "Write JSON to standard output.")
_DECODE = flags.DEFINE_bool("decode", False, "Decode every image fully: finds files that are cut off.")
_IMAGES = flags.DEFINE_bool("images", True, "Open the images; --noimages for questions whose images are not at hand.")
_IMAGES_ROOT = flags.DEFINE_string("images_root", None, "Folder that image paths start from; by default found.")
_ACCESS = flags.DEFINE_string("access", "Open-access", "Folder below QA_information, in OmniMedVQA's layout.")
_LENIENT = flags.DEFINE_bool("lenient", False, "Drop and count unusable records instead of stopping at them.")


def inspected(path: str, display: progress.Display) -> tuple[list[Example], dict[str, Any]]:
  """The usable questions of a path, and its report: `summary`, `figures` and, unless --noimages, `images`.

  Raises:
    ValueError: the data cannot be used.
    OSError: a remote path cannot be read.
  """
  copying = functools.partial(display.progress, "copying, bytes")
  image_root = _IMAGES_ROOT.value and storage.staged(_IMAGES_ROOT.value, progress=copying)
  examples, summary = formats.read_any(
    storage.staged(path, progress=copying),
    image_root=image_root,
    access=_ACCESS.value,
    lenient=_LENIENT.value,
    check_images=_IMAGES.value,
  )
  summary.root = storage.origin(summary.root)
  report: dict[str, Any] = {}
  if _IMAGES.value:
    examples, report["images"] = inspection.open_images(
      examples,
      summary,
      decode=_DECODE.value,
      progress=lambda done, total: display.progress("images", done, total),
    )
    summary.verdict(lenient=_LENIENT.value)
  return examples, {"summary": summary.to_dict(), "figures": inspection.question_counts(examples)} | report


def table_of(title: str, *columns: str) -> Table:
  """An empty table in which nothing is cut; figures are folded where the terminal is too narrow."""
  table = Table(title=title)
  for column in columns:
    table.add_column(column, overflow="fold")
  return table


def rule_table(summary: Mapping[str, Any]) -> Table:
  """Every rule that applied."""
  table = table_of("rules", "rule", "records", "what it means")
  for rule, text in cleaning.RULES.items():
    if rule in summary["rules"]:
      table.add_row(rule, f"{summary['rules'][rule]:,}", text)
  return table


def first_lines(summary: Mapping[str, Any]) -> str:
  """Where each rule applied first; a path in a table could not be copied."""
  return "\n".join(f"first {rule}: {summary['first'][rule]}" for rule in cleaning.RULES if rule in summary["rules"])


def group_table(title: str, kind: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
  """One row per group: questions, chance, how many have so many options, and how many each gold letter."""
  table = table_of(title, kind, "questions", "chance", "options", "gold letters")
  for name, group in groups.items():
    table.add_row(
      cleaning.printable(name),
      f"{group['questions']:,}",
      f"{100 * group['chance']:.1f} %",
      "  ".join(f"{options}:{count:,}" for options, count in group["options"].items()),
      "  ".join(f"{letter}:{count:,}" for letter, count in group["letters"].items()),
    )
  return table


def image_lines(found: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
  """What the images are, in words."""
  if report is None:
    return "images: not opened (--noimages)"
  several = found["images_with_several_questions"]
  lines = [f"{found['images']:,} images, {several:,} of them with several questions"]
  kinds = ", ".join(f"{kind} {count:,}" for kind, count in report["formats"].items())
  common = ", ".join(f"{size} {count:,}" for size, count in itertools.islice(report["sizes"].items(), 6))
  (left, top), (right, bottom) = report["smallest"], report["largest"]
  lines.append(f"formats: {kinds}; {report['bytes'] / 1e6:,.1f} MB")
  lines.append(f"sizes: {report['different_sizes']:,}, {left} to {right} wide, {top} to {bottom} high; {common}")
  return "\n".join(lines)


def show(report: Mapping[str, Any], console: Console) -> None:
  """Prints a report."""
  summary, found = report["summary"], report["figures"]
  head = (
    f"{cleaning.printable(summary['root'])}: {summary['format']}, {summary['files']} files, {summary['records']:,} "
  )
  head += f"records, {summary['kept']:,} kept, {summary['dropped']:,} dropped"
  shown: list[RenderableType] = [head]
  if summary["rules"]:
    shown += [rule_table(summary), first_lines(summary)]
  shown.append(group_table("modalities", "modality", found["modalities"] | {"all": found["overall"]}))
  shown.append(group_table("question types", "question type", found["question_types"]))
  for part in [*shown, image_lines(found, report.get("images"))]:
    console.print(part, soft_wrap=isinstance(part, str))


def main(argv: list[str]) -> None:
  """Reads, opens, counts and prints."""
  if len(argv) < 2:
    raise ValueError("no PATH: name the folder or the files to check")
  console = progress.terminal(stderr=_JSON.value)
  display = progress.Display()
  result: dict[str, Any] = {"usable": True, "reports": [], "overlaps": []}
  read: dict[str, list[Example]] = {}
  try:
    for path in argv[1:]:
      examples, report = inspected(path, display)
      result["reports"].append(report)
      if not _JSON.value:
        show(report, console)
      for before, earlier in read.items():
        number, share = splits.overlap(earlier, examples)
        result["overlaps"].append({"first": before, "second": path, "images": number, "share": share})
        if not _JSON.value:
          line = f"{number:,} images of {path}, {100 * share:.1f} %, are also in {before}, by path"
          console.print(cleaning.printable(line), soft_wrap=True)
      read[path] = examples
  except (ValueError, OSError) as error:
    result |= {"usable": False, "error": str(error)}
    raise
  finally:
    display.close()
    if _JSON.value:
      sys.stdout.write(json.dumps(result, indent=2) + "\n")


def run() -> None:
  """Starts the command."""
  environment.run(main, arguments=True)


if __name__ == "__main__":
  run()
