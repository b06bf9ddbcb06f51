"""Figures of a study over the time of its trainings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kepo_jax.evaluation import equal_cost, studies
from kepo_jax.evaluation.studies import Entry
from kepo_jax.reporting import study_style
from kepo_jax.reporting.study_style import GREY, Style

BAND = "Lines: mean over seeds; bands: lowest to highest seed."
_ACROSS: dict[str | None, str] = {None: "step", "seconds": "seconds", "tokens": "thousand tokens"}
_TITLES: dict[str | None, str] = {None: "steps", "seconds": "seconds", "tokens": "tokens of student and teacher"}
# Title, metric, whether it is a share.
_DYNAMICS = (
  ("Accuracy of rollouts", "reward/accuracy", True),
  ("Reward", "reward/mean", False),
  ("Completion length, tokens", "completion/length", False),
  ("Entropy, nats per token", "entropy", False),
  ("Divergence of gated tokens, nats", "divergence/gated", False),
  ("Divergence of other tokens, nats", "divergence/ungated", False),
)
_ASKING = (
  ("Cliff rate: prompts that no rollout solves", "cliff_rate"),
  ("Prompts that ask for hints", "hint/trigger_rate"),
)
Band = Mapping[str, np.ndarray]


def learning_figure(
  entries: Sequence[Entry],
  train_modality: str,
  *,
  quantity: str | None = None,
  looks: Mapping[str, Style] | None = None,
) -> Figure:
  """Validation accuracy, out of domain and on the training modality, in one column of panels per family of methods.

  Args:
    entries: of one pair, "start" among them.
    train_modality: name of the in-domain modality.
    quantity: what runs to the right: None for steps, or a cost of `equal_cost.QUANTITIES`.
    looks: of `study_style.styles`, if the study has more methods than these.
  """
  looks = looks or study_style.styles(study_style.described(entries))
  found = studies.methods(entries)
  groups = study_style.families(study_style.described(entries))
  bands = {figure: _validations(found, figure, quantity) for figure in ("out_of_domain", "in_domain")}
  figure = Figure(
    figsize=(study_style.WIDTH if len(groups) > 1 else 5.5, 5.2 if len(groups) > 1 else 6), layout="constrained"
  )
  axes = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
  for row, (name, title) in zip(axes, (("out_of_domain", "out of domain"), ("in_domain", train_modality)), strict=True):
    for axis, (family, group) in zip(row, groups.items(), strict=True):
      _grey_lines(axis, bands[name], group)
      for method in [method for method in group if method in bands[name]]:
        _banded_line(axis, bands[name][method], looks[method], markers=True)
      study_style.dress(axis, family if name == "out_of_domain" else "")
    row[0].set_ylabel(f"validation, {title}", fontsize=8.5)
  for axis in axes[1]:
    _across(axis, quantity)
  drawn = [name for name in bands["out_of_domain"] if name in {m for group in groups.values() for m in group}]
  study_style.legend_below(figure, [looks[name].handle() for name in drawn])
  grey = " Grey: the methods of the other panels." if len(groups) > 1 else ""
  study_style.heading(figure, f"Validation accuracy against {_TITLES[quantity]}", BAND + grey)
  return figure


def modality_figure(
  entries: Sequence[Entry],
  items: Mapping[str, Any],
  *,
  shown: Sequence[str] | None = None,
  looks: Mapping[str, Style] | None = None,
) -> Figure:
  """Validation accuracy against steps, one panel per modality.

  Args:
    entries: of one pair, "start" among them.
    items: the record of items.json.
    shown: methods in colour; None: one of each family. The others are grey.
    looks: of `study_style.styles`.
  """
  looks = looks or study_style.styles(study_style.described(entries))
  found = studies.methods(entries)
  shown = study_style.focused(study_style.described(entries)) if shown is None else shown
  names = list(items["modalities"])
  columns = min(4, len(names))
  rows = -(-len(names) // columns)
  figure = Figure(figsize=(study_style.WIDTH, 1.9 * rows + 1.1), layout="constrained")
  grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
  axes = grid.ravel()
  chance = _chance(items)
  for axis, name in zip(axes, names, strict=False):
    bands = _validations(found, name, None)
    _grey_lines(axis, bands, shown)
    for method in [method for method in shown if method in bands]:
      _banded_line(axis, bands[method], looks[method], markers=True, band_alpha=0.1)
    axis.axhline(chance[name], color=study_style.TEXT, linewidth=0.8, linestyle=":")
    note = " (unseen)" if name in items["unseen"] else " (trained on)" if name == items["train_modality"] else ""
    study_style.dress(axis, name + note)
  study_style.hide_rest(grid, len(names))
  for axis in axes[max(0, len(names) - columns) : len(names)]:
    _across(axis, None)
  guess = Line2D([], [], color=study_style.TEXT, linewidth=0.8, linestyle=":", label="chance")
  study_style.legend_below(figure, [*(looks[m].handle() for m in shown), guess])
  grey = " Grey: the other methods." if len(shown) < sum(name not in studies.UNTRAINED for name in found) else ""
  study_style.heading(figure, "Validation accuracy per modality against step", BAND + grey)
  return figure


def dynamics_figure(entries: Sequence[Entry], *, looks: Mapping[str, Style] | None = None) -> Figure:
  """Reward, completion length, entropy, and the divergence of gated and of other tokens against steps.

  Args:
    entries: of one pair; a method is in the panels whose figures it logs.
    looks: of `study_style.styles`.
  """
  looks = looks or study_style.styles(study_style.described(entries))
  found = {name: mine for name, mine in studies.methods(entries).items() if name not in studies.UNTRAINED}
  focus = study_style.focused(study_style.described(entries))
  bands = {metric: {name: curve_band(mine, metric) for name, mine in found.items()} for _, metric, _ in _DYNAMICS}
  panels = [panel for panel in _DYNAMICS if any(bands[panel[1]].values())]
  rows = max(1, -(-len(panels) // 3))
  figure = Figure(figsize=(study_style.WIDTH, 2.2 * rows + 1.0), layout="constrained")
  grid = figure.subplots(rows, 3, sharex=True, squeeze=False)
  axes = dict(zip((metric for _, metric, _ in panels), grid.ravel(), strict=False))
  for title, metric, share in panels:
    for method, band in bands[metric].items():
      if band is not None:
        _banded_line(axes[metric], band, looks[method], band_alpha=0.15 if method in focus else 0)
    study_style.dress(axes[metric], title, share=share)
  # The two divergences are there to be compared.
  compared = [axes[metric] for metric in axes if metric.startswith("divergence/")]
  for axis in compared:
    axis.set_ylim(0, max(each.get_ylim()[1] for each in compared))
  study_style.hide_rest(grid, len(panels))
  for axis in grid.ravel()[max(0, len(panels) - 3) : len(panels)]:
    _across(axis, None)
  drawn = [name for name in found if any(each[name] for each in bands.values())]
  study_style.legend_below(figure, [looks[name].handle_plain() for name in drawn])
  study_style.heading(figure, "What happens during training", BAND + _some(focus, found))
  return figure


def exploration_figure(entries: Sequence[Entry], *, looks: Mapping[str, Style] | None = None) -> Figure:
  """Cliffs, hints asked for, and how many of the failed prompts were helped within b attempts, against steps.

  Args:
    entries: of one pair; acceptance has a panel for each of the last two methods that ask for hints.
    looks: of `study_style.styles`.
  """
  looks = looks or study_style.styles(study_style.described(entries))
  found = {name: mine for name, mine in studies.methods(entries).items() if name not in studies.UNTRAINED}
  asking = [
    name for name, mine in found.items() if any(f"hint/accept_rate@{b}" in mine[0]["curves"] for b in range(1, 11))
  ]
  figure = Figure(figsize=(study_style.WIDTH, 5.6), layout="constrained")
  grid = figure.subplots(2, 2, sharex=True)
  axes = grid.ravel()
  for axis, (title, metric) in zip(axes, _ASKING, strict=False):
    drawn = _metric_lines(axis, found, metric, looks)
    study_style.dress(axis, title)
    axis.set_ylim(bottom=0)
    axis.legend(handles=drawn, frameon=False, fontsize=7, ncols=1 + (len(drawn) > 4), handlelength=2.6)
  for axis, method in zip(axes[2:], asking[-2:], strict=False):
    _acceptance_panel(
      axis, found[method], looks[method].label, study_style.full_colour(study_style.config_of(method, found[method][0]))
    )
  study_style.hide_rest(grid, 2 + len(asking[-2:]))
  for axis in axes[len(asking[-2:]) : 2 + len(asking[-2:])]:
    _across(axis, None)
  study_style.heading(
    figure,
    "Exploration",
    BAND
    + _some(study_style.focused(study_style.described(entries)), found)
    + " Windows without a failed prompt have no acceptance.",
  )
  return figure


def _some(focus: Sequence[str], found: Mapping[str, Any]) -> str:
  return "" if len(focus) == len(found) else " Bands of one method per family."


def curve_band(entries: Sequence[Entry], metric: str) -> dict[str, np.ndarray] | None:
  """Mean, lowest and highest seed of a metric of `curves`; None where no training has it."""
  having = [entry["curves"] for entry in entries if any(v is not None for v in entry["curves"].get(metric, []))]
  if not having:
    return None
  return equal_cost.banded([(np.array(each["step"], float), np.array(each[metric], float)) for each in having])


def _metric_lines(
  axis: Axes, found: Mapping[str, Sequence[Entry]], metric: str, looks: Mapping[str, Style]
) -> list[Line2D]:
  bands = {name: curve_band(mine, metric) for name, mine in found.items()}
  known = {name: band for name, band in bands.items() if band is not None}
  focus = study_style.focused({name: mine[0] for name, mine in found.items()})
  for name, band in known.items():
    _banded_line(axis, band, looks[name], band_alpha=0.15 if name in focus else 0)
  return [looks[name].handle_plain() for name in known]


def _acceptance_panel(axis: Axes, entries: Sequence[Entry], method: str, full: str) -> None:
  names = sorted(
    (n for n in entries[0]["curves"] if n.startswith("hint/accept_rate@")), key=lambda n: int(n.split("@")[1])
  )
  for name, colour, marker in zip(names, study_style.shades(full, len(names)), "osD^vPXosD", strict=False):
    band = curve_band(entries, name)
    attempt = int(name.split("@")[1])
    if band is not None:
      label = "after 1 attempt" if attempt == 1 else f"after {attempt}"
      _banded_line(axis, band, Style(label, colour, "-", marker), markers=True, band_alpha=0.15 if attempt == 1 else 0)
  study_style.dress(axis, f"Failed prompts helped: {method}")
  axis.set_ylim(0, 1.03)
  axis.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower left")


def _validations(found: Mapping[str, Sequence[Entry]], figure: str, quantity: str | None) -> dict[str, Band]:
  trained = {name: mine for name, mine in found.items() if name not in studies.UNTRAINED}
  bands = {
    name: equal_cost.banded(
      [equal_cost.validation_curve(entry, equal_cost.start_of(entry, found), figure, quantity) for entry in mine]
    )
    for name, mine in trained.items()
  }
  # What costs nothing of a quantity has no place on its axis.
  return {name: band for name, band in bands.items() if band["across"].max(initial=0) > 0}


def _chance(items: Mapping[str, Any]) -> dict[str, float]:
  modality, chance = np.asarray(items["modality"]), np.asarray(items["chance"])
  return {name: float(chance[modality == i].mean()) for i, name in enumerate(items["modalities"])}


def _grey_lines(axis: Axes, bands: Mapping[str, Band], but: Sequence[str]) -> None:
  for method, band in bands.items():
    if method not in but:
      axis.plot(band["across"], band["mean"], color=GREY, linewidth=0.8, alpha=0.8, zorder=1)


def _banded_line(axis: Axes, band: Band, look: Style, *, markers: bool = False, band_alpha: float = 0.18) -> None:
  known = np.isfinite(band["mean"])
  across, mean, low, high = (band[key][known] for key in ("across", "mean", "low", "high"))
  if band_alpha:
    axis.fill_between(across, low, high, color=look.colour, alpha=band_alpha, linewidth=0, zorder=2)
  axis.plot(across, mean, color=look.colour, linestyle=look.line, marker=look.marker if markers else "", markersize=3.5,
            linewidth=1.6, label=look.label, zorder=3)  # fmt: skip


def _across(axis: Axes, quantity: str | None) -> None:
  axis.set_xlabel(_ACROSS[quantity], fontsize=8.5, color=study_style.TEXT)
  if quantity == "tokens":
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:,g}")
