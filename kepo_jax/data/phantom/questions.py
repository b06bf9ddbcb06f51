"""Questions about scenes: OmniMedVQA's five types, two wordings each, and the true rules behind the answers.

The set of options never depends on the answer: a topic offers all its classes, or (modality, anatomy) a random choice
in which every class is equally likely to be the right one. Letters are balanced.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from kepo_jax.data.phantom import scenes
from kepo_jax.data.phantom.scenes import MODALITIES, ORGANS, Scene

DISEASES = {  # (size, tone) of the lesions -> disease
  ("small", "dark"): "cyst",
  ("small", "bright"): "nodule",
  ("large", "dark"): "abscess",
  ("large", "bright"): "tumor",
}
GRADES = ("mild", "moderate", "severe")
BURDENS = {  # (number, size) of the lesions -> grade
  (1, "small"): "mild",
  (1, "large"): "moderate",
  (2, "small"): "moderate",
  (2, "large"): "severe",
  (3, "small"): "severe",
  (3, "large"): "severe",
}
NUMBERS = ("none", "one", "two", "three")
HEALTH = ("healthy", "diseased")


@dataclasses.dataclass(frozen=True)
class Topic:
  """One thing to ask about a scene."""

  question_type: str  # as OmniMedVQA spells it
  share: float  # of the questions of a split
  wordings: tuple[str, str]
  classes: tuple[str, ...]  # the options; empty where they depend on a random choice
  truth: Callable[[Scene], str]
  needs_lesions: bool


_OTHER = "Other Biological Attributes"
# fmt: off
TOPICS: Mapping[str, Topic] = {
  "modality": Topic("Modality Recognition", 0.08, ("What modality is this?", "How was this picture taken?"),
                    (), lambda scene: scene.modality, False),
  "organ": Topic("Anatomy Identification", 0.10, ("What organ is shown?", "Which part of the body is this?"),
                 (), lambda scene: scene.organ, False),
  "disease": Topic("Disease Diagnosis", 0.34, ("What is the diagnosis?", "Which disease is shown?"),
                   tuple(DISEASES.values()), lambda scene: DISEASES[scene.size, scene.tone], True),
  "health": Topic("Disease Diagnosis", 0.08, ("Is the organ healthy?", "Is any disease shown?"),
                  HEALTH, lambda scene: HEALTH[min(scene.count, 1)], False),
  "grade": Topic("Lesion Grading", 0.22, ("What grade is shown?", "How severe is the disease?"),
                 GRADES, lambda scene: BURDENS[scene.count, scene.size], True),
  "count": Topic(_OTHER, 0.04, ("How many lesions are shown?", "What is the number of lesions?"),
                 NUMBERS, lambda scene: NUMBERS[scene.count], False),
  "side": Topic(_OTHER, 0.035, ("Which side is affected?", "On what side is the disease?"),
                scenes.SIDES, lambda scene: scene.side, True),
  "level": Topic(_OTHER, 0.035, ("Which level is affected?", "At what level is the disease?"),
                 scenes.LEVELS, lambda scene: scene.level, True),
  "size": Topic(_OTHER, 0.035, ("What size are the lesions?", "How big are the lesions?"),
                scenes.SIZES, lambda scene: scene.size, True),
  "tone": Topic(_OTHER, 0.035, ("What tone are the lesions?", "Are the lesions dark or bright?"),
                scenes.TONES, lambda scene: scene.tone, True),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Question:
  """A question about one scene, with its options in the order of their letters."""

  topic: str
  stem: str
  options: tuple[str, ...]
  answer: str  # text of the right option

  @property
  def letter(self) -> str:
    """Returns the letter of the right option."""
    return chr(ord("A") + self.options.index(self.answer))


def scene_for(topic: str, modality: str, rng: np.random.Generator) -> Scene:
  """Draws a scene on which every answer of the topic is equally likely."""
  lowest = 1 if TOPICS[topic].needs_lesions or (topic == "health" and rng.integers(2)) else 0
  highest = 3 if lowest or topic != "health" else 0
  findings: dict = {"count": int(rng.integers(lowest, highest + 1))}
  if topic == "grade":
    wanted = GRADES[rng.integers(3)]
    burdens = [burden for burden, name in BURDENS.items() if name == wanted]
    findings["count"], findings["size"] = burdens[rng.integers(len(burdens))]
  return scenes.draw_scene(rng, modality, **findings)


def option_set(topic: str, scene: Scene, rng: np.random.Generator) -> list[str]:
  """Returns the classes on offer, in no particular order."""
  others = [name for name in MODALITIES if name != scene.modality]
  if topic == "modality":
    return [scene.modality, *rng.choice(others, 3, replace=False)]
  if topic == "organ":
    return [*ORGANS[scene.modality], *ORGANS[str(rng.choice(others))]]
  return list(TOPICS[topic].classes)


def ask(topic: str, scene: Scene, rng: np.random.Generator, place: int | None = None) -> Question:
  """Asks a question whose right option stands at `place` (a random one if None), the others shuffled around it."""
  answer = TOPICS[topic].truth(scene)
  others = [str(option) for option in option_set(topic, scene, rng) if option != answer]
  rng.shuffle(others)
  place = int(rng.integers(len(others) + 1)) if place is None else place
  others.insert(place, answer)
  return Question(topic, TOPICS[topic].wordings[rng.integers(2)], tuple(others), answer)


def option_count(topic: str) -> int:
  """Returns the number of options of a topic's questions."""
  return len(TOPICS[topic].classes) or 4


def shuffled_topics(total: int, rng: np.random.Generator) -> list[str]:
  """Returns `total` topics in the shares of `TOPICS` (largest remainders), shuffled."""
  exact = {name: topic.share * total for name, topic in TOPICS.items()}
  counts = {name: int(value + 1e-9) for name, value in exact.items()}
  by_remainder = sorted(TOPICS, key=lambda name: counts[name] - exact[name])
  for name in by_remainder[: total - sum(counts.values())]:
    counts[name] += 1
  topics = [name for name, count in counts.items() for _ in range(count)]
  rng.shuffle(topics)
  return topics


def balanced_places(topics: list[str], rng: np.random.Generator) -> list[int]:
  """Returns the place of each right option, balanced to within one among questions of equally many options."""
  places = [0] * len(topics)
  for size in sorted({option_count(topic) for topic in topics}):
    members = [i for i, topic in enumerate(topics) if option_count(topic) == size]
    deck = np.arange(len(members)) % size
    rng.shuffle(deck)
    for i, place in zip(members, deck, strict=True):
      places[i] = int(place)
  return places
