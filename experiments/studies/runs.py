"""Makes the runs of a study: what each computes, its command, and processes side by side."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.studies import plan
from kepo_jax.data import splits
from kepo_jax.evaluation import outputs
from kepo_jax.models.qwen3_vl import checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
HINTS = "hints.json"
HINTED = 100  # questions per modality on which hints are measured
# Sections and fields that do not change what is learnt.
IDLE_SECTIONS = ("checkpoint", "log", "profile")
_WHERE = "data.directory"  # data may be moved
UNTOLD = (_WHERE, *(f"{section}." for section in IDLE_SECTIONS))
_ASKED = ("data.", "model.", "eval.prompt", "eval.max_new_tokens")  # what an evaluation without training depends on
# In a process of its own: one that has asked for a GPU keeps its memory from the runs.
_PROBE = "import jax; print(jax.default_backend(), jax.local_device_count())"


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the cells of a benchmark run."""

  benchmark: plan.Benchmark
  workdir: pathlib.Path  # one folder per run

  def digest(self, cell: plan.Cell) -> str:
    """Names what a cell computes by 16 hexadecimal digits; cells of different studies with one digest are one run."""
    if cell.method.trained:
      config = self._departures(cell)
    elif cell.method.measures:
      models = [self.benchmark.models[name] for name in (cell.pair.student, cell.pair.teacher)]
      config = {"measured": models, "hint_prompt": cell.method.measures, "limit": HINTED, **self._asked}
    else:
      role = "teacher" if cell.method == plan.TEACHER else "student"
      kind = {} if cell.method.kind == "evaluation" else {"kind": cell.method.kind}
      config = {"evaluated": self.benchmark.models[getattr(cell.pair, role)], **kind, **self._asked}
    told = json.dumps([plan.REVISION, self.benchmark.name, config, _frozen(self.benchmark)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]

  def _departures(self, cell: plan.Cell) -> dict[str, Any]:
    """Returns where a config departs from grpo.py, so that a new field with a default changes no digest."""
    config, plain = plan.config_of(cell, self.benchmark), plan.parent_config(self.benchmark).fields()
    return {
      name: value
      for name, value in config.fields().items()
      if name not in ("seed", _WHERE)
      and name.partition(".")[0] not in IDLE_SECTIONS
      and value != plain[name]
      and (config.needs_teacher or name != "model.teacher")
    } | {"seed": cell.seed}

  @property
  def _asked(self) -> dict[str, Any]:
    """Returns the fields of every config that matter where nothing is trained."""
    asked = {name: value for name, value in self.benchmark.overrides.items() if name.startswith(_ASKED)}
    return {name: value for name, value in asked.items() if name != _WHERE}

  def folder(self, cell: plan.Cell) -> pathlib.Path:
    """Returns the folder of a cell."""
    kind = cell.method.config or ("hints" if cell.method.measures else "evaluated")
    return self.workdir / f"{kind}-{self.digest(cell)}"

  def commands(self, cell: plan.Cell) -> list[list[str]]:
    """Returns what a user would type for a cell, in order."""
    folder = self.folder(cell)
    if cell.method.trained:
      fields = plan.fields_of(cell, self.benchmark)
      config = f"--config=experiments/configs/{cell.method.config}.py:{self.benchmark.setting}"
      given = [f"--config.{name}={value}" for name, value in fields.items()]
      return [["experiments.kepo_medvqa", config, *given, f"--workdir={folder}", "--auto_resume"]]
    if cell.method.measures:
      return [self._measurement(cell)]
    parts = ("test", "validation") if cell.method != plan.TEACHER else ("test",)
    return [self._evaluation(cell, part) for part in parts]

  def _measurement(self, cell: plan.Cell) -> list[str]:
    config, models = plan.plain_config(self.benchmark), self.benchmark.models
    given = {
      "student": models[cell.pair.student], "teacher": models[cell.pair.teacher], "hint_prompt": cell.method.measures,
      "output": self.folder(cell) / HINTS, "limit": HINTED, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor,
      "overwrite": True, "data": config.data.directory, "split_files": config.data.split_files,
      "lenient": config.data.lenient,
    }  # fmt: skip
    return ["experiments.measure_hints", *(f"--{name}={value}" for name, value in given.items())]

  def _evaluation(self, cell: plan.Cell, split: str) -> list[str]:
    student, folder = cell.method != plan.TEACHER, self.folder(cell) / split
    model = self.benchmark.models[cell.pair.student if student else cell.pair.teacher]
    config = plan.plain_config(self.benchmark)
    data, asked = config.data, config.eval
    given = {
      "model": model, "split": split, "output": folder, "templates": data.templates, "resize": data.resize,
      "train_modality": data.train_modality, "batch": asked.prompts, "max_new_tokens": asked.max_new_tokens,
      "dtype": config.model.compute_dtype if student else config.model.teacher_dtype, "kind": cell.method.kind,
      "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor,
    }  # fmt: skip
    names = ("split_files", "train_items", "validation_items", "test_items", "split_seed")
    given |= {"data": data.directory, "lenient": data.lenient, **{name: getattr(data, name) for name in names}}
    resumed = ["--resume"] if (folder / outputs.ABOUT).exists() else []
    return ["experiments.evaluate_medvqa", *(f"--{name}={value}" for name, value in given.items()), *resumed]


def _frozen(benchmark: plan.Benchmark) -> Any:
  """Identifies questions and models by content, so that new ones mean new runs where their paths stay the same."""
  if benchmark.identity or benchmark.name != "phantom":
    return dict(benchmark.identity) or None
  return json.loads((ROOT / "experiments" / "assets" / "phantom" / "frozen.json").read_text())


def identity_of(benchmark: plan.Benchmark) -> dict[str, str]:
  """Computes fingerprints of models and data: "model student" and the like, "train questions" and other parts.

  Empty for the embedded benchmark, whose items and models are frozen with the code.

  Raises:
    ValueError: data or a model cannot be read.
    OSError: a remote folder cannot be read.
  """
  data = plan.plain_config(benchmark).data
  if benchmark.name == "phantom" and not (data.directory or data.split_files):
    return {}
  identity = {
    f"model {name}": outputs.model_hash(checkpoint.resolved_folder(path))[:16]
    for name, path in benchmark.models.items()
  }
  for part, examples in splits.load(data).items():
    told = (json.dumps([e.id, e.question, e.options, e.answer, e.modality, e.question_type]) for e in examples)
    identity[f"{part} questions"] = outputs.digest(told)[:16]
  return identity


class Workers:
  """Runs processes side by side, one per core or device.

  A pool of our own, because a run must outlive Ctrl-C until it has saved: joblib and concurrent.futures kill their
  workers or wait for the queue, bind no worker to a core, and do not tell the CPU seconds of a process.
  """

  def __init__(self, slots: Sequence[Mapping[str, Any]]):
    """Keeps the slots.

    Args:
      slots: for each process that may run at a time, `core` (a CPU to which it is bound, so that the order of its sums
        does not depend on how many others run) or `environment` (variables that choose its device).
    """
    self._slots = slots
    self._running: set[subprocess.Popen] = set()
    self._lock = threading.Lock()
    self._stopping = threading.Event()

  def run(
    self, cells: Sequence[plan.Cell], place: Place, finished: Callable[[plan.Cell, float, float, str], None]
  ) -> None:
    """Runs cells until none is left.

    Args:
      cells: in order.
      place: of the study.
      finished: called in this thread with a cell, its seconds, its CPU seconds and what went wrong, "" for nothing.

    Raises:
      KeyboardInterrupt: as asked; by then the processes have saved what they had and ended.
    """
    waiting: queue.SimpleQueue[plan.Cell] = queue.SimpleQueue()
    for cell in cells:
      waiting.put(cell)
    done: queue.SimpleQueue[tuple[plan.Cell, float, float, str]] = queue.SimpleQueue()
    overs = [threading.Event() for _ in self._slots]
    for slot, over in zip(self._slots, overs, strict=True):
      threading.Thread(target=self._work, args=(slot, waiting, place, done, over)).start()
    with contextlib.ExitStack() as ended:
      for over in overs:
        ended.callback(self._wait, over)
      ended.callback(self._stop)  # before they are waited for; nothing runs any more where all went well
      for _ in cells:
        finished(*done.get())

  def _work(self, slot: Mapping[str, Any], waiting: Any, place: Place, done: Any, over: threading.Event) -> None:
    if "core" in slot and hasattr(os, "sched_setaffinity"):
      os.sched_setaffinity(0, {slot["core"]})  # of this thread, which its processes inherit
    with contextlib.ExitStack() as ended:
      ended.callback(over.set)
      while not self._stopping.is_set():
        try:
          cell = waiting.get_nowait()
        except queue.Empty:
          return
        start = time.monotonic()
        try:
          cpu, fault = self._process(slot, cell, place)
        except OSError as error:
          cpu, fault = 0.0, str(error)
        done.put((cell, time.monotonic() - start, cpu, fault))

  def _process(self, slot: Mapping[str, Any], cell: plan.Cell, place: Place) -> tuple[float, str]:
    """Returns the CPU seconds of a cell's processes, 0 if resumed (the first part is unknown), and what went wrong."""
    folder, cpu = place.folder(cell), 0.0
    anew = not folder.exists()
    log = folder.parent / f"{folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for command in place.commands(cell):
      with log.open("ab") as file, self._lock:
        if self._stopping.is_set():
          return cpu, "stopped"
        process = subprocess.Popen(
          [sys.executable, "-m", *command],
          cwd=ROOT,
          env=os.environ | slot.get("environment", {}),
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=subprocess.STDOUT,
          start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )
        self._running.add(process)
      _, status, usage = os.wait4(process.pid, 0)
      with self._lock:
        self._running.discard(process)
      process.returncode = os.waitstatus_to_exitcode(status)
      cpu += usage.ru_utime + usage.ru_stime
      if process.returncode:
        return cpu, f"exit code {process.returncode}; {log} ends with: {_last_line(log)}"
    return cpu if anew else 0.0, ""

  def _wait(self, over: threading.Event) -> None:
    # Not by joining the thread: until Python 3.13 one whose join was interrupted counts as ended.
    while not over.is_set():
      try:
        over.wait()
      except KeyboardInterrupt:
        self._stop()  # passed on once more: a run that hears it twice ends without saving

  def _stop(self) -> None:
    self._stopping.set()
    try:
      with self._lock:
        for process in self._running:
          with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    except KeyboardInterrupt:  # asked again meanwhile: it would be lost
      self._stop()


def _last_line(log: pathlib.Path) -> str:
  lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
  return lines[-1][:300] if lines else "nothing"


def worker_slots(count: int, devices: int = 1) -> list[dict[str, Any]]:
  """Returns what each process may use: one core of a CPU, some GPUs, or all chips of a TPU host.

  Args:
    count: at most so many; 0: as many as there are.
    devices: GPUs of each process.

  Raises:
    ValueError: jax finds no device.
  """
  probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
  if probe.returncode:
    raise ValueError(f"jax finds no device: {(probe.stderr.strip().splitlines() or ['no message'])[-1]}")
  backend, available = probe.stdout.split()[-2:]
  if backend == "cpu":
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    slots: list[dict[str, Any]] = [{"core": core} for core in cores]
  elif backend == "gpu":
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(int(available))))).split(",")
    groups = [visible[i : i + devices] for i in range(0, len(visible), devices)]
    slots = [{"environment": {"CUDA_VISIBLE_DEVICES": ",".join(group)}} for group in groups]
  else:
    slots = [{}]
  return slots[:count] if count else slots
