"""Figures of a study: test accuracies, validation and training curves, and what a study varied.

A method has the same colour, line and marker in all figures.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.studies import statistics, tables
from experiments.studies.plan import UNTRAINED
from experiments.studies.statistics import Entry
from experiments.studies.tables import config_of
from kepo_jax.reporting.curves import COLOURS

_BLUE, _VERMILION, _GREEN, _PINK, _SKY = COLOURS  # of Okabe and Ito, told apart with any colour vision
# Config -> colour and marker.
_LOOKS = {
  "start": ("#8A8A8A", "X"), "start-no_think": ("#8A8A8A", "x"), "teacher": ("#333333", "h"),
  "sft": ("#E69F00", "v"), "sft_teacher": ("#E69F00", "v"),
  "grpo": (_BLUE, "s"), "rloo": (_SKY, "p"), "gkd": (_VERMILION, "^"), "kepo_ke": (_PINK, "D"), "kepo": (_GREEN, "o"),
  "kepo_released": (_GREEN, "o"), "kepo_eq7": (_GREEN, "o"),
}  # fmt: skip
_UNKNOWN = ("#000000", ">")
# Title of a panel -> configs whose methods it shows.
_FAMILIES = {
  "Supervised": ("sft", "sft_teacher"),
  "Policy gradient": ("grpo", "rloo"),
  "Uniform distillation": ("gkd",),
  "Gated distillation": ("kepo_ke",),
  "KEPO: gate and hints": ("kepo", "kepo_released", "kepo_eq7"),
}
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.4)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)), (0, (2, 0.8)))
_ONE_PANEL = 5  # methods whose lines can be told apart in one panel
GREY, LIGHT, TEXT = "#BDBDBD", "#E6E6E6", "#333333"
WIDTH = 9.0  # inches; at this width letters of 8 points stay readable on a page
INTERVALS = "Bars: 95 % intervals over seeds and questions; of one seed or an untrained model over questions alone."
BAND = "Lines: mean over seeds; bands: lowest to highest seed."
# Title, metric, whether it is a share.
_DYNAMICS = (
  ("Accuracy of rollouts", "reward/accuracy", True),
  ("Reward", "reward/mean", False),
  ("Completion length, tokens", "completion/length", False),
  ("Entropy, nats per token", "entropy", False),
  ("Divergence of gated tokens, nats", "divergence/gated", False),
  ("Divergence of other tokens, nats", "divergence/ungated", False),
  ("Cliff rate: prompts that no rollout solves", "cliff_rate", True),
  ("Prompts that ask for hints", "hint/trigger_rate", True),
  ("Of these, helped by the first hint", "hint/accept_rate@1", True),
)
_SUMMARY = ("in_domain", "out_of_domain", "unseen")
_HINT_QUALITY = (
  ("gain", "gain in log-probability, nats per token"),
  ("reliance", "hint reliance, nats per token"),
  ("leak_rate", "leak rate"),
)
Summary = Mapping[str, Any]  # of `statistics.summarised`
Band = Mapping[str, np.ndarray]  # of `statistics.banded`


@dataclasses.dataclass(frozen=True)
class Style:
  """Look of a method."""

  label: str
  colour: str
  line: Any = "-"
  marker: str = ""

  def handle(self, *, marker: bool = True) -> Line2D:
    """Returns an entry of a legend."""
    return Line2D([], [], color=self.colour, linestyle=self.line, marker=self.marker if marker else "", markersize=4,
                  linewidth=1.6, label=self.label)  # fmt: skip


Looks = Mapping[str, Style]


def study_figures(
  study: str, entries: Sequence[Entry], items: Mapping[str, Any], summaries: tables.Summaries
) -> dict[str, Figure]:
  """Draws a study, name -> figure: the first pair of student and teacher in full, accuracy for each other pair."""
  looks = styles(described(entries))
  figures: dict[str, Figure] = {}
  for number, (pair, group) in enumerate(statistics.pairs(entries).items()):
    suffix, summary = ("" if number == 0 else "-" + "-".join(pair)), summaries[pair]
    figures[f"accuracy{suffix}"] = overview_figure(summary, f"Test accuracy, {' taught by '.join(pair)}", looks)
    if number == 0:
      figures["modalities"] = modalities_figure(summary, looks)
      if statistics.trained_methods(group):
        figures["validation"] = learning_figure(group, summary["train_modality"], looks)
        figures["training"] = dynamics_figure(group, looks)
      figures |= _varied_figure(study, group, items, summary)
  return figures


def _varied_figure(
  study: str, entries: Sequence[Entry], items: Mapping[str, Any], summary: Summary
) -> dict[str, Figure]:
  values = tables.varied(study, entries)
  if study == "tau" and values["tau"]:
    signal = statistics.settings(entries, "objective.gate_signal", "accuracy")
    rates = {entry["method"]: f"{entry['learning_rate']:g}" for entry in entries if entry["learning_rate"]}
    points = {name: (tau, f"{signal[name]}, rate {rates[name]}") for name, tau in values["tau"].items()}
    return {"tau": tau_figure(summary, points)}
  if study == "budget" and values["B"]:
    return {"budget": budget_figure(summary, values["B"], statistics.stability(entries, items))}
  return {}


def save(folder: epath.PathLike, name: str, figure: Figure) -> None:
  """Writes NAME.png; the same figure gives the same bytes."""
  with (epath.Path(folder) / f"{name}.png").open("wb") as file:
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def described(entries: Sequence[Entry]) -> dict[str, Entry]:
  """Returns method -> its first entry, which has its label and its config."""
  first: dict[str, Entry] = {}
  for entry in entries:
    first.setdefault(entry["method"], entry)
  return first


def styles(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
  """Gives each method a style; of methods with one colour the last is solid and full, those before dashed and lighter.

  Args:
    described: all methods of a study, in their order, with `method`, `label` and `config` of each.
  """
  plain = {method: _LOOKS.get(config_of(entry), _UNKNOWN) for method, entry in described.items()}
  result = {}
  for method, (colour, marker) in plain.items():
    same = [name for name, look in plain.items() if look[0] == colour]
    place = len(same) - 1 - same.index(method)
    lighter = _lighter(colour, 0.45 * place / max(1, len(same) - 1))
    result[method] = Style(described[method]["label"], lighter, _LINES[place % len(_LINES)], marker)
  return result


def families(described: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
  """Groups trained methods by title; one group without a title where they are few enough for one panel."""
  trained = {method: config_of(entry) for method, entry in described.items() if method not in UNTRAINED}
  if len(trained) <= _ONE_PANEL:
    return {"": list(trained)}
  groups = {title: [m for m, config in trained.items() if config in configs] for title, configs in _FAMILIES.items()}
  known = {method for group in groups.values() for method in group}
  groups["Others"] = [method for method in trained if method not in known]
  return {title: group for title, group in groups.items() if group}


def focused(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Picks one method of each family where all would be unreadable: GRPO, and the last of the other families."""
  groups = families(described)
  if len(groups) == 1:
    return list(*groups.values())
  return ["grpo" if "grpo" in group else group[-1] for group in groups.values()]


def overview_figure(summary: Summary, title: str, looks: Looks) -> Figure:
  """Draws the accuracy of every method on the training modality, out of domain, and on the unseen modality."""
  names = {key: name for key, name in tables.headings(summary).items() if key in _SUMMARY}
  rows = len(summary["methods"])
  figure = Figure(figsize=(WIDTH, 0.24 * rows + 1.4), layout="constrained")
  axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
  for axis, (key, name) in zip(axes, names.items(), strict=True):
    for place, (method, entry) in enumerate(summary["methods"].items()):
      look, values = looks[method], entry["statistics"][key]
      y = rows - 1 - place
      axis.plot([values["low"], values["high"]], [y, y], color=look.colour, linewidth=1.8, solid_capstyle="butt")
      axis.plot(values["mean"], y, marker=look.marker, color=look.colour, markersize=5.5, markeredgecolor="white",
                markeredgewidth=0.5, zorder=4)  # fmt: skip
      if len(values["values"]) > 1:
        seeds = np.full(len(values["values"]), y - 0.3)
        axis.plot(values["values"], seeds, ".", color=look.colour, markersize=3, alpha=0.8)
    axis.axvline(summary["chance"][key], color=TEXT, linewidth=0.8, linestyle=":")
    _name_rows(axis, list(summary["methods"]), looks, shown=axis is axes[0])
    axis.margins(x=0.06)
    axis.set_title(name[:1].upper() + name[1:], fontsize=9, loc="left", color=TEXT)
  _head(figure, title, f"{INTERVALS} Small dots: seeds. Dotted: chance.")
  return figure


def modalities_figure(summary: Summary, looks: Looks) -> Figure:
  """Draws bars with intervals of every method, one panel per modality."""
  keys = [key for key in summary["chance"] if key.startswith("modalities/")]
  columns = min(4 if len(keys) > 6 else 3, len(keys))
  lines, rows = -(-len(keys) // columns), len(summary["methods"])
  figure = Figure(figsize=(WIDTH, lines * (0.19 * rows + 0.55) + 0.8), layout="constrained")
  axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
  for axis, key in zip(axes.ravel(), keys, strict=False):
    for place, (method, entry) in enumerate(summary["methods"].items()):
      values = entry["statistics"][key]
      axis.barh(rows - 1 - place, values["mean"], height=0.72, color=looks[method].colour)
      axis.plot([values["low"], values["high"]], [rows - 1 - place] * 2, color=TEXT, linewidth=1.1)
    axis.axvline(summary["chance"][key], color=TEXT, linewidth=0.8, linestyle=":")
    _name_rows(axis, list(summary["methods"]), looks, shown=axis in axes[:, 0], size=7.5)
    axis.set_title(textwrap.fill(tables.marked(summary, key), 20), fontsize=8.5, loc="left", color=TEXT)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.5, 1])
    if key.split("/", 1)[1] in summary["unseen"]:
      axis.set_facecolor("#F4F0E6")
  _hide_rest(axes, len(keys))
  shaded = " Shaded: no model has seen it." if summary["unseen"] else ""
  _head(figure, "Test accuracy per modality", f"{INTERVALS} Dotted: chance.{shaded}")
  return figure


def learning_figure(entries: Sequence[Entry], train_modality: str, looks: Looks) -> Figure:
  """Draws validation accuracy, out of domain and on the training modality, a column of panels per family of methods.

  Args:
    entries: of one pair, "start" among them.
    train_modality: name of the in-domain modality.
    looks: of `styles`.
  """
  groups = families(described(entries))
  several = len(groups) > 1
  figure = Figure(figsize=(WIDTH if several else 5.5, 5.2 if several else 6), layout="constrained")
  axes = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
  for row, (metric, title) in zip(
    axes, (("out_of_domain", "out of domain"), ("in_domain", train_modality)), strict=True
  ):
    bands = _validation_bands(entries, metric)
    for axis, (family, group) in zip(row, groups.items(), strict=True):
      for method in [name for name in bands if name not in group]:
        axis.plot(bands[method]["across"], bands[method]["mean"], color=GREY, linewidth=0.8, alpha=0.8, zorder=1)
      for method in [name for name in group if name in bands]:
        _draw_band(axis, bands[method], looks[method], markers=True)
      _dress(axis, family if metric == "out_of_domain" else "")
    row[0].set_ylabel(f"validation, {title}", fontsize=8.5)
  for axis in axes[1]:
    axis.set_xlabel("thousand tokens", fontsize=8.5, color=TEXT)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:,g}")
  _legend_below(figure, [looks[name].handle() for group in groups.values() for name in group])
  grey = " Grey: the methods of the other panels." if several else ""
  _head(figure, "Validation accuracy against tokens of student and teacher", BAND + grey)
  return figure


def dynamics_figure(entries: Sequence[Entry], looks: Looks) -> Figure:
  """Draws reward, length, entropy, divergence, and exploration against steps."""
  groups, focus = statistics.trained_methods(entries), focused(described(entries))
  bands = {metric: {name: curve_band(group, metric) for name, group in groups.items()} for _, metric, _ in _DYNAMICS}
  panels = [panel for panel in _DYNAMICS if any(bands[panel[1]].values())]
  rows = max(1, -(-len(panels) // 3))
  figure = Figure(figsize=(WIDTH, 2.2 * rows + 1.0), layout="constrained")
  grid = figure.subplots(rows, 3, sharex=True, squeeze=False)
  compared = []
  for axis, (title, metric, share) in zip(grid.ravel(), panels, strict=False):
    for method, band in bands[metric].items():
      if band is not None:
        _draw_band(axis, band, looks[method], alpha=0.15 if method in focus else 0)
    _dress(axis, title, share=share)
    compared += [axis] if metric.startswith("divergence/") else []
  for axis in compared:
    axis.set_ylim(0, max(other.get_ylim()[1] for other in compared))
  _hide_rest(grid, len(panels))
  for axis in grid.ravel()[max(0, len(panels) - 3) : len(panels)]:
    axis.set_xlabel("step", fontsize=8.5, color=TEXT)
  drawn = [name for name in groups if any(by_method[name] for by_method in bands.values())]
  _legend_below(figure, [looks[name].handle(marker=False) for name in drawn])
  _head(figure, "What happens during training", BAND + _bands_of(focus, groups))
  return figure


def tau_figure(summary: Summary, points: Mapping[str, tuple[float, str]]) -> Figure:
  """Draws test accuracy against the gate's threshold, one line per gate signal and learning rate.

  Points of different rates are not joined: what lies between them is a matter of the rate as much as of the threshold.

  Args:
    summary: of `statistics.summarised`.
    points: method -> (tau, gate signal and learning rate).
  """
  names = {key: name for key, name in tables.headings(summary).items() if key in _SUMMARY}
  groups = list(dict.fromkeys(group for _, group in points.values()))
  colours = dict(zip(groups, (_GREEN, _PINK, *COLOURS), strict=False))
  figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
  axes = figure.subplots(1, len(names), squeeze=False)[0]
  for axis, (key, name) in zip(axes, names.items(), strict=True):
    for i, group in enumerate(groups):
      known = [method for method in points if points[method][1] == group and method in summary["methods"]]
      chosen = sorted(known, key=lambda method: points[method][0])
      places = [points[method][0] + 0.05 * (i - (len(groups) - 1) / 2) for method in chosen]
      look = Style(group, colours[group], "-" if i == 0 else "--", "oDs^"[i % 4])
      _draw_intervals(axis, summary, chosen, key, look, places)
    _dress(axis, name[:1].upper() + name[1:])
    axis.set_xticks(sorted({tau for tau, _ in points.values()}))
    axis.set_xlabel("tau", fontsize=8.5, color=TEXT)
  handles = [Style(f"gate signal: {group}", colours[group], "-" if i == 0 else "--", "oDs^"[i % 4]).handle()
             for i, group in enumerate(groups)]  # fmt: skip
  _legend_below(figure, handles, columns=4 if len(handles) < 4 else 2)
  _head(figure, "Threshold of the gate: test accuracy", f"{INTERVALS} Small dots: seeds.")
  return figure


def budget_figure(summary: Summary, points: Mapping[str, int], stability: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Draws out-of-domain accuracy, and two measures of stability, against the budget of hints.

  Args:
    summary: of `statistics.summarised`.
    points: method -> B, rounds of hinted sampling per failed prompt.
    stability: of `statistics.stability`.
  """
  ordered = sorted((name for name in points if name in summary["methods"]), key=lambda name: points[name])
  figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
  first, second = figure.subplots(1, 2)
  places = list(range(len(ordered)))
  _draw_intervals(first, summary, ordered, "out_of_domain", Style("", _GREEN, "-", "o"), places)
  _dress(first, "Out of domain, test")
  for key, look in (
    ("seeds", Style("between seeds, test", _BLUE, "-", "o")),
    ("validations", Style("over the last three validations", _VERMILION, "--", "s")),
  ):
    values = [stability.get(name, {}).get(key) for name in ordered]
    second.plot(places, [np.nan if value is None else 100 * value for value in values], linestyle=look.line,
                marker=look.marker, color=look.colour, label=look.label, linewidth=1.6, markersize=5)  # fmt: skip
  for place, name in enumerate(ordered):
    if interval := stability.get(name, {}).get("seeds_interval"):
      second.plot([place, place], [100 * bound for bound in interval], color=_BLUE, linewidth=1, alpha=0.6)
  _dress(second, "Standard deviation of the out-of-domain mean, points", share=False)
  second.set_ylim(bottom=0)
  second.set_ylim(top=1.3 * second.get_ylim()[1])
  second.legend(frameon=False, fontsize=8, loc="upper right")
  for axis in (first, second):
    axis.set_xticks(places, [str(points[name]) for name in ordered])
    axis.set_xlabel("B, rounds of hinted sampling per failed prompt", fontsize=8.5, color=TEXT)
    axis.set_xlim(-0.4, len(ordered) - 0.6)
  _head(figure, "Budget of hints", f"{INTERVALS} Small dots: seeds. Deviations over seeds: 95 % by chi-square.")
  return figure


def hints_figure(records: Sequence[Mapping[str, Any]], train_modality: str, unseen: Sequence[str] = ()) -> Figure:
  """Draws the quality of hints against the share of reward-positive candidates, a dot per modality; and acceptance.

  Args:
    records: as `tables.hint_tables` takes them, without those of all modalities together.
    train_modality: its dots have a ring.
    unseen: modalities whose dots have a dotted ring.
  """
  pairs = list(dict.fromkeys((record["student"], record["teacher"]) for record in records))
  prompts = list(dict.fromkeys(record["hint_prompt"] for record in records))
  looks = {
    pair: Style(" taught by ".join(pair), colour, "", marker)
    for pair, colour, marker in zip(pairs, (*COLOURS, "#E69F00", "#000000"), "os^Dvos", strict=False)
  }
  figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
  axes = figure.subplots(2, 2).ravel()
  for axis, (key, label) in zip(axes, _HINT_QUALITY, strict=False):
    for record in records:
      look, x, y = looks[record["student"], record["teacher"]], record[key], record["positive_rate"]
      if x is None or y is None:
        continue
      size = 12 + 0.6 * record["prompts"]
      face = look.colour if record["hint_prompt"] == prompts[0] else "white"
      axis.scatter(x, y, s=size, marker=look.marker, linewidths=1.1, edgecolors=look.colour, facecolors=face,
                   alpha=0.85, zorder=3)  # fmt: skip
      if record["modality"] == train_modality or record["modality"] in unseen:
        _ring(axis, [x], [y], size + 70, "-" if record["modality"] == train_modality else ":")
    _dress(axis)
    axis.set_xlabel(label, fontsize=8.5, color=TEXT)
    axis.set_ylabel("reward-positive candidates", fontsize=8.5, color=TEXT)
    if key == "leak_rate":
      axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
  _draw_accepted_by_round(axes[3], records, prompts, looks)
  handles: list[Any] = [look.handle() for look in looks.values()]
  handles += [Line2D([], [], color=TEXT, marker="o", linestyle="-" if i == 0 else "--", label=prompt,
                     markerfacecolor=TEXT if i == 0 else "white") for i, prompt in enumerate(prompts)]  # fmt: skip
  handles += [_ring(axes[3], [], [], 90, "-", f"{train_modality} (trained on)")]
  handles += [_ring(axes[3], [], [], 90, ":", f"{name} (unseen)") for name in unseen]
  _legend_below(figure, handles)
  said = "One dot per modality; its area grows with the number of prompts."
  _head(figure, "Hints: what they tell, and what comes of it", said)
  return figure


def curve_band(entries: Sequence[Entry], metric: str) -> dict[str, np.ndarray] | None:
  """Returns mean, lowest and highest seed of a metric of `curves`; None where no training has it."""
  curves = [entry["curves"] for entry in entries if any(v is not None for v in entry["curves"].get(metric, []))]
  if not curves:
    return None
  return statistics.banded([(np.array(curve["step"], float), np.array(curve[metric], float)) for curve in curves])


def _validation_bands(entries: Sequence[Entry], metric: str) -> dict[str, Band]:
  groups = statistics.methods(entries)
  bands = {
    name: statistics.banded(
      [statistics.validation_curve(entry, statistics.start_of(entry, groups), metric) for entry in group]
    )
    for name, group in statistics.trained_methods(entries).items()
  }
  return {name: band for name, band in bands.items() if band["across"].max(initial=0) > 0}


def _draw_band(axis: Axes, band: Band, look: Style, *, markers: bool = False, alpha: float = 0.18) -> None:
  known = np.isfinite(band["mean"])
  across, mean, low, high = (band[key][known] for key in ("across", "mean", "min", "max"))
  if alpha:
    axis.fill_between(across, low, high, color=look.colour, alpha=alpha, linewidth=0, zorder=2)
  axis.plot(across, mean, color=look.colour, linestyle=look.line, marker=look.marker if markers else "", markersize=3.5,
            linewidth=1.6, label=look.label, zorder=3)  # fmt: skip


def _draw_accepted_by_round(
  axis: Axes, records: Sequence[Mapping[str, Any]], prompts: Sequence[str], looks: Mapping[tuple[str, str], Style]
) -> None:
  for pair, look in looks.items():
    for i, prompt in enumerate(prompts):
      chosen = [record for record in records if (record["student"], record["teacher"]) == pair
                and record["hint_prompt"] == prompt and record["prompts"] and record["accept_rate"]]  # fmt: skip
      if chosen:
        rounds = min(len(record["accept_rate"]) for record in chosen)
        rates = np.average([record["accept_rate"][:rounds] for record in chosen], axis=0,
                           weights=[record["prompts"] for record in chosen])  # fmt: skip
        axis.plot(range(1, rounds + 1), rates, color=look.colour, marker=look.marker, linewidth=1.4, markersize=5,
                  linestyle="-" if i == 0 else "--", markerfacecolor=look.colour if i == 0 else "white")  # fmt: skip
        axis.set_xticks(range(1, rounds + 1))
  _dress(axis)
  axis.set_xlabel("rounds", fontsize=8.5, color=TEXT)
  axis.set_ylabel("prompts with an accepted candidate", fontsize=8.5, color=TEXT)


def _draw_intervals(
  axis: Axes, summary: Summary, methods: Sequence[str], key: str, look: Style, places: Sequence[float]
) -> None:
  entries = [summary["methods"][method]["statistics"][key] for method in methods]
  axis.plot(places, [entry["mean"] for entry in entries], color=look.colour, linestyle=look.line, linewidth=1.4)
  for place, entry in zip(places, entries, strict=True):
    axis.plot([place, place], [entry["low"], entry["high"]], color=look.colour, linewidth=2, solid_capstyle="butt")
    axis.plot(place, entry["mean"], marker=look.marker, color=look.colour, markersize=6, markeredgecolor="white",
              markeredgewidth=0.6)  # fmt: skip
    if len(entry["values"]) > 1:
      seeds = np.full(len(entry["values"]), place)
      axis.plot(seeds, entry["values"], ".", color=TEXT, markersize=2.5, alpha=0.7, zorder=5)


def _name_rows(axis: Axes, methods: Sequence[str], looks: Looks, *, shown: bool, size: float = 8.5) -> None:
  axis.set_yticks(np.arange(len(methods))[::-1], [looks[name].label for name in methods], fontsize=size)
  axis.set_ylim(-0.7, len(methods) - 0.3)
  _dress(axis, share=False)
  axis.tick_params(axis="y", labelleft=shown, length=0, labelsize=size)
  axis.grid(axis="y", visible=False)
  axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _ring(
  axis: Axes, x: Sequence[float], y: Sequence[float], size: float, line: str, label: str = ""
) -> PathCollection:
  # The edge of a line's marker cannot be dotted, that of a dot can.
  return axis.scatter(x, y, s=size, facecolors="none", edgecolors=TEXT, linewidths=0.9, linestyles=line, label=label,
                      zorder=4)  # fmt: skip


def _bands_of(focus: Sequence[str], groups: Mapping[str, Any]) -> str:
  return "" if len(focus) == len(groups) else " Bands of one method per family."


def _lighter(colour: str, share: float) -> str:
  red, green, blue = (value + (1 - value) * share for value in to_rgb(colour))
  return to_hex((red, green, blue))


def _dress(axis: Axes, title: str = "", *, share: bool = True) -> None:
  """Sets title, grid, spines and letters of a panel; shares in percent."""
  axis.set_title(title, fontsize=9, loc="left", color=TEXT)
  axis.tick_params(labelsize=8, colors=TEXT, length=2.5)
  axis.grid(color=LIGHT, linewidth=0.7)
  axis.set_axisbelow(True)
  for side in ("top", "right"):
    axis.spines[side].set_visible(False)
  if share:
    axis.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g} %")


def _hide_rest(axes: np.ndarray, used: int) -> None:
  """Hides the panels of a grid, [rows, columns], that were not used; those above them get their ticks' labels."""
  for place in range(used, axes.size):
    row, column = divmod(place, axes.shape[1])
    axes[row, column].set_visible(False)
    if row and place - axes.shape[1] < used:
      axes[row - 1, column].tick_params(labelbottom=True)


def _head(figure: Figure, title: str, said: str) -> None:
  """Writes the title above the figure, and in smaller letters what lines, bands and bars mean."""
  lines = textwrap.wrap(said, int(14 * figure.get_figwidth()))
  figure.suptitle("\n".join([title, *lines]), x=0.01, ha="left", fontsize=9, color=TEXT)


def _legend_below(figure: Figure, handles: Sequence[Any], *, columns: int = 4) -> None:
  if handles:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False,
                  fontsize=8, handlelength=3)  # fmt: skip
