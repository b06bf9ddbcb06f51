import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from kepo_jax.reporting import pages
from kepo_jax.reporting.pages import figures


def figure(points):
  made = Figure(figsize=(3, 2))
  made.subplots().scatter(*np.random.default_rng(0).random((2, points)), c=np.linspace(0, 1, points))
  return made


def test_a_figure_is_drawn_in_vectors_and_always_the_same():
  first, second = (pages.figure_block(figure(5), alt="points") for _ in range(2))
  assert first == second and first.media == "image/svg+xml"
  assert first.image.startswith(b"<?xml") and b"<dc:date>" not in first.image and b"Matplotlib v" not in first.image


def test_what_is_large_in_vectors_is_drawn_in_pixels(monkeypatch):
  monkeypatch.setattr(figures, "_LARGEST", 1000)
  first, second = (pages.figure_block(figure(5), alt="points") for _ in range(2))
  assert first == second and first.media == "image/png"
  asked = pages.figure_block(figure(5), alt="points", vectors=False)
  image = Image.open(io.BytesIO(asked.image))
  assert asked.media == "image/png" and image.mode == "P"
  assert image.convert("RGBA").getpixel((0, 0))[3] == 0  # a dark page shows through
