"""The page of a run: its plan, figures, accuracies and questions, from the files of its folder."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from kepo_jax.reporting import curves, pages, tables
from kepo_jax.reporting.sinks import read_records
from kepo_jax.reporting.warnings import Watch

Record = Mapping[str, Any]

_FOOTER = "This file holds all that it shows and asks for nothing else. Questions, images and completions are as they are "
_FOOTER += "in the run's folder: samples.jsonl, outputs/ and the data set; long texts are cut here, large images made small."


def run_page(workdir: epath.PathLike) -> pages.Page:
  """The page of a run, finished or not; what its files do not have is left out.

  Raises:
    ValueError: a file is not what a run writes.
    OSError: it cannot be read.
  """
  root = epath.Path(workdir)
  config, stored = _read(root / "config.json"), _read(root / "evaluation.json")
  metrics = _records(root / "metrics.jsonl")
  evaluations = {name: stored[name] for name in ("before", "after") if name in stored}
  done = max((record["step"] for record in metrics), default=0)
  steps = config.get("train", {}).get("steps", done)
  sections = (
    ("Warnings", [pages.TextBlock(text, warning=True) for text in stored_warnings(metrics)]),
    ("Plan", [pages.TableBlock(plan_rows(config), plain=True)] if config else []),
    ("Accuracy", _accuracy(evaluations, stored.get("validation", []), steps)),
    ("Training", _training(metrics)),
    ("Questions", _questions(root)),
  )
  return pages.Page(
    title=f"Run {root.name}",
    subtitle=_subtitle(config, done, steps),
    facts=_facts(evaluations, metrics),
    sections=tuple(pages.Section(heading, tuple(blocks)) for heading, blocks in sections if blocks),
    footer=_FOOTER,
  )
