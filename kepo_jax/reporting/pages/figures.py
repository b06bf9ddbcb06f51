"""Matplotlib figures as blocks of a page."""

import io

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from kepo_jax.reporting.pages.blocks import FigureBlock

_LARGEST = 300_000  # bytes of a vector figure; curves over thousands of steps are smaller in pixels


def figure_block(
  figure: Figure, *, alt: str, caption: str = "", wide: bool = True, vectors: bool = True
) -> FigureBlock:
  """A figure as vectors where these are small, else in pixels; the same figure gives the same bytes.

  Its ground is transparent, so that a dark page can turn its colours over.

  Args:
    figure: of Matplotlib.
    alt: what it shows, for those who do not see it.
    caption: below it.
    wide: whether it has a row of its own.
    vectors: False: pixels in any case, for pages that are kept in a repository.
  """
  if vectors and len(drawn := _vectors(figure)) <= _LARGEST:
    return FigureBlock(image=drawn, alt=alt, caption=caption, media="image/svg+xml", wide=wide)
  return FigureBlock(image=_pixels(figure), alt=alt, caption=caption, wide=wide)


def _vectors(figure: Figure) -> bytes:
  target = io.BytesIO()
  # Without a salt Matplotlib draws random ids, and without an explicit None it writes the date.
  with matplotlib.rc_context({"svg.hashsalt": "kepo_jax", "svg.fonttype": "path"}):
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  return target.getvalue()


def _pixels(figure: Figure) -> bytes:
  drawn, target = io.BytesIO(), io.BytesIO()
  figure.savefig(drawn, format="png", dpi=130, transparent=True, metadata={"Software": None})
  # Lines and letters in few colours: a palette is enough, and a third of the size.
  Image.open(drawn).quantize(256, method=Image.Quantize.FASTOCTREE).save(target, format="png", optimize=True)
  return target.getvalue()
