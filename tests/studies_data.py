"""Made-up entries of a study, with the shapes of real ones; none of the figures was measured."""

import itertools

import numpy as np

from kepo_jax.evaluation import studies

MODALITIES = ("CT", "Dermoscopy", "Fundus Photography", "MRI", "Microscopy", "OCT", "Ultrasound", "X-Ray")
KINDS = ("Anatomy Identification", "Disease Diagnosis", "Lesion Grading", "Modality Recognition", "Other")
# Method -> label, accuracy in the end on seen modalities and on the unseen one, tokens of a step in thousands (student,
# teacher), seconds.
METHODS = {
  "sft": ("SFT, gold answers", 0.40, 0.32, 0.0, 0.0, 12),
  "grpo": ("GRPO", 0.80, 0.43, 1.2, 0.0, 40),
  "gkd-1": ("GKD, own rows", 0.79, 0.45, 1.2, 1.2, 50),
  "kepo-tau1": ("KEPO, tau = 1", 0.86, 0.47, 1.3, 1.3, 66),
}
FREE = {"start": ("untrained student", 0.53, 0.30), "teacher": ("teacher", 0.77, 0.45)}
STEPS = (20, 40, 60, 80)


def items(per_modality, questions_per_image=1):
  """A record of items.json."""
  count = per_modality * len(MODALITIES)
  kind = np.arange(count) * 7 // 3 % len(KINDS)
  return {
    "ids": [f"q{n}" for n in range(count)],
    "modalities": list(MODALITIES),
    "modality": (np.arange(count) // per_modality).tolist(),
    "question_types": list(KINDS),
    "question_type": kind.tolist(),
    "image": (np.arange(count) // questions_per_image).tolist(),
    "chance": np.array([0.25, 0.25, 1 / 3, 0.25, 0.5])[kind].tolist(),
    "train_modality": "MRI",
    "unseen": ["Fundus Photography"],
  }


def entries(record, *, methods=METHODS, pair=("confused", "weak"), free=True, overrides=None):
  """Entries of some methods, of seeds 0 and 1 each where something is trained."""
  of_pair = {"student": pair[0], "teacher": pair[1], "stage": "final"}
  found = []
  for name, (label, seen, unseen) in FREE.items() if free else ():
    rng = np.random.default_rng(len(name))
    found.append(of_pair | {
      "method": name, "label": label, "learning_rate": None, "seed": None, "steps": 0, "config": "", "overrides": {},
      "test": _test(record, seen, unseen, rng),
      "validation": [_validation(0, seen, unseen, 0, 0, 0, rng)] if name == "start" else [],
    })  # fmt: skip
  for (name, settings), seed in itertools.product(methods.items(), range(2)):
    label, seen, unseen, student, teacher, seconds = settings
    rng = np.random.default_rng([len(found), seed])
    validations = [
      _validation(step, 0.53 + (seen - 0.53) * (step / 80) ** 0.3, unseen, step * student * 1e3, step * teacher * 1e3,
                  seconds * step / 80, rng)
      for step in STEPS
    ]  # fmt: skip
    found.append(of_pair | {
      "method": name, "label": label, "learning_rate": 3e-4, "seed": seed, "steps": 80,
      "config": f"{name.split('-')[0]}.py", "overrides": (overrides or {}).get(name, {}), "digest": "0" * 16,
      "test": _test(record, seen, unseen, rng), "validation": validations, "curves": _curves(seen),
      "cost": validations[-1]["cost"] | {"cpu_seconds": 1.7 * seconds},
    })  # fmt: skip
  return found


def _test(record, seen, unseen, rng):
  names = np.array(record["modalities"])[record["modality"]]
  correct = rng.random(len(names)) < np.where(np.isin(names, record["unseen"]), unseen, seen)
  others = [correct[names == name].mean() for name in MODALITIES if name != "MRI"]
  return {
    "correct": studies.packed(correct), "in_domain": float(correct[names == "MRI"].mean()),
    "out_of_domain": float(np.mean(others)), "overall": float(correct.mean()), "format": float(rng.uniform(0.97, 1)),
    "unparsed": 0.005, "truncated": 0.001, "tokens": float(rng.normal(17, 0.3)),
  }  # fmt: skip


def _validation(step, seen, unseen, student, teacher, seconds, rng):
  each = {name: float(rng.binomial(40, unseen if name.startswith("Fundus") else seen) / 40) for name in MODALITIES}
  others = [value for name, value in each.items() if name != "MRI"]
  return {
    "step": step, "in_domain": each["MRI"], "out_of_domain": float(np.mean(others)),
    "overall": float(np.mean(list(each.values()))), "modalities": each,
    "cost": {"student_tokens": student, "teacher_tokens": teacher, "seconds": seconds},
  }  # fmt: skip


def _curves(end):
  names = ("reward/accuracy", "reward/mean", "cliff_rate", "divergence/gated", "hint/trigger_rate")
  accepted = [f"hint/accept_rate@{n}" for n in range(1, 6)]
  return {"step": list(STEPS)} | {name: np.linspace(0.4, end, len(STEPS)).tolist() for name in (*names, *accepted)}


def hint_records():
  """Records of the hints study: two teachers, two prompts, every modality."""
  rng = np.random.default_rng(5)
  found = []
  for teacher, prompt, name in itertools.product(("weak", "strong"), ("hint_and_answer", "hint_only"), MODALITIES):
    gain, reliance, rate = rng.normal(1.5, 0.25), rng.normal(1, 0.2), rng.uniform(0.2, 0.9)
    found.append(
      {"student": "confused", "teacher": teacher, "hint_prompt": prompt, "modality": name, "questions": 100,
       "prompts": int(rng.integers(20, 90)), "candidates": 500, "gain": gain, "reliance": reliance,
       "leak_rate": rng.uniform(0, 0.04), "positive_rate": rate,
       "accept_rate": [1 - (1 - rate) ** b for b in range(1, 6)]}
    )  # fmt: skip
  return found
