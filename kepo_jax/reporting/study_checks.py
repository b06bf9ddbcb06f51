"""Figures of the checks of a study: the gate's threshold and direction, the budget of hints, and their quality."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kepo_jax.reporting import study_bars, study_style, study_tables
from kepo_jax.reporting.curves import COLOURS
from kepo_jax.reporting.study_bars import INTERVALS, Summary
from kepo_jax.reporting.study_style import TEXT

_FIGURES = ("in_domain", "out_of_domain", "unseen")
_QUALITY = (
  ("gain", "gain in log-probability, nats per token"),
  ("reliance", "hint reliance, nats per token"),
  ("leak_rate", "leak rate"),
)
_PAIR_MARKERS = ("o", "s", "^", "D", "v")


def tau_figure(summary: Summary, points: Mapping[str, tuple[float, str]]) -> Figure:
  """Test accuracy against the gate's threshold, one line per gate signal and learning rate.

  Points of different rates are not joined: what lies between them is a matter of the rate as much as of the threshold.

  Args:
    summary: of `studies.summarised`.
    points: method -> (tau, gate signal and learning rate).
  """
  return _lines_figure(summary, points, title="Threshold of the gate", across="tau", name="gate signal")


def budget_figure(summary: Summary, points: Mapping[str, int], stability: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Out-of-domain accuracy, and two measures of stability, against the budget of hints.

  Args:
    summary: of `studies.summarised`.
    points: method -> B, rounds of hinted sampling per failed prompt.
    stability: of `studies.stability`.
  """
  ordered = sorted((name for name in points if name in summary["methods"]), key=lambda name: points[name])
  figure = Figure(figsize=(study_style.WIDTH, 3.6), layout="constrained")
  first, second = figure.subplots(1, 2)
  colour = study_style.full_colour("kepo")
  _interval_line(first, summary, ordered, "out_of_domain", colour, "o")
  study_style.dress(first, "Out of domain, test")
  for key, label, line, marker, shade in (
    ("seeds", "between seeds, test", "-", "o", COLOURS[0]),
    ("validations", "over the last three validations", "--", "s", COLOURS[1]),
  ):
    values = [stability.get(name, {}).get(key) for name in ordered]
    second.plot(range(len(ordered)), [np.nan if value is None else 100 * value for value in values], linestyle=line,
                marker=marker, color=shade, label=label, linewidth=1.6, markersize=5)  # fmt: skip
  intervals = [stability.get(name, {}).get("seeds_interval") for name in ordered]
  for place, interval in enumerate(intervals):
    if interval:
      second.plot([place, place], [100 * bound for bound in interval], color=COLOURS[0], linewidth=1, alpha=0.6)
  study_style.dress(second, "Standard deviation of the out-of-domain mean, points", share=False)
  second.set_ylim(bottom=0)
  second.set_ylim(top=1.3 * second.get_ylim()[1])
  second.legend(frameon=False, fontsize=8, loc="upper right")
  for axis in (first, second):
    axis.set_xticks(range(len(ordered)), [str(points[name]) for name in ordered])
    axis.set_xlabel("B, rounds of hinted sampling per failed prompt", fontsize=8.5, color=TEXT)
    axis.set_xlim(-0.4, len(ordered) - 0.6)
  said = f"{INTERVALS} Small dots: seeds. Deviations over seeds: 95 % by chi-square."
  study_style.heading(figure, "Budget of hints", said)
  return figure


def gate_figure(summary: Summary, *, looks: Mapping[str, study_style.Style] | None = None) -> Figure:
  """Test accuracy by the direction of the gate, beside whatever else the summary holds for comparison."""
  return study_bars.overview_figure(summary, title="Direction of the gate: test accuracy", looks=looks)


def hints_figure(records: Sequence[Mapping[str, Any]], train_modality: str, unseen: Sequence[str] = ()) -> Figure:
  """Quality of hints against the share of reward-positive candidates, one dot per modality; and acceptance by round.

  Args:
    records: as `check_tables.hint_rows` takes them.
    train_modality: its dots have a black edge.
    unseen: modalities whose dots have a dotted ring.
  """
  pairs = list(dict.fromkeys((record["student"], record["teacher"]) for record in records))
  prompts = list(dict.fromkeys(record["hint_prompt"] for record in records))
  colours = dict(zip(pairs, (*COLOURS, "#E69F00", "#000000"), strict=False))
  markers = dict(zip(pairs, _PAIR_MARKERS * 2, strict=False))
  figure = Figure(figsize=(study_style.WIDTH, 6.6), layout="constrained")
  axes = figure.subplots(2, 2).ravel()
  for axis, (key, label) in zip(axes, _QUALITY, strict=False):
    for record in records:
      pair = (record["student"], record["teacher"])
      marked = record["modality"] == train_modality or record["modality"] in unseen
      _hint_dot(axis, record, key, colours[pair], markers[pair], filled=record["hint_prompt"] == prompts[0],
                ring=("-" if record["modality"] == train_modality else ":") if marked else "")  # fmt: skip
    study_style.dress(axis, "")
    axis.set_xlabel(label, fontsize=8.5, color=TEXT)
    axis.set_ylabel("reward-positive candidates", fontsize=8.5, color=TEXT)
    if key == "leak_rate":
      axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
  _acceptance_lines(axes[3], records, pairs, prompts, colours, markers)
  handles: list[Any] = [
    Line2D([], [], color=colours[p], marker=markers[p], linestyle="", label=f"{p[0]} taught by {p[1]}") for p in pairs
  ]
  handles += [Line2D([], [], color=TEXT, marker="o", linestyle="-" if i == 0 else "--", label=prompt,
                     markerfacecolor=TEXT if i == 0 else "white") for i, prompt in enumerate(prompts)]  # fmt: skip
  handles += [
    _ring_handle(axes[3], "-", f"{train_modality} (trained on)"),
    *(_ring_handle(axes[3], ":", f"{n} (unseen)") for n in unseen),
  ]
  study_style.legend_below(figure, handles)
  said = "One dot per modality; its area grows with the number of prompts."
  study_style.heading(figure, "Hints: what they tell, and what comes of it", said)
  return figure


def _lines_figure(
  summary: Summary, points: Mapping[str, tuple[float, str]], *, title: str, across: str, name: str
) -> Figure:
  named = study_tables.headings(summary)
  keys = [key for key in _FIGURES if key in named]
  series = list(dict.fromkeys(group for _, group in points.values()))
  figure = Figure(figsize=(study_style.WIDTH, 3.5), layout="constrained")
  axes = figure.subplots(1, len(keys), squeeze=False)[0]
  colours = dict(zip(series, (COLOURS[2], COLOURS[3], *COLOURS), strict=False))
  for axis, key in zip(axes, keys, strict=True):
    for i, group in enumerate(series):
      mine = sorted(
        (m for m in points if points[m][1] == group and m in summary["methods"]), key=lambda m: points[m][0]
      )
      places = [points[m][0] + 0.05 * (i - (len(series) - 1) / 2) for m in mine]
      _interval_line(axis, summary, mine, key, colours[group], "oDs^"[i % 4], places=places, label=group,
                     line="-" if i == 0 else "--")  # fmt: skip
    study_style.dress(axis, named[key][:1].upper() + named[key][1:])
    axis.set_xticks(sorted({place for place, _ in points.values()}))
    axis.set_xlabel(across, fontsize=8.5, color=TEXT)
  handles = [Line2D([], [], color=colours[group], marker="oDs^"[i % 4], linestyle="-" if i == 0 else "--",
                    label=f"{name}: {group}") for i, group in enumerate(series)]  # fmt: skip
  study_style.legend_below(figure, handles, columns=4 if len(handles) < 4 else 2)
  study_style.heading(figure, f"{title}: test accuracy", f"{INTERVALS} Small dots: seeds.")
  return figure


def _interval_line(
  axis: Axes,
  summary: Summary,
  methods: Sequence[str],
  key: str,
  colour: str,
  marker: str,
  *,
  places: Sequence[float] | None = None,
  label: str = "",
  line: str = "-",
) -> None:
  places = list(range(len(methods))) if places is None else places
  entries = [summary["methods"][method]["statistics"][key] for method in methods]
  axis.plot(places, [entry["mean"] for entry in entries], color=colour, linestyle=line, linewidth=1.4, label=label)
  for place, entry in zip(places, entries, strict=True):
    axis.plot([place, place], [entry["low"], entry["high"]], color=colour, linewidth=2, solid_capstyle="butt")
    axis.plot(
      place, entry["mean"], marker=marker, color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.6
    )
    if len(entry["values"]) > 1:
      axis.plot(
        np.full(len(entry["values"]), place), entry["values"], ".", color=TEXT, markersize=2.5, alpha=0.7, zorder=5
      )


def _hint_dot(
  axis: Axes, record: Mapping[str, Any], key: str, colour: str, marker: str, *, filled: bool, ring: str
) -> None:
  if record[key] is None or record["positive_rate"] is None:
    return
  size = 12 + 0.6 * record["prompts"]
  axis.scatter(record[key], record["positive_rate"], s=size, marker=marker, linewidths=1.1, edgecolors=colour,
               facecolors=colour if filled else "white", alpha=0.85, zorder=3)  # fmt: skip
  if ring:
    axis.scatter(record[key], record["positive_rate"], s=size + 70, marker="o", facecolors="none", edgecolors=TEXT,
                 linewidths=0.9, linestyles=ring, zorder=4)  # fmt: skip


def _acceptance_lines(axis: Axes, records: Sequence[Mapping[str, Any]], pairs: Sequence, prompts: Sequence[str],
                      colours: Mapping, markers: Mapping) -> None:  # fmt: skip
  for pair in pairs:
    for i, prompt in enumerate(prompts):
      mine = [
        r for r in records if (r["student"], r["teacher"]) == pair and r["hint_prompt"] == prompt and r["prompts"]
      ]
      mine = [record for record in mine if record["accept_rate"]]
      if mine:
        rounds = min(len(record["accept_rate"]) for record in mine)
        rates = np.average(
          [record["accept_rate"][:rounds] for record in mine], axis=0, weights=[r["prompts"] for r in mine]
        )
        axis.plot(range(1, rounds + 1), rates, color=colours[pair], marker=markers[pair], linewidth=1.4, markersize=5,
                  linestyle="-" if i == 0 else "--", markerfacecolor=colours[pair] if i == 0 else "white")  # fmt: skip
        axis.set_xticks(range(1, rounds + 1))
  study_style.dress(axis, "")
  axis.set_xlabel("rounds", fontsize=8.5, color=TEXT)
  axis.set_ylabel("prompts with an accepted candidate", fontsize=8.5, color=TEXT)


def _ring_handle(axis: Axes, line: str, label: str) -> PathCollection:
  # Of a line's markers the edge cannot be dotted, of dots it can.
  return axis.scatter([], [], s=90, facecolors="none", edgecolors=TEXT, linewidths=0.9, linestyles=line, label=label)
