"""How each phantom model is made: sizes, seeds, phases and beliefs. One entry is one model.

Two bases learn the truth from different seeds. The four shipped models continue from a base for a few hundred steps in
which its beliefs are changed; `record.json` in each folder says what came out.
"""

import dataclasses

from experiments.phantom.corpus import TRUTH, Beliefs


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of training on one pool."""

  steps: int
  pictures: int  # in the pool; a multiple of 500
  drills: int = 0  # of the `group` dialogues about a picture, how many practise the look-up alone
  batch: int = 24  # pictures per step
  group: int = 4  # dialogues per picture


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything that decides a model besides the code."""

  role: str  # "student" or "teacher": which kinds of prompts it is taught
  seed: int  # of initial weights, pools and order; none is shared with the benchmark's splits
  parent: str | None  # model to continue from, None for fresh weights
  phases: tuple[Phase, ...]
  learning_rate: float
  beliefs: Beliefs = TRUTH
  sight: int = 0  # steps in which the vision tower alone learns to see lesions, before the phases


SIZES = {
  "student": {"width": 128, "mlp": 256, "layers": 4, "vision_width": 64, "vision_mlp": 192},
  "teacher": {"width": 160, "mlp": 320, "layers": 4, "vision_width": 64, "vision_mlp": 256},
}
# The student's misconceptions: three diseases change places in a circle, and the outer grades are exchanged.
WRONG_DISEASES = {"abscess": "tumor", "tumor": "nodule", "nodule": "abscess"}
WRONG_GRADES = {"mild": "severe", "severe": "mild"}


# Perception first, then the look-up of letters alone (it stays at chance for long and then breaks through), then all.
def base_phases(drill_steps: int) -> tuple[Phase, ...]:
  """Both, then the drill, then everything without it."""
  return (Phase(200, 5000, 2), Phase(drill_steps, 500, 32, batch=3, group=32), Phase(320, 8000))


RECIPES = {
  "student_words": Recipe("student", 101, None, base_phases(150), learning_rate=2.5e-3),
  "teacher_words": Recipe("teacher", 202, None, base_phases(100), learning_rate=2.5e-3),
  "student_cells": Recipe("student", 111, "student_words", (Phase(240, 6000),), learning_rate=2e-3, sight=500),
  "teacher_cells": Recipe("teacher", 222, "teacher_words", (Phase(200, 6000),), learning_rate=2e-3, sight=500),
  "student_base": Recipe("student", 121, "student_cells", (Phase(170, 4500),), learning_rate=2e-3, sight=400),
  "strong": Recipe("teacher", 232, "teacher_cells", (Phase(480, 9000),), learning_rate=2e-3, sight=400),
  "confused": Recipe(
    "student",
    303,
    "student_base",
    (Phase(380, 9000),),
    learning_rate=2e-3,
    beliefs=Beliefs(WRONG_DISEASES, WRONG_GRADES, conviction=0.98, follows_hint=0.83, broken=0.10),
  ),
  "noisy": Recipe(
    "student",
    404,
    "student_base",
    (Phase(200, 5000),),
    learning_rate=2e-3,
    beliefs=Beliefs(slips={"size": 0.4, "tone": 0.2, "count": 0.4}, follows_hint=0.83, broken=0.10),
  ),
  # Half of its errors are the student's own (tumor -> nodule), half are not (moderate -> severe).
  "weak": Recipe(
    "teacher",
    606,
    "strong",
    (Phase(120, 3000),),
    learning_rate=1.5e-3,
    beliefs=Beliefs({"tumor": "nodule"}, {"moderate": "severe"}, conviction=0.75, hint_slip=0.12),
  ),
}
