"""The page of a run: its plan, figures, accuracies and questions, from the files of its folder."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from kepo_jax.config import Config
from kepo_jax.reporting import curves, pages, progress, tables
from kepo_jax.reporting.warnings import Watch
from kepo_jax.reporting.writers import read_records

Record = Mapping[str, Any]

# What is compared on top of the page.
_SUMMARIES = (("in_domain", "In domain"), ("out_of_domain", "Out of domain"), ("overall", "All questions"))
_FOOTER = (
  "This file holds all that it shows and asks for nothing else. Questions, images and completions are as they are "
)
_FOOTER += (
  "in the run's folder: samples.jsonl, outputs/ and the data set; long texts are cut here, large images made small."
)


def run_page(workdir: epath.PathLike) -> pages.Page:
  """Lays out the page of a run, finished or not; leaves out what its files do not have.

  Raises:
    ValueError: a file is not what a run writes.
    OSError: it cannot be read.
  """
  root = epath.Path(workdir)
  config, stored = _read(root / "config.json"), _read(root / "evaluation.json")
  metrics = _records(root / "metrics.jsonl")
  evaluations: dict[str, Record] = {name: stored[name] for name in ("before", "after") if name in stored}
  done = max((record["step"] for record in metrics), default=0)
  steps = config.get("train", {}).get("steps", done)
  sections: tuple[tuple[str, Iterable[pages.Block]], ...] = (
    ("Warnings", [pages.TextBlock(text, warning=True) for text in warnings_of(metrics)]),
    ("Plan", [pages.TableBlock(rows, words=True)] if (rows := plan_rows(config)) else []),
    ("Accuracy", _accuracy(evaluations, stored.get("validation", []), steps)),
    ("Training", _training(metrics)),
    ("Questions", _questions(root)),
  )
  return pages.Page(
    title=f"Run {root.name}",
    subtitle=f"{done:,} of {steps:,} steps" if done < steps else f"{done:,} steps",
    facts=tuple(_facts(evaluations, metrics)),
    sections=tuple(pages.Section(heading, made) for heading, blocks in sections if (made := tuple(blocks))),
    footer=_FOOTER,
  )


def plan_rows(config: Mapping[str, Any]) -> tuple[tables.Row, ...]:
  """Describes the run, (name, value); empty for a config of another version, with other fields."""
  try:
    same = config.keys() == Config().to_dict().keys()
    return tuple(progress.config_rows(Config.from_dict(config))) if same else ()
  except (AttributeError, KeyError, TypeError, ValueError):
    return ()


def warnings_of(metrics: Sequence[Record]) -> list[str]:
  """Recomputes the warnings of a run from its metrics."""
  watch, messages = Watch(), []
  for record in metrics:
    values = {name: math.nan if value is None else value for name, value in record.items() if name != "step"}
    if {"validation/in_domain", "validation/out_of_domain"} <= values.keys():
      messages += watch.evaluation(values["validation/in_domain"], values["validation/out_of_domain"])
    elif not any(name.startswith("validation/") for name in values):
      messages += watch.step(values)
  return messages


def _facts(evaluations: Mapping[str, Record], metrics: Sequence[Record]) -> Iterator[pages.Fact]:
  for key, label in _SUMMARIES:
    entries = [result[key] for result in evaluations.values() if result.get(key)]
    if entries:
      value = " → ".join(f"{100 * tables.center(entry):.1f}" for entry in entries)
      spread = " → ".join(f"[{100 * entry['low']:.1f},\u00a0{100 * entry['high']:.1f}]" for entry in entries)
      count = f", {entries[-1]['count']:,} questions" if "count" in entries[-1] else ""
      yield pages.Fact(f"{label}, {' → '.join(evaluations)}", f"{value}\u00a0%", f"95 % interval {spread}{count}")
  steps, values = curves.series(metrics, "cliff_rate")
  part = len(steps) // 10
  if part:
    first, last = (100 * float(each.mean()) for each in (values[:part], values[-part:]))
    note = f"questions that no rollout solves, first and last {part} steps"
    yield pages.Fact("Cliff rate", f"{first:.1f} → {last:.1f}\u00a0%", note)


def _accuracy(evaluations: Mapping[str, Record], validations: Sequence[Record], steps: int) -> Iterator[pages.Block]:
  if evaluations:
    names = " and ".join(evaluations)
    yield pages.figure_block(
      curves.bars_figure(evaluations, title="Accuracy on the test questions per modality"),
      alt=f"Bars: accuracy {names} for each modality; the table below has the numbers.",
      caption="Bars are accuracies of greedy answers, lines their 95 % intervals.",
    )
    if next(iter(evaluations.values()))["question_types"]:
      yield pages.figure_block(
        curves.bars_figure(evaluations, title="Per question type", section="question_types"),
        alt=f"Bars: accuracy {names} for each question type; the table below has the numbers.",
        wide=False,
      )
  if validations:
    ends = {step: evaluations[name] for name, step in (("before", 0), ("after", steps)) if name in evaluations}
    yield pages.figure_block(
      curves.validation_figure(validations, ends=ends, title="Validation questions, over the training"),
      alt=f"Curves: accuracy in and out of domain at {len(validations)} validations.",
      caption="Bands are 95 % intervals; diamonds are the test questions before and after.",
      wide=False,
    )
  if evaluations:
    yield pages.TableBlock(tuple(tables.accuracy_rows(evaluations)), caption="Accuracy in percent, with 95 % intervals")


def _training(metrics: Sequence[Record]) -> Iterator[pages.Block]:
  if metrics:
    yield pages.figure_block(
      curves.curves_figure(metrics, columns=3),
      alt="Curves over the steps: rewards, cliffs, gate, hints, divergence, entropy, lengths and gradient norm.",
      caption="Where a line is thin, it has every step, and the thick one is its moving average. "
      "docs/metrics.md defines the figures.",
    )


def _questions(root: epath.Path) -> Iterator[pages.Block]:
  outputs = {name: _records(root / "outputs" / f"{name}.jsonl") for name in ("before", "after")}
  samples = [
    *pages.training_samples(_records(root / "samples.jsonl")),
    *pages.evaluated_samples({name: records for name, records in outputs.items() if records}),
  ]
  if samples:
    text = "Questions of the training with the rollouts of their group, and test questions before and after it."
    yield pages.BrowserBlock(tuple(samples), text)


def _read(path: epath.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def _records(path: epath.Path) -> list[dict[str, Any]]:
  return read_records(path) if path.exists() else []
