"""One pool of questions, dealt to training, validation and test by a published rule.

The rule with its defaults, 600 training, 40 validation and 300 test questions and seed 0, is this project's published
split of OmniMedVQA, `mri600`: the questions are sorted by data set and question id, grouped by image, and the groups
of a modality ordered by the SHA-256 of seed and id, so that no image stands in two parts, and membership depends on the
ids, the seed and which images are the same, alone. The split of the paper cannot be made again: its order came from a
directory listing.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from absl import logging

from kepo_jax.data import id_files, images
from kepo_jax.data.batching import shuffled
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
  def ids(self) -> dict[str, list[str]]:
    """Split name -> ids, sorted."""
    return {name: sorted(example.id for example in part) for name, part in self.as_dict().items()}

  @property
  def digest(self) -> str:
    """SHA-256 over the ids of all three parts: equal digests, the same membership."""
    return id_files.ids_digest(self.ids)


def limited(
  examples: Sequence[Example], per_modality: int | None, seed: int, *, lenient: bool = False
) -> list[Example]:
  """At most a number of questions of each modality, chosen by the seed, sorted by (data set, id).

  Args:
    examples: the questions.
    per_modality: how many; None: all.
    seed: another seed, another choice.
    lenient: pass over questions with an image that cannot be read, so that others take their place; only as many
      images are decoded as that needs, and none if all questions are wanted.
  """
  if per_modality is None:
    return in_order(examples)
  chosen: list[Example] = []
  for group in _by_modality(examples).values():
    order, found = iter(shuffled(group, seed)), list[Example]()
    while batch := list(itertools.islice(order, per_modality - len(found))):
      found += _readable(batch) if lenient else batch
    chosen += found
  return in_order(chosen)


def split_by_modality(
  examples: Sequence[Example],
  *,
  train_modality: str = "MRI",
  train: int = 600,
  validation_per_modality: int = 40,
  test_per_modality: int = 300,
  seed: int = 0,
  lenient: bool = False,
) -> Split:
  """Cuts one pool of questions; no image is shared between two parts.

  Questions that share an image form a group. A group belongs to one modality, of several to the first by name, and its
  questions of the others are left out. Within each modality groups are ordered by a hash of the seed and their first
  id, and dealt to test, then validation, then (training modality only) train, until each has its number; what a group
  holds beyond that number is left out. Other modalities give what they have.

  Images are the same if their paths or their bytes are. Bytes are compared among the images of the questions that were
  dealt, not of the whole pool, since the files of OmniMedVQA have 30 to 70 thousand bytes and most have the size of
  another: where two are the same, their groups are joined and dealing begins again, until there are none. The same
  holds for images that cannot be read, if `lenient`: their questions are taken away.

  Args:
    examples: all questions.
    train_modality: canonical name of the modality to train on.
    train: training questions.
    validation_per_modality: questions of each modality for evaluation during training.
    test_per_modality: questions of each modality for the final figures.
    seed: another seed, another membership.
    lenient: let other questions take the place of those whose images cannot be decoded.

  Raises:
    ValueError: the training modality has too few questions.
  """
  wanted = {"test": test_per_modality, "validation": validation_per_modality, "train": train}
  pool, seen, same = list(examples), set[str](), dict[str, str]()
  while True:
    split = _dealt(pool, train_modality, wanted, seed, same)
    chosen = {image for part in split.as_dict().values() for example in part for image in example.images}
    unreadable = _unreadable(chosen - seen) if lenient else set()
    seen |= chosen
    repeated = images.repeats(seen)
    if not unreadable and repeated == same:
      break
    same = dict(repeated)
    pool = [example for example in pool if not unreadable.intersection(example.images)]
  for name in ("test", "validation"):
    dealt = collections.Counter(example.modality for example in split.as_dict()[name])
    for modality in sorted({example.modality for example in examples}):
      if dealt[modality] < wanted[name]:
        logging.warning("%s: %d %s questions instead of %d", modality, dealt[modality], name, wanted[name])
  if same:
    logging.warning(
      "%d images have the content of others that were dealt; each counts as one image with those", len(same)
    )
  if left_out := len(examples) - len(pool):
    logging.warning("%d questions with unreadable images were replaced by others", left_out)
  return split


def _dealt(
  examples: Sequence[Example], train_modality: str, wanted: dict[str, int], seed: int, same: Mapping[str, str]
) -> Split:
  """One dealing of `split_by_modality`; `same` gives for an image another name of it."""
  parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
  pools = _by_modality(examples)
  if train_modality not in pools:
    raise ValueError(
      f"no question of modality {train_modality!r}; the data have {sorted(pools)}: set data.train_modality to one of "
      "them, or name the modality of each record (docs/data.md)."
    )
  groups = collections.defaultdict(list)
  for group in _image_groups(examples, same):
    # Its image must not stand on two sides, and what counts for a modality must be of it.
    modality = min(example.modality for example in group)
    groups[modality].append([example for example in group if example.modality == modality])
  for modality in sorted(pools):
    training = modality == train_modality
    found = _deal(groups[modality], wanted if training else wanted | {"train": 0}, seed)
    for name, dealt in found.items():
      parts[name] += dealt
      if len(dealt) < wanted[name] and training:
        lost = len(pools[modality]) - sum(map(len, groups[modality]))
        shared = f" ({lost} are about images that a modality before it has)" if lost else ""
        raise ValueError(
          f"{modality} has {len(pools[modality])} questions, too few for {wanted}{shared}: {name} would get "
          f"{len(dealt)}; lower data.train_items, data.validation_items or data.test_items."
        )
  return Split(**{name: in_order(part) for name, part in parts.items()})


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


def _unreadable(paths: Iterable[str]) -> set[str]:
  """Images that cannot be decoded; the first is named in the log."""
  found: set[str] = set()
  for path in sorted(paths):
    try:
      images.load_image(path)
    except ValueError as error:
      logging.log(logging.INFO if found else logging.WARNING, "left out: %s", error)
      found.add(path)
  return found


def _readable(examples: Sequence[Example]) -> list[Example]:
  bad = _unreadable({image for example in examples for image in example.images})
  return [example for example in examples if not bad.intersection(example.images)]


def _image_groups(examples: Sequence[Example], same: Mapping[str, str]) -> list[list[Example]]:
  """Questions connected by a common image, each group and the list sorted by (data set, id)."""
  parent: dict[str, str] = {}

  def leader(name: str) -> str:
    while parent.setdefault(name, name) != name:
      parent[name] = parent[parent[name]]
      name = parent[name]
    return name

  for example in examples:
    for image in example.images:
      parent[leader(f"image {same.get(image, image)}")] = leader(f"question {example.id}")
  groups = collections.defaultdict(list)
  for example in in_order(examples):
    groups[leader(f"question {example.id}")].append(example)
  return list(groups.values())


def in_order(examples: Iterable[Example]) -> list[Example]:
  return sorted(examples, key=lambda example: (example.dataset, example.id))


def _by_modality(examples: Iterable[Example]) -> dict[str, list[Example]]:
  pools = collections.defaultdict(list)
  for example in examples:
    pools[example.modality].append(example)
  return dict(pools)
