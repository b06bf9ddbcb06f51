"""Made-up entries of a study, with the shapes and sizes of real ones; none of the figures was measured."""

import math

import numpy as np

from kepo_jax.evaluation import studies

MODALITIES = ("CT", "Dermoscopy", "Fundus Photography", "MRI", "Microscopy", "OCT", "Ultrasound", "X-Ray")
KINDS = (
  "Anatomy Identification",
  "Disease Diagnosis",
  "Lesion Grading",
  "Modality Recognition",
  "Other Biological Attributes",
)
# Method -> label, accuracy in the end on seen modalities and on the unseen one, tokens of a step in thousands (student,
# teacher), seconds.
METHODS = {
  "sft": ("SFT, gold answers", 0.40, 0.32, 0.0, 0.0, 12),
  "sft_teacher": ("SFT, the teacher's answers", 0.74, 0.42, 0.0, 1.1, 25),
  "grpo": ("GRPO", 0.80, 0.43, 1.2, 0.0, 40),
  "rloo": ("RLOO", 0.795, 0.44, 1.2, 0.0, 40),
  "gkd-0": ("GKD, teacher's rows", 0.76, 0.42, 0.0, 2.3, 45),
  "gkd-0.5": ("GKD, half and half", 0.78, 0.43, 0.6, 1.7, 50),
  "gkd-1": ("GKD, own rows", 0.79, 0.45, 1.2, 1.2, 50),
  "kepo_ke-tau0": ("KEPO without hints, tau = 0", 0.82, 0.44, 1.2, 1.2, 55),
  "kepo_ke-tau1": ("KEPO without hints, tau = 1", 0.835, 0.45, 1.2, 1.2, 55),
  "kepo-tau0": ("KEPO, tau = 0", 0.84, 0.45, 1.3, 1.3, 66),
  "kepo-tau1": ("KEPO, tau = 1", 0.86, 0.47, 1.3, 1.3, 66),
}
FREE = {"start": ("untrained student", 0.53, 0.30), "teacher": ("teacher", 0.77, 0.45)}


def items(per_modality=300, questions_per_image=1):
  """A record of items.json."""
  count = per_modality * len(MODALITIES)
  kind = np.random.default_rng(1).choice(len(KINDS), count, p=[0.1, 0.42, 0.22, 0.08, 0.18])
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


def entries(record, *, methods=None, seeds=5, pair=("confused", "weak"), free=True, overrides=None):
  """Entries of some methods, of one seed each where nothing is trained."""
  chosen = METHODS if methods is None else methods
  found = [_free(record, name, *FREE[name], pair) for name in FREE] if free else []
  for place, (name, settings) in enumerate(chosen.items()):
    for seed in range(seeds):
      found.append(_trained(record, name, settings, seed, place, pair, (overrides or {}).get(name, {})))
  return found


def _free(record, name, label, seen, unseen, pair):
  entry = {
    "method": name, "label": label, "student": pair[0], "teacher": pair[1], "learning_rate": None, "seed": None,
    "steps": 0, "stage": "final", "config": "", "overrides": {},
    "test": _test(record, seen, unseen, np.random.default_rng(len(name))), "validation": [],
  }  # fmt: skip
  if name == "start":
    entry["validation"] = [_validation(0, seen, unseen, 0, 0, 0, np.random.default_rng(3))]
  return entry


def _trained(record, name, settings, seed, place, pair, overrides):
  label, seen, unseen, student, teacher, seconds = settings
  rng = np.random.default_rng([place, seed])
  end = seen + rng.normal(0, 0.008)
  seconds *= rng.uniform(0.97, 1.03)
  validations = [
    _validation(step, _between(0.53, end, step / 80), unseen, step * student * 1e3, step * teacher * 1e3,
                seconds * step / 80, rng)
    for step in (20, 40, 60, 80)
  ]  # fmt: skip
  return {
    "method": name, "label": label, "student": pair[0], "teacher": pair[1], "learning_rate": 3e-4, "seed": seed,
    "steps": 80, "stage": "final", "config": f"{name.split('-')[0]}.py", "overrides": overrides, "digest": "0" * 16,
    "test": _test(record, end, unseen, rng), "validation": validations, "curves": _curves(name, end, rng),
    "cost": validations[-1]["cost"] | {"cpu_seconds": 1.7 * seconds},
  }  # fmt: skip


def _between(first, last, share):
  return first + (last - first) * (1 - math.exp(-3.5 * share)) / (1 - math.exp(-3.5))


def _test(record, seen, unseen, rng):
  names = np.array(record["modalities"])[record["modality"]]
  hard = np.random.default_rng(7).normal(0, 0.15, len(names))  # the same questions are hard for all methods
  correct = rng.random(len(names)) < np.where(np.isin(names, record["unseen"]), unseen, seen) + hard
  inside = names == record["train_modality"]
  others = [correct[names == name].mean() for name in MODALITIES if name != record["train_modality"]]
  return {
    "correct": studies.packed(correct), "in_domain": float(correct[inside].mean()),
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


def _curves(name, end, rng):
  steps = np.arange(4, 81, 4)

  def noisy(first, last, width):
    rise = np.array([_between(first, last, step / 80) for step in steps])
    return (rise + rng.normal(0, width, len(steps))).round(5).tolist()

  found = {"step": steps.tolist()}
  if name not in ("sft", "sft_teacher", "gkd-0"):  # the student samples
    found |= {
      "reward/accuracy": noisy(0.42, end, 0.03), "reward/mean": noisy(1.2, end + 0.95, 0.04),
      "completion/length": noisy(17, 16, 0.15), "entropy": noisy(0.3, 0.06, 0.008),
      "cliff_rate": noisy(0.2, 0.05, 0.01),
    }  # fmt: skip
  if name.startswith(("gkd", "kepo")):
    found |= {"divergence/gated": noisy(0.06, 0.02, 0.002), "gate/frac": noisy(0.42, end, 0.02)}
    if "kepo" in name:
      found["divergence/ungated"] = noisy(0.12, 0.05, 0.004)
  if name.startswith("kepo-"):
    found["hint/trigger_rate"] = found["cliff_rate"]
    for attempt in range(1, 6):
      found[f"hint/accept_rate@{attempt}"] = noisy(1 - 0.35**attempt, 1 - 0.3**attempt, 0.02)
  return found


def hint_records(per_pair=1):
  """Records of the hints study: two pairs, two prompts, every modality."""
  rng = np.random.default_rng(5)
  found = []
  for student, teacher in (("confused", "weak"), ("confused", "strong"), ("noisy", "weak"), ("noisy", "strong")):
    for prompt in ("hint_and_answer", "hint_only"):
      for name in MODALITIES:
        gain = rng.normal(1.6 if prompt == "hint_and_answer" else 1.2, 0.25) * (0.6 if name.startswith("Fundus") else 1)
        rate = float(np.clip(0.35 + 0.25 * gain + rng.normal(0, 0.05), 0.05, 0.98))
        prompts = int(rng.integers(20, 90))
        found.append(
          {"student": student, "teacher": teacher, "hint_prompt": prompt, "modality": name,
           "questions": 100, "prompts": prompts,
           "candidates": prompts * 10, "gain": float(gain), "reliance": float(gain * 0.7 + rng.normal(0, 0.1)),
           "leak_rate": float(rng.uniform(0, 0.04)), "positive_rate": rate,
           "accept_rate": [1 - (1 - rate) ** b for b in range(1, 6)]}
        )  # fmt: skip
  return found
