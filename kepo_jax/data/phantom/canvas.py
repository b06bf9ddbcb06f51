"""Soft shapes and smooth noise on a 64 x 64 canvas, shared by the eight drawing styles.

Everything is float64: a last-bit difference between machines then practically never moves a pixel by one level.
Masks are float64[64, 64] in 0..1, pictures float64[64, 64, 3] in 0..1.
"""

import numpy as np

from kepo_jax.data.phantom.scenes import Scene

SIDE = 64
Y, X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)


def ramp(distance: np.ndarray, width: float = 1.0) -> np.ndarray:
  """0 outside, 1 inside; `distance` in pixels is positive inside, the edge is `width` pixels wide."""
  return np.clip(distance / width + 0.5, 0.0, 1.0)


def frame(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
  """Pixel coordinates x, y of the organ: centred, tilted and scaled as the scene says."""
  x, y = X - 31.5 - scene.shift[0], Y - 31.5 - scene.shift[1]
  c, s = np.cos(scene.tilt) / scene.scale, np.sin(scene.tilt) / scene.scale
  return c * x + s * y, c * y - s * x


def ellipse(x: np.ndarray, y: np.ndarray, a: float | np.ndarray, b: float) -> np.ndarray:
  """Distance in pixels to the edge of an ellipse around 0, positive inside (exact on the axes)."""
  return (1.0 - np.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-12)) * np.minimum(a, b)


def box(x: np.ndarray, y: np.ndarray, a: float | np.ndarray, b: float, corner: float = 0.0) -> np.ndarray:
  """Distance to the edge of a rectangle of half sides a and b with rounded corners, positive inside."""
  dx, dy = np.abs(x) - a + corner, np.abs(y) - b + corner
  outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
  return corner - outside - np.minimum(np.maximum(dx, dy), 0)


def _weights(cells: int) -> np.ndarray:
  """float64[64, cells], smooth interpolation from a coarse grid to the pixels."""
  position = np.linspace(0, cells - 1, SIDE)
  closeness = np.clip(1 - np.abs(position[:, None] - np.arange(cells)), 0, None)
  smooth = closeness**2 * (3 - 2 * closeness)
  return smooth / smooth.sum(axis=1, keepdims=True)


_WEIGHTS = {cells: _weights(cells) for cells in (4, 6, 8, 12, 16, 24, 32, 48)}


def clouds(rng: np.random.Generator, rows: int, columns: int | None = None) -> np.ndarray:
  """Smooth noise in about -1.5..1.5 with `rows` x `columns` random cells."""
  columns = columns or rows
  return _WEIGHTS[rows] @ rng.uniform(-1.5, 1.5, (rows, columns)) @ _WEIGHTS[columns].T


def grain(rng: np.random.Generator, strength: float) -> np.ndarray:
  """Independent noise per pixel."""
  return rng.uniform(-1.7, 1.7, (SIDE, SIDE)) * strength


def segment(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
  """Distance in pixels to a straight segment (never negative)."""
  dx, dy = end[0] - start[0], end[1] - start[1]
  along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
  return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def lesion_mask(scene: Scene) -> np.ndarray:
  """Where the lesions are; in picture axes around the shifted centre, neither tilted nor scaled."""
  mask = np.zeros((SIDE, SIDE))
  x, y = X - 31.5 - scene.shift[0], Y - 31.5 - scene.shift[1]
  for lesion in scene.lesions:
    c, s = np.cos(lesion.angle), np.sin(lesion.angle)
    dx, dy = x - lesion.x, y - lesion.y
    stretch = np.sqrt(lesion.aspect)
    distance = ellipse(c * dx + s * dy, c * dy - s * dx, lesion.radius * stretch, lesion.radius / stretch)
    mask = np.maximum(mask, ramp(distance, 1.3))
  return mask


def gray(level: np.ndarray) -> np.ndarray:
  """A picture of equal channels."""
  return np.repeat(level[:, :, None], 3, axis=2)


def paint(picture: np.ndarray, mask: np.ndarray, colour: tuple[float, ...] | float | np.ndarray) -> np.ndarray:
  """`picture` blended towards one colour where the mask says; works on [64, 64] and [64, 64, 3]."""
  if picture.ndim == 3:
    mask = mask[:, :, None]
  return picture + mask * (np.asarray(colour, dtype=np.float64) - picture)
