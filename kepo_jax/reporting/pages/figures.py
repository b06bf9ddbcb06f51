"""Matplotlib figures as blocks of a page."""

import io

import matplotlib
from matplotlib.figure import Figure

from kepo_jax.reporting.pages.blocks import FigureBlock

_LARGEST = 300_000  # bytes of a vector figure; curves over thousands of steps are smaller in pixels


def figure_block(figure: Figure, *, alt: str, caption: str = "", wide: bool = True) -> FigureBlock:
  """A figure as vectors where these are small, else in pixels; the same figure gives the same bytes.

  Its ground is transparent, so that a dark page can turn its colours over.

  Args:
    figure: of Matplotlib.
    alt: what it shows, for those who do not see it.
    caption: below it.
    wide: whether it has a row of its own.
  """
  vectors = io.BytesIO()
  # Without a salt Matplotlib draws random ids, and without an explicit None it writes the date.
  with matplotlib.rc_context({"svg.hashsalt": "kepo_jax", "svg.fonttype": "path"}):
    figure.savefig(vectors, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  if vectors.tell() <= _LARGEST:
    return FigureBlock(image=vectors.getvalue(), alt=alt, caption=caption, media="image/svg+xml", wide=wide)
  pixels = io.BytesIO()
  figure.savefig(pixels, format="png", dpi=130, transparent=True, metadata={"Software": None})
  return FigureBlock(image=pixels.getvalue(), alt=alt, caption=caption, wide=wide)
