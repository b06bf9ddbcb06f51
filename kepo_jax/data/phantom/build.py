"""Writes PhantomVQA to disk in OmniMedVQA's layout, so that the reader of the real data reads it.

`write(DIR)` makes one root per split, DIR/train, DIR/validation and DIR/test, each with `Images/<dataset>/*.png` and
`QA_information/Open-access/<dataset>.json`. The items are frozen: `ITEMS_SHA256` is the hash of every record and every
drawn parameter, `PIXELS_SHA256` that of every picture. A change of either is a new `VERSION`.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np
from absl import logging
from PIL import Image

from kepo_jax.data.phantom import drawing, questions, scenes
from kepo_jax.data.phantom.questions import Question
from kepo_jax.data.phantom.scenes import Scene

VERSION = "1"
SEED = 20260131
ITEMS_SHA256 = "27321cf7bce1d3a31b9ba6695c93a3e62ee4ce1a58aaa058fab6cc9933e9e6a8"
PIXELS_SHA256 = "22cb01c9f309a98e74219bac41ab9b703c511bc0deb9da2dd6ce8b368c10dafc"
SPLITS: Mapping[str, Mapping[str, int]] = {  # items of each split and modality
  "train": {"MRI": 600},
  "validation": dict.fromkeys(scenes.MODALITIES, 40),
  "test": dict.fromkeys(scenes.MODALITIES, 300),
}
SPELLINGS = {  # `modality_type` as OmniMedVQA spells it
  "MRI": "MR (Mag-netic Resonance Imaging)",
  "CT": "CT(Computed Tomography)",
  "X-ray": "X-Ray",
  "ultrasound": "ultrasound",
  "dermoscopy": "Dermoscopy",
  "fundus": "Fundus Photography",
  "OCT": "OCT (Optical Coherence Tomography",
  "microscopy": "Microscopy Images",
}


@dataclasses.dataclass(frozen=True)
class Item:
  """One benchmark item before it is written."""

  dataset: str
  number: int
  scene: Scene
  question: Question

  @property
  def question_id(self) -> str:
    """Names the item in a stable way, for example "Phantom-MRI-train_0007"."""
    return f"{self.dataset}_{self.number:04d}"

  def record(self) -> dict[str, str]:
    """Returns the item as one flat record of an OmniMedVQA file."""
    options = {f"option_{chr(ord('A') + i)}": text for i, text in enumerate(self.question.options)}
    return {
      "dataset": self.dataset,
      "question_id": self.question_id,
      "question_type": questions.TOPICS[self.question.topic].question_type,
      "question": self.question.stem,
      "gt_answer": self.question.answer,
      "image_path": f"Images/{self.dataset}/{self.question_id}.png",
      **options,
      "modality_type": SPELLINGS[self.scene.modality],
    }


def make_items(split: str, *, seed: int = SEED) -> list[Item]:
  """Makes the items of one split; each split and modality has a random stream of its own."""
  made = []
  for modality, total in SPLITS[split].items():
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), zlib.crc32(modality.encode())))
    topics = questions.shuffled_topics(total, rng)
    places = questions.balanced_places(topics, rng)
    for number, (topic, place) in enumerate(zip(topics, places, strict=True)):
      scene = questions.scene_for(topic, modality, rng)
      question = questions.ask(topic, scene, rng, place)
      made.append(Item(f"Phantom-{modality}-{split}", number, scene, question))
  return made


def items_digest(splits: Mapping[str, list[Item]]) -> str:
  """Computes the SHA-256 over every record and every drawn parameter."""
  digest = hashlib.sha256()
  for split in sorted(splits):
    for item in splits[split]:
      digest.update(json.dumps([item.record(), item.scene.digest()], sort_keys=True).encode())
  return digest.hexdigest()


def write_split(directory: pathlib.Path, items: list[Item]) -> bytes:
  """Writes pictures and records of one split; returns the SHA-256 of its pixels."""
  digest = hashlib.sha256()
  records = collections.defaultdict(list)
  for item in items:
    picture = drawing.draw(item.scene)
    digest.update(picture.tobytes())
    path = directory / item.record()["image_path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    records[item.dataset].append(item.record())
  listing = directory / "QA_information" / "Open-access"
  listing.mkdir(parents=True, exist_ok=True)
  for dataset, rows in records.items():
    (listing / f"{dataset}.json").write_text(json.dumps(rows, indent=1) + "\n")
  return digest.digest()


def write(directory: str | pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes the frozen benchmark unless it is there already; returns the root of each split.

  Raises:
    ValueError: when this code no longer makes the items that `VERSION` stands for.
  """
  directory = pathlib.Path(directory)
  roots = {split: directory / split for split in SPLITS}
  stamp = directory / "phantom.json"
  content = {"version": VERSION, "seed": SEED, "items_sha256": ITEMS_SHA256, "pixels_sha256": PIXELS_SHA256}
  if stamp.exists() and json.loads(stamp.read_text()) == content:
    return roots
  splits = {split: make_items(split) for split in SPLITS}
  digest = items_digest(splits)
  if digest != ITEMS_SHA256:
    raise ValueError(
      f"PhantomVQA {VERSION} should hash to {ITEMS_SHA256} but its items hash to {digest}: scenes or questions "
      "changed; undo the change, or bump VERSION and the hashes in kepo_jax/data/phantom/build.py."
    )
  pixels = hashlib.sha256(b"".join(write_split(roots[split], splits[split]) for split in sorted(splits))).hexdigest()
  if pixels != PIXELS_SHA256:
    # The items are right; another maths library rounded a few pixels differently. Figures may move by a hair.
    logging.warning("PhantomVQA %s: pixels hash to %s instead of %s on this machine.", VERSION, pixels, PIXELS_SHA256)
  stamp.write_text(json.dumps(content, indent=2) + "\n")
  return roots
