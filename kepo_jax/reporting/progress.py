"""The progress display: a live bar in a terminal, plain lines elsewhere."""

import atexit
import collections
import os
import statistics
import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from kepo_jax.reporting.panels import human_time

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
  """A console that shows names as they are: brackets in them are no markup.

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
  """The figures that matter most while one waits; those that a step does not have are left out."""
  parts = [f"{label} {pattern.format(metrics[name])}" for label, name, pattern in FIGURES if name in metrics]
  accepted = accept_rate(metrics)
  if accepted is not None:
    parts.append(f"hints accepted {accepted:.2f}")
  if "tokens_per_second/step" in timing:
    parts.append(f"{timing['tokens_per_second/step']:,.0f} tokens/s")
  return "  ".join(parts)


def accept_rate(metrics: Mapping[str, float]) -> float | None:
  """Share of the failed prompts with an accepted candidate after the last round; None without failed prompts."""
  rounds = [name for name in metrics if name.startswith("hint/accept_rate@")]
  return metrics[max(rounds, key=lambda name: int(name.split("@")[1]))] if rounds else None
