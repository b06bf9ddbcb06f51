"""Figures of a study's test accuracies: all methods, modality by modality, and paired differences."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from kepo_jax.reporting import study_style, study_tables
from kepo_jax.reporting.study_style import TEXT, Style

INTERVALS = "Bars: 95 % intervals over seeds and questions; of one seed or an untrained model over questions alone."
_FAR = 0.12  # a difference that is a failure, or a start
_WIDEST = 0.25  # half the scale at most; longer intervals run over its edge
Summary = Mapping[str, Any]


def looks_of(summary: Summary) -> dict[str, Style]:
  """Method -> style, of all methods of a summary."""
  return study_style.styles(summary["methods"])


def overview_figure(summary: Summary, *, title: str = "Test accuracy", paper: bool = False,
                    looks: Mapping[str, Style] | None = None) -> Figure:  # fmt: skip
  """Accuracy of every method on the training modality, out of domain, and on the unseen modality.

  Args:
    summary: of `studies.summarised`.
    title: of the figure.
    paper: whether the paper's own figures stand in a row of their own below, marked as such.
    looks: of `study_style.styles`.
  """
  looks = looks or looks_of(summary)
  names = study_tables.headings(summary)
  names = {key: names[key] for key in ("in_domain", "out_of_domain", "unseen") if key in names}
  rows = len(summary["methods"])
  height = 0.24 * rows + 1.4
  figure = Figure(figsize=(study_style.WIDTH, height + (1.25 if paper else 0)), layout="constrained")
  grid = figure.add_gridspec(2 if paper else 1, len(names), height_ratios=[height, 1.0][: 2 if paper else 1])
  first = None
  for i, (key, heading) in enumerate(names.items()):
    axis = figure.add_subplot(grid[0, i], sharey=first)
    first = first or axis
    for place, (method, entry) in enumerate(summary["methods"].items()):
      _dot(axis, entry["statistics"][key], rows - 1 - place, looks[method], trained=entry["seeds"] != [None])
    axis.axvline(summary["chance"][key], color=TEXT, linewidth=0.8, linestyle=":")
    _rows(axis, list(summary["methods"]), looks, shown=i == 0)
    axis.margins(x=0.06)
    axis.set_title(_capital(heading), fontsize=9, loc="left", color=TEXT)
  if paper:
    _paper_panel(figure.add_subplot(grid[1, :]))
  study_style.heading(figure, title, f"{INTERVALS} Small dots: seeds. Dotted: chance.")
  return figure


def section_figure(
  summary: Summary, section: str = "modalities", *, looks: Mapping[str, Style] | None = None
) -> Figure:
  """Bars with intervals of every method, one panel per modality or question type."""
  looks = looks or looks_of(summary)
  keys = [key for key in summary["chance"] if key.startswith(f"{section}/")]
  columns = min(4 if len(keys) > 6 else 3, len(keys))
  lines, rows = -(-len(keys) // columns), len(summary["methods"])
  figure = Figure(figsize=(study_style.WIDTH, lines * (0.19 * rows + 0.55) + 0.8), layout="constrained")
  axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
  for axis, key in zip(axes.ravel(), keys, strict=False):
    for place, (method, entry) in enumerate(summary["methods"].items()):
      _bar(axis, entry["statistics"][key], rows - 1 - place, looks[method])
    axis.axvline(summary["chance"][key], color=TEXT, linewidth=0.8, linestyle=":")
    _rows(axis, list(summary["methods"]), looks, shown=axis in axes[:, 0], size=7.5)
    name = textwrap.wrap(study_tables.marked(summary, key), 20 if columns == 4 else 40)
    axis.set_title("\n".join(name), fontsize=8.5, loc="left", color=TEXT)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.5, 1])
    if key.split("/", 1)[1] in summary["unseen"]:
      axis.set_facecolor("#F4F0E6")
  study_style.hide_rest(axes, len(keys))
  what = "modality" if section == "modalities" else "question type"
  shaded = " Shaded: no model has seen it." if section == "modalities" and summary["unseen"] else ""
  study_style.heading(figure, f"Test accuracy per {what}", f"{INTERVALS} Dotted: chance.{shaded}")
  return figure


def forest_figure(summary: Summary, *, looks: Mapping[str, Style] | None = None) -> Figure:
  """Paired differences to the references, out of domain (filled) and on the training modality (hollow)."""
  looks = looks or looks_of(summary)
  references = [name for name in summary["differences"] if summary["differences"][name]]
  methods = [name for name in summary["methods"] if any(name in summary["differences"][r] for r in references)]
  figure = Figure(figsize=(study_style.WIDTH, 0.34 * len(methods) + 1.3), layout="constrained")
  axes = figure.subplots(1, max(1, len(references)), sharey=True, sharex=True, squeeze=False)[0]
  limit = _limit([entry for reference in references for entry in summary["differences"][reference].values()])
  for i, (axis, reference) in enumerate(zip(axes, references, strict=False)):
    for place, method in enumerate(methods):
      entry = summary["differences"][reference].get(method)
      if entry is not None:
        _difference(axis, entry, len(methods) - 1 - place, looks[method], limit)
    axis.axvline(0, color=TEXT, linewidth=0.9)
    axis.set_xlim(-limit, limit)
    _rows(axis, methods, looks, shown=i == 0)
    axis.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):+g}" if value else "0")
    axis.set_xlabel("percentage points", fontsize=8.5)
    axis.set_title(f"Difference to {looks[reference].label}", fontsize=9, loc="left", color=TEXT)
  said = f"Filled: out of domain, also in figures; hollow: {summary['train_modality']}. {INTERVALS}"
  said += " Arrows: off the scale. Not corrected for the number of comparisons."
  study_style.heading(figure, "Paired differences of test accuracy", said)
  return figure


def _dot(axis: Axes, entry: Mapping[str, Any], place: float, look: Style, *, trained: bool = True) -> None:
  axis.plot([entry["low"], entry["high"]], [place, place], color=look.colour, linewidth=1.8, solid_capstyle="butt")
  axis.plot(entry["mean"], place, marker=look.marker, color=look.colour, markersize=5.5, markeredgecolor="white",
            markeredgewidth=0.5, zorder=4)  # fmt: skip
  if trained and len(entry["values"]) > 1:
    axis.plot(
      entry["values"], np.full(len(entry["values"]), place - 0.3), ".", color=look.colour, markersize=3, alpha=0.8
    )


def _bar(axis: Axes, entry: Mapping[str, Any], place: float, look: Style) -> None:
  axis.barh(place, entry["mean"], height=0.72, color=look.colour)
  axis.plot([entry["low"], entry["high"]], [place, place], color=TEXT, linewidth=1.1, solid_capstyle="butt")


def _limit(entries: Sequence[Mapping[str, Any]]) -> float:
  """Half the scale of differences: it has to show those of methods that are comparable, not of failures."""
  found = [entry["statistics"][key] for entry in entries for key in ("in_domain", "out_of_domain")
           if key in entry["statistics"]]  # fmt: skip
  near = [max(abs(each["low"]), abs(each["high"])) for each in found if abs(each["mean"]) < _FAR]
  return min(_WIDEST, 1.08 * max([0.03, *near]))


def _difference(axis: Axes, entry: Mapping[str, Any], place: float, look: Style, limit: float) -> None:
  for key, shift, face in (("in_domain", -0.2, "white"), ("out_of_domain", 0.14, look.colour)):
    found = entry["statistics"].get(key)
    if found is None:
      continue
    if abs(found["mean"]) > limit:
      axis.plot(math.copysign(0.97 * limit, found["mean"]), place + shift, marker="<" if found["mean"] < 0 else ">",
                color=look.colour, markerfacecolor=face, markersize=5)  # fmt: skip
      continue
    width = 1.0 if key == "in_domain" else 2.0
    axis.plot(
      [found["low"], found["high"]], [place + shift] * 2, color=look.colour, linewidth=width, solid_capstyle="butt"
    )
    axis.plot(found["mean"], place + shift, marker=look.marker, color=look.colour, markerfacecolor=face,
              markersize=4.5 if key == "in_domain" else 5.5, markeredgewidth=1)  # fmt: skip
  if "out_of_domain" in entry["statistics"]:
    beside = blended_transform_factory(axis.transAxes, axis.transData)
    text = study_tables.percent(entry["statistics"]["out_of_domain"], signed=True)
    axis.text(1.01, place + 0.1, text, transform=beside, fontsize=7, va="center", color=TEXT)


def _rows(axis: Axes, methods: Sequence[str], looks: Mapping[str, Style], *, shown: bool, size: float = 8.5) -> None:
  axis.set_yticks(np.arange(len(methods))[::-1], [looks[name].label for name in methods], fontsize=size)
  axis.set_ylim(-0.7, len(methods) - 0.3)
  study_style.dress(axis, share=False)
  axis.tick_params(axis="y", labelleft=shown, length=0, labelsize=size)
  axis.grid(axis="y", visible=False)
  axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _paper_panel(axis: Axes) -> None:
  """The paper's own figures, in a frame of their own."""
  names = list(study_tables.PAPER)
  axis.set_facecolor("#F7F7F7")
  for place, name in enumerate(reversed(names)):
    value = study_tables.PAPER[name] / 100
    axis.plot(value, place, marker="o", markerfacecolor="none", color=TEXT, markersize=6)
    axis.text(value + 0.001, place, f"{100 * value:.2f}", va="center", fontsize=7.5, color=TEXT)
  axis.set_yticks(range(len(names)), names[::-1], fontsize=8.5)
  axis.set_ylim(-0.7, len(names) - 0.3)
  axis.set_xlim(0.72, 0.80)
  axis.tick_params(labelsize=8, length=0)
  axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
  axis.set_title(
    f"Not ours: {study_tables.PAPER_SOURCE}. Out of domain, mean of 7", fontsize=8.5, loc="left", color=TEXT
  )


def _capital(text: str) -> str:
  return text[:1].upper() + text[1:]
