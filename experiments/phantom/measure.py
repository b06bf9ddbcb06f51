"""Measures the shipped phantom models: greedy accuracy, learning cliffs, and what hints do.

  python -m experiments.phantom.measure --models=experiments/assets/phantom --output=runs/phantom/measured.json

Accuracy is on the frozen test items; cliffs (no accurate rollout of 8 at temperature 1) and hints on the training
items, which no model has seen. Each `record.json` gets its own results under "measured".
"""

import functools
import json
import pathlib
import time

import jax
import numpy as np
from absl import flags, logging

from experiments import environment, hints
from experiments.phantom import corpus
from kepo_jax import exploration, rewards
from kepo_jax.data import prompts
from kepo_jax.data.phantom import build
from kepo_jax.data.phantom.scenes import Scene
from kepo_jax.data.processor import Processor
from kepo_jax.data.readers import omnimedvqa
from kepo_jax.models.qwen3_vl import checkpoint
from kepo_jax.training import rollouts as rollouts_lib
from kepo_jax.training.batched_model import BatchedModel
from kepo_jax.training.programs import SamplingSettings
from kepo_jax.types import Example

_MODELS = flags.DEFINE_string("models", "experiments/assets/phantom", "Folder that holds the model folders.")
_NAMES = flags.DEFINE_list("names", ["confused", "noisy", "strong", "weak"], "Models to measure.")
_DATA = flags.DEFINE_string("data", "runs/phantom-data", "Where the benchmark is, or is written.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results.")
_LIMIT = flags.DEFINE_integer("limit", 300, "Test items per modality, and training items for cliffs.")
BATCH, TOKENS = 100, 32  # questions at a time; longest completion and hint
STUDENTS, TEACHERS = ("confused", "noisy"), ("strong", "weak")


class Model:
  """A model folder that answers questions."""

  def __init__(self, folder: pathlib.Path, mesh: jax.sharding.Mesh):
    processor = Processor.from_directory(folder, templates=prompts.TEMPLATES["brief"], prompt_buckets=(40, 56))
    loaded = checkpoint.load_pretrained(folder, mesh=mesh, layout="decode", unstack=True)
    self.batched = BatchedModel(*loaded, processor, mesh, size=BATCH)

  def answers(self, examples: list[Example], kind: str, *, samples: int = 1, temperature: float = 0.0, seed: int = 0,
              control: str = "none") -> list[list[str]]:  # fmt: skip
    """Texts of `samples` completions for each question."""
    settings = SamplingSettings(samples, TOKENS, temperature)
    rollouts = self.batched.rollouts(examples, kind, settings, jax.random.key(seed), control=control)
    return rollouts_lib.texts_of(self.batched.processor, rollouts, prompts=len(examples)).tolist()


def accuracies(texts: list[list[str]], examples: list[Example]) -> np.ndarray:
  """float[N, G], 1 where the answer is right."""
  return np.array([[rewards.accuracy(text, e) for text in row] for row, e in zip(texts, examples, strict=True)])


def mean_by(values: np.ndarray, names: list[str]) -> dict[str, float]:
  """Mean per name, in order of name."""
  return {name: round(float(values[[n == name for n in names]].mean()), 4) for name in sorted(set(names))}


@functools.cache
def scenes() -> dict[str, Scene]:
  """What was drawn for each frozen item of the test and the training split, by its id."""
  items = [*build.make_items("test"), *build.make_items("train")]
  return {f"{item.dataset}/{item.question_id}": item.scene for item in items}


def perception(texts: list[list[str]], examples: list[Example]) -> dict[str, dict[str, float]]:
  """Per attribute and modality: share of the texts whose think block says what was drawn.

  Only pictures that have the attribute count; a text that leaves it out is wrong.
  """
  shares = {}
  drawn = [corpus.true_findings(scenes()[example.id]) for example in examples]
  for name in corpus.ATTRIBUTES:
    rows = [i for i, true in enumerate(drawn) if name in true]
    right = [np.mean([corpus.read_findings(text).get(name) == drawn[i][name] for text in texts[i]]) for i in rows]
    shares[name] = mean_by(np.array(right), [examples[i].modality for i in rows])
  return shares


def alone(model: Model, test: list[Example], train: list[Example]) -> dict:
  """Metrics of one model without help."""
  begun = time.monotonic()
  greedy = model.answers(test, "evaluation")
  right = accuracies(greedy, test)[:, 0]
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
    "perception": perception(greedy, test),
    "sampled_perception": {name: shares["MRI"] for name, shares in perception(texts, train).items()},
    "by_type": mean_by(right, [example.question_type for example in test]),
    "no_think": round(float(accuracies(model.answers(some, "no_think"), some).mean()), 4),
    "grey_image": round(float(accuracies(model.answers(some, "evaluation", control="blank"), some).mean()), 4),
    "cliff_rate": round(float((hits == 0).all(axis=1).mean()), 4),
    "sampled_accuracy": round(float(hits.mean()), 4),
    "sampled_format": round(float(np.mean([rewards.strict_format(text) for row in texts for text in row])), 4),
    "evaluation_seconds": round(seconds, 1),
  }


def with_hints(student: Model, teacher: Model, train: list[Example], kind: str) -> dict[str, float]:
  """On the student's cliffs: share of prompts with an accepted candidate of 2, by round, a new hint each round.

  `candidate_rate` and `hints_parsed` are those of the first round.
  """
  hits = accuracies(student.answers(train, "think", samples=8, temperature=1.0, seed=1), train)
  cliffs = [example for example, row in zip(train, hits, strict=True) if not row.any()]
  outcome = hints.all_rounds(
    student.batched,
    teacher.batched,
    cliffs,
    lambda purpose, attempt: jax.random.key({"hint": 10, "candidate": 20}[purpose] + attempt),
    hint=SamplingSettings(1, TOKENS, 0.7),
    candidate=SamplingSettings(2, TOKENS, 1.0),
    hint_prompt=kind,
    rounds=5,
    scorer=rewards.Scorer({"accuracy": (rewards.accuracy, 1.0), "format": (rewards.strict_format, 1.0)}),
    accept=exploration.Acceptance(leak_filter=False),
  )
  results: dict[str, float] = {"cliffs": len(cliffs)}
  if cliffs:
    metrics = exploration.exploration_metrics(outcome, prompts=len(train), rounds=5, examples=cliffs)
    first = [each for tried in outcome.candidates.values() for each in tried if each.attempt == 1]
    good = [each.accurate and each.well_formed for each in first]
    parsed = [exploration.parse_hint(texts[0]) is not None for texts in outcome.hints.values()]
    results |= {f"accept@{b}": round(metrics[f"hint/accept_rate@{b}"], 4) for b in (1, 5)}
    results |= {"candidate_rate": round(float(np.mean(good)), 4), "hints_parsed": round(float(np.mean(parsed)), 4)}
  return results


def main(_: list[str]) -> None:
  """Measures on all devices."""
  mesh = environment.device_mesh(fsdp=1, tensor=1)
  with jax.set_mesh(mesh):
    measure(mesh)


def measure(mesh: jax.sharding.Mesh) -> None:
  """Measures every named model, then every pair of student and teacher."""
  roots = build.write(_DATA.value)
  test, train = omnimedvqa.read(roots["test"])[0], omnimedvqa.read(roots["train"])[0]
  names = sorted({example.modality for example in test})
  test = [e for name in names for e in [e for e in test if e.modality == name][: _LIMIT.value]]
  train = train[: _LIMIT.value]
  folder, results = pathlib.Path(_MODELS.value), {}
  models = {name: Model(folder / name, mesh) for name in _NAMES.value}
  for name, loaded in models.items():
    results[name] = alone(loaded, test, train)
    logging.info("%s: %s", name, json.dumps(results[name]))
    record = json.loads((folder / name / "record.json").read_text())
    record["measured"] = results[name]
    (folder / name / "record.json").write_text(json.dumps(record, indent=2) + "\n")
  for student in (name for name in STUDENTS if name in models):
    for teacher in (name for name in TEACHERS if name in models):
      for kind in ("hint_and_answer", "hint_only"):
        label = f"{student} helped by {teacher}, {kind}"
        results[label] = with_hints(models[student], models[teacher], train, kind)
        logging.info("%s: %s", label, json.dumps(results[label]))
  if _OUTPUT.value:
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  environment.run(main)
