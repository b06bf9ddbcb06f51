"""What a run shows in a terminal: its plan, decoded samples, and a live bar, or plain lines elsewhere."""

import atexit
import collections
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kepo_jax.config import Config
from kepo_jax.types import RunPlan

_PIPE = 120  # columns in a file or pipe, which has no width of its own
# What the display shows of a step: label, name of the metric, format.
FIGURES = (
  ("reward", "reward/mean", "{:.2f}"),
  ("accuracy", "reward/accuracy", "{:.2f}"),
  ("cliff", "cliff_rate", "{:.2f}"),
  ("gate", "gate/frac", "{:.2f}"),
  ("nll", "supervised/nll", "{:.3f}"),
)


def terminal(*, stderr: bool = False, width: int | None = None) -> Console:
  """Makes a console that shows names as they are: brackets in them are no markup.

  Args:
    stderr: write there instead of to the standard output.
    width: columns; by default those of the terminal, and at least 120 in a file or pipe, which has none.
  """
  console = Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
  if width is None and not console.is_terminal:
    console.width = max(console.width, _PIPE)
  return console


class Display:
  """Follows steps and other long work; one per run."""

  def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic):
    """Opens the display.

    Args:
      console: where to write, standard error by default so that standard output stays free.
      clock: seconds; tests pass their own.
    """
    self._console = console or terminal(stderr=True)
    self._clock = clock
    self._total = 0
    self._last = clock()
    self._durations: collections.deque[float] = collections.deque(maxlen=20)
    self._other: dict[str, tuple[float, int]] = {}  # work -> (time of its start, quarters shown)
    self._tasks: dict[str, TaskID] = {}
    self._live: Live | None = None
    if self._console.is_terminal and not os.environ.get("CI"):
      self._bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        console=self._console,
      )
      self._live = Live(self._bars, console=self._console, refresh_per_second=4)
      self._live.start()
      atexit.register(self.close)  # a run that dies must not leave the terminal without a cursor

  def begin(self, total: int) -> None:
    """Starts the clock of the steps, of which the whole run has `total`."""
    self._total = total
    self._last = self._clock()

  def show(self, *renderables: RenderableType) -> None:
    """Prints something above the bar."""
    for renderable in renderables:  # a text may hold any name, and the console of a caller reads markup
      self._console.print(Text(renderable) if isinstance(renderable, str) else renderable)

  def warn(self, message: str) -> None:
    """Prints a warning that stands out."""
    self._console.print(Text.assemble(("warning: ", "bold yellow"), message))

  def step(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
    """Shows the figures of one step."""
    now = self._clock()
    self._durations.append(now - self._last)
    self._last = now
    figures = figures_line(metrics, timing)
    left = human_time(statistics.median(self._durations) * (self._total - step))
    if self._live:
      self._bar("training", step, self._total, f"{left} left")
      self._live.update(Group(self._bars, Text(figures)))
    elif self._due(step):
      self._console.print(Text(f"step {step}/{self._total}  {figures}  {left} left"), soft_wrap=True)

  def progress(self, what: str, done: int, total: int) -> None:
    """Shows how far some other work has come; the training clock stands still meanwhile."""
    now = self._clock()
    # The first news of some work comes when a part of it is done: it began when the last thing ended.
    since, quarters = self._other.setdefault(what, (self._last, 0))
    self._last = now
    if self._live:
      self._bar(what, done, total, "")
      if done >= total:
        self._bars.remove_task(self._tasks.pop(what))
      self._live.update(self._bars)
    elif total and done * 4 // total > quarters:
      self._other[what] = (since, done * 4 // total)
      self._console.print(Text(f"{what}: {done}/{total} in {human_time(now - since)}"))
    if done >= total:
      self._other.pop(what)

  def close(self) -> None:
    """Ends the live display; the last state stays on the screen."""
    if self._live:
      self._live.stop()
      self._live = None

  def _bar(self, what: str, done: int, total: int, left: str) -> None:
    if what not in self._tasks:
      self._tasks[what] = self._bars.add_task(what, total=total, left=left)
    self._bars.update(self._tasks[what], completed=done, total=total, left=left)

  def _due(self, step: int) -> bool:
    """About one plain line per 5 %, and the last step."""
    every = max(1, round(self._total / 20))
    return step % every == 0 or step == self._total or len(self._durations) == 1


def figures_line(metrics: Mapping[str, float], timing: Mapping[str, float]) -> str:
  """Formats the metrics that matter most while one waits; leaves out those that a step does not have."""
  parts = [f"{label} {pattern.format(metrics[name])}" for label, name, pattern in FIGURES if name in metrics]
  accepted = accept_rate(metrics)
  if accepted is not None:
    parts.append(f"hints accepted {accepted:.2f}")
  if "tokens_per_second/step" in timing:
    parts.append(f"{timing['tokens_per_second/step']:,.0f} tokens/s")
  return "  ".join(parts)


def accept_rate(metrics: Mapping[str, float]) -> float | None:
  """Returns the share of the failed prompts that got an accepted candidate; None without failed prompts."""
  rounds = [name for name in metrics if name.startswith("hint/accept_rate@")]
  return metrics[max(rounds, key=lambda name: int(name.split("@")[1]))] if rounds else None


def human_bytes(count: float) -> str:
  """Formats a number of bytes in three digits, for example "1.23 GB" (powers of 1,000)."""
  for unit in ("B", "kB", "MB", "GB", "TB"):
    if count < 999.5 or unit == "TB":
      return f"{count:.3g} {unit}"
    count /= 1000
  raise AssertionError("unreachable")


def human_count(count: float) -> str:
  """Formats a number in three digits, for example "2.13 B"."""
  for unit in ("", " K", " M", " B"):
    if count < 999.5 or unit == " B":
      return f"{count:.3g}{unit}"
    count /= 1000
  raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
  """Formats a duration as "42 s", "3 min 05 s" or "2 h 07 min"."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds} s"
  if seconds < 3600:
    return f"{seconds // 60} min {seconds % 60:02d} s"
  return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


# What a user can change where a run does not fit.
MEMORY_FIELDS = (
  "Raise batch.micro_batches; lower sampling.max_new_tokens or batch.rollouts; set model.remat=full or "
  "model.teacher_memory=host; or share the models out with mesh.fsdp and mesh.tensor."
)


def device_bytes() -> int | None:
  """Returns the memory of one device in bytes, on a CPU its share of the machine's; None where it is not known."""
  device = jax.local_devices()[0]
  if device.platform != "cpu":
    return (device.memory_stats() or {}).get("bytes_limit")
  try:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
  except (ValueError, OSError):
    return None


def largest_parts(memory: Mapping[str, int]) -> str:
  """Names the three largest parts of a plan of memory."""
  parts = sorted(((size, name) for name, size in memory.items() if name != "peak"), reverse=True)[:3]
  return ", ".join(f"{name} {human_bytes(size)}" for size, name in parts)


def start_panel(
  plan: RunPlan, parameters: Mapping[str, int], memory: Mapping[str, int] | None = None
) -> RenderableType:
  """Shows what the run will do.

  Args:
    plan: as the hooks receive it.
    parameters: role -> number of weights.
    memory: part -> bytes on one device and "peak", an estimate; left out when None.
  """
  config = plan.config
  rows: list[tuple[str, str]] = [
    (
      role,
      f"{config.model.teacher if role == 'teacher' else config.model.student}: {_model_line(model, parameters[role])}",
    )
    for role, model in plan.models.items()
  ]
  if config.model.lora_rank:
    rows.append(("trained", _lora_line(config.model)))
  devices = math.prod(plan.mesh.values())
  axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  rows.append(("mesh", f"{devices} x {jax.devices()[0].device_kind} ({axes})"))
  rows.append(("questions", ", ".join(f"{split} {count:,}" for split, count in plan.questions.items())))
  if plan.data:
    rows.append(("data", plan.data))
  if plan.images:
    rows.append(("images", plan.images))
  rows += method_rows(config)
  first = f", from step {plan.start_step}" if plan.start_step else ""
  rows.append(("steps", f"{config.train.steps}{first}; learning rate {config.optimizer.learning_rate:g}"))
  if memory:
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items() if size and name != "peak")
    rows.append(("memory", f"about {human_bytes(memory['peak'])} per device at most (estimate: {parts})"))
  rows.append(("programs", ", ".join(plan.programs)))
  rows.append(("workdir", plan.workdir or "none: nothing is written"))
  table = Table.grid(padding=(0, 2))
  table.add_column(style="bold", no_wrap=True)
  table.add_column()
  for name, value in rows:
    table.add_row(name, Text(value))
  return Panel(table, title="this run", title_align="left", expand=False)


def method_rows(config: Config) -> list[tuple[str, str]]:
  """Says what the student learns from: (name, value) for batch, reward, objective and exploration."""
  return [
    ("batch", _batch_line(config)),
    ("reward", _reward_line(config)),
    ("objective", _objective_line(config)),
    ("exploration", _exploration_line(config)),
  ]


def config_rows(config: Config) -> list[tuple[str, str]]:
  """Describes a run from its config alone: (name, value)."""
  rows = [("student", config.model.student)]
  if config.model.teacher:
    rows.append(("teacher", config.model.teacher))
  if config.model.lora_rank:
    rows.append(("trained", _lora_line(config.model)))
  rows.append(("data", config.data.directory or "PhantomVQA, drawn by the project"))
  rows.append(("trained on", config.data.train_modality))
  rows += method_rows(config)
  return rows + [
    ("steps", f"{config.train.steps:,}"),
    ("learning rate", f"{config.optimizer.learning_rate:g}, {config.optimizer.warmup_steps} steps of warm-up"),
    ("seed", f"{config.seed}"),
  ]


def samples_panel(samples: Sequence[Mapping[str, Any]], *, step: int, limit: int = 4) -> RenderableType:
  """Shows the first rollouts of a step, each question once; leaves out hints and their candidates.

  Args:
    samples: records as samples.jsonl has them.
    step: updates done.
    limit: rollouts shown.
  """
  parts: list[RenderableType] = []
  shown = None
  for sample in [sample for sample in samples if sample["kind"] == "rollout"][:limit]:
    if sample["id"] != shown:
      shown = sample["id"]
      options = "  ".join(f"{chr(ord('A') + i)}: {option}" for i, option in enumerate(sample["options"]))
      parts.append(Text(f"{sample['question']}\n{options}  (answer {sample['answer']})", style="dim"))
      parts.append(Rule(style="dim"))
    parts.append(Text.assemble((_verdict(sample), "bold"), "  ", sample["completion"].strip()))
  return Panel(Group(*parts), title=f"samples of step {step}", title_align="left", expand=False)


def _verdict(sample: Mapping[str, Any]) -> str:
  """A rollout's rewards and marks, for example "accuracy 1 format 1 distilled"."""
  marks = [f"{name} {value:g}" for name, value in sample["rewards"].items()]
  marks += ["distilled"] if sample["gate"] else []
  marks += [name for name in ("injected", "supervised") if sample[name]]
  return " ".join(marks)


def _model_line(model: Any, parameters: int) -> str:
  text, vision = model.text, model.vision
  return (
    f"{human_count(parameters)} parameters: text {text.num_hidden_layers} layers x {text.hidden_size}, "
    f"vision {vision.depth} x {vision.hidden_size}, vocabulary {text.vocab_size:,}"
  )


def _lora_line(model: Any) -> str:
  scale = f"scale {model.lora_alpha:g} / {model.lora_rank}"
  return f"LoRA of rank {model.lora_rank}, {scale}, on {', '.join(model.lora_targets)}"


def _reward_line(config: Config) -> str:
  """Convention, weights, and further functions as the config names them; what a caller passes is not known here."""
  reward = config.reward
  parts = f"accuracy x {reward.accuracy:g}, format x {reward.format:g}"
  if reward.combination == "product":
    parts = f"accuracy and format together x {reward.accuracy:g}"
  more = [part.strip().rpartition(":") for part in reward.more.split(",") if part.strip()]
  return ", ".join(
    [f"{reward.convention}: {parts}", *(f"{name.strip()} x {weight.strip()}" for name, _, weight in more)]
  )


def _objective_line(config: Config) -> str:
  objective = config.objective
  parts = []
  if objective.policy_weight and config.batch.on_policy_fraction:
    parts.append(f"policy gradient ({objective.advantage}, {objective.aggregation}, {objective.ratio} ratio)")
  if objective.distill_weight:
    gate = "every rollout" if objective.gate_mode == "none" else f"{objective.gate_mode} {objective.gate_signal} gate"
    weight = f" {objective.divergence_weight:g}" if objective.divergence == "jsd" else ""
    parts.append(f"distillation x {objective.distill_weight:g} ({objective.divergence}{weight}, {gate})")
  if objective.reference_weight:
    parts.append(f"reference KL x {objective.reference_weight:g}")
  if objective.supervised_weight:
    parts.append(f"likelihood x {objective.supervised_weight:g}")
  return ", ".join(parts)


def _batch_line(config: Config) -> str:
  batch, micro = config.batch, config.batch.micro_batches
  line = f"{batch.prompts} prompts x {batch.rollouts} rollouts of up to {config.sampling.max_new_tokens} tokens"
  if batch.on_policy_fraction < 1:
    writer = {"teacher": "the teacher", "answer": "the gold answers"}[config.supervised.source]
    line += f", {1 - batch.on_policy_fraction:.0%} of them by {writer}"
  line += f", {micro} micro-batch{'es' if micro > 1 else ''}"
  return line + (f", {batch.updates} updates" if batch.updates > 1 else "")


def _exploration_line(config: Config) -> str:
  exploration = config.exploration
  if exploration.trigger == "never" or not exploration.replacements or not exploration.rounds:
    return "none"
  per_round = exploration.candidates or exploration.replacements
  return (
    f"on {exploration.trigger}: up to {exploration.rounds} rounds of {per_round} candidates, "
    f"up to {exploration.replacements} rollouts replaced ({config.objective.off_context})"
  )
