"""Writes the embedded benchmark PhantomVQA to disk, or a contact sheet of what it draws.

python -m experiments.phantom.draw --directory=runs/phantom-data     # OmniMedVQA's layout, one root per split
python -m experiments.phantom.draw --sheet=docs/phantom.png          # all modalities, organs and findings
"""

import numpy as np
from absl import flags, logging
from PIL import Image, ImageDraw, ImageFont

from experiments import environment
from kepo_jax.data.phantom import build, drawing, questions, scenes

_DIRECTORY = flags.DEFINE_string("directory", None, "Where to write the data set.")
_SHEET = flags.DEFINE_string("sheet", None, "Where to write the contact sheet, a PNG.")

FINDINGS = (  # columns of the sheet, for each organ
  {"count": 0},
  {"count": 1, "size": "large", "tone": "dark", "side": "left", "level": "upper"},
  {"count": 2, "size": "small", "tone": "bright", "side": "right", "level": "upper"},
  {"count": 3, "size": "small", "tone": "dark", "side": "left", "level": "lower"},
  {"count": 3, "size": "large", "tone": "bright", "side": "right", "level": "lower"},
)
ZOOM, MARGIN, LABEL, BAND = 2, 4, 100, 40  # enlargement; pixels around a picture, for row names, for column names


def caption(findings: dict) -> str:
  """Two lines over a column: what is drawn, and what that is called."""
  if not findings["count"]:
    return "no lesion\nhealthy"
  name = questions.DISEASES[findings["size"], findings["tone"]]
  grade = questions.BURDENS[findings["count"], findings["size"]]
  drawn = f"{findings['count']} {findings['size']} {findings['tone']}"
  return f"{drawn}\n{findings['level']} {findings['side']}\n{name}, {grade}"


def contact_sheet() -> Image.Image:
  """One row per modality; its two organs side by side, each with the findings of `FINDINGS`."""
  cell = drawing.SIDE * ZOOM + MARGIN
  columns = 2 * len(FINDINGS)
  size = (LABEL + columns * cell, BAND + len(scenes.MODALITIES) * cell)
  sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(12)
  pen = ImageDraw.Draw(sheet)
  for column in range(columns):
    pen.multiline_text(
      (LABEL + column * cell + 2, 1), caption(FINDINGS[column % len(FINDINGS)]), "black", font, spacing=0
    )
  for row, modality in enumerate(scenes.MODALITIES):
    rng = np.random.default_rng(row)
    top = BAND + row * cell
    pen.multiline_text((4, top + 40), f"{modality}\n{' | '.join(scenes.ORGANS[modality])}", "black", font)
    for column in range(columns):
      organ = scenes.ORGANS[modality][column // len(FINDINGS)]
      picture = drawing.draw(scenes.draw_scene(rng, modality, organ=organ, **FINDINGS[column % len(FINDINGS)]))
      large = Image.fromarray(picture).resize((cell - MARGIN, cell - MARGIN), Image.Resampling.NEAREST)
      sheet.paste(large, (LABEL + column * cell, top))
  return sheet


def main(argv: list[str]) -> None:
  """Writes what the flags ask for."""
  del argv
  if not (_DIRECTORY.value or _SHEET.value):
    raise ValueError("give --directory, --sheet or both.")
  if _SHEET.value:
    contact_sheet().save(_SHEET.value)
  if _DIRECTORY.value:
    for split, root in build.write(_DIRECTORY.value).items():
      logging.info("%s: %d items under %s", split, sum(build.SPLITS[split].values()), root)


if __name__ == "__main__":
  environment.run(main)
