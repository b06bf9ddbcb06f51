"""Eight modality styles: very different rendering of the same findings, on a 64 x 64 canvas."""

import numpy as np

from kepo_jax.data.phantom.scenes import Scene

SIDE = 64
Y, X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)


def ramp(distance: np.ndarray, width: float = 1.0) -> np.ndarray:
  """Returns 0 outside and 1 inside; `distance` in pixels is positive inside, the edge is `width` pixels wide."""
  return np.clip(distance / width + 0.5, 0.0, 1.0)


def _rotated(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns coordinates in axes turned by `angle`."""
  c, s = np.cos(angle), np.sin(angle)
  return c * x + s * y, c * y - s * x


def frame(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
  """Returns pixel coordinates x, y of the organ: centred, tilted and scaled as the scene says."""
  x, y = X - 31.5 - scene.shift[0], Y - 31.5 - scene.shift[1]
  c, s = np.cos(scene.tilt) / scene.scale, np.sin(scene.tilt) / scene.scale
  return c * x + s * y, c * y - s * x


def ellipse(x: np.ndarray, y: np.ndarray, a: float | np.ndarray, b: float) -> np.ndarray:
  """Computes the distance in pixels to the edge of an ellipse around 0, positive inside (exact on the axes)."""
  return (1.0 - np.sqrt((x / a) ** 2 + (y / b) ** 2 + 1e-12)) * np.minimum(a, b)


def box(x: np.ndarray, y: np.ndarray, a: float | np.ndarray, b: float, corner: float = 0.0) -> np.ndarray:
  """Computes the distance to the edge of a rectangle of half sides a and b, corners rounded, positive inside."""
  dx, dy = np.abs(x) - a + corner, np.abs(y) - b + corner
  outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
  return corner - outside - np.minimum(np.maximum(dx, dy), 0)


def _weights(cells: int) -> np.ndarray:
  """Computes float64[64, cells], smooth interpolation from a coarse grid to the pixels."""
  position = np.linspace(0, cells - 1, SIDE)
  closeness = np.clip(1 - np.abs(position[:, None] - np.arange(cells)), 0, None)
  smooth = closeness**2 * (3 - 2 * closeness)
  return smooth / smooth.sum(axis=1, keepdims=True)


_WEIGHTS = {cells: _weights(cells) for cells in (4, 6, 8, 12, 16, 24, 32, 48)}


def clouds(rng: np.random.Generator, rows: int, columns: int | None = None) -> np.ndarray:
  """Draws smooth noise in about -1.5..1.5 with `rows` x `columns` random cells."""
  columns = columns or rows
  return _WEIGHTS[rows] @ rng.uniform(-1.5, 1.5, (rows, columns)) @ _WEIGHTS[columns].T


def grain(rng: np.random.Generator, strength: float) -> np.ndarray:
  """Draws independent noise per pixel."""
  return rng.uniform(-1.7, 1.7, (SIDE, SIDE)) * strength


def segment(x: np.ndarray, y: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
  """Computes the distance in pixels to a straight segment (never negative)."""
  dx, dy = end[0] - start[0], end[1] - start[1]
  along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
  return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def lesion_mask(scene: Scene) -> np.ndarray:
  """Returns where the lesions are; in picture axes around the shifted centre, neither tilted nor scaled."""
  mask = np.zeros((SIDE, SIDE))
  x, y = X - 31.5 - scene.shift[0], Y - 31.5 - scene.shift[1]
  for lesion in scene.lesions:
    along, across = _rotated(x - lesion.x, y - lesion.y, lesion.angle)
    stretch = np.sqrt(lesion.aspect)
    distance = ellipse(along, across, lesion.radius * stretch, lesion.radius / stretch)
    mask = np.maximum(mask, ramp(distance, 1.3))
  return mask


def gray(level: np.ndarray) -> np.ndarray:
  """Makes a picture of equal channels."""
  return np.repeat(level[:, :, None], 3, axis=2)


def paint(picture: np.ndarray, mask: np.ndarray, colour: tuple[float, ...] | float | np.ndarray) -> np.ndarray:
  """Blends a picture towards one colour where the mask says; works on [64, 64] and [64, 64, 3]."""
  if picture.ndim == 3:
    mask = mask[:, :, None]
  return picture + mask * (np.asarray(colour, dtype=np.float64) - picture)


def _show(picture: np.ndarray, scene: Scene, lesions: np.ndarray, dark, bright, strength: float = 0.92) -> np.ndarray:
  """Blends the lesions in with the colour of their tone."""
  colour = bright if scene.tone == "bright" else dark
  return paint(picture, lesions * min(1.0, strength * scene.contrast), colour)


def _mri(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  level = np.full((64, 64), 0.02)
  if scene.organ == "brain":
    level = paint(level, ramp(ellipse(x, y, 28, 30.5), 1.5), 0.62)  # scalp
    level = paint(level, ramp(ellipse(x, y, 26.2, 28.7), 1.5), 0.06)  # skull gives no signal
    folds = 0.5 + 0.05 * clouds(noise, 12)
    inner = ramp(ellipse(x, y, 24.8, 27.3), 1.5)
    level = level + inner * (folds - level)
    level = paint(level, inner * ramp(0.9 - np.abs(x + 0.6 * np.sin(y / 3)), 1.5) * 0.5, 0.2)  # midline
    for side in (-1, 1):
      horn = ellipse(x - side * (2.7 + 0.015 * y * y), y, 1.5, 6.5)
      level = paint(level, ramp(horn, 1.5), 0.14)  # ventricles
  else:
    level = paint(level, ramp(box(x, y, 25, 33, 8), 2.5), 0.3 + 0.03 * clouds(noise, 8))
    for sign in (-1, 1):
      bone = box(x, y - sign * 17.5, 20.5 - 0.04 * (y - sign * 30) ** 2 / 8, 15.8, 6)
      level = paint(level, ramp(bone + 1.2, 1.2), 0.1)  # cortex
      level = paint(level, ramp(bone, 1.5), 0.5 + 0.04 * clouds(noise, 16))
    level = paint(level, ramp(1.4 - np.abs(y), 1.0) * ramp(box(x, y, 20, 4, 2), 1.5), 0.72)  # joint fluid
  level = _show(level, scene, lesions, 0.12, 0.93)
  return gray(level + grain(noise, 0.012) + scene.exposure)


def _ct(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  level = np.zeros((64, 64))
  table = np.abs(Y - 60.5 + 0.006 * (X - 31.5) ** 2)
  level = paint(level, ramp(1.0 - table, 1.0), 0.7)  # the table under the patient
  if scene.organ == "skull":
    level = paint(level, ramp(ellipse(x, y, 27.5, 28.5)), 0.42)
    level = paint(level, ramp(ellipse(x, y, 26.8, 27.6)), 1.0)
    level = paint(level, ramp(ellipse(x, y, 23.6, 24.6)), 0.44 + 0.015 * clouds(noise, 8))
    level = paint(level, ramp(0.6 - np.abs(x)) * ramp(-2.0 - y), 0.6)  # falx
    petrous = (
      ramp(1.6 - np.abs(np.abs(y - 1) - 0.55 * (np.abs(x) - 13)), 2) * ramp(np.abs(x) - 17) * ramp(23.5 - np.abs(x))
    )
    level = paint(level, petrous * 0.8, 1.0)
  else:
    body = ellipse(x, y, 29.5, 27.5)
    level = paint(level, ramp(body), 0.2)  # fat
    level = paint(level, ramp(body - 2.5), 0.46 + 0.015 * clouds(noise, 8))
    for k in range(12):  # ribs cut across: short bright arcs on a ring
      angle = 2 * np.pi * (k + 0.5) / 12
      rib = ellipse(*_rotated(x - 26.2 * np.cos(angle), y - 24.2 * np.sin(angle), angle), 1.2, 3.0)
      level = paint(level, ramp(rib), 1.0)
    level = paint(level, ramp(ellipse(x, y - 21, 4.2, 3.4)), 0.98)  # vertebra
    level = paint(level, ramp(ellipse(x, y - 24.6, 1.0, 1.6)), 0.95)
    level = paint(level, ramp(ellipse(x - 1.0, y - 15.0, 1.8, 1.8)), 0.62)  # aorta
  level = _show(level, scene, lesions, 0.1, 0.85)
  return gray(level + grain(noise, 0.02) + scene.exposure)


def _xray(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  if scene.organ == "chest":
    level = 0.66 + 0.05 * clouds(noise, 4)
    level = paint(level, ramp(-24 - y + 0.1 * np.abs(x), 4) * ramp(np.abs(x) - 8, 4), 0.28)  # air above the shoulders
    for side in (-1, 1):
      lung = ellipse(x - side * 13.5, (y + 1) - 0.02 * (x - side * 13.5) ** 2, 12.5, 27)
      level = paint(level, ramp(lung, 4), 0.36 + 0.03 * clouds(noise, 16))
    bow = 0.022 * (np.abs(x) - 4) ** 2
    ribs = np.clip(np.cos((y - bow) * 2 * np.pi / 8.5), 0, 1) ** 2 * ramp(ellipse(x, y, 29, 29), 4)
    level = level + 0.13 * ribs * ramp(np.abs(x) - 3, 3)
    level = paint(level, ramp(3.2 - np.abs(x), 2.5) * 0.7, 0.82)  # spine
    level = paint(level, ramp(ellipse(x - 4.0, y - 13, 8.0, 9.0), 5) * 0.6, 0.8)  # heart
    level = paint(level, ramp(y - 25 - 0.02 * x * x, 4) * 0.9, 0.8)  # diaphragm
  else:
    level = 0.03 + 0.01 * clouds(noise, 4)
    level = paint(level, ramp(box(x, y, 25 - 0.008 * y * y + 0.1 * y, 60), 4), 0.34 + 0.03 * clouds(noise, 6))
    for centre, half in ((-9.0, 7.5), (11.5, 5.6)):
      bone = half + 0.0022 * y * y - np.abs(x - centre)
      level = paint(level, ramp(bone), 0.8)  # cortex
      level = paint(level, ramp(bone - 2.2, 2.5), 0.52 + 0.04 * clouds(noise, 24, 12))
  level = _show(level, scene, lesions, 0.06, 0.99)
  return gray(level + grain(noise, 0.012) + scene.exposure)


def _ultrasound(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  level = 0.4 + 0.06 * clouds(noise, 8)
  if scene.organ == "kidney":
    bean = ellipse(x, y - 0.006 * x * x, 27, 20)
    level = paint(level, ramp(1.0 - np.abs(bean), 1.5), 0.75)  # capsule
    level = paint(level, ramp(bean, 2) * 0.8, 0.36)
    level = paint(level, ramp(ellipse(x, y, 12, 2.6), 3) * 0.8, 0.78)  # sinus
  else:
    for side in (-1, 1):
      lobe = ellipse(x - side * 12.5, y + 1, 10.5, 21)
      level = paint(level, ramp(1.0 - np.abs(lobe), 1.5), 0.7)
      level = paint(level, ramp(lobe, 2) * 0.8, 0.45)
    level = paint(level, ramp(ellipse(x, y + 4, 3.4, 12), 2), 0.1)  # windpipe
  level = _show(level, scene, lesions, 0.02, 1.0, 1.0)
  # Speckle multiplies the echo, coarser across the beam; then the fan of the probe cuts the picture.
  speckle = 1 + 0.26 * clouds(noise, 48, 32) + 0.1 * clouds(noise, 32, 24)
  level = level * np.clip(speckle, 0.3, 1.8) * 1.05
  radius, angle = np.hypot(X - 31.5, Y + 22), np.arctan2(X - 31.5, Y + 22)
  fan = ramp(radius - 24) * ramp(83 - radius) * ramp((0.66 - np.abs(angle)) * radius)
  return gray(fan * (level + scene.exposure))


def _dermoscopy(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  tone = clouds(noise, 6)[:, :, None]
  picture = np.array([0.86, 0.63, 0.52]) + tone * np.array([0.02, 0.03, 0.03])
  if scene.organ == "skin":
    patch = ellipse(x, y, 25 + 1.5 * np.sin(3 * np.arctan2(y, x)), 25)
    picture = paint(picture, ramp(patch, 6) * 0.55, (0.68, 0.43, 0.31))  # the mole
    net = np.abs(np.sin(0.55 * (x + y)) * np.sin(0.55 * (x - y)))
    picture = paint(picture, ramp(patch, 6) * ramp(0.28 - net, 0.3) * 0.25, (0.4, 0.22, 0.14))
  else:
    plate = box(x, y + 2, 24, 26, 13)
    picture = paint(picture, ramp(2 - np.abs(plate), 3) * 0.8, (0.66, 0.36, 0.3))  # nail fold
    ridges = (0.03 * np.sin(x * 1.1 + noise.uniform(0, 6)))[:, :, None]
    picture = paint(picture, ramp(plate, 2), 0.0) + ramp(plate, 2)[:, :, None] * (np.array([0.84, 0.66, 0.6]) + ridges)
    picture = paint(picture, ramp(ellipse(x, y - 24, 14, 6), 2) * 0.7, (0.97, 0.9, 0.86))  # lunula
  picture = _show(picture, scene, lesions, (0.16, 0.07, 0.06), (1.0, 0.97, 0.9))
  for _ in range(4):  # hairs
    start, end = noise.uniform(-2, 66, 2), noise.uniform(-2, 66, 2)
    bend = 3 * np.sin((X + Y) / 14 + noise.uniform(0, 6))
    hair = segment(X + bend, Y, tuple(start), tuple(end))
    picture = paint(picture, ramp(0.45 - hair, 0.9) * 0.6, (0.22, 0.12, 0.08))
  edge = np.hypot(X - 31.5, Y - 31.5)
  return (picture + scene.exposure) * (1 - 0.9 * ramp(edge - 36, 9))[:, :, None]


def _fundus(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  centre = np.hypot(X - 31.5, Y - 31.5)
  glow = (1.0 - 0.3 * (centre / 31) ** 2 + 0.05 * clouds(noise, 8))[:, :, None]
  picture = glow * np.array([0.84, 0.4, 0.13])
  eye = 1.0 if scene.texture % 2 else -1.0
  disc = (eye * 22.5, 0.0) if scene.organ == "macula" else (0.0, 0.0)
  radius = 5.0 if scene.organ == "macula" else 7.5
  vessels = _vessels(x, y, disc, noise, straight=scene.organ == "disc")
  picture = paint(picture, vessels * 0.75, (0.5, 0.08, 0.05))
  if scene.organ == "macula":
    picture = paint(picture, ramp(ellipse(x + eye * 1.5, y, 4, 4), 6) * 0.6, (0.45, 0.16, 0.06))
  disc_mask = ramp(ellipse(x - disc[0], y - disc[1], radius * 0.92, radius), 2)
  picture = paint(picture, disc_mask * 0.9, (1.0, 0.82, 0.45))
  picture = paint(picture, ramp(ellipse(x - disc[0], y - disc[1], radius * 0.4, radius * 0.45), 2), (1.0, 0.95, 0.75))
  picture = paint(picture, vessels * disc_mask * 0.5, (0.6, 0.15, 0.08))
  picture = _show(picture, scene, lesions, (0.2, 0.02, 0.02), (1.0, 0.96, 0.62))
  return (picture + scene.exposure) * ramp(30.8 - centre, 1.2)[:, :, None]


def _vessels(x, y, disc: tuple[float, float], noise: np.random.Generator, straight: bool) -> np.ndarray:
  """Arcades that leave the optic disc upwards and downwards and bend around the macula."""
  mask = np.zeros_like(x)
  for sign in (-1, 1):
    for reach in (17.0, 23.0):
      wobble = 0.8 * np.sin(x / 5 + noise.uniform(0, 6))
      inward = np.clip(-np.sign(disc[0] or 1) * (x - disc[0]), 0, None)
      arc = sign * (reach - 1) * (np.sqrt(inward / 46 + 1e-9) if not straight else inward / 46) * 1.05
      width = np.clip(1.5 - inward / 40, 0.4, None) * (1.0 if reach < 20 else 0.75)
      mask = np.maximum(mask, ramp(width - np.abs(y - disc[1] - arc - wobble) * 0.8) * (inward > 0))
    stem = disc[0] + 2.5 * np.sin(y / 7 + noise.uniform(0, 6)) * ramp(np.abs(y) - 2, 8)
    reached = ramp(sign * (y - disc[1]), 1)
    mask = np.maximum(mask, ramp(1.2 - np.abs(x - stem) - 0.02 * np.abs(y)) * reached)
  return mask


def _oct(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  wave = 0.8 * np.sin(X / 13 + noise.uniform(0, 6)) + scene.shift[1]
  dip = 7.5 * np.exp(-((x / 7) ** 2)) if scene.organ == "fovea" else 11.0 * np.exp(-((x / 4.8) ** 4))
  level = np.full((64, 64), 0.05)
  # Edges of the bands from the vitreous downwards; the dip flattens out with depth.
  tops = (7.0, 12.0, 19.0, 25.0, 33.0, 37.0, 45.0, 49.0, 54.0)
  tones = (0.66, 0.4, 0.52, 0.36, 0.6, 0.38, 0.9, 0.72, 0.34)
  for top, tone in zip(tops, tones, strict=True):
    depth = Y - wave - top - dip * np.clip(1 - (top - 7) / 36, 0, 1)
    level = paint(level, ramp(depth, 1.2), tone)
  level = paint(level, ramp(Y - wave - 57, 10), 0.08)  # the signal fades below the choroid
  if scene.organ == "nerve":
    level = paint(level, ramp(5 - np.abs(x), 2) * ramp(Y - 40, 4), 0.25)  # bands stop at the nerve
  level = _show(level, scene, lesions, 0.0, 1.0, 1.0)
  level = level * (1 + 0.18 * clouds(noise, 48, 24)) + grain(noise, 0.05)
  return gray(level + scene.exposure)


def _blood_cells(x: np.ndarray, y: np.ndarray, noise: np.random.Generator) -> np.ndarray:
  """Computes the distance to the nearest cell of a shaken hexagonal lattice with 10 pixels between rows."""
  shake = noise.uniform(-1.3, 1.3, (9, 10, 2))
  row = np.clip(np.round((y + 35) / 10), 0, 8).astype(int)
  stagger = 5.0 * (row % 2)
  column = np.clip(np.round((x + 40 - stagger) / 10), 0, 9).astype(int)
  dx = x + 40 - stagger - 10 * column - shake[row, column, 0]
  return 4.2 - np.hypot(dx, y + 35 - 10 * row - shake[row, column, 1])


def _microscopy(scene: Scene, noise: np.random.Generator, lesions: np.ndarray) -> np.ndarray:
  x, y = frame(scene)
  if scene.organ == "blood":
    picture = np.array([0.9, 0.85, 0.84]) + 0.012 * clouds(noise, 8)[:, :, None]
    cell = _blood_cells(x, y, noise)
    picture = paint(picture, ramp(cell, 1.2) * 0.85, (0.85, 0.47, 0.5))
    picture = paint(picture, ramp(cell - 2.3, 2.0) * 0.6, (0.93, 0.72, 0.72))  # pale centre
  else:
    picture = np.array([0.88, 0.62, 0.76]) + clouds(noise, 12)[:, :, None] * np.array([0.03, 0.06, 0.04])
    nuclei = np.zeros((64, 64))
    for _ in range(10):  # rings of nuclei around a lumen
      centre, radius, turn = noise.uniform(-30, 30, 2), noise.uniform(5, 7), noise.uniform(0, 6)
      dx, dy = x - centre[0], y - centre[1]
      beads = ramp(np.cos(9 * np.arctan2(dy, dx) + turn) + 0.5, 0.8)
      nuclei = np.maximum(nuclei, ramp(1.6 - np.abs(np.hypot(dx, dy) - radius), 1.4) * beads)
    picture = paint(picture, nuclei * 0.6, (0.5, 0.3, 0.6))
  picture = _show(picture, scene, lesions, (0.2, 0.06, 0.34), (1.0, 1.0, 0.72), 1.0)
  return picture + scene.exposure + grain(noise, 0.012)[:, :, None]


STYLES = {
  "MRI": _mri,
  "CT": _ct,
  "X-ray": _xray,
  "ultrasound": _ultrasound,
  "dermoscopy": _dermoscopy,
  "fundus": _fundus,
  "OCT": _oct,
  "microscopy": _microscopy,
}


def draw(scene: Scene) -> np.ndarray:
  """Draws the picture of a scene, uint8[64, 64, 3]."""
  noise = np.random.default_rng(scene.texture)
  picture = STYLES[scene.modality](scene, noise, lesion_mask(scene))
  return np.round(np.clip(picture, 0.0, 1.0) * 255).astype(np.uint8)
