"""What a phantom image shows: discrete findings and every continuous parameter of the drawing.

A `Scene` is all that `drawing.draw` needs; two equal scenes give the same pixels. Lengths are pixels of the 64 x 64
image, angles radians. Lesions of one scene share side, level, size and tone, so that each finding has one word.
"""

import dataclasses
import hashlib

import numpy as np

MODALITIES = ("MRI", "CT", "X-ray", "ultrasound", "dermoscopy", "fundus", "OCT", "microscopy")
ORGANS = {
  "MRI": ("brain", "knee"),
  "CT": ("skull", "abdomen"),
  "X-ray": ("chest", "leg"),
  "ultrasound": ("kidney", "thyroid"),
  "dermoscopy": ("skin", "nail"),
  "fundus": ("macula", "disc"),
  "OCT": ("fovea", "nerve"),
  "microscopy": ("blood", "gland"),
}
COUNTS = (0, 1, 2, 3)
SIDES = ("left", "right")  # of the picture, not of the patient
LEVELS = ("upper", "lower")
SIZES = ("small", "large")
TONES = ("dark", "bright")

RADII = {"small": (1.7, 2.1), "large": (3.8, 4.4)}
GAP = 2.0  # least free space between two lesions
REACH = (23.0, 24.0)  # half axes of the ellipse around the centre that holds every lesion
OFFSET = (4.0, 18.0)  # distance of a lesion's centre from the midlines


@dataclasses.dataclass(frozen=True)
class Lesion:
  """One blob, placed relative to the centre of the organ."""

  x: float
  y: float
  radius: float
  aspect: float  # long over short half axis
  angle: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """All drawn parameters; side, level, size and tone are "" when there is no lesion."""

  modality: str
  organ: str
  side: str
  level: str
  size: str
  tone: str
  lesions: tuple[Lesion, ...]
  shift: tuple[float, float]  # of the organ's centre, x and y
  scale: float  # of the organ's outline
  tilt: float  # of the organ
  exposure: float  # added to the brightness
  contrast: float  # of the lesions against the tissue, 1 is nominal
  texture: int  # seed of noise, vessels, hairs, cells

  @property
  def count(self) -> int:
    """Counts the lesions."""
    return len(self.lesions)

  def digest(self) -> str:
    """Computes the SHA-256 over all parameters, the continuous ones included."""
    return hashlib.sha256(repr(dataclasses.astuple(self)).encode()).hexdigest()


def place_lesions(rng: np.random.Generator, count: int, side: str, level: str, size: str) -> tuple[Lesion, ...]:
  """Places lesions inside one quadrant that neither touch each other nor leave the organ."""
  signs = np.array([-1 if side == "left" else 1, -1 if level == "upper" else 1])
  while True:
    centres = rng.uniform(*OFFSET, size=(40, 2))
    radii = rng.uniform(*RADII[size], size=40)
    inside = (((centres + 0.7 * radii[:, None]) / REACH) ** 2).sum(axis=1) <= 1
    chosen: list[int] = []
    for i in np.flatnonzero(inside).tolist():
      distances = [np.hypot(*(centres[i] - centres[j])) - radii[i] - radii[j] for j in chosen]
      if all(distance >= GAP for distance in distances):
        chosen.append(i)
      if len(chosen) == count:
        aspects, angles = rng.uniform(1.0, 1.2, count), rng.uniform(0, np.pi, count)
        return tuple(
          Lesion(*_rounded(*(centres[i] * signs), radii[i], aspect, angle))
          for i, aspect, angle in zip(chosen, aspects, angles, strict=True)
        )


def _rounded(*values: float) -> list[float]:
  """Rounds to six decimals: the scene is then the same in JSON, in its digest and on every machine."""
  return [round(float(value), 6) for value in values]


def draw_scene(
  rng: np.random.Generator,
  modality: str,
  *,
  organ: str | None = None,
  count: int | None = None,
  side: str | None = None,
  level: str | None = None,
  size: str | None = None,
  tone: str | None = None,
) -> Scene:
  """Draws a random scene of one modality; findings that are given are kept, the others are drawn uniformly."""
  organ = organ or str(rng.choice(ORGANS[modality]))
  count = int(rng.choice(COUNTS)) if count is None else count
  if count:
    side, level = side or str(rng.choice(SIDES)), level or str(rng.choice(LEVELS))
    size, tone = size or str(rng.choice(SIZES)), tone or str(rng.choice(TONES))
    lesions = place_lesions(rng, count, side, level, size)
  else:
    side = level = size = tone = ""
    lesions = ()
  shift = _rounded(*rng.uniform(-1.5, 1.5, 2))
  scale, tilt, exposure, contrast = _rounded(
    rng.uniform(0.96, 1.04), rng.uniform(-0.08, 0.08), rng.uniform(-0.03, 0.03), rng.uniform(0.85, 1.1)
  )
  texture = int(rng.integers(2**32))
  return Scene(
    modality, organ, side, level, size, tone, lesions, (shift[0], shift[1]), scale, tilt, exposure, contrast, texture
  )
