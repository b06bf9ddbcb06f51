"""How the methods of a study look: the same colour, line and marker in all its figures; and how figures are written."""

import dataclasses
import io
import pathlib
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
# Names of configs with colour and marker; the colours are Okabe and Ito's, as in `curves`.
_CONFIG_LOOKS = {
  "start": ("#8A8A8A", "X"), "start-no_think": ("#8A8A8A", "x"), "teacher": ("#333333", "h"),
  "sft": ("#E69F00", "v"), "sft_teacher": ("#E69F00", "v"),
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
_ONE_PANEL = 5  # methods whose lines can be told apart in one panel
_SHORT = 14  # letters of a label, of which five have room beside each other
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


def config_of(method: str, entry: Mapping[str, Any]) -> str:
  """Name of the config that an entry was trained with, "kepo" for "kepo.py"; of a model as it came the method's."""
  return pathlib.PurePath(entry.get("config") or method).stem


def styles(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
  """Method -> style; of methods with one colour the last is drawn solid and full, those before it dashed and lighter.

  Args:
    described: all methods of a study, in their order, with `label` and `config` of each.
  """
  found, plain = {}, {method: _look(method, entry) for method, entry in described.items()}
  for method, (colour, marker) in plain.items():
    same = [name for name, look in plain.items() if look[0] == colour]
    place = len(same) - 1 - same.index(method)
    shade = 0.45 * place / max(1, len(same) - 1)
    line = _LINES[place % len(_LINES)]
    found[method] = Style(described[method]["label"], _lighter(colour, shade), line, marker)
  return found


def _look(method: str, entry: Mapping[str, Any]) -> tuple[str, str]:
  return _CONFIG_LOOKS.get(config_of(method, entry), _UNKNOWN)


def full_colour(config: str) -> str:
  """Colour of a config's methods, however light a variant is drawn."""
  return to_hex(_CONFIG_LOOKS.get(config, _UNKNOWN)[0])


def _lighter(colour: str, share: float) -> str:
  red, green, blue = (value + (1 - value) * share for value in to_rgb(colour))
  return to_hex((red, green, blue))


def shades(colour: str, count: int) -> list[str]:
  """From light to full, told apart by their lightness."""
  return [_lighter(colour, 0.6 * (1 - i / max(1, count - 1))) for i in range(count)]


def described(entries: Sequence[Entry]) -> dict[str, Entry]:
  """Method -> its first entry, which says what it is called and with what it was trained."""
  found: dict[str, Entry] = {}
  for entry in entries:
    found.setdefault(entry["method"], entry)
  return found


def families(described: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
  """Title -> trained methods; one group without a title where they are few enough for one panel."""
  trained = {method: config_of(method, entry) for method, entry in described.items() if method not in UNTRAINED}
  if len(trained) <= _ONE_PANEL:
    return {"": list(trained)}
  groups = {title: [m for m, config in trained.items() if config in configs] for title, configs in FAMILIES.items()}
  known = {method for group in groups.values() for method in group}
  groups["Others"] = [method for method in trained if method not in known]
  return {title: group for title, group in groups.items() if group}


def focused(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Methods that stand for their family where all at once would be unreadable: GRPO, and the last of the others."""
  groups = families(described)
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
  if len(handles) == 5 and max(len(handle.get_label()) for handle in handles) < _SHORT:
    columns = 5
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
