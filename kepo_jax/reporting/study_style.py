"""How the methods of a study look: the same colour, line and marker in all its figures; and how figures are written."""

import dataclasses
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kepo_jax.evaluation.studies import UNTRAINED, Entry
from kepo_jax.reporting.curves import COLOURS

_BLUE, _VERMILION, _GREEN, _PINK, _SKY = COLOURS
# Names of configs with colour and marker; the colours are Okabe and Ito's, as in `curves`. A method is called after its
# config, and a hyphen.
_CONFIG_LOOKS = {
  "start": ("#8A8A8A", "X"), "teacher": ("#333333", "h"), "sft": ("#E69F00", "v"), "sft_teacher": ("#E69F00", "v"),
  "grpo": (_BLUE, "s"), "rloo": (_SKY, "p"), "gkd": (_VERMILION, "^"), "kepo_ke": (_PINK, "D"), "kepo": (_GREEN, "o"),
  "kepo_released": (_GREEN, "o"), "kepo_eq7": (_GREEN, "o"),
}  # fmt: skip
_UNKNOWN = ("#000000", ">")
# Title of a panel -> configs whose methods it shows.
FAMILIES = {
  "Supervised": ("sft", "sft_teacher"),
  "Policy gradient": ("grpo", "rloo"),
  "Uniform distillation": ("gkd",),
  "Gated distillation": ("kepo_ke",),
  "KEPO: gate and hints": ("kepo", "kepo_released", "kepo_eq7"),
}
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.4)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)), (0, (2, 0.8)))
GREY, LIGHT, TEXT = "#BDBDBD", "#E6E6E6", "#333333"
WIDTH = 9.0  # inches; at this width letters of 8 points stay readable on a page


@dataclasses.dataclass(frozen=True)
class Style:
  """Look of a method."""

  label: str
  colour: str
  line: Any
  marker: str

  def handle(self) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=self.colour, linestyle=self.line, marker=self.marker, markersize=4, label=self.label)

  def handle_plain(self) -> Line2D:
    """An entry of a legend for lines without markers."""
    return Line2D([], [], color=self.colour, linestyle=self.line, linewidth=1.6, label=self.label)


def config_of(method: str) -> str:
  """The config that a method is called after: what stands before the first hyphen."""
  return method.split("-")[0]


def styles(labels: Mapping[str, str]) -> dict[str, Style]:
  """Method -> style; of methods with one colour the last is drawn solid and full, those before it dashed and lighter.

  Args:
    labels: all methods of a study with their labels, in their order.
  """
  found = {}
  for method, label in labels.items():
    colour, marker = _CONFIG_LOOKS.get(config_of(method), _UNKNOWN)
    same = [name for name in labels if _CONFIG_LOOKS.get(config_of(name), _UNKNOWN)[0] == colour]
    place = len(same) - 1 - same.index(method)
    shade = 0.45 * place / max(1, len(same) - 1)
    found[method] = Style(label, _lighter(colour, shade), _LINES[place % len(_LINES)], marker)
  return found


def full_colour(method: str) -> str:
  """Colour of a method's config, however light its variant is drawn."""
  return to_hex(_CONFIG_LOOKS.get(config_of(method), _UNKNOWN)[0])


def _lighter(colour: str, share: float) -> str:
  red, green, blue = (value + (1 - value) * share for value in to_rgb(colour))
  return to_hex((red, green, blue))


def shades(colour: str, count: int) -> list[str]:
  """From light to full, told apart by their lightness."""
  return [_lighter(colour, 0.6 * (1 - i / max(1, count - 1))) for i in range(count)]


def labels_of(entries: Sequence[Entry]) -> dict[str, str]:
  """Method -> label, in order of appearance."""
  return {entry["method"]: entry["label"] for entry in entries}


def families(methods: Sequence[str]) -> dict[str, list[str]]:
  """Title -> trained methods; one group without a title where they are few enough for one panel."""
  trained = [method for method in methods if method not in UNTRAINED]
  if len(trained) <= 5:
    return {"": trained}
  groups = {title: [m for m in trained if config_of(m) in configs] for title, configs in FAMILIES.items()}
  known = {method for group in groups.values() for method in group}
  groups["Others"] = [method for method in trained if method not in known]
  return {title: group for title, group in groups.items() if group}


def focused(methods: Sequence[str]) -> list[str]:
  """Methods that stand for their family where all at once would be unreadable: GRPO, and the last of the others."""
  groups = families(methods)
  if len(groups) == 1:
    return list(*groups.values())
  return ["grpo" if "grpo" in group else group[-1] for group in groups.values()]


def dress(axis: Axes, title: str = "", *, share: bool = True, size: float = 9) -> None:
  """Grid, spines and letters of a panel; shares in percent."""
  axis.set_title(title, fontsize=size, loc="left", color=TEXT)
  axis.tick_params(labelsize=8, colors=TEXT, length=2.5)
  axis.grid(color=LIGHT, linewidth=0.7)
  axis.set_axisbelow(True)
  for side in ("top", "right"):
    axis.spines[side].set_visible(False)
  if share:
    axis.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g} %")


def hide_rest(axes: np.ndarray, used: int) -> None:
  """Hides the panels of a grid, [rows, columns], that were not used; those above them get their ticks' labels."""
  for place in range(used, axes.size):
    row, column = divmod(place, axes.shape[1])
    axes[row, column].set_visible(False)
    if row and place - axes.shape[1] < used:
      axes[row - 1, column].tick_params(labelbottom=True)


def heading(figure: Figure, title: str, said: str = "") -> None:
  """Title above the figure, and in smaller letters what lines, bands and bars mean."""
  lines = textwrap.wrap(said, int(14 * figure.get_figwidth()))
  figure.suptitle("\n".join([title, *lines]), x=0.01, ha="left", fontsize=9, color=TEXT)


def legend_below(figure: Figure, handles: Sequence[Any], *, columns: int = 4) -> None:
  """One legend for all panels, under them."""
  if handles:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False,
                  fontsize=8, handlelength=3)  # fmt: skip


def image_bytes(figure: Figure, kind: str) -> bytes:
  """A figure as "png" or "svg"; the same figure gives the same bytes."""
  target = io.BytesIO()
  dates = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
  # Names of clips and letters in an SVG are hashes, salted at random unless told otherwise.
  with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "path"}):
    figure.savefig(target, format=kind, dpi=150, metadata=dates)
  return target.getvalue()


def save(figure: Figure, folder: epath.PathLike, name: str) -> list[str]:
  """Writes NAME.png and NAME.svg; returns their names."""
  for kind in ("png", "svg"):
    (epath.Path(folder) / f"{name}.{kind}").write_bytes(image_bytes(figure, kind))
    figure.set_layout_engine("none")  # what was laid out once stays; that takes longer than drawing
  return [f"{name}.png", f"{name}.svg"]
