"""The questions of a run: three folders on disk, a published split, or one pool that is split by our rule.

The rule with its defaults, 600 training, 40 validation and 300 test questions and seed 0, is this project's published
split of OmniMedVQA, `mri600`: the questions are sorted by data set and question id, grouped by image, and the groups
of a modality ordered by the SHA-256 of seed and id. So no image stands in two parts, and membership depends only on the
ids, the seed and which images are the same. The split of the paper cannot be made again: its order came from a
directory listing.
"""

import collections
import itertools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from scipy.cluster import hierarchy

from kepo_jax import storage
from kepo_jax.data import images
from kepo_jax.data.batching import shuffled
from kepo_jax.data.cleaning import Summary
from kepo_jax.data.phantom import build
from kepo_jax.data.readers import formats, hf_folders, json_files, omnimedvqa
from kepo_jax.data.readers.split_files import PARTS
from kepo_jax.data.tfds import folders
from kepo_jax.types import Example

SPLITS = ("train", "validation", "test")
_NEEDED = {"train", "test"}


def load(
  data: Any,
  *,
  report: Callable[[Summary], None] = lambda summary: None,
  progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Example]]:
  """Reads the questions of a run and logs what was repaired, as a warning where anything was.

  Args:
    data: a `config.DataConfig`; `directory` may have any format of `formats.read_any`.
    report: called with what each reading kept, repaired and dropped.
    progress: receives (bytes copied, bytes in all) of remote folders, which are read from a copy in the cache.

  Returns:
    "train", "validation" and "test" -> questions. Folders that are already split, published splits, and data sets that
    TFDS has built are read as they are and limited to the numbers of the config, where 0 training or test items are
    all. Logs a warning where images of validation or test questions are training images too, by path or content.

  Raises:
    ValueError: the data cannot be read, or hold too few questions; names the folder or the field.
    OSError: a remote folder cannot be read.
  """
  check_named(data)
  directory = os.fspath(storage.staged(data.directory, progress=progress)) if data.directory else ""
  if data.split_files:
    return _published_split(data, storage.staged(data.split_files, progress=progress), directory, report)
  if directory and (built := folders.find(directory)):
    from kepo_jax.data.tfds import reading  # slow to import, and imports this module

    parts = reading.read_splits(built)
    count = sum(map(len, parts.values()))
    report(Summary(root=storage.origin(built), format="TFDS", records=count, kept=count))  # repaired when it was built
    return _compared(data.directory, _limited_parts(parts, data))
  roots = split_roots(directory) if directory else phantom_roots()
  if not roots:
    refuse_published(directory)
    return split_by_modality(_read(directory, report, lenient=data.lenient), data)
  if missing := [name for name in SPLITS if name not in roots]:
    raise ValueError(f"{data.directory}: has {sorted(roots)} but not {missing}; add them, or point at one single root")
  expected = () if data.directory else ("modality_spelling",)  # the phantom is written in OmniMedVQA's spellings
  parts = {name: _read(root, report, lenient=data.lenient, expected=expected) for name, root in roots.items()}
  used = _limited_parts(parts, data)
  return _compared(data.directory, used) if data.directory else used  # no picture of the phantom is drawn twice


def check_named(data: Any) -> None:
  """Refuses a config for real data that names none.

  Raises:
    ValueError: `directory` is None.
  """
  if data.directory is None and not data.split_files:
    raise ValueError(
      "data.directory is not given, and this setting is for real data: pass --config.data.directory=DIR "
      "(docs/data.md), or take experiments/configs/kepo.py, which runs on the embedded benchmark."
    )


def phantom_roots() -> dict[str, pathlib.Path]:
  """Returns the root of each split of the phantom benchmark, which is drawn into the cache folder on first use."""
  cache = storage.cache_directory()
  target = cache / f"phantom-{build.VERSION}-{build.PIXELS_SHA256[:8]}"
  if not target.is_dir():
    cache.mkdir(parents=True, exist_ok=True)
    logging.info("drawing the phantom benchmark into %s", target)
    # Drawn into a temporary folder and renamed: another process never reads half of it.
    drawn = pathlib.Path(tempfile.mkdtemp(dir=cache, prefix="drawing-"))
    build.write(drawn)
    try:
      drawn.rename(target)
    except OSError:
      shutil.rmtree(drawn)  # another process was faster
  return build.write(target)


def split_roots(directory: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Returns the roots of the folders train, validation and test in a directory; empty for a single root."""
  top = pathlib.Path(directory)
  return {name: top / name for name in SPLITS if (top / name / "QA_information").is_dir()}


def published_parts(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Finds the parts of a published split, each as `formats.read_any` takes it.

  Parts are folders called train, test and validation (or training, val, valid, dev), as Med-R1 has them and Hugging
  Face's library saves them; else parquet files whose names begin with these words; else JSON files with these names.
  They lie in the folder itself or in the only folder below it that has them.

  Returns:
    "train", "test" and, if there is one, "validation" -> folder, file, or pattern of `hf_folders.part_files`.

  Raises:
    ValueError: there is no train or no test part, one that could be either of two, or several such folders.
  """
  top = pathlib.Path(folder)
  parts = _parts_in(top) if top.is_dir() else {}
  if not parts.keys() >= _NEEDED and top.is_dir():
    inside = {below: _parts_in(below) for below in sorted(top.iterdir()) if below.is_dir()}
    complete = {below: inner for below, inner in inside.items() if inner.keys() >= _NEEDED}
    if len(complete) > 1:
      raise ValueError(f"{top} holds several published splits ({', '.join(map(str, complete))}); name one of them")
    parts = next(iter(complete.values()), parts)
  if missing := _NEEDED - parts.keys():
    raise ValueError(
      f"{folder}: has no {' and no '.join(sorted(missing))} part; split_files is a folder with train/ and test/, such "
      "as Splits/modality of Med-R1, a data set that Hugging Face's library saved to disk, or one with train-*.parquet "
      "and test-*.parquet"
    )
  return {name: parts[name] for name in SPLITS if name in parts}


def _parts_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Finds parts in a folder: subfolders, else parquet files, else JSON files, if both train and test are there."""
  layouts: list[dict[str, set[pathlib.Path]]] = [collections.defaultdict(set) for _ in range(3)]
  subfolders, tables, lists = layouts
  for path in folder.iterdir():
    word = hf_folders.part_of(path)
    if path.is_dir() and path.name.lower() in PARTS:
      subfolders[PARTS[path.name.lower()]].add(path)
    elif json_files.has_ending(path, (".parquet",)) and word in PARTS:
      tables[PARTS[word]].add(folder / f"{word}-*.parquet")
    elif json_files.has_ending(path, json_files.ENDINGS) and path.stem.lower() in PARTS:
      lists[PARTS[path.stem.lower()]].add(path)
  complete = [parts for parts in layouts if parts.keys() >= _NEEDED]
  chosen = (complete or [parts for parts in layouts if parts] or [{}])[0]
  for name, places in chosen.items():
    if len(places) > 1:
      raise ValueError(f"{folder}: any of {', '.join(sorted(map(str, places)))} could be the {name} part; keep one")
  return {name: places.pop() for name, places in chosen.items()}


def refuse_published(directory: str | os.PathLike) -> None:
  """Refuses a published split where a pool of questions is wanted, since its parts would be mixed.

  Raises:
    ValueError: files, or the folders that they lie in, are called both train and test, or Hugging Face's list of splits
      is there.
  """
  top = pathlib.Path(directory)
  if not top.is_dir() or omnimedvqa.roots(top):  # the layout has no parts, although its data sets may be called so
    return
  files = json_files.below(top, (*json_files.ENDINGS, ".parquet", ".arrow"))
  parts = {_part_of(file.relative_to(top)) for file in files}
  if parts >= _NEEDED or any(file.name == "dataset_dict.json" for file in files):
    raise ValueError(
      f"{top} holds a published split, whose training and test questions would be mixed; name it as split_files, with "
      "train/ and test/ as folders, or name one of its parts."
    )


def _part_of(file: pathlib.Path) -> str:
  """Returns the part that the first or last word of a file's name, or of the nearest folder, tells; "" for none."""
  for name in (file.stem, *(folder.name for folder in file.parents)):
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    for word in words[:1] + words[-1:]:
      if word in PARTS:
        return PARTS[word]
  return ""


def _limited_parts(parts: Mapping[str, Sequence[Example]], data: Any) -> dict[str, list[Example]]:
  # 0 training or test items: all of a given split, but none of a pool that we split.
  limits = {"train": data.train_items or None, "validation": data.validation_items, "test": data.test_items or None}
  questions = {}
  for name, examples in parts.items():
    usable = [example for example in examples if name != "train" or example.modality == data.train_modality]
    questions[name] = limited(usable, limits[name], data.split_seed, lenient=data.lenient)
    logging.info("%s: %d of %d questions used", name, len(questions[name]), len(examples))
  return questions


def _published_split(
  data: Any, files: pathlib.Path, images_root: str, report: Callable[[Summary], None]
) -> dict[str, list[Example]]:
  """Reads a published split as it is; without a validation part, questions come from the rest of its training part.

  Its authors decide whether training and test questions share images; the number is logged.
  """
  parts = {
    name: _read(path, report, lenient=data.lenient, image_root=images_root or None)
    for name, path in published_parts(files).items()
  }
  used = _limited_parts(parts, data)
  if "validation" not in parts:
    taken = {image for part in used.values() for example in part for image in example.images}
    rest = [example for example in parts["train"] if not taken.intersection(example.images)]
    used["validation"] = limited(rest, data.validation_items, data.split_seed, lenient=data.lenient)
  # All that was published is compared by path alone: every image would have to be read.
  for state, questions, how in (("as published", parts, "path"), ("as used", used, "path or content")):
    shared, share = overlap(questions["train"], questions["test"], contents=questions is used)
    numbers = (len(questions["train"]), len(parts["train"]), len(questions["test"]), len(parts["test"]))
    logging.warning(
      "%s %s: %d test images (%.1f %%) are training images too, by %s; %d of %d training and %d of %d test questions",
      *(data.split_files, state, shared, 100 * share, how, *numbers),
    )
  return _compared(data.split_files, used, names=("validation",))


def _compared(
  where: str, parts: dict[str, list[Example]], names: Sequence[str] = ("validation", "test")
) -> dict[str, list[Example]]:
  """Returns the parts; logs a warning for each that shares images with the training questions."""
  for name in names:
    shared, share = overlap(parts["train"], parts[name], contents=True)
    if shared:
      logging.warning(
        "%s: %d %s images (%.1f %%) are training images too, by path or content; they tell less about images "
        "that the model has not seen",
        *(where, shared, name, 100 * share),
      )
  return parts


def _read(
  root: str | os.PathLike,
  report: Callable[[Summary], None],
  *,
  lenient: bool,
  image_root: str | None = None,
  expected: Collection[str] = (),  # rules that cause no warning
) -> list[Example]:
  examples, summary = formats.read_any(root, image_root=image_root, lenient=lenient)
  summary.root = storage.origin(summary.root)
  unexpected = summary.rules.keys() - set(expected)
  logging.log(logging.WARNING if unexpected else logging.INFO, "%s", summary.text())
  report(summary)
  return examples


def overlap(train: Iterable[Example], test: Iterable[Example], *, contents: bool = False) -> tuple[int, float]:
  """Counts the images of test questions that are images of training questions too; also returns their share.

  Args:
    train: training questions.
    test: test questions.
    contents: compare files by their bytes, too; those of equal size are read. By path alone, both parts must have been
      read with the same root.
  """
  train_images = {image for example in train for image in example.images}
  test_images = {image for example in test for image in example.images}
  same = images.repeats(train_images | test_images) if contents else {}
  known = {same.get(image, image) for image in train_images}
  shared = sum(same.get(image, image) in known for image in test_images)
  return shared, shared / len(test_images) if test_images else 0.0


def limited(
  examples: Sequence[Example], per_modality: int | None, seed: int, *, lenient: bool = False
) -> list[Example]:
  """Chooses at most a number of questions of each modality, sorted by (data set, id).

  Args:
    examples: the questions.
    per_modality: how many; None: all.
    seed: another seed, another choice.
    lenient: replace questions whose image cannot be read. Decodes only as many images as needed, and none if all
      questions are wanted.
  """
  if per_modality is None:
    return _sorted(examples)
  chosen: list[Example] = []
  for pool in _by_modality(examples).values():
    order, taken = iter(shuffled(pool, seed)), list[Example]()
    while batch := list(itertools.islice(order, per_modality - len(taken))):
      bad = _unreadable({image for example in batch for image in example.images}) if lenient else set()
      taken += [example for example in batch if not bad.intersection(example.images)]
    chosen += taken
  return _sorted(chosen)


def split_by_modality(examples: Sequence[Example], data: Any) -> dict[str, list[Example]]:
  """Splits one pool of questions so that no image is shared between two parts.

  Questions that share an image form a group. A group gets one modality, the first by name. Its questions of other
  modalities are left out. Within each modality groups are ordered by a hash of the seed and their first
  id, and fill test, then validation, then (training modality only) train, until each has its number; what a group
  holds beyond that number is left out. Other modalities give what they have.

  Images are the same if their paths or their bytes are. Only images of chosen questions are compared by bytes: most
  OmniMedVQA files (30 to 70 kB) share their size with another. If two are the same, their groups are joined and the
  split is repeated, until no two are. If `lenient`, it also repeats without the questions whose images cannot be read.

  Args:
    examples: all questions.
    data: has the fields `train_modality`, `train_items`, `validation_items` and `test_items` (both per modality),
      `split_seed` and `lenient` of `config.DataConfig`.

  Returns:
    each of SPLITS -> questions, sorted by (data set, id).

  Raises:
    ValueError: the training modality has too few questions.
  """
  sizes = {"test": data.test_items, "validation": data.validation_items, "train": data.train_items}
  pool, seen, same = list(examples), set[str](), dict[str, str]()
  while True:
    parts = _split_once(pool, data.train_modality, sizes, data.split_seed, same)
    chosen = {image for part in parts.values() for example in part for image in example.images}
    unreadable = _unreadable(chosen - seen) if data.lenient else set()
    seen |= chosen
    repeated = images.repeats(seen)
    if not unreadable and repeated == same:
      break
    same = dict(repeated)
    pool = [example for example in pool if not unreadable.intersection(example.images)]
  for name in ("test", "validation"):
    counts = collections.Counter(example.modality for example in parts[name])
    for modality in sorted({example.modality for example in examples}):
      if counts[modality] < sizes[name]:
        logging.warning("%s: %d %s questions instead of %d", modality, counts[modality], name, sizes[name])
  if same:
    logging.warning(
      "%d images have the content of others that were chosen; each counts as one image with those", len(same)
    )
  if left_out := len(examples) - len(pool):
    logging.warning("%d questions with unreadable images were replaced by others", left_out)
  return parts


def _split_once(
  examples: Sequence[Example], train_modality: str, sizes: dict[str, int], seed: int, same: Mapping[str, str]
) -> dict[str, list[Example]]:
  """Runs one round of `split_by_modality`; `same` maps an image to another name of it."""
  pools = _by_modality(examples)
  if train_modality not in pools:
    raise ValueError(
      f"no question of modality {train_modality!r}; the data have {sorted(pools)}: set data.train_modality to one of "
      "them, or name the modality of each record (docs/data.md)."
    )
  groups = collections.defaultdict(list)
  for group in _image_groups(examples, same):
    # A group has one modality: its image must not stand in two parts, and each modality's numbers count its own.
    modality = min(example.modality for example in group)
    groups[modality].append([example for example in group if example.modality == modality])
  parts: dict[str, list[Example]] = {name: [] for name in SPLITS}
  for modality in sorted(pools):
    training = modality == train_modality
    for name, chosen in _filled(groups[modality], sizes if training else sizes | {"train": 0}, seed).items():
      parts[name] += chosen
      if len(chosen) < sizes[name] and training:
        lost = len(pools[modality]) - sum(map(len, groups[modality]))
        shared = f" ({lost} are about images that a modality before it has)" if lost else ""
        raise ValueError(
          f"{modality} has {len(pools[modality])} questions, too few for {sizes}{shared}: {name} would get "
          f"{len(chosen)}; lower data.train_items, data.validation_items or data.test_items."
        )
  return {name: _sorted(part) for name, part in parts.items()}


def _filled(groups: list[list[Example]], sizes: dict[str, int], seed: int) -> dict[str, list[Example]]:
  """Fills parts of given sizes, one after the other, with groups in the order of a hash of their first id."""
  by_head = {group[0].id: group for group in groups}
  parts: dict[str, list[Example]] = {name: [] for name in sizes}
  for head in shuffled([group[0] for group in groups], seed):
    name = next((name for name in sizes if len(parts[name]) < sizes[name]), None)
    if name is None:
      break
    parts[name] += by_head[head.id][: sizes[name] - len(parts[name])]
  return parts


def _unreadable(paths: Iterable[str]) -> set[str]:
  """Returns the images that cannot be decoded; the first is logged as a warning."""
  bad: set[str] = set()
  for path in sorted(paths):
    try:
      images.load_image(path)
    except ValueError as error:
      logging.log(logging.INFO if bad else logging.WARNING, "left out: %s", error)
      bad.add(path)
  return bad


def _image_groups(examples: Sequence[Example], same: Mapping[str, str]) -> list[list[Example]]:
  """Groups questions that are connected by common images; each group and the list sorted by (data set, id)."""
  sets = hierarchy.DisjointSet()
  for example in examples:
    sets.add(("question", example.id))
    for image in example.images:
      name = ("image", same.get(image, image))
      sets.add(name)
      sets.merge(name, ("question", example.id))
  groups = collections.defaultdict(list)
  for example in _sorted(examples):
    groups[sets["question", example.id]].append(example)
  return list(groups.values())


def _sorted(examples: Iterable[Example]) -> list[Example]:
  return sorted(examples, key=lambda example: (example.dataset, example.id))


def _by_modality(examples: Iterable[Example]) -> dict[str, list[Example]]:
  pools = collections.defaultdict(list)
  for example in examples:
    pools[example.modality].append(example)
  return dict(pools)
