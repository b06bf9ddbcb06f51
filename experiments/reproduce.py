"""Runs what is missing of a study, and writes its page, tables and figures.

  python -m experiments.reproduce                          # the main study on the phantom benchmark: hours of a CPU
  python -m experiments.reproduce --study=gate --seeds=3
  python -m experiments.reproduce --benchmark=omnimedvqa --data=DIR --student=DIR --teacher=DIR

One process per free core or device; a finished run is kept at once in runs/results/STUDY/runs.json, and the same
command continues after an interruption. At the end it is compared with docs/results, the results that the project
ships; those change only with --output=docs/results. Learning rates are chosen per method on validation questions, with
two seeds each.
"""

import dataclasses
import json
import pathlib
import signal
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import environment
from experiments.studies import page, plan, results, runs
from kepo_jax.reporting import progress
from kepo_jax.reporting.progress import human_time
from kepo_jax.training import lock

_STUDY = flags.DEFINE_enum("study", "main", list(plan.STUDIES), "What is compared: experiments/studies/plan.py.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Runs of each method.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", [], "Only these of the study's methods; empty: all.")
_BENCHMARK = flags.DEFINE_enum("benchmark", "phantom", ["phantom", "omnimedvqa"], "Questions and models.")
_DATA = flags.DEFINE_string("data", "", "omnimedvqa: the data, in a format of docs/data.md.")
_STUDENT = flags.DEFINE_string("student", "Qwen/Qwen3-VL-2B-Instruct", "omnimedvqa: Qwen3-VL folder or Hub id.")
_TEACHER = flags.DEFINE_string("teacher", "Qwen/Qwen3-VL-32B-Instruct", "omnimedvqa: Qwen3-VL folder or Hub id.")
_SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of every config, such as train.steps=2; may be repeated.")
_OUTPUT = flags.DEFINE_string("output", "runs/results", "Where the folder of the study is.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "Where the folders of the runs are.")
_DEVICES = flags.DEFINE_integer(
  "devices", 1, "GPUs of each process, for --set=mesh.fsdp=2 and the like.", lower_bound=1
)
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes side by side; 0: one per core or GPU.", lower_bound=0)
_VERIFY = flags.DEFINE_string(
  "verify", "", "METHOD:SEED, a finished run on the first pair: makes it again, and compares."
)
_RUN = flags.DEFINE_bool("run", True, "False only writes tables, figures and page from what there is.")
_TABLES = flags.DEFINE_string("tables", "", "Folder for every table as Markdown, CSV and LaTeX; empty: none.")

SHIPPED = pathlib.Path(__file__).resolve().parent.parent / "docs" / "results"
_SHOWN = ("test", "curves")  # of an entry: what a run gives again to the last digit


def main(_: list[str]) -> None:
  """Runs the study that the flags describe, and reports on it."""
  environment.prepare()
  study, benchmark = chosen_study(), chosen_benchmark()
  benchmark = dataclasses.replace(benchmark, identity=runs.identity_of(benchmark))
  if taken := sorted(plan.reserved(study) & set(fields(_SET.value))):
    raise ValueError(
      f"--set={taken[0]} is what the study {study.name} varies itself; set it for one run with kepo_medvqa."
    )
  place = runs.Place(benchmark, pathlib.Path(_WORKDIR.value).absolute() / benchmark.name)
  if _VERIFY.value:
    print(verified(study, place))
    return
  faults: dict[str, str] = {}
  if _RUN.value:
    for number in (signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, lambda number, frame: _interrupt())
    place.workdir.mkdir(parents=True, exist_ok=True)
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    try:
      # Studies rewrite files of each other: the grids of all of them are the main study's.
      with lock.WorkdirLock(place.workdir), lock.WorkdirLock(output, flag="--output"):
        faults = run_study(study, place, progress.terminal(stderr=True))
    except KeyboardInterrupt:
      raise SystemExit("stopped; what was finished is kept, and the same command goes on.") from None
  report(study, place)
  if faults:
    raise SystemExit("\n".join(f"error: {cell}: {fault}" for cell, fault in faults.items()))


def verified(study: plan.Study, place: runs.Place) -> str:
  """Makes a run of --verify again, in a folder of its own; says that the figures are the same.

  Raises:
    ValueError: there is no such run, it cannot be made, or its figures differ.
  """
  name, _, seed = _VERIFY.value.partition(":")
  kept, first = results_of(study.name, place.benchmark), place.benchmark.pairs[0]
  chosen_on = results_of("main", place.benchmark)
  if not kept.entries:  # nothing was made here: the shipped ones
    kept = results.Results(SHIPPED / kept.folder.name, study.name, place.benchmark)
    chosen_on = results.Results(SHIPPED / chosen_on.folder.name, "main", place.benchmark)
  rates = results.chosen_rates(list(plan.grid(study, place.benchmark, _SEEDS.value)), place, chosen_on)
  cells = [
    cell
    for cell in plan.finals(study, place.benchmark, _SEEDS.value, rates)
    if (cell.method.name, str(cell.seed), cell.pair) == (name, seed, first)
  ]
  known = kept.own(cells[0], place.digest(cells[0])) if cells else None
  if known is None:
    raise ValueError(f"--verify={_VERIFY.value}: {kept.folder} has no such run; give METHOD:SEED of a finished one.")
  with tempfile.TemporaryDirectory(prefix="kepo_jax-") as folder:
    again, faults = dataclasses.replace(place, workdir=pathlib.Path(folder)), list[str]()
    runs.Workers(runs.worker_slots(1, _DEVICES.value)).run(
      cells, again, lambda cell, seconds, cpu, fault: faults.append(fault)
    )
    if any(faults):
      raise ValueError(f"{cells[0].name} could not be made again: {faults[0]}")
    made = results.entry_of(again, cells[0], results.outputs_of(again, cells[0]))
  if different := [part for part in _SHOWN if json.loads(json.dumps(made[part])) != known[part]]:
    raise ValueError(f"{cells[0].name} came out otherwise: {' and '.join(different)} differ from {kept.folder}.")
  return f"{cells[0].name}: all answers to the test questions and all curves are the same, to the last digit"


def report(study: plan.Study, place: runs.Place) -> None:
  """Writes tables, figures and page of what there is.

  Raises:
    ValueError: there is nothing.
  """
  kept = results_of(study.name, place.benchmark)
  if not kept.entries:
    raise ValueError(f"{kept.folder} holds no finished run of {study.name}; leave --norun away to make some.")
  grid = list(plan.grid(study, place.benchmark, _SEEDS.value))
  chosen_on = results_of("main", place.benchmark)
  rates = results.chosen_rates(grid, place, chosen_on)
  print(
    page.write(
      study,
      place,
      kept,
      chosen_on=chosen_on,
      grid=grid,
      rates=rates,
      seeds=_SEEDS.value,
      folder=_TABLES.value or None,
    )  # fmt: skip
  )
  print(compared_with_shipped(study, place, kept, rates))


def compared_with_shipped(
  study: plan.Study, place: runs.Place, kept: results.Results, rates: Mapping[str, float]
) -> str:
  """Says how finished runs compare with the same runs of the results that the project ships."""
  shipped = results.Results(SHIPPED / kept.folder.name, study.name, place.benchmark)
  if kept.folder.resolve() == shipped.folder.resolve():
    return f"written to {kept.folder}, the shipped results"
  cells = plan.finals(study, place.benchmark, _SEEDS.value, rates)
  entries = [(cell.name, kept.own(cell, place.digest(cell)), shipped.own(cell, place.digest(cell))) for cell in cells]
  both = [(name, ours, theirs) for name, ours, theirs in entries if ours and theirs]
  # An untrained model has no curves.
  other = [name for name, ours, theirs in both if any(ours.get(part) != theirs.get(part) for part in _SHOWN)]
  said = f"{len(both) - len(other)} of {len(both)} runs that are also in docs/results have the same answers and curves"
  return said + (f"; others than shipped: {', '.join(other)}" if other else "")


def _interrupt() -> None:
  raise KeyboardInterrupt


def chosen_study() -> plan.Study:
  """The study of the flags, with the methods that they name.

  Raises:
    ValueError: a method that the study does not have.
  """
  study, names = plan.STUDIES[_STUDY.value], _METHODS.value
  known = [method.name for method in study.methods]
  if unknown := sorted(set(names) - set(known)):
    raise ValueError(f"--methods={','.join(unknown)}: the study {study.name} has {', '.join(known)}.")
  return study.only(names) if names else study


def chosen_benchmark() -> plan.Benchmark:
  """The benchmark of the flags.

  Raises:
    ValueError: it needs data, or a field of --set is none.
  """
  if _BENCHMARK.value == "phantom":
    return plan.phantom(fields(_SET.value))
  if not _DATA.value:
    raise ValueError("--benchmark=omnimedvqa needs --data=DIR; docs/data.md says how to get the data.")
  # Runs are started from the checkout, wherever this was.
  data = _DATA.value if "://" in _DATA.value else str(pathlib.Path(_DATA.value).absolute())
  student, teacher = (
    str(pathlib.Path(name).absolute()) if pathlib.Path(name).is_dir() else name
    for name in (_STUDENT.value, _TEACHER.value)
  )
  return plan.omnimedvqa(student, teacher, data, fields(_SET.value))


def fields(given: Sequence[str]) -> dict[str, Any]:
  """FIELD=VALUE texts as fields of a config, each of the type that it has there.

  Raises:
    ValueError: one is no field of a config, or its value of another type.
  """
  config, found = plan.plain_config(plan.phantom()).fields(), {}
  for text in given:
    name, equals, value = text.partition("=")
    default = config.get(name) if "." in name else None
    readers = {bool: {"true": True, "false": False}.__getitem__, tuple: lambda v: tuple(int(x) for x in v.split(","))}
    try:
      if not equals or default is None:
        raise KeyError(name)
      found[name] = readers.get(type(default), type(default))(value.lower() if type(default) is bool else value)
    except (KeyError, ValueError):
      raise ValueError(f"--set={text} is no SECTION.FIELD=VALUE of kepo_jax/config.py.") from None
  return found


def results_of(study: str, benchmark: plan.Benchmark) -> results.Results:
  """What there is of a study: in a folder of its name, after that of a benchmark that is not the embedded one."""
  name = study if benchmark.name == "phantom" else f"{benchmark.name}-{study}"
  return results.Results(pathlib.Path(_OUTPUT.value) / name, study, benchmark)


def run_study(study: plan.Study, place: runs.Place, console: Console) -> dict[str, str]:
  """Runs the grid, chooses the learning rates, and runs the rest; cell -> what went wrong with it."""
  benchmark, count = place.benchmark, _SEEDS.value
  grid = list(plan.grid(study, benchmark, count))
  slots = runs.worker_slots(_WORKERS.value, _DEVICES.value)
  guessed = {cell.method.name: benchmark.rates[0] for cell in grid}  # how many runs there are depends on no rate
  measured = list(plan.measured(study, benchmark))
  total = len(grid) + len(list(plan.finals(study, benchmark, count, guessed))) + len(measured)
  with Overview(console, total, len(slots)) as overview:
    chosen_on = results_of("main", benchmark)
    faults = run_missing(grid, place, chosen_on, slots, overview)
    rates = results.chosen_rates(grid, place, chosen_on)
    overview.say(", ".join(f"{name} {rate:g}" for name, rate in rates.items()) + ": learning rates")
    finals = [*plan.finals(study, benchmark, count, rates), *measured]
    return faults | run_missing(finals, place, results_of(study.name, benchmark), slots, overview)


def run_missing(
  cells: Sequence[plan.Cell],
  place: runs.Place,
  kept: results.Results,
  slots: Sequence[Mapping[str, Any]],
  overview: "Overview",
) -> dict[str, str]:
  """Runs those cells that no study has yet; cell -> what went wrong with it."""
  faults: dict[str, str] = {}

  def settled(cell: plan.Cell, cpu: float = 0.0) -> bool:
    """Whether there is a result; a folder that cannot be read is a fault of its run, and the others go on."""
    try:
      return kept.settle(place, cell, cpu)
    except results.OtherQuestions as error:
      faults[cell.name] = str(error)
    except (KeyError, ValueError, FileNotFoundError) as error:
      faults[cell.name] = f"{place.folder(cell)} cannot be read: {error}; remove it, and the run is made again."
    except OSError as error:  # storage, of the run or of the results
      faults[cell.name] = f"{error}; mend the storage, and the same command goes on."
    return False

  def finished(cell: plan.Cell, seconds: float, cpu: float, fault: str) -> None:
    if fault or not settled(cell, cpu):
      faults.setdefault(cell.name, fault or f"it left no result in {place.folder(cell)}")
    overview.count(cell.name, seconds, faults.get(cell.name, ""))

  missing: dict[str, plan.Cell] = {}
  for cell in cells:
    if not settled(cell) and cell.name not in faults:
      missing.setdefault(place.digest(cell), cell)
  overview.skip(len(cells) - len(missing))
  runs.Workers(slots).run(list(missing.values()), place, finished)
  for cell in cells:  # those that another one has computed
    settled(cell)
  return faults


class Overview(Progress):
  """Shows how far a study is, and about how long the rest of it takes."""

  def __init__(self, console: Console, total: int, workers: int):
    left = TextColumn("{task.fields[left]}")
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left)
    super().__init__(*columns, console=console, disable=not console.is_terminal)
    self._workers, self._seconds, self._skipped, self._total = workers, list[float](), 0, total
    self._task = self.add_task("", total=total, left="")

  def say(self, line: str) -> None:
    """Shows a line above the bar."""
    self.console.print(line, style="dim", soft_wrap=True)

  def skip(self, count: int) -> None:
    """Counts runs that need not be made."""
    self._skipped += count
    self.advance(self._task, count)

  def count(self, name: str, seconds: float, fault: str) -> None:
    """Counts a run that was made."""
    self._seconds.append(seconds)
    done, mean = self._skipped + len(self._seconds), sum(self._seconds) / len(self._seconds)
    left = f"about {human_time(mean * (self._total - done) / self._workers)} left"
    self.update(self._task, completed=done, left=left)
    self.say(f"{done}/{self._total}  {name}: {fault or human_time(seconds)}; {left}")


if __name__ == "__main__":
  environment.run(main)
