"""Keeps the results of a study: reads finished runs, and writes and finds entries in runs.json and grid.json."""

import functools
import json
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.studies import plan, runs, statistics
from kepo_jax import evaluation, storage
from kepo_jax.evaluation import outputs as outputs_lib
from kepo_jax.reporting.writers import read_records

FILES = ("grid.json", "runs.json")  # of runs that choose a learning rate, and of those that count
WINDOWS = 20  # points of a stored curve
CURVES = (
  "reward/accuracy", "reward/format", "reward/mean", "completion/length", "entropy", "divergence/gated",
  "divergence/ungated", "cliff_rate", "dead_group_rate", "hint/trigger_rate", "hint/leak_rate", "hint/reliance",
  "injected_frac", "gate/frac", "grad_norm", "supervised/nll", "supervised/accept_rate",
)  # fmt: skip
_ACCEPTED = "hint/accept_rate@"
TOKENS = {"student_tokens": ("sampled", "trained"), "teacher_tokens": ("written", "scored")}


def outputs_of(place: runs.Place, cell: plan.Cell, items: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
  """Reads what a finished cell answered to each test question; empty where it is not finished.

  Args:
    place: of the study.
    cell: of it.
    items: the test questions of the study, where they are known. A model that is only evaluated may have been asked
      more: training takes the first `data.test_items` of each modality of a test part.

  Raises:
    ValueError: a file is damaged.
  """
  folder = place.folder(cell)
  if cell.method.trained:
    finished = folder / "model" / "config.json"  # the export comes last, and its config at its end
    return outputs_lib.read_outputs(folder / "outputs" / "after.jsonl") if finished.exists() else []
  validated = cell.method == plan.TEACHER or (folder / "validation" / outputs_lib.RESULT).exists()
  if not (validated and (folder / "test" / outputs_lib.RESULT).exists()):
    return []
  outputs = outputs_lib.read_outputs(folder / "test")
  by_id = {output["id"]: output for output in outputs}
  return [by_id[name] for name in items["ids"] if name in by_id] if items else outputs


def entry_of(place: runs.Place, cell: plan.Cell, outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Builds the entry of a finished cell, JSON-able, without the seconds of CPU.

  Args:
    place: of the study.
    cell: finished.
    outputs: of `outputs_of`.

  Raises:
    ValueError: a file of the run is damaged.
    OSError: a file of the run is missing.
  """
  folder = place.folder(cell)
  entry: dict[str, Any] = _identity(cell) | {"digest": place.digest(cell), "commit": _commit(), "jax": jax.__version__}
  if not cell.method.trained:
    train_modality = plan.plain_config(place.benchmark).data.train_modality
    entry["test"] = _tested(evaluation.summarised(outputs, train_modality=train_modality), outputs)
    if cell.method != plan.TEACHER:
      validation = json.loads((folder / "validation" / outputs_lib.RESULT).read_text())
      cost = {**dict.fromkeys(TOKENS, 0), "seconds": 0.0}
      entry["validation"] = [{"step": 0, **_accuracies(validation), "cost": cost}]
    return entry
  stored = json.loads((folder / "evaluation.json").read_text())
  metrics = [record for record in read_records(folder / "metrics.jsonl") if "lr" in record]
  timing = read_records(folder / "timing.jsonl")
  costs = _cumulated(metrics, timing, processor=place.benchmark.setting == "phantom")
  config = json.loads((folder / "config.json").read_text())
  entry |= {
    "start": "start-no_think" if config["eval"]["prompt"] == "no_think" else "start",
    "steps": len(metrics),
    "test": _tested(stored["after"], outputs),
    "validation": [
      {"step": record["step"], **_accuracies(record), "cost": _costs(costs[record["step"] - 1])}
      for record in stored.get("validation", [])
    ],
    "cost": costs[-1],
  }
  if cell.seed not in plan.GRID_SEEDS:  # nothing is drawn of these
    entry["curves"] = curves_of(metrics)
  return entry


@functools.cache
def _commit() -> str:
  """Returns the commit of the checkout, with a plus sign where it was changed since; empty outside of one."""
  told = [
    subprocess.run(["git", "-C", str(runs.ROOT), *command], capture_output=True, text=True)
    for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
  ]
  return "" if told[0].returncode else told[0].stdout.strip() + ("+" if told[1].stdout.strip() else "")


def _tested(result: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  correct = np.array([output["correct"] for output in outputs])
  shares = {name: result[name] for name in ("format", "unparsed", "truncated")}
  tokens = float(np.mean([output["tokens"] for output in outputs]))
  lenient = np.array([output["lenient_correct"] for output in outputs])
  packed = {name: statistics.packed(bits) for name, bits in (("correct", correct), ("lenient", lenient))}
  return {**packed, **_accuracies(result), **shares, "tokens": round(tokens, 3)}


def _accuracies(result: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "in_domain": result["in_domain"] and round(result["in_domain"]["accuracy"], 5),
    "out_of_domain": result["out_of_domain"] and round(result["out_of_domain"]["mean"], 5),
    "overall": round(result["overall"]["accuracy"], 5),
    "modalities": {name: round(entry["accuracy"], 5) for name, entry in result["modalities"].items()},
  }


def _cumulated(
  metrics: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]], *, processor: bool
) -> list[dict[str, Any]]:
  """Adds up the cost of the run until each step: tokens of each kind, and seconds, on a CPU those it computed."""
  kinds = [kind for names in TOKENS.values() for kind in names]
  totals, costs = {**dict.fromkeys((*TOKENS, *kinds), 0), "seconds": 0.0}, []
  for step, spent in zip(metrics, timing, strict=True):
    for total, names in TOKENS.items():
      for kind in names:
        count = int(step.get(f"tokens/{kind}", 0))
        totals[kind] += count
        totals[total] += count
    totals["seconds"] = round(totals["seconds"] + spent["seconds/processor" if processor else "seconds/step"], 3)
    costs.append(dict(totals))
  return costs


def _costs(cost: Mapping[str, Any]) -> dict[str, Any]:
  """Keeps what figures are drawn from."""
  return {name: cost[name] for name in (*TOKENS, "seconds")}


def curves_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
  """Averages metrics over windows of steps; null where a metric was absent from a whole window.

  Args:
    metrics: one record per step.

  Returns:
    "step" with the last step of each window, and one list per metric that any step has.
  """
  size = -(-len(metrics) // WINDOWS)
  windows = [metrics[start : start + size] for start in range(0, len(metrics), size)]
  accepted = sorted({name for step in metrics for name in step if name.startswith(_ACCEPTED)}, key=_round)
  curves: dict[str, list[float | None]] = {"step": [window[-1]["step"] for window in windows]}
  for name in (*CURVES, *accepted):
    known = [[step[name] for step in window if step.get(name) is not None] for window in windows]
    if any(known):
      curves[name] = [float(f"{np.mean(values):.5g}") if values else None for values in known]
  return curves


def _round(name: str) -> int:
  return int(name.removeprefix(_ACCEPTED))


def items_of(outputs: Sequence[Mapping[str, Any]], benchmark: plan.Benchmark) -> dict[str, Any]:
  """Describes the test questions of a study in the order of its outputs: modality, type, image and chance."""
  modalities, types = (
    list(dict.fromkeys(output[name] for output in outputs)) for name in ("modality", "question_type")
  )
  images = {shown: number for number, shown in enumerate(dict.fromkeys(tuple(o.get("images", ())) for o in outputs))}
  return {
    "ids": [output["id"] for output in outputs],
    "modalities": modalities,
    "modality": [modalities.index(output["modality"]) for output in outputs],
    "question_types": types,
    "question_type": [types.index(output["question_type"]) for output in outputs],
    "image": [images[tuple(output.get("images", ()))] for output in outputs],
    "chance": [round(1 / len(output["options"]), 4) for output in outputs],
    "train_modality": plan.plain_config(benchmark).data.train_modality,
    "unseen": list(benchmark.unseen),
  }


class OtherQuestions(ValueError):
  """A run has answered other test questions than its study."""


class Results:
  """runs.json, grid.json and hints.json of one study, and items.json beside the folders of all studies."""

  def __init__(self, folder: pathlib.Path, study: str, benchmark: plan.Benchmark):
    """Reads what is there, and what other studies beside it have of the same benchmark, with the same fields set.

    Raises:
      ValueError: a file is not of this study, or damaged.
    """
    told = {name: str(value) for name, value in benchmark.overrides.items() if not name.startswith(runs.UNTOLD)}
    about: dict[str, Any] = {"benchmark": benchmark.name, "set": told}
    about |= {"identity": dict(benchmark.identity)} if benchmark.identity else {}
    self.folder, self._head = folder, {"study": study, **about}
    # The test questions are the same for all studies of a benchmark.
    self._items_file = folder.parent / ("items.json" if benchmark.name == "phantom" else f"{benchmark.name}-items.json")
    self._entries: dict[str, dict[str, Any]] = {}
    self._known: dict[str, dict[str, Any]] = {}  # by digest, of all studies
    self._hints: dict[str, list[dict[str, Any]]] = {}  # digest -> records
    if (folder / runs.HINTS).exists():
      measurements = _read(folder / runs.HINTS)["measurements"]
      self._hints = {measurement["digest"]: measurement["records"] for measurement in measurements}
    for path in sorted(path for name in FILES for path in folder.parent.glob(f"*/{name}")):
      stored = _read(path)
      if path.parent == folder:
        self._check_head(path, stored)
        self._entries |= {_key(entry): entry for entry in stored["runs"]}
      if _about(stored) == _about(self._head):
        self._known |= {entry["digest"]: entry for entry in stored["runs"]}
    self.items: dict[str, Any] | None = _read(self._items_file) if self._items_file.exists() else None
    if self._known and self.items is None:
      raise ValueError(
        f"{self._items_file} is missing, which says which questions were answered in {folder.parent}; restore it, or "
        "remove these results."
      )

  def _check_head(self, path: pathlib.Path, stored: Mapping[str, Any]) -> None:
    if any(stored.get(name) != self._head[name] for name in ("study", "benchmark", "set")):
      raise ValueError(f"{path} is of another study or benchmark, or of other fields of --set; use another --output.")
    theirs, ours = stored.get("identity", {}), self._head.get("identity", {})
    if changed := sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)):
      raise ValueError(
        f"{path} was made with others than these: {', '.join(changed)}; use another --output and --workdir."
      )

  @property
  def entries(self) -> list[dict[str, Any]]:
    """Returns all entries of the study, in the order of the file."""
    return [entry for _, entry in sorted(self._entries.items())]

  def settle(self, place: runs.Place, cell: plan.Cell, cpu: float = 0.0) -> bool:
    """Says whether a cell has a result; reads it from the files of its run if nobody has.

    Args:
      place: of the run.
      cell: of the study.
      cpu: seconds of a run that was made in one go, 0 where that is not known.

    Raises:
      ValueError: a file of the run is damaged.
      OSError: a file of the run is missing.
      OtherQuestions: the run answered other questions than the study.
    """
    digest = place.digest(cell)
    if cell.method.measures:
      path = place.folder(cell) / runs.HINTS
      if digest not in self._hints and path.exists():
        self.add_hints(digest, _read(path)["records"])
      return digest in self._hints
    if self.entry(cell, digest):
      return True
    if not (outputs := outputs_of(place, cell, self.items)):
      return False
    entry = entry_of(place, cell, outputs)
    if cpu:
      entry["cost"] = entry.get("cost", {}) | {"cpu_seconds": round(cpu, 1)}
    self.add(entry, items_of(outputs, place.benchmark))
    return True

  def hints(self, digest: str) -> list[dict[str, Any]]:
    """Returns the records of a measurement of hints; empty where it is not finished."""
    return self._hints.get(digest, [])

  def add_hints(self, digest: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a measurement at once."""
    self._hints[digest] = [dict(record) for record in records]
    lines = [json.dumps({"digest": name, "records": records}) for name, records in sorted(self._hints.items())]
    self._write(runs.HINTS, "measurements", lines)

  def own(self, cell: plan.Cell, digest: str) -> dict[str, Any] | None:
    """Returns the entry of a cell; None where there is none, or one of another version of the data or the config."""
    entry = self._entries.get(_key(_identity(cell)))
    return entry if entry and entry["digest"] == digest else None

  def entry(self, cell: plan.Cell, digest: str) -> dict[str, Any] | None:
    """Returns `find`, and keeps it for this study."""
    entry = self.find(cell, digest)
    if entry and not self.own(cell, digest):
      self.add(entry)
    return entry

  def find(self, cell: plan.Cell, digest: str) -> dict[str, Any] | None:
    """Returns `own`, or what another line or study has computed with the same digest; writes nothing."""
    if entry := self.own(cell, digest):
      return entry
    return {**self._known[digest], **_identity(cell)} if digest in self._known else None

  def add(self, entry: Mapping[str, Any], items: Mapping[str, Any] | None = None) -> None:
    """Writes an entry at once.

    Args:
      entry: of `entry_of`.
      items: its test questions; None: those of the study.

    Raises:
      OtherQuestions: its test questions are not those of the study.
    """
    items = items or self.items
    if self.items and items and self.items["ids"] != items["ids"]:
      raise OtherQuestions(
        f"{self.folder} is about other test questions than {entry['method']}; use another --output and --workdir."
      )
    self._entries[_key(entry)] = self._known[entry["digest"]] = dict(entry)
    if items and items != self.items:
      self.items = dict(items)
      self.folder.mkdir(parents=True, exist_ok=True)
      storage.write_text(self._items_file, json.dumps(self.items) + "\n")
    for name in FILES:
      lines = [json.dumps(stored) for stored in self.entries if _file_of(stored) == name]
      if lines:
        self._write(name, "runs", lines)

  def _write(self, name: str, field: str, lines: Sequence[str]) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    joined = ",\n".join(lines)
    storage.write_text(self.folder / name, f'{json.dumps(self._head)[:-1]}, "{field}": [\n{joined}\n]}}\n')


def chosen_rates(grid: Sequence[plan.Cell], place: runs.Place, kept: Results) -> dict[str, float]:
  """Picks for each method the learning rate with the best validation, of those that have finished with every seed.

  Args:
    grid: of `plan.grid`.
    place: of the runs.
    kept: results of the main study, which holds the grids of all studies.
  """
  entries = {cell: kept.find(cell, place.digest(cell)) for cell in grid}
  lacking = {(cell.method.name, cell.learning_rate) for cell, entry in entries.items() if entry is None}
  complete = [e for cell, e in entries.items() if e and (cell.method.name, cell.learning_rate) not in lacking]
  return statistics.chosen_rates([entry for entry in complete if entry["validation"]])


def _about(stored: Mapping[str, Any]) -> list[Any]:
  """Returns what two studies must share to use each other's runs."""
  return [stored.get("benchmark"), stored.get("set"), stored.get("identity", {})]


def _file_of(entry: Mapping[str, Any]) -> str:
  return "grid.json" if entry["seed"] in plan.GRID_SEEDS else "runs.json"


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); remove it, and what is missing is read or run again.") from error


def _identity(cell: plan.Cell) -> dict[str, Any]:
  """Returns what places an entry in its study, whatever computed it."""
  return {
    "method": cell.method.name,
    "label": cell.method.label,
    "student": cell.pair.student,
    "teacher": cell.pair.teacher,
    "learning_rate": cell.learning_rate,
    "seed": cell.seed,
    "config": cell.method.config,
    "overrides": dict(cell.method.overrides),
  }


def _key(entry: Mapping[str, Any]) -> str:
  return json.dumps([entry[name] for name in ("student", "teacher", "method", "learning_rate", "seed")])
