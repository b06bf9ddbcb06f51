"""The hook that follows a run from its plan to its report."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from rich.console import Console

from kepo_jax import storage
from kepo_jax.models.qwen3_vl import model
from kepo_jax.reporting import curves, pages, progress, tables
from kepo_jax.reporting.progress import Display
from kepo_jax.reporting.run_page import run_page
from kepo_jax.reporting.warnings import Watch
from kepo_jax.reporting.writers import JsonLines, Sink, TensorBoardSink, TrackioSink, WandbSink, read_records, write_all
from kepo_jax.types import Hook, RunPlan, StepReport

_FILES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")
MemoryEstimate = Callable[[RunPlan], Mapping[str, int]]


class RunReporter(Hook):
  """Shows a run in the terminal and keeps its figures, samples and plots in the workdir; the first host only.

  Writes metrics.jsonl (deterministic values only), timing.jsonl, samples.jsonl, tensorboard/ and, at the end,
  report/ with its page. Without a workdir it only shows.
  """

  def __init__(self, *, memory: MemoryEstimate | None = None, console: Console | None = None):
    """Opens the display.

    Args:
      memory: plan -> part -> bytes per device, shown before the first step (kepo_jax.planning.memory.estimate).
      console: where to show, standard error by default.
    """
    self._memory = memory
    self.memory: Mapping[str, int] = {}  # part of the plan -> bytes per device; known once the run starts
    # Every host follows the run; only the first one shows and writes anything.
    self._first_host = jax.process_index() == 0
    self._display = Display(console if self._first_host else Console(quiet=True))
    self._watch = Watch()
    self._workdir = ""
    self._first_step = 1
    self._sinks: list[Sink] = []
    self._timing: list[Sink] = []
    self._files: dict[str, JsonLines] = {}
    self._samples: JsonLines | None = None
    self._evaluations: dict[str, Any] = {}

  def start(self, plan: RunPlan) -> None:
    """Shows the plan and opens the files.

    Raises:
      ValueError: an optional sink is asked for and not installed.
    """
    self._workdir = plan.workdir if self._first_host else ""
    self._first_step = plan.start_step + 1
    if self._workdir:
      self._open(plan)
    self.memory = self._memory(plan) if self._memory else {}
    parameters = {role: parameter_count(config) for role, config in plan.models.items()}
    self._display.show(progress.start_panel(plan, parameters, self.memory))
    if self.memory and (room := progress.device_bytes()) and self.memory["peak"] > room:
      self._display.warn(
        f"the plan needs about {progress.human_bytes(self.memory['peak'])} per device, which has "
        f"{progress.human_bytes(room)}: it will not fit. {progress.MEMORY_FIELDS}"
      )
    self._display.begin(plan.config.train.steps)

  def step(self, report: StepReport) -> None:
    """Records and shows one step; the first one with its samples."""
    write_all(self._sinks, report.step, report.metrics)
    write_all(self._timing, report.step, report.timing)
    if self._samples:
      for sample in report.samples:
        self._samples.write(report.step, sample)
    if report.step == self._first_step and "compiled/programs" in report.timing:
      self._display.show(compiled_line(report.timing))
    if report.step == self._first_step and report.samples:
      self._display.show(progress.samples_panel(report.samples, step=report.step))
    self._display.step(report.step, report.metrics, report.timing)
    self._warn(self._watch.step(report.metrics))

  def evaluation(self, step: int, name: str, result: dict[str, Any]) -> None:
    """Records a validation among the metrics, and shows what it means."""
    if name != "validation":
      self._evaluations[name] = result
      return
    figures = validation_figures(result)
    write_all(self._sinks, step, figures)
    self._display.show(
      f"step {step}  validation  " + "  ".join(f"{k.split('/')[1]} {v:.3f}" for k, v in figures.items())
    )
    if {"validation/in_domain", "validation/out_of_domain"} <= figures.keys():
      self._warn(self._watch.evaluation(figures["validation/in_domain"], figures["validation/out_of_domain"]))

  def position(self) -> dict[str, int]:
    """Flushes the files to the disk; returns their lengths."""
    for sink in self._all():
      sink.flush()
    return {name: file.position for name, file in self._files.items()}

  def progress(self, what: str, done: int, total: int) -> None:
    """Shows how far loading or an evaluation has come."""
    self._display.progress(what, done, total)

  def stop(self) -> None:
    """Closes the files and the display."""
    self._display.close()
    self._close()

  def finish(self) -> None:
    """Closes the files, writes report/ and shows the accuracies before and after."""
    self._close()
    evaluations = self._evaluations
    if self._workdir:
      evaluations = write_report(self._workdir) or evaluations
    if evaluations:
      self._display.show(tables.rich_table(tables.accuracy_rows(evaluations), title="accuracy, %, with 95 % intervals"))
    if self._workdir:
      self._display.show(f"report and figures: {epath.Path(self._workdir) / 'report'}")
    self._display.close()

  def _open(self, plan: RunPlan) -> None:
    root = epath.Path(plan.workdir)
    self._files = {name: JsonLines(root / name, position=plan.positions.get(name, 0)) for name in _FILES}
    metrics, timing, self._samples = self._files.values()
    self._sinks, self._timing = [metrics], [timing]
    log = plan.config.log
    if log.tensorboard:
      history = [*metrics.records(), *timing.records()]
      sink = TensorBoardSink(root / "tensorboard", history=sorted(history, key=lambda record: record["step"]))
      self._sinks.append(sink)
      self._timing.append(sink)
    for project, optional in ((log.wandb, WandbSink), (log.trackio, TrackioSink)):
      if project:
        config = json.loads(plan.config.to_json())
        self._sinks.append(optional(project, workdir=plan.workdir, config=config, start_step=plan.start_step))

  def _all(self) -> list[Sink]:
    return [*self._files.values(), *(sink for sink in self._sinks if not isinstance(sink, JsonLines))]

  def _close(self) -> None:
    for sink in self._all():
      sink.close()

  def _warn(self, messages: list[str]) -> None:
    for message in messages:
      self._display.warn(message)


def compiled_line(timing: Mapping[str, float]) -> str:
  """Says how many programs there are, and how many of them came from the compilation cache."""
  programs, cached = int(timing["compiled/programs"]), int(timing["compiled/cached"])
  return f"{programs} programs, {cached} from the compilation cache"


def parameter_count(config: Any) -> int:
  """Counts the weights of a Qwen3-VL of a `Qwen3VLConfig`, tied ones once."""
  return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(config, jnp.float32)))


def validation_figures(result: Mapping[str, Any]) -> dict[str, float]:
  """Picks the accuracies of an evaluation that go among the metrics: `validation/in_domain` and the like."""
  entries = {key: result.get(key) for key in ("in_domain", "out_of_domain", "overall")}
  return {f"validation/{key}": tables.center(entry) for key, entry in entries.items() if entry}


def write_report(workdir: epath.PathLike) -> dict[str, Any]:
  """Writes report/, from the files of a run: index.html, curves.png, modalities.png, question_types.png, accuracy.md.

  A page that cannot be made, for what a file of the run holds, is left out with a warning.

  Args:
    workdir: of a run, finished or not; what its files do not have is left out.

  Returns:
    the evaluations before and after, empty without evaluation.json.
  """
  root = epath.Path(workdir)
  with storage.written_locally(root / "report") as report:
    report.mkdir(parents=True, exist_ok=True)
    evaluations = _write_figures(root, report)
    _write_page(root, report)
    return evaluations


def _write_page(root: epath.Path, report: pathlib.Path) -> None:
  try:
    text = pages.rendered(run_page(root))
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    # The run is over and its figures are written; a record that was edited by hand must not end it with an error.
    logging.warning("%s: report/index.html could not be made: %s: %s", root, type(error).__name__, error)
  else:
    (report / "index.html").write_text(text, encoding="utf-8")


def _write_figures(root: epath.Path, report: pathlib.Path) -> dict[str, Any]:
  records = read_records(root / "metrics.jsonl") if (root / "metrics.jsonl").exists() else []
  if records:
    curves.save(curves.curves_figure(records, title=root.name), report / "curves.png")
  if not (root / "evaluation.json").exists():
    return {}
  stored = json.loads((root / "evaluation.json").read_text())
  evaluations = {name: stored[name] for name in ("before", "after") if name in stored}
  if evaluations:
    curves.save(curves.bars_figure(evaluations), report / "modalities.png")
    if next(iter(evaluations.values()))["question_types"]:
      curves.save(curves.bars_figure(evaluations, section="question_types"), report / "question_types.png")
    (report / "accuracy.md").write_text(tables.markdown_table(tables.accuracy_rows(evaluations)))
  return evaluations
