"""What a program can check of the look of a figure."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def _shown(figure):
  FigureCanvasAgg(figure)
  figure.draw_without_rendering()
  renderer = figure.canvas.get_renderer()
  unseen = {text for axis in figure.axes if not axis.get_visible() for text in axis.findobj(Text)}
  for each in (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)):
    low, high = sorted(each.get_view_interval())
    # Ticks beyond the limits have labels that are never drawn.
    unseen |= {tick.label1 for tick in each.get_major_ticks() if not low - 1e-9 <= tick.get_loc() <= high + 1e-9}
  for text in figure.findobj(Text):
    if text.get_visible() and text.get_text().strip() and text not in unseen:
      yield text, text.get_window_extent(renderer)


def cut_texts(figure):
  """Texts that reach over the edge of the figure by more than a pixel."""
  edge = figure.bbox
  return [
    text.get_text()
    for text, box in _shown(figure)
    if box.x0 < edge.x0 - 1 or box.y0 < edge.y0 - 1 or box.x1 > edge.x1 + 1 or box.y1 > edge.y1 + 1
  ]


def overlapping_titles(figure):
  """Pairs of titles, labels of axes and entries of legends that lie over each other."""
  named = {axis.title for axis in figure.axes} | {axis._left_title for axis in figure.axes}
  named |= {label for axis in figure.axes for label in (axis.xaxis.label, axis.yaxis.label)}
  named |= {figure._suptitle} | {text for legend in figure.legends for text in legend.get_texts()}
  boxes = [(text.get_text(), box) for text, box in _shown(figure) if text in named]
  return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
