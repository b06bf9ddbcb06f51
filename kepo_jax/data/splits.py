"""Train, validation and test questions: three folders on disk, or one folder cut by a published rule."""

import collections
import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging

from kepo_jax.data import omnimedvqa
from kepo_jax.data.phantom import build
from kepo_jax.data.pipeline import shuffled
from kepo_jax.types import Example

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
  """Questions by purpose, each sorted by (data set, id)."""

  train: list[Example]
  validation: list[Example]
  test: list[Example]

  def as_dict(self) -> dict[str, list[Example]]:
    """Split name -> questions."""
    return {name: getattr(self, name) for name in SPLITS}

  @property
  def digest(self) -> str:
    """SHA-256 over the ids of all three parts: equal digests, equal splits."""
    lines = (f"{name}\t{example.id}\n" for name in SPLITS for example in getattr(self, name))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def cache_directory() -> pathlib.Path:
  """The project's folder for what can be made again: $XDG_CACHE_HOME/kepo_jax or ~/.cache/kepo_jax."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kepo_jax"


def phantom_roots() -> dict[str, pathlib.Path]:
  """Root of each split of the phantom benchmark, drawn into the cache folder on first use."""
  cache = cache_directory()
  target = cache / f"phantom-{build.VERSION}-{build.PIXELS_SHA256[:8]}"
  if not target.is_dir():
    cache.mkdir(parents=True, exist_ok=True)
    logging.info("drawing the phantom benchmark into %s", target)
    # Drawn beside its place and moved: another process never reads half of it.
    drawn = pathlib.Path(tempfile.mkdtemp(dir=cache, prefix="drawing-"))
    build.write(drawn)
    try:
      drawn.rename(target)
    except OSError:
      shutil.rmtree(drawn)  # another process was faster
  return build.write(target)


def split_roots(directory: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Roots of the splits that lie as folders train, validation and test in a directory; empty for a single root."""
  top = pathlib.Path(directory)
  return {name: top / name for name in SPLITS if (top / name / "QA_information").is_dir()}


def load(data: Any) -> dict[str, list[Example]]:
  """The questions of a run.

  Args:
    data: record with `directory` ("" for the phantom benchmark), `train_modality`, `train_items`,
      `validation_items` and `test_items` (both per modality), and `split_seed`.

  Returns:
    "train", "validation" and "test" -> questions; folders that are already split are read as they are, and
    cut down to the numbers asked for.

  Raises:
    ValueError: the data cannot be read, or hold too few questions; names the folder or the field.
  """
  roots = split_roots(data.directory) if data.directory else phantom_roots()
  if not roots:
    examples = _read(data.directory)
    split = split_by_modality(
      examples,
      train_modality=data.train_modality,
      train=data.train_items,
      validation_per_modality=data.validation_items,
      test_per_modality=data.test_items,
      seed=data.split_seed,
    )
    return split.as_dict()
  if missing := [name for name in SPLITS if name not in roots]:
    raise ValueError(f"{data.directory}: has {sorted(roots)} but not {missing}; add them, or point at one single root")
  limits = {"train": data.train_items, "validation": data.validation_items, "test": data.test_items}
  questions = {}
  for name, root in roots.items():
    examples = _read(root)
    if name == "train":
      examples = [example for example in examples if example.modality == data.train_modality]
    questions[name] = limited(examples, limits[name], data.split_seed)
  return questions


def _read(root: str | os.PathLike) -> list[Example]:
  examples, summary = omnimedvqa.read(root)
  logging.log(logging.WARNING if summary.dropped else logging.INFO, "%s", summary.text())
  return examples


def limited(examples: Sequence[Example], per_modality: int, seed: int) -> list[Example]:
  """At most a number of questions of each modality, chosen by the seed, sorted by (data set, id)."""
  groups = _by_modality(examples).values()
  return _sorted(example for group in groups for example in shuffled(group, seed)[:per_modality])


def split_by_modality(
  examples: Sequence[Example],
  *,
  train_modality: str = "MRI",
  train: int = 600,
  validation_per_modality: int = 40,
  test_per_modality: int = 300,
  seed: int = 0,
) -> Split:
  """Cuts one pool of questions; no image is shared between two parts.

  Questions that share an image form a group. Within each modality groups are ordered by a hash of the seed and
  their first id, and dealt to test, then validation, then (training modality only) train, until each has its number;
  what a group holds beyond that number is left out. Other modalities give what they have.

  Args:
    examples: all questions.
    train_modality: canonical name of the modality to train on.
    train: training questions.
    validation_per_modality: questions of each modality for evaluation during training.
    test_per_modality: questions of each modality for the final figures.
    seed: another seed, another membership.

  Raises:
    ValueError: the training modality has too few questions.
  """
  parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
  pools = _by_modality(examples)
  if train_modality not in pools:
    raise ValueError(f"no question of modality {train_modality!r}; the data have {sorted(pools)}")
  groups = collections.defaultdict(list)
  for group in _image_groups(examples):
    # A group with two modalities belongs to the first: its image must not stand on two sides.
    groups[min(example.modality for example in group)].append(group)
  for modality in sorted(groups):
    training = modality == train_modality
    wanted = {"test": test_per_modality, "validation": validation_per_modality, "train": train if training else 0}
    found = _deal(groups[modality], wanted, seed)
    for name, dealt in found.items():
      parts[name] += dealt
      if len(dealt) < wanted[name] and training:
        raise ValueError(
          f"{modality} has {len(pools[modality])} questions, too few for {wanted}: {name} would get {len(dealt)}; "
          "lower data.train_items, data.validation_items or data.test_items."
        )
      if len(dealt) < wanted[name]:
        logging.warning("%s: %d %s questions instead of %d", modality, len(dealt), name, wanted[name])
  return Split(**{name: _sorted(part) for name, part in parts.items()})


def _deal(groups: list[list[Example]], wanted: dict[str, int], seed: int) -> dict[str, list[Example]]:
  heads = {group[0].id: group for group in groups}
  order = [heads[example.id] for example in shuffled([group[0] for group in groups], seed)]
  dealt: dict[str, list[Example]] = {name: [] for name in wanted}
  for group in order:
    name = next((name for name in wanted if len(dealt[name]) < wanted[name]), None)
    if name is None:
      break
    dealt[name] += group[: wanted[name] - len(dealt[name])]
  return dealt


def _image_groups(examples: Sequence[Example]) -> list[list[Example]]:
  """Questions connected by a common image, each group and the list sorted by (data set, id)."""
  parent: dict[str, str] = {}

  def leader(name: str) -> str:
    while parent.setdefault(name, name) != name:
      parent[name] = parent[parent[name]]
      name = parent[name]
    return name

  for example in examples:
    for image in example.images:
      parent[leader(f"image {image}")] = leader(f"question {example.id}")
  groups = collections.defaultdict(list)
  for example in _sorted(examples):
    groups[leader(f"question {example.id}")].append(example)
  return list(groups.values())


def _sorted(examples: Iterable[Example]) -> list[Example]:
  return sorted(examples, key=lambda example: (example.dataset, example.id))


def _by_modality(examples: Iterable[Example]) -> dict[str, list[Example]]:
  pools = collections.defaultdict(list)
  for example in examples:
    pools[example.modality].append(example)
  return dict(pools)
