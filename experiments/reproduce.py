"""Runs what is missing of a study, and writes its tables, figures and page.

  python -m experiments.reproduce                          # the main study on the phantom benchmark: hours of a CPU
  python -m experiments.reproduce --study=gate --seeds=3
  python -m experiments.reproduce --benchmark=omnimedvqa --data=DIR --student=DIR --teacher=DIR

One process per free core or device; a finished run is kept at once in runs/results/STUDY/runs.json, and the same
command goes on after an interruption. At the end it is compared with docs/results, the results that the project ships;
those change only with --output=docs/results. Learning rates are chosen per method on validation questions, by two
seeds each.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import environment, studies, study_report, study_runs
from kepo_jax.evaluation import studies as study_statistics
from kepo_jax.reporting import progress
from kepo_jax.reporting.panels import human_time
from kepo_jax.training import lock

_STUDY = flags.DEFINE_enum("study", "main", list(studies.STUDIES), "What is compared: experiments/studies.py.")
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

SHIPPED = pathlib.Path(__file__).resolve().parent.parent / "docs" / "results"
_SHOWN = ("test", "curves")  # of an entry: what a run gives again to the last digit
# In a process of its own: one that has asked for a GPU keeps its memory from the runs.
_PROBE = "import jax; print(jax.default_backend(), jax.local_device_count())"


def main(_: list[str]) -> None:
  """Runs the study that the flags describe, and reports on it."""
  environment.prepare()
  study, benchmark = chosen_study(), chosen_benchmark()
  benchmark = dataclasses.replace(benchmark, identity=study_runs.identity_of(benchmark))
  if taken := sorted(studies.reserved(study) & set(fields(_SET.value))):
    raise ValueError(
      f"--set={taken[0]} is what the study {study.name} varies itself; set it for one run with kepo_medvqa."
    )
  place = study_runs.Place(benchmark, pathlib.Path(_WORKDIR.value).absolute() / benchmark.name)
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


def verified(study: studies.Study, place: study_runs.Place) -> str:
  """Makes a run of --verify again, in a folder of its own; says that the figures are the same.

  Raises:
    ValueError: there is no such run, it cannot be made, or its figures differ.
  """
  name, _, seed = _VERIFY.value.partition(":")
  results, first = results_of(study.name, place.benchmark), place.benchmark.pairs[0]
  rates = chosen_rates(
    list(studies.grid(study, place.benchmark, _SEEDS.value)), place, results_of("main", place.benchmark)
  )
  cells = [
    cell
    for cell in studies.finals(study, place.benchmark, _SEEDS.value, rates)
    if (cell.method.name, str(cell.seed), cell.pair) == (name, seed, first)
  ]
  known = results.own(cells[0], place.digest(cells[0])) if cells else None
  if known is None:
    raise ValueError(f"--verify={_VERIFY.value}: {results.folder} has no such run; give METHOD:SEED of a finished one.")
  with tempfile.TemporaryDirectory(prefix="kepo_jax-") as folder:
    again, faults = dataclasses.replace(place, workdir=pathlib.Path(folder)), list[str]()
    study_runs.Workers(worker_slots(1)).run(cells, again, lambda cell, seconds, cpu, fault: faults.append(fault))
    if any(faults):
      raise ValueError(f"{cells[0].name} could not be made again: {faults[0]}")
    made = study_runs.entry_of(again, cells[0], study_runs.outputs_of(again, cells[0]))
  if different := [part for part in _SHOWN if json.loads(json.dumps(made[part])) != known[part]]:
    raise ValueError(f"{cells[0].name} came out otherwise: {' and '.join(different)} differ from {results.folder}.")
  return f"{cells[0].name}: all answers to the test questions and all curves are the same, to the last digit"


def report(study: studies.Study, place: study_runs.Place) -> None:
  """Writes tables, figures and page of what there is.

  Raises:
    ValueError: there is nothing.
  """
  results = results_of(study.name, place.benchmark)
  if not results.entries:
    raise ValueError(f"{results.folder} holds no finished run of {study.name}; leave --norun away to make some.")
  grid = list(studies.grid(study, place.benchmark, _SEEDS.value))
  chosen_on = results_of("main", place.benchmark)
  rates = chosen_rates(grid, place, chosen_on)
  written = study_report.write(study, place, results, chosen_on=chosen_on, grid=grid, rates=rates, seeds=_SEEDS.value)
  print(written)
  print(compared_with_shipped(study, place, results, rates))


def compared_with_shipped(
  study: studies.Study, place: study_runs.Place, results: study_runs.Results, rates: Mapping[str, float]
) -> str:
  """In words how finished runs compare with the same runs of the results that the project ships."""
  shipped = study_runs.Results(SHIPPED / results.folder.name, study.name, place.benchmark)
  if results.folder.resolve() == shipped.folder.resolve():
    return f"written to {results.folder}, the shipped results"
  cells = studies.finals(study, place.benchmark, _SEEDS.value, rates)
  found = [(cell.name, results.own(cell, place.digest(cell)), shipped.own(cell, place.digest(cell))) for cell in cells]
  both = [(name, mine, theirs) for name, mine, theirs in found if mine and theirs]
  other = [name for name, mine, theirs in both if any(mine[part] != theirs[part] for part in _SHOWN)]
  said = f"{len(both) - len(other)} of {len(both)} runs that are also in docs/results have the same answers and curves"
  return said + (f"; others than shipped: {', '.join(other)}" if other else "")


def _interrupt() -> None:
  raise KeyboardInterrupt


def chosen_study() -> studies.Study:
  """The study of the flags, with the methods that they name.

  Raises:
    ValueError: a method that the study does not have.
  """
  study, names = studies.STUDIES[_STUDY.value], _METHODS.value
  known = [method.name for method in study.methods]
  if unknown := sorted(set(names) - set(known)):
    raise ValueError(f"--methods={','.join(unknown)}: the study {study.name} has {', '.join(known)}.")
  return study.only(names) if names else study


def chosen_benchmark() -> studies.Benchmark:
  """The benchmark of the flags.

  Raises:
    ValueError: it needs data, or a field of --set is none.
  """
  if _BENCHMARK.value == "phantom":
    return studies.phantom(fields(_SET.value))
  if not _DATA.value:
    raise ValueError("--benchmark=omnimedvqa needs --data=DIR; docs/data.md says how to get the data.")
  # Runs are started from the checkout, wherever this was.
  data = _DATA.value if "://" in _DATA.value else str(pathlib.Path(_DATA.value).absolute())
  student, teacher = (
    str(pathlib.Path(name).absolute()) if pathlib.Path(name).is_dir() else name
    for name in (_STUDENT.value, _TEACHER.value)
  )
  return studies.omnimedvqa(student, teacher, data, fields(_SET.value))


def fields(given: Sequence[str]) -> dict[str, Any]:
  """FIELD=VALUE texts as fields of a config, each of the type that it has there.

  Raises:
    ValueError: one is no field of a config, or its value of another type.
  """
  config, found = studies.plain_config(studies.phantom()), {}
  for text in given:
    name, equals, value = text.partition("=")
    section, _, field = name.rpartition(".")
    default = config.get(section, {}).get(field) if section else None
    readers = {bool: {"true": True, "false": False}.__getitem__, tuple: lambda v: tuple(int(x) for x in v.split(","))}
    try:
      if not equals or default is None:
        raise KeyError(name)
      found[name] = readers.get(type(default), type(default))(value.lower() if type(default) is bool else value)
    except (KeyError, ValueError):
      raise ValueError(f"--set={text} is no SECTION.FIELD=VALUE of experiments/configs/grpo.py.") from None
  return found


def results_of(study: str, benchmark: studies.Benchmark) -> study_runs.Results:
  """What there is of a study: in a folder of its name, after that of a benchmark that is not the embedded one."""
  name = study if benchmark.name == "phantom" else f"{benchmark.name}-{study}"
  return study_runs.Results(pathlib.Path(_OUTPUT.value) / name, study, benchmark)


def run_study(study: studies.Study, place: study_runs.Place, console: Console) -> dict[str, str]:
  """Runs the grid, chooses the learning rates, and runs the rest; cell -> what went wrong with it."""
  benchmark, count = place.benchmark, _SEEDS.value
  grid = list(studies.grid(study, benchmark, count))
  slots = worker_slots(_WORKERS.value)
  guessed = {cell.method.name: benchmark.rates[0] for cell in grid}  # how many runs there are depends on no rate
  measured = list(studies.measured(study, benchmark))
  total = len(grid) + len(list(studies.finals(study, benchmark, count, guessed))) + len(measured)
  with Overview(console, total, len(slots)) as overview:
    chosen_on = results_of("main", benchmark)
    faults = run_missing(grid, place, chosen_on, slots, overview)
    rates = chosen_rates(grid, place, chosen_on)
    overview.say(", ".join(f"{name} {rate:g}" for name, rate in rates.items()) + ": learning rates")
    finals = [*studies.finals(study, benchmark, count, rates), *measured]
    return faults | run_missing(finals, place, results_of(study.name, benchmark), slots, overview)


def chosen_rates(
  grid: Sequence[studies.Cell], place: study_runs.Place, results: study_runs.Results
) -> dict[str, float]:
  """Method -> the learning rate with the best validation, of those that have finished with every seed."""
  found = [(cell, results.find(cell, place.digest(cell))) for cell in grid]
  lacking = {(cell.method.name, cell.learning_rate) for cell, entry in found if entry is None}
  whole = [entry for cell, entry in found if entry and (cell.method.name, cell.learning_rate) not in lacking]
  return study_statistics.chosen_rates([entry for entry in whole if entry["validation"]])


def run_missing(
  cells: Sequence[studies.Cell],
  place: study_runs.Place,
  results: study_runs.Results,
  slots: Sequence[Mapping[str, Any]],
  overview: "Overview",
) -> dict[str, str]:
  """Runs those cells that no study has yet; cell -> what went wrong with it."""
  faults: dict[str, str] = {}

  def settled(cell: studies.Cell, cpu: float = 0.0) -> bool:
    """Whether there is a result; a folder that cannot be read is a fault of its run, and the others go on."""
    try:
      return results.settle(place, cell, cpu)
    except study_runs.OtherQuestions as error:
      faults[cell.name] = str(error)
    except (KeyError, ValueError, FileNotFoundError) as error:
      faults[cell.name] = f"{place.folder(cell)} cannot be read: {error}; remove it, and the run is made again."
    except OSError as error:  # storage, of the run or of the results
      faults[cell.name] = f"{error}; mend the storage, and the same command goes on."
    return False

  def finished(cell: studies.Cell, seconds: float, cpu: float, fault: str) -> None:
    if fault or not settled(cell, cpu):
      faults.setdefault(cell.name, fault or f"it left no result in {place.folder(cell)}")
    overview.finished(cell.name, seconds, faults.get(cell.name, ""))

  missing: dict[str, studies.Cell] = {}
  for cell in cells:
    if not settled(cell) and cell.name not in faults:
      missing.setdefault(place.digest(cell), cell)
  overview.skip(len(cells) - len(missing))
  study_runs.Workers(slots).run(list(missing.values()), place, finished)
  for cell in cells:  # those that another one has computed
    settled(cell)
  return faults


def worker_slots(count: int) -> list[dict[str, Any]]:
  """What each process may use: one core of a CPU, one GPU, or all chips of a TPU host.

  Args:
    count: at most so many; 0: as many as there are.

  Raises:
    ValueError: jax finds no device.
  """
  found = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
  if found.returncode:
    raise ValueError(f"jax finds no device: {(found.stderr.strip().splitlines() or ['no message'])[-1]}")
  backend, devices = found.stdout.split()[-2:]
  if backend == "cpu":
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    slots: list[dict[str, Any]] = [{"core": core} for core in cores]
  elif backend == "gpu":
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(int(devices))))).split(",")
    groups = [visible[i : i + _DEVICES.value] for i in range(0, len(visible), _DEVICES.value)]
    slots = [{"environment": {"CUDA_VISIBLE_DEVICES": ",".join(group)}} for group in groups]
  else:
    slots = [{}]
  return slots[:count] if count else slots


class Overview:
  """How far a study is, and about how long the rest of it takes."""

  def __init__(self, console: Console, total: int, workers: int):
    self._bars = Progress(
      TextColumn("runs"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      TextColumn("{task.fields[left]}"),
      console=console,
      disable=not console.is_terminal,
    )
    self._console, self._total, self._workers = console, total, workers
    self._done, self._seconds = 0, list[float]()
    self._task = self._bars.add_task("", total=total, left="")

  def __enter__(self) -> "Overview":
    self._bars.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bars.stop()

  def say(self, line: str) -> None:
    """Shows a line above the bar."""
    self._console.print(line, style="dim", soft_wrap=True)

  def skip(self, count: int) -> None:
    """Counts runs that need not be made."""
    self._done += count
    self._bars.update(self._task, completed=self._done)

  def finished(self, name: str, seconds: float, fault: str) -> None:
    """Counts a run that was made."""
    self._done += 1
    self._seconds.append(seconds)
    mean = sum(self._seconds) / len(self._seconds)
    left = f"about {human_time(mean * (self._total - self._done) / self._workers)} left"
    self._bars.update(self._task, completed=self._done, left=left)
    self.say(f"{self._done}/{self._total}  {name}: {fault or human_time(seconds)}; {left}")


if __name__ == "__main__":
  environment.run(main)
