"""Entries of a study, made up and kept."""

import itertools
import json

import numpy as np

from experiments.studies import statistics
from tests.conftest import ROOT

RESULTS = ROOT / "docs" / "results"
MODALITIES = ("CT", "Dermoscopy", "Fundus Photography", "MRI", "Microscopy", "OCT", "Ultrasound", "X-Ray")
TYPES = ("Anatomy Identification", "Disease Diagnosis", "Lesion Grading", "Modality Recognition", "Other")
# Method -> accuracy on seen modalities and on the unseen one.
METHODS = {"grpo": (0.8, 0.43), "gkd-1": (0.79, 0.45), "kepo-tau1": (0.86, 0.47)}
FREE = {"start": (0.53, 0.3), "teacher": (0.77, 0.45)}


def kept(study, file="runs.json"):
  return json.loads((RESULTS / study / file).read_text())["runs"]


def kept_items():
  return json.loads((RESULTS / "items.json").read_text())


def items(per_modality, questions_per_image=1):
  """A record of items.json."""
  count = per_modality * len(MODALITIES)
  question_type = np.arange(count) * 7 // 3 % len(TYPES)
  return {
    "ids": [f"q{n}" for n in range(count)], "modalities": list(MODALITIES),
    "modality": (np.arange(count) // per_modality).tolist(), "question_types": list(TYPES),
    "question_type": question_type.tolist(), "image": (np.arange(count) // questions_per_image).tolist(),
    "chance": np.array([0.25, 0.25, 1 / 3, 0.25, 0.5])[question_type].tolist(), "train_modality": "MRI",
    "unseen": ["Fundus Photography"],
  }  # fmt: skip


def entries(record):
  """Entries of METHODS with seeds 0 and 1, and of FREE."""
  made = []
  for (name, (seen, unseen)), seed in itertools.product((FREE | METHODS).items(), range(2)):
    trained, rng = name in METHODS, np.random.default_rng([len(made), seed])
    if not trained and seed:
      continue
    names = np.array(record["modalities"])[record["modality"]]
    correct = rng.random(len(names)) < np.where(np.isin(names, record["unseen"]), unseen, seen)
    others = [correct[names == modality].mean() for modality in MODALITIES if modality != "MRI"]
    test = {"correct": statistics.packed(correct), "in_domain": float(correct[names == "MRI"].mean()),
            "out_of_domain": float(np.mean(others)), "overall": float(correct.mean()),
            "format": float(rng.uniform(0.97, 1))}  # fmt: skip
    validation = [
      {"step": step, "in_domain": seen, "out_of_domain": seen + rng.normal(0, 0.02)} for step in (0, 40, 80)
    ]
    made.append(
      {"method": name, "label": name.upper(), "student": "confused", "teacher": "weak", "config": name.split("-")[0],
       "learning_rate": 3e-4 if trained else None, "seed": seed if trained else None, "test": test,
       "validation": validation if trained else validation[:1]}
    )  # fmt: skip
  return made


def training(method, seed, points, *, teacher=0):
  """An entry with validation records of (step, tokens, accuracy)."""
  records = [
    {"step": step, "in_domain": value, "out_of_domain": value / 2, "overall": value / 4,
     "cost": {"student_tokens": tokens - teacher, "teacher_tokens": teacher}}
    for step, tokens, value in points
  ]  # fmt: skip
  return {"method": method, "label": method, "student": "s", "teacher": "t", "seed": seed, "learning_rate": 1e-4,
          "steps": records[-1]["step"], "validation": records, "cost": records[-1]["cost"]}  # fmt: skip
