"""Figures of a run: training curves from metrics.jsonl, accuracy per modality from evaluation.json."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kepo_jax.reporting.tables import center

# One panel per row: title, names of metrics with their labels, whether the values are shares of one.
PANELS: tuple[tuple[str, dict[str, str], bool], ...] = (
  ("Student's reward, before injection",
   {"reward/accuracy": "accuracy", "reward/format": "format"}, True),
  ("Prompts without a signal", {"cliff_rate": "no accurate rollout", "dead_group_rate": "equal rewards"}, True),
  ("Rollouts distilled and injected", {"gate/frac": "gate open", "injected_frac": "injected"}, True),
  ("Failed prompts helped by hints", {}, True),  # the rounds of a run name the metrics
  ("Divergence from the teacher, nats per token",
   {"divergence/gated": "gated", "divergence/ungated": "not gated", "divergence/injected": "injected"}, False),
  ("Validation accuracy", {"validation/in_domain": "in domain", "validation/out_of_domain": "out of domain"}, True),
  ("Entropy, nats per token", {"entropy": "entropy"}, False),
  ("Completion length, tokens", {"completion/length": "length"}, False),
  ("KL to the reference, nats per token", {"kl/ref": "KL"}, False),
  ("Gradient norm", {"grad_norm": "before clipping"}, False),
  ("Learning rate", {"lr": "learning rate"}, False),
)  # fmt: skip
# Okabe and Ito's colours: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_STYLE: dict[str, Any] = {"linewidth": 1.8, "solid_capstyle": "round"}


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
  """Averages float64[n] over the `span` points around each, fewer at both ends; leaves out nan values."""
  known = np.isfinite(values)
  sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
  counts = np.cumsum(np.concatenate([[0], known]))
  places = np.arange(len(values))
  low, high = np.maximum(0, places - span // 2), np.minimum(len(values), places + span // 2 + 1)
  with np.errstate(invalid="ignore"):
    return np.where(counts[high] > counts[low], (sums[high] - sums[low]) / (counts[high] - counts[low]), np.nan)


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns (steps, values) of one metric over the records that have it; null reads as nan."""
  found = [(record["step"], record[name]) for record in records if name in record]
  steps = np.array([step for step, _ in found], float)
  return steps, np.array([np.nan if value is None else value for _, value in found], float)


def curves_figure(records: Sequence[Mapping[str, Any]], *, title: str = "", columns: int | None = None) -> Figure:
  """Draws training curves, one panel per family of metrics that the run logged.

  Args:
    records: of metrics.jsonl.
    title: of the figure.
    columns: panels beside each other at most; None: 3, or 4 where there are more than 9.
  """
  available = {name for record in records for name in record}
  panels = [(heading, _present(metrics, heading, available), share) for heading, metrics, share in PANELS]
  panels = [panel for panel in panels if panel[1]]
  columns = min(columns or (3 if len(panels) <= 9 else 4), max(1, len(panels)))
  rows = max(1, -(-len(panels) // columns))
  figure = Figure(figsize=(4.4 * columns, 2.7 * rows + 0.5), layout="constrained")
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  last = max((record["step"] for record in records), default=1)
  for axis, (heading, metrics, share) in zip(axes, panels, strict=False):
    _curve_panel(axis, records, metrics)
    _dress(axis, heading, share)
    axis.set_xlim(0, last)
  for axis in axes[len(panels) :]:
    axis.set_visible(False)
  for axis in axes[max(0, len(panels) - columns) : len(panels)]:
    axis.set_xlabel("step", fontsize=9)
  if title:
    figure.suptitle(title, fontsize=12)
  return figure


def bars_figure(
  evaluations: Mapping[str, Mapping[str, Any]], *, title: str = "", section: str = "modalities"
) -> Figure:
  """Draws accuracy per modality (or question type), one bar per evaluation, with 95 % intervals.

  Args:
    evaluations: name ("before", "after") -> result of kepo_jax.evaluation.
    title: of the figure.
    section: "modalities" or "question_types".
  """
  first = next(iter(evaluations.values()))
  names = list(first[section])
  summary = ["out_of_domain"] if section == "modalities" and first.get("out_of_domain") else []
  labels = [_wrapped(name) for name in names] + ["mean\nout of\ndomain"] * len(summary)
  figure = Figure(figsize=(max(5.0, 1.15 * len(labels) + 1.2), 3.8), layout="constrained")
  axis = figure.subplots()
  width = 0.8 / len(evaluations)
  places = np.arange(len(labels)) + np.array([0.0] * len(names) + [0.35] * len(summary))
  for i, (which, result) in enumerate(evaluations.items()):
    entries = [result[section][name] for name in names] + [result[key] for key in summary]
    values = np.array([center(entry) for entry in entries])
    low, high = (np.array([entry[key] for entry in entries]) for key in ("low", "high"))
    x = places + (i - (len(evaluations) - 1) / 2) * width
    colour = "#B8C4CE" if i == 0 and len(evaluations) > 1 else COLOURS[max(0, i - 1)]
    axis.bar(x, values, width * 0.94, color=colour, label=which)
    spread = np.maximum(0.0, [values - low, high - values])
    axis.errorbar(x, values, yerr=spread, fmt="none", ecolor="#333333", elinewidth=1, capsize=2.5)
  if summary:
    axis.axvline(places[-1] - 0.68, color="#999999", linewidth=0.8, linestyle=":")
  axis.set_xticks(places, labels, fontsize=9)
  _dress(axis, title or "Accuracy with 95 % intervals", share=True)
  axis.grid(axis="x", visible=False)
  axis.set_ylim(0, 1.0)
  # Beside the title: inside, the legend would cover bars near 100 %.
  axis.legend(frameon=False, fontsize=9, loc="lower right", ncols=len(evaluations), bbox_to_anchor=(1, 1))
  return figure


def validation_figure(
  validations: Sequence[Mapping[str, Any]], *, ends: Mapping[int, Mapping[str, Any]] | None = None, title: str = ""
) -> Figure:
  """Draws validation accuracy over the steps with 95 % intervals, and test accuracy before and after.

  Args:
    validations: results of kepo_jax.evaluation with their `step`, as evaluation.json has them.
    ends: step -> result on the test questions, before and after the training.
    title: of the figure.
  """
  figure = Figure(figsize=(7.0, 3.8), layout="constrained")
  axis = figure.subplots()
  for colour, (key, label) in zip(
    COLOURS, (("in_domain", "in domain"), ("out_of_domain", "out of domain")), strict=False
  ):
    found = [(each["step"], each[key]) for each in validations if each.get(key)]
    if found:
      steps, entries = zip(*found, strict=True)
      axis.plot(steps, [center(e) for e in entries], color=colour, label=label, marker="o", markersize=4, **_STYLE)
      axis.fill_between(
        steps, [e["low"] for e in entries], [e["high"] for e in entries], color=colour, alpha=0.15, lw=0
      )
    tested = [(step, result[key]) for step, result in (ends or {}).items() if result.get(key)]
    if tested:
      steps, entries = zip(*tested, strict=True)
      values = np.array([center(entry) for entry in entries])
      spread = [values - [e["low"] for e in entries], [e["high"] for e in entries] - values]
      axis.errorbar(
        steps, values, yerr=np.maximum(0.0, spread), fmt="D", color=colour, markerfacecolor="white", markersize=5,
        elinewidth=1, capsize=2.5, label=f"{label}, test",
      )  # fmt: skip
  _dress(axis, title, share=True)
  axis.set_xlabel("step", fontsize=9)
  if axis.get_legend_handles_labels()[0]:
    axis.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
  return figure


def save(figure: Figure, path: epath.PathLike) -> None:
  """Writes a figure as PNG; the same figure gives the same bytes."""
  with epath.Path(path).open("wb") as file:
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


def _present(metrics: Mapping[str, str], heading: str, available: set[str]) -> dict[str, str]:
  if heading.startswith("Failed prompts"):
    rounds = sorted((n for n in available if n.startswith("hint/accept_rate@")), key=lambda n: int(n.split("@")[1]))
    # First and last round: what one hint does, and what persistence adds.
    labels = {name: f"within {name.split('@')[1]} hint{'s' if name.split('@')[1] != '1' else ''}" for name in rounds}
    return {name: labels[name] for name in dict.fromkeys(rounds[:1] + rounds[-1:])}
  return {name: label for name, label in metrics.items() if name in available}


def _curve_panel(axis: Axes, records: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> None:
  for colour, (name, label) in zip(COLOURS, metrics.items(), strict=False):
    steps, values = series(records, name)
    if len(values) < 20 or name == "lr":  # the schedule has no noise
      axis.plot(
        steps, values, color=colour, label=label, marker="o" if len(values) < 20 else "", markersize=3, **_STYLE
      )
      continue
    span = 2 * (len(values) // 30) + 3
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
    axis.plot(steps, smoothed(values, span), color=colour, label=label, **_STYLE)
  if len(metrics) > 1:
    axis.legend(frameon=False, fontsize=8)


def _dress(axis: Axes, heading: str, share: bool) -> None:
  axis.set_title(heading, fontsize=10, loc="left")
  axis.tick_params(labelsize=8)
  axis.grid(color="#E6E6E6", linewidth=0.7)
  axis.set_axisbelow(True)
  for side in ("top", "right"):
    axis.spines[side].set_visible(False)
  if share:
    axis.set_ylim(-0.02, 1.02)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
  elif axis.get_ylim()[0] >= 0 or axis.dataLim.y0 >= 0:
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _wrapped(name: str) -> str:
  return "\n".join(name.split(" "))
