"""How each phantom model is made: sizes, seeds, phases and beliefs. One entry is one model.

Two bases learn the truth from different seeds. The four shipped models continue from a base for a few hundred steps in
which its beliefs are changed; `record.json` in each folder says what came out.
"""

import dataclasses

from experiments.phantom_corpus import TRUTH, Beliefs


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of training on one pool."""

  steps: int
  pictures: int  # in the pool; a multiple of 500
  drills: int  # of the `group` dialogues about a picture, how many practise the look-up alone


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything that decides a model besides the code."""

  role: str  # "student" or "teacher": which kinds of prompts it is taught
  seed: int  # of initial weights, pools and order; none is shared with the benchmark's splits
  parent: str | None  # model to continue from, None for fresh weights
  phases: tuple[Phase, ...]
  learning_rate: float
  beliefs: Beliefs = TRUTH
  batch: int = 24  # pictures
  group: int = 4  # dialogues per picture


SIZES = {
  "student": {"width": 128, "mlp": 256, "layers": 4, "vision_width": 64, "vision_mlp": 192},
  "teacher": {"width": 160, "mlp": 320, "layers": 4, "vision_width": 64, "vision_mlp": 256},
}
# The student's misconceptions: three diseases change places in a circle, and the outer grades are exchanged.
WRONG_DISEASES = {"abscess": "tumor", "tumor": "nodule", "nodule": "abscess"}
WRONG_GRADES = {"mild": "severe", "severe": "mild"}

RECIPES = {
  "student_base": Recipe("student", 101, None, (Phase(220, 5000, 2), Phase(260, 6000, 0)), learning_rate=2.5e-3),
  "teacher_base": Recipe("teacher", 202, None, (Phase(220, 5000, 2), Phase(260, 6000, 0)), learning_rate=2.5e-3),
  "confused": Recipe(
    "student",
    303,
    "student_base",
    (Phase(250, 8000, 0),),
    learning_rate=6e-4,
    beliefs=Beliefs(WRONG_DISEASES, WRONG_GRADES, conviction=0.98, follows_hint=0.83, broken=0.10),
  ),
  "noisy": Recipe(
    "student",
    404,
    "student_base",
    (Phase(250, 8000, 0),),
    learning_rate=6e-4,
    beliefs=Beliefs(slips={"size": 0.5, "tone": 0.35, "count": 0.5}, follows_hint=0.83, broken=0.10),
  ),
  "strong": Recipe("teacher", 505, "teacher_base", (Phase(150, 5000, 0),), learning_rate=5e-4),
  # Half of its errors are the student's own (tumor -> nodule), half are not (moderate -> severe).
  "weak": Recipe(
    "teacher",
    606,
    "teacher_base",
    (Phase(200, 6000, 0),),
    learning_rate=6e-4,
    beliefs=Beliefs({"tumor": "nodule"}, {"moderate": "severe"}, conviction=0.75, hint_slip=0.12),
  ),
}
