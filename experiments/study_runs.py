"""Runs the cells of a study, each in a process of its own, and reads what they leave behind."""

import contextlib
import dataclasses
import functools
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

import jax
import numpy as np

from experiments import studies
from kepo_jax import evaluation, storage
from kepo_jax.data import splits
from kepo_jax.evaluation import journal
from kepo_jax.evaluation import studies as study_statistics
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.reporting.sinks import read_records

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = ("grid.json", "runs.json")  # of runs that choose a learning rate, and of those that count
HINTS = "hints.json"
WINDOWS = 20  # points of a stored curve
CURVES = (
  "reward/accuracy", "reward/format", "reward/mean", "completion/length", "entropy", "divergence/gated",
  "divergence/ungated", "cliff_rate", "dead_group_rate", "hint/trigger_rate", "hint/leak_rate", "hint/reliance",
  "injected_frac", "gate/frac", "grad_norm", "supervised/nll", "supervised/accept_rate",
)  # fmt: skip
_ACCEPTED = "hint/accept_rate@"
# Sections and fields that change nothing of what is learnt.
IDLE_SECTIONS = ("checkpoint", "log", "profile")
_WHERE = "data.directory"  # data may be moved
_UNTOLD = (_WHERE, *(f"{section}." for section in IDLE_SECTIONS))
_ASKED = ("data.", "model.", "eval.prompt", "eval.max_new_tokens")  # what an evaluation without training depends on
TOKENS = {"student_tokens": ("sampled", "trained"), "teacher_tokens": ("written", "scored")}
HINTED = 100  # questions per modality on which hints are measured


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the cells of a benchmark run."""

  benchmark: studies.Benchmark
  workdir: pathlib.Path  # one folder per run

  def digest(self, cell: studies.Cell) -> str:
    """16 hexadecimal digits that name what a cell computes: cells of different studies with one digest are one run."""
    if cell.method.trained:
      config = self._departures(cell)
    elif cell.method.measures:
      models = [self.benchmark.models[name] for name in (cell.pair.student, cell.pair.teacher)]
      config = {"measured": models, "hint_prompt": cell.method.measures, "limit": HINTED, **self._asked}
    else:
      role = "teacher" if cell.method == studies.TEACHER else "student"
      kind = {} if cell.method.kind == "evaluation" else {"kind": cell.method.kind}
      config = {"evaluated": self.benchmark.models[getattr(cell.pair, role)], **kind, **self._asked}
    told = json.dumps([studies.REVISION, self.benchmark.name, config, _frozen(self.benchmark)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]

  def _departures(self, cell: studies.Cell) -> dict[str, Any]:
    """What a run computes, as its departures from grpo.py: a field that all configs gain changes none of them."""
    config, plain = studies.config_of(cell, self.benchmark), studies.parent_config(self.benchmark)
    teacher = config.needs_teacher
    return {
      f"{section}.{name}": value
      for section, fields in config.items()
      if section != "seed" and section not in IDLE_SECTIONS
      for name, value in fields.items()
      if f"{section}.{name}" != _WHERE
      and value != plain[section][name]
      and (teacher or (section, name) != ("model", "teacher"))
    } | {"seed": cell.seed}

  @property
  def _asked(self) -> dict[str, Any]:
    """Fields of every config that matter where nothing is trained."""
    asked = {name: value for name, value in self.benchmark.overrides.items() if name.startswith(_ASKED)}
    return {name: value for name, value in asked.items() if name != _WHERE}

  def folder(self, cell: studies.Cell) -> pathlib.Path:
    """The folder of a cell."""
    kind = cell.method.config or ("hints" if cell.method.measures else "evaluated")
    return self.workdir / f"{kind}-{self.digest(cell)}"

  def commands(self, cell: studies.Cell) -> list[list[str]]:
    """What a user would type for a cell, in order."""
    folder = self.folder(cell)
    if cell.method.trained:
      fields = studies.fields_of(cell, self.benchmark)
      config = f"--config=experiments/configs/{cell.method.config}.py:{self.benchmark.setting}"
      given = [f"--config.{name}={value}" for name, value in fields.items()]
      return [["experiments.kepo_medvqa", config, *given, f"--workdir={folder}", "--auto_resume"]]
    if cell.method.measures:
      return [self._measurement(cell)]
    splits = ("test", "validation") if cell.method != studies.TEACHER else ("test",)
    return [self._evaluation(cell, split) for split in splits]

  def _measurement(self, cell: studies.Cell) -> list[str]:
    config, models = studies.plain_config(self.benchmark), self.benchmark.models
    given = {
      "student": models[cell.pair.student], "teacher": models[cell.pair.teacher], "hint_prompt": cell.method.measures,
      "output": self.folder(cell) / HINTS, "limit": HINTED, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor,
      "overwrite": True, "data": config.data.directory, "split_files": config.data.split_files,
      "lenient": config.data.lenient,
    }  # fmt: skip
    return ["experiments.measure_hints", *(f"--{name}={value}" for name, value in given.items())]

  def _evaluation(self, cell: studies.Cell, split: str) -> list[str]:
    student, folder = cell.method != studies.TEACHER, self.folder(cell) / split
    model = self.benchmark.models[cell.pair.student if student else cell.pair.teacher]
    config = studies.plain_config(self.benchmark)
    data, asked = config.data, config.eval
    given = {
      "model": model, "split": split, "output": folder, "templates": data.templates, "resize": data.resize,
      "train_modality": data.train_modality, "batch": asked.prompts, "max_new_tokens": asked.max_new_tokens,
      "dtype": config.model.compute_dtype if student else config.model.teacher_dtype, "kind": cell.method.kind,
      "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor,
    }  # fmt: skip
    names = ("split_files", "train_items", "validation_items", "test_items", "split_seed")
    given |= {"data": data.directory, "lenient": data.lenient, **{name: data[name] for name in names}}
    resumed = ["--resume"] if (folder / journal.ABOUT).exists() else []
    return ["experiments.evaluate_medvqa", *(f"--{name}={value}" for name, value in given.items()), *resumed]


def _frozen(benchmark: studies.Benchmark) -> Any:
  """What questions and models are, so that new ones mean new runs: also where their paths stay the same."""
  if benchmark.identity or benchmark.name != "phantom":
    return dict(benchmark.identity) or None
  return json.loads((ROOT / "experiments" / "assets" / "phantom" / "frozen.json").read_text())


def identity_of(benchmark: studies.Benchmark) -> dict[str, str]:
  """Fingerprints of what paths name: "model student" and the like, and "train questions" and those of other parts.

  Empty for the embedded benchmark, whose items and models are frozen with the code.

  Raises:
    ValueError: data or a model cannot be read.
    OSError: a remote folder cannot be read.
  """
  data = studies.plain_config(benchmark).data
  if benchmark.name == "phantom" and not (data.directory or data.split_files):
    return {}
  found = {
    f"model {name}": journal.model_hash(conversion.resolved_folder(path))[:16]
    for name, path in benchmark.models.items()
  }
  for part, examples in splits.load(data).items():
    told = (json.dumps([e.id, e.question, e.options, e.answer, e.modality, e.question_type]) for e in examples)
    found[f"{part} questions"] = journal.digest(told)[:16]
  return found


def outputs_of(place: Place, cell: studies.Cell, items: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
  """What a finished cell said to each test question; empty where it is not finished.

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
    return journal.read_outputs(folder / "outputs" / "after.jsonl") if finished.exists() else []
  validated = cell.method == studies.TEACHER or (folder / "validation" / journal.RESULT).exists()
  if not (validated and (folder / "test" / journal.RESULT).exists()):
    return []
  outputs = journal.read_outputs(folder / "test")
  by_id = {output["id"]: output for output in outputs}
  return [by_id[name] for name in items["ids"] if name in by_id] if items else outputs


def entry_of(place: Place, cell: studies.Cell, outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What is kept of a finished cell, JSON-able, without the seconds of CPU.

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
    train_modality = studies.plain_config(place.benchmark).data.train_modality
    entry["test"] = _tested(evaluation.summarised(outputs, train_modality=train_modality), outputs)
    if cell.method != studies.TEACHER:
      found = json.loads((folder / "validation" / journal.RESULT).read_text())
      cost = {**dict.fromkeys(TOKENS, 0), "seconds": 0.0}
      entry["validation"] = [{"step": 0, **_accuracies(found), "cost": cost}]
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
      {"step": each["step"], **_accuracies(each), "cost": _costs(costs[each["step"] - 1])}
      for each in stored.get("validation", [])
    ],
    "curves": curves_of(metrics),
    "cost": costs[-1],
  }
  return entry


@functools.cache
def _commit() -> str:
  """The commit of the checkout, with a plus sign where it was changed since; empty outside of one."""
  told = [
    subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
    for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
  ]
  return "" if told[0].returncode else told[0].stdout.strip() + ("+" if told[1].stdout.strip() else "")


def _tested(result: Mapping[str, Any], outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  correct = np.array([output["correct"] for output in outputs])
  shares = {name: result[name] for name in ("format", "unparsed", "truncated")}
  tokens = float(np.mean([output["tokens"] for output in outputs]))
  lenient = np.array([output["lenient_correct"] for output in outputs])
  packed = {name: study_statistics.packed(bits) for name, bits in (("correct", correct), ("lenient", lenient))}
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
  """Cost of the run up to each step: tokens of each kind, and seconds, where it computes those of the processor."""
  kinds = [kind for names in TOKENS.values() for kind in names]
  totals, found = {**dict.fromkeys((*TOKENS, *kinds), 0), "seconds": 0.0}, []
  for step, spent in zip(metrics, timing, strict=True):
    for total, names in TOKENS.items():
      for kind in names:
        count = int(step.get(f"tokens/{kind}", 0))
        totals[kind] += count
        totals[total] += count
    totals["seconds"] = round(totals["seconds"] + spent["seconds/processor" if processor else "seconds/step"], 3)
    found.append(dict(totals))
  return found


def _costs(cost: Mapping[str, Any]) -> dict[str, Any]:
  """Of a validation, what figures are drawn from."""
  return {name: cost[name] for name in (*TOKENS, "seconds")}


def curves_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
  """Means of metrics over windows of steps; null where a metric was absent from a whole window.

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


def items_of(outputs: Sequence[Mapping[str, Any]], benchmark: studies.Benchmark) -> dict[str, Any]:
  """The test questions of a study in the order of its outputs: what each is, by number, and which share an image."""
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
    "train_modality": studies.plain_config(benchmark).data.train_modality,
    "unseen": list(benchmark.unseen),
  }


class Workers:
  """Processes side by side, one per core or device."""

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
    self, cells: Sequence[studies.Cell], place: Place, finished: Callable[[studies.Cell, float, float, str], None]
  ) -> None:
    """Runs cells until none is left.

    Args:
      cells: in order.
      place: of the study.
      finished: called in this thread with a cell, its seconds, its CPU seconds and what went wrong, "" for nothing.

    Raises:
      KeyboardInterrupt: as asked; by then the processes have saved what they had and ended.
    """
    waiting: queue.SimpleQueue[studies.Cell] = queue.SimpleQueue()
    for cell in cells:
      waiting.put(cell)
    done: queue.SimpleQueue[tuple[studies.Cell, float, float, str]] = queue.SimpleQueue()
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

  def _process(self, slot: Mapping[str, Any], cell: studies.Cell, place: Place) -> tuple[float, str]:
    """CPU seconds of a cell's processes, 0 for one that goes on, of which a part is unknown; and what went wrong."""
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


class OtherQuestions(ValueError):
  """A run has answered other test questions than its study."""


class Results:
  """runs.json, grid.json and items.json of one study."""

  def __init__(self, folder: pathlib.Path, study: str, benchmark: studies.Benchmark):
    """Reads what is there, and what other studies beside it have of the same benchmark, with the same fields set.

    Raises:
      ValueError: a file is not of this study, or damaged.
    """
    told = {name: str(value) for name, value in benchmark.overrides.items() if not name.startswith(_UNTOLD)}
    about: dict[str, Any] = {"benchmark": benchmark.name, "set": told}
    about |= {"identity": dict(benchmark.identity)} if benchmark.identity else {}
    self.folder, self._head = folder, {"study": study, **about}
    self._entries: dict[str, dict[str, Any]] = {}
    self._known: dict[str, dict[str, Any]] = {}  # by digest, of all studies
    self.items: dict[str, Any] | None = None
    self._hints: dict[str, list[dict[str, Any]]] = {}  # digest -> records
    if (folder / HINTS).exists():
      self._hints = {each["digest"]: each["records"] for each in _read(folder / HINTS)["measurements"]}
    paths = (path for name in FILES for path in folder.parent.glob(f"*/{name}"))
    for path in sorted(paths, key=lambda path: path.parent == folder):
      found = _read(path)
      if path.parent == folder:
        self._check_head(path, found)
        self._entries |= {_key(entry): entry for entry in found["runs"]}
      if _about(found) == _about(self._head):
        self._known |= {entry["digest"]: entry for entry in found["runs"]}
        self.items = _items_beside(path)

  def _check_head(self, path: pathlib.Path, found: Mapping[str, Any]) -> None:
    if (found.get("study"), found.get("benchmark"), found.get("set")) != tuple(
      self._head[name] for name in ("study", "benchmark", "set")
    ):
      raise ValueError(f"{path} is of another study or benchmark, or of other fields of --set; use another --output.")
    theirs, ours = found.get("identity", {}), self._head.get("identity", {})
    if changed := sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)):
      raise ValueError(
        f"{path} was made with others than these: {', '.join(changed)}; use another --output and --workdir."
      )

  @property
  def entries(self) -> list[dict[str, Any]]:
    """All of the study, in the order of the file."""
    return [entry for _, entry in sorted(self._entries.items())]

  def settle(self, place: Place, cell: studies.Cell, cpu: float = 0.0) -> bool:
    """Whether something is known of a cell, also by now from files of its run that nobody had read.

    Args:
      place: of the run.
      cell: of the study.
      cpu: seconds of a run that was made in one go, 0 where that is not known.

    Raises:
      ValueError: a file of the run is damaged.
      OSError: a file of the run is missing.
      OtherQuestions: it is about other questions than the study.
    """
    digest = place.digest(cell)
    if cell.method.measures:
      found = place.folder(cell) / HINTS
      if digest not in self._hints and found.exists():
        self.add_hints(digest, _read(found)["records"])
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
    """The records of a measurement of hints; empty where it is not finished."""
    return self._hints.get(digest, [])

  def add_hints(self, digest: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Keeps a measurement, at once."""
    self._hints[digest] = [dict(record) for record in records]
    lines = ",\n".join(json.dumps({"digest": name, "records": found}) for name, found in sorted(self._hints.items()))
    self.folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(self.folder / HINTS, f'{json.dumps(self._head)[:-1]}, "measurements": [\n{lines}\n]}}\n')

  def own(self, cell: studies.Cell, digest: str) -> dict[str, Any] | None:
    """The entry of a cell; None where there is none, or one of another version of the data or the config."""
    found = self._entries.get(_key(_identity(cell)))
    return found if found and found["digest"] == digest else None

  def entry(self, cell: studies.Cell, digest: str) -> dict[str, Any] | None:
    """`own`, also where another line or study has computed the same; None where nobody has."""
    found = self.find(cell, digest)
    if found and not self.own(cell, digest):
      self.add(found)
    return found

  def find(self, cell: studies.Cell, digest: str) -> dict[str, Any] | None:
    """`entry`, without writing anything."""
    if found := self.own(cell, digest):
      return found
    return {**self._known[digest], **_identity(cell)} if digest in self._known else None

  def add(self, entry: Mapping[str, Any], items: Mapping[str, Any] | None = None) -> None:
    """Keeps an entry, at once.

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
    self.items = dict(items or {})
    self._entries[_key(entry)] = self._known[entry["digest"]] = dict(entry)
    self.folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(self.folder / "items.json", json.dumps(self.items) + "\n")
    for name in FILES:
      lines = ",\n".join(json.dumps(each) for each in self.entries if _file_of(each) == name)
      if lines:
        storage.write_text(self.folder / name, f'{json.dumps(self._head)[:-1]}, "runs": [\n{lines}\n]}}\n')


def _about(found: Mapping[str, Any]) -> list[Any]:
  """What two studies share that may use each other's runs."""
  return [found.get("benchmark"), found.get("set"), found.get("identity", {})]


def _items_beside(path: pathlib.Path) -> Any:
  """items.json, which says what the answers of a file of runs are about."""
  items = path.parent / "items.json"
  if not items.exists():
    raise ValueError(f"{items} is not there, without which {path} says nothing; bring it back, or remove {path.name}.")
  return _read(items)


def _file_of(entry: Mapping[str, Any]) -> str:
  return "grid.json" if entry["seed"] in studies.GRID_SEEDS else "runs.json"


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); remove it, and what is missing is read or run again.") from error


def _identity(cell: studies.Cell) -> dict[str, Any]:
  """Where an entry stands in its study, whatever computed it."""
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
