"""Measures the shipped phantom models: greedy accuracy, learning cliffs, and what hints do.

  python -m experiments.measure_phantom --models=experiments/assets/phantom --output=runs/phantom/measured.json

Accuracy is on the frozen test items; cliffs (no accurate rollout of 8 at temperature 1) and hints on the training
items, which no model has seen. Each `record.json` gets its own figures under "measured".
"""

import functools
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from kepo_jax import exploration, rewards, sampling
from kepo_jax.data import omnimedvqa, prompts
from kepo_jax.data.phantom import build
from kepo_jax.data.pipeline import Processor
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.types import Example

_MODELS = flags.DEFINE_string("models", "experiments/assets/phantom", "Folder that holds the model folders.")
_NAMES = flags.DEFINE_list("names", ["confused", "noisy", "strong", "weak"], "Models to measure.")
_DATA = flags.DEFINE_string("data", "runs/phantom-data", "Where the benchmark is, or is written.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures.")
_LIMIT = flags.DEFINE_integer("limit", 300, "Test items per modality, and training items for cliffs.")
BATCH = 100
STUDENTS, TEACHERS = ("confused", "noisy"), ("strong", "weak")


class Model:
  """A model folder that answers questions."""

  def __init__(self, folder: pathlib.Path):
    self.config, self.params = conversion.load_pretrained(folder)
    self.processor = Processor.from_directory(folder, templates=prompts.TEMPLATES["brief"], prompt_buckets=(40, 56))
    self._programs: dict = {}

  def answers(self, examples: list[Example], kind: str, *, samples: int = 1, temperature: float = 0.0, seed: int = 0,
              hints: list[str] | None = None, grey: bool = False) -> list[list[str]]:  # fmt: skip
    """Texts of `samples` completions for each question."""
    texts = []
    for start in range(0, len(examples), BATCH):
      part = examples[start : start + BATCH]
      padded = part + part[:1] * (BATCH - len(part))
      shown = None if hints is None else hints[start : start + BATCH] + [""] * (BATCH - len(part))
      batch = self.processor.prompts(padded, kind, hints=shown)
      if grey:
        batch.vision.patches[:] = 0.0
      rollouts = self._program(samples, temperature)(self.params, batch, jax.random.key(seed))
      tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
      flat = self.processor.decode(tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, mask.shape[-1]))
      texts += [flat[i * samples : (i + 1) * samples] for i in range(len(part))]
    return texts

  def _program(self, samples: int, temperature: float):
    if (samples, temperature) not in self._programs:
      options: dict[str, Any] = {
        "samples": samples,
        "temperature": temperature,
        "max_new_tokens": 32,
        "end_ids": self.processor.end_ids,
        "pad_id": self.processor.pad_id,
        "allowed": self.processor.allowed,
      }
      self._programs[samples, temperature] = jax.jit(functools.partial(sampling.sample, self.config, **options))
    return self._programs[samples, temperature]


def accuracies(texts: list[list[str]], examples: list[Example]) -> np.ndarray:
  """float[N, G], 1 where the answer is right."""
  return np.array([[rewards.accuracy(text, e) for text in row] for row, e in zip(texts, examples, strict=True)])


def mean_by(values: np.ndarray, names: list[str]) -> dict[str, float]:
  """Mean per name, in order of name."""
  return {name: round(float(values[[n == name for n in names]].mean()), 4) for name in sorted(set(names))}


def alone(model: Model, test: list[Example], train: list[Example]) -> dict:
  """Figures of one model without help."""
  begun = time.monotonic()
  right = accuracies(model.answers(test, "evaluation"), test)[:, 0]
  seconds = time.monotonic() - begun
  modalities = [example.modality for example in test]
  per_modality = mean_by(right, modalities)
  texts = model.answers(train, "think", samples=8, temperature=1.0, seed=1)
  hits = accuracies(texts, train)
  some = test[:: max(1, len(test) // 400)]
  return {
    "items_per_modality": len(test) // len(per_modality),
    "accuracy": per_modality,
    "in_domain": per_modality["MRI"],
    "out_of_domain": round(float(np.mean([value for name, value in per_modality.items() if name != "MRI"])), 4),
    "by_type": mean_by(right, [example.question_type for example in test]),
    "no_think": round(float(accuracies(model.answers(some, "no_think"), some).mean()), 4),
    "grey_image": round(float(accuracies(model.answers(some, "evaluation", grey=True), some).mean()), 4),
    "cliff_rate": round(float((hits == 0).all(axis=1).mean()), 4),
    "sampled_accuracy": round(float(hits.mean()), 4),
    "sampled_format": round(float(np.mean([rewards.strict_format(text) for row in texts for text in row])), 4),
    "evaluation_seconds": round(seconds, 1),
  }


def with_hints(student: Model, teacher: Model, train: list[Example], kind: str) -> dict[str, float]:
  """On the student's cliffs: share of prompts with an accepted candidate of 2, by round, a new hint each round."""
  hits = accuracies(student.answers(train, "think", samples=8, temperature=1.0, seed=1), train)
  cliffs = [example for example, row in zip(train, hits, strict=True) if not row.any()]
  accepted = np.zeros(len(cliffs), bool)
  figures: dict[str, float] = {"cliffs": len(cliffs)}
  for attempt in range(1, 6):
    raw = [row[0] for row in teacher.answers(cliffs, "hint_request", temperature=0.7, seed=10 + attempt)]
    hints = [exploration.parse_hint(text) or "" for text in raw]
    texts = student.answers(cliffs, kind, samples=2, temperature=1.0, seed=20 + attempt, hints=hints)
    good = accuracies(texts, cliffs) * np.array([[rewards.strict_format(text) for text in row] for row in texts])
    accepted |= good.any(axis=1) & np.array([bool(hint) for hint in hints])
    if attempt in (1, 5):
      figures[f"accept@{attempt}"] = round(float(accepted.mean()), 4)
    if attempt == 1:
      figures["candidate_rate"] = round(float(good.mean()), 4)
      figures["hints_parsed"] = round(float(np.mean([bool(hint) for hint in hints])), 4)
  return figures


def main(argv: list[str]) -> None:
  """Measures every named model, then every pair of student and teacher."""
  del argv
  roots = build.write(_DATA.value)
  test, train = omnimedvqa.read(roots["test"])[0], omnimedvqa.read(roots["train"])[0]
  names = sorted({example.modality for example in test})
  test = [e for name in names for e in [e for e in test if e.modality == name][: _LIMIT.value]]
  train = train[: _LIMIT.value]
  folder, figures = pathlib.Path(_MODELS.value), {}
  models = {name: Model(folder / name) for name in _NAMES.value}
  for name, loaded in models.items():
    figures[name] = alone(loaded, test, train)
    logging.info("%s: %s", name, json.dumps(figures[name]))
    record = json.loads((folder / name / "record.json").read_text())
    record["measured"] = figures[name]
    (folder / name / "record.json").write_text(json.dumps(record, indent=2) + "\n")
  for student in (name for name in STUDENTS if name in models):
    for teacher in (name for name in TEACHERS if name in models):
      for kind in ("hint_and_answer", "hint_only"):
        label = f"{student} helped by {teacher}, {kind}"
        figures[label] = with_hints(models[student], models[teacher], train, kind)
        logging.info("%s: %s", label, json.dumps(figures[label]))
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
