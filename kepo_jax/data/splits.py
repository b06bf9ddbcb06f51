"""The questions of a run: three folders on disk, a published split, or a pool divided by our rule."""

import collections
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from kepo_jax import storage
from kepo_jax.data import id_files, images
from kepo_jax.data.cleaning import Summary
from kepo_jax.data.phantom import build
from kepo_jax.data.readers import formats, hf_folders, json_files, omnimedvqa
from kepo_jax.data.readers.split_files import PARTS
from kepo_jax.data.splitting import SPLITS, Split, in_order, limited, split_by_modality
from kepo_jax.data.tfds import folders
from kepo_jax.types import Example

_NEEDED = {"train", "test"}


def published_parts(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Where the parts of a published split lie, each as `formats.read_any` takes it.

  Parts are folders called train, test and validation (or training, val, valid, dev), as Med-R1 has them and Hugging
  Face's library saves them; else parquet files whose names begin with these words; else JSON files with these names.
  They lie in the folder itself or in the only folder below it that has them.

  Returns:
    "train", "test" and, if there is one, "validation" -> folder, file, or pattern of `hf_folders.part_files`.

  Raises:
    ValueError: there is no train or no test part, one that could be either of two, or several such folders.
  """
  top = pathlib.Path(folder)
  found = _parts_in(top) if top.is_dir() else {}
  if not found.keys() >= _NEEDED and top.is_dir():
    inside = {below: _parts_in(below) for below in sorted(top.iterdir()) if below.is_dir()}
    whole = {below: inner for below, inner in inside.items() if inner.keys() >= _NEEDED}
    if len(whole) > 1:
      raise ValueError(f"{top} holds several published splits ({', '.join(map(str, whole))}); name one of them")
    found = next(iter(whole.values()), found)
  if missing := _NEEDED - found.keys():
    raise ValueError(
      f"{folder}: has no {' and no '.join(sorted(missing))} part; split_files is a folder with train/ and test/, such "
      "as Splits/modality of Med-R1, a data set that Hugging Face's library saved to disk, or one with train-*.parquet "
      "and test-*.parquet"
    )
  return {name: found[name] for name in ("train", "validation", "test") if name in found}


def _parts_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Parts that lie in a folder: of those kinds that `parts` lists, the first that has both train and test."""
  kinds: list[dict[str, set[pathlib.Path]]] = [collections.defaultdict(set) for _ in range(3)]
  for path in folder.iterdir():
    word = hf_folders.part_of(path)
    if path.is_dir() and path.name.lower() in PARTS:
      kinds[0][PARTS[path.name.lower()]].add(path)
    elif json_files.has_ending(path, (".parquet",)) and word in PARTS:
      kinds[1][PARTS[word]].add(folder / f"{word}-*.parquet")
    elif json_files.has_ending(path, json_files.ENDINGS) and path.stem.lower() in PARTS:
      kinds[2][PARTS[path.stem.lower()]].add(path)
  chosen = next((kind for kind in kinds if kind.keys() >= _NEEDED), next(filter(None, kinds), {}))
  for name, places in chosen.items():
    if len(places) > 1:
      raise ValueError(f"{folder}: any of {', '.join(sorted(map(str, places)))} could be the {name} part; keep one")
  return {name: places.pop() for name, places in chosen.items()}


def refuse_published(directory: str | os.PathLike) -> None:
  """Refuses a folder that holds a published split where a pool of questions is wanted: its parts would be mixed.

  Raises:
    ValueError: the names of its files, or of the folders that these lie in, tell of both train and test, or there is
      Hugging Face's list of splits.
  """
  top = pathlib.Path(directory)
  if not top.is_dir() or omnimedvqa.roots(top):  # the layout has no parts, although its data sets may be called so
    return
  files = json_files.below(top, (*json_files.ENDINGS, ".parquet", ".arrow"))
  told = {_told(file.relative_to(top)) for file in files}
  if told >= _NEEDED or any(file.name == "dataset_dict.json" for file in files):
    raise ValueError(
      f"{top} holds a published split, whose training and test questions would be mixed; name it as split_files, with "
      "train/ and test/ as folders, or name one of its parts."
    )


def _told(file: pathlib.Path) -> str:
  """The part that a file belongs to by the first or last word of its name, or of the nearest folder; "" for none."""
  for name in (file.stem, *(folder.name for folder in file.parents)):
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    for word in words[:1] + words[-1:]:
      if word in PARTS:
        return PARTS[word]
  return ""


_PHANTOM_RULES = ("modality_spelling",)  # the phantom is written in OmniMedVQA's spellings
published_parts, refuse_published = published_parts, refuse_published


def phantom_roots() -> dict[str, pathlib.Path]:
  """Root of each split of the phantom benchmark, drawn into the cache folder on first use."""
  cache = storage.cache_directory()
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


def check_named(data: Any) -> None:
  """Refuses a setting for real data that names none.

  Raises:
    ValueError: `directory` is None.
  """
  if data.directory is None and not data.split_files:
    raise ValueError(
      "data.directory is not given, and this setting is for real data: pass --config.data.directory=DIR "
      "(docs/data.md), or take experiments/configs/kepo.py, which runs on the embedded benchmark."
    )


def load(
  data: Any,
  *,
  report: Callable[[Summary], None] = lambda summary: None,
  progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Example]]:
  """The questions of a run; which rules were applied in reading them is logged, as a warning where there were any.

  Args:
    data: record with `directory` ("" for the embedded phantom benchmark; else any format of `formats.read_any`),
      `split_files` ("", or the folder of a published split), `train_modality`, `train_items`, `validation_items` and
      `test_items` (both per modality), `split_seed`, and `lenient` (leave out and count what cannot be used, and let
      other questions take the place of those whose images cannot be decoded).
    report: called with what each reading kept, repaired and dropped.
    progress: receives (bytes copied, bytes in all) of remote folders, which are read from a copy in the cache.

  Returns:
    "train", "validation" and "test" -> questions; folders that are already split, published splits, and data sets that
    TFDS has built, are read as they are, and cut down to the numbers asked for, where 0 training or test items are all.
    Images of validation or test questions that are training images too, by path or content, are warned of.

  Raises:
    ValueError: the data cannot be read, or hold too few questions; names the folder or the field.
    OSError: a remote folder cannot be read.
  """
  check_named(data)
  directory = os.fspath(storage.staged(data.directory, progress=progress)) if data.directory else ""
  if data.split_files:
    return _given_split(data, storage.staged(data.split_files, progress=progress), directory, report)
  if directory and (built := folders.find(directory)):
    # Imported here: it is slow to import, and makes use of this module.
    from kepo_jax.data.tfds import reading

    parts = reading.read_splits(built)
    count = sum(map(len, parts.values()))
    report(
      Summary(root=storage.origin(built), format="TFDS", records=count, kept=count)
    )  # rules were applied in building it
    return _compared(data.directory, _cut_down(parts, data))
  roots = split_roots(directory) if directory else phantom_roots()
  if not roots:
    refuse_published(directory)
    examples = _read(directory, report, lenient=data.lenient)
    return cut_by_rule(examples, data).as_dict()
  if missing := [name for name in SPLITS if name not in roots]:
    raise ValueError(f"{data.directory}: has {sorted(roots)} but not {missing}; add them, or point at one single root")
  expected = () if data.directory else _PHANTOM_RULES
  parts = {name: _read(root, report, lenient=data.lenient, expected=expected) for name, root in roots.items()}
  used = _cut_down(parts, data)
  return _compared(data.directory, used) if data.directory else used  # no picture of the phantom is drawn twice


def cut_by_rule(examples: Sequence[Example], data: Any) -> Split:
  """`split_by_modality` with the fields of a record: `train_modality`, `train_items`, `lenient` and the like of `load`.

  Raises:
    ValueError: the training modality has too few questions.
  """
  return split_by_modality(
    examples,
    train_modality=data.train_modality,
    train=data.train_items,
    validation_per_modality=data.validation_items,
    test_per_modality=data.test_items,
    seed=data.split_seed,
    lenient=data.lenient,
  )


def _cut_down(parts: Mapping[str, Sequence[Example]], data: Any) -> dict[str, list[Example]]:
  # Of parts that others made, 0 asks for all that there are; of a pool that we cut, for none.
  limits = {
    "train": data.train_items or None, "validation": data.validation_items, "test": data.test_items or None
  }  # fmt: skip
  questions = {}
  for name, examples in parts.items():
    wanted = [example for example in examples if name != "train" or example.modality == data.train_modality]
    questions[name] = limited(wanted, limits[name], data.split_seed, lenient=data.lenient)
    logging.info("%s: %d of %d questions used", name, len(questions[name]), len(examples))
  return questions


def _given_split(
  data: Any, files: pathlib.Path, images_root: str, report: Callable[[Summary], None]
) -> dict[str, list[Example]]:
  """A published split, verbatim; validation questions come from what is left of its training part.

  Whether its training and test questions share images is up to its authors, and said.
  """
  parts = {
    name: _read(path, report, lenient=data.lenient, image_root=images_root or None)
    for name, path in published_parts(files).items()
  }
  split = _cut_down(parts, data)
  if "validation" not in parts:
    taken = {image for part in split.values() for example in part for image in example.images}
    rest = [example for example in parts["train"] if not taken.intersection(example.images)]
    split["validation"] = limited(rest, data.validation_items, data.split_seed, lenient=data.lenient)
  # Of all that was published paths alone are compared: its images would have to be read whole.
  for what, each, how in (("as published", parts, "path"), ("as used", split, "path or content")):
    shared, share = overlap(each["train"], each["test"], contents=each is split)
    numbers = (len(each["train"]), len(parts["train"]), len(each["test"]), len(parts["test"]))
    logging.warning(
      "%s %s: %d test images (%.1f %%) are training images too, by %s; %d of %d training and %d of %d test questions",
      *(data.split_files, what, shared, 100 * share, how, *numbers),
    )
  _compared(data.split_files, split, names=("validation",))
  return split


def _compared(
  where: str, parts: dict[str, list[Example]], names: Sequence[str] = ("validation", "test")
) -> dict[str, list[Example]]:
  """The same parts; warns of each that shares images with the training questions."""
  for name in names:
    shared, share = overlap(parts["train"], parts[name], contents=True)
    if shared:
      logging.warning(
        "%s: %d %s images (%.1f %%) are training images too, by path or content; figures on them say less of images "
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
  expected: Collection[str] = (),  # rules that are no news
) -> list[Example]:
  examples, summary = formats.read_any(root, image_root=image_root, lenient=lenient)
  summary.root = storage.origin(summary.root)
  news = summary.rules.keys() - set(expected)
  logging.log(logging.WARNING if news else logging.INFO, "%s", summary.text())
  report(summary)
  return examples


def overlap(train: Iterable[Example], test: Iterable[Example], *, contents: bool = False) -> tuple[int, float]:
  """How many images of the test questions are also images of training questions, and their share of the test's.

  Args:
    train: training questions.
    test: test questions.
    contents: compare files by their bytes, too; those of equal size are read. By path alone, both parts must have been
      read with the same root.
  """
  seen = {image for example in train for image in example.images}
  asked = {image for example in test for image in example.images}
  same = images.repeats(seen | asked) if contents else {}
  known = {same.get(image, image) for image in seen}
  shared = sum(same.get(image, image) in known for image in asked)
  return shared, shared / len(asked) if asked else 0.0


def write_ids(split: Split, path: epath.PathLike, *, rule: str, seed: int) -> str:
  """Writes which questions a split holds and what they are, as JSON: rule, seed, and the fields of `id_files.identity`.

  Args:
    split: the split.
    path: the file.
    rule: in words or by name how the split was made, for example "mri600".
    seed: of the rule.

  Returns:
    the SHA-256 over everything that the questions are.

  Raises:
    ValueError: the file exists and holds something else, such as questions that have changed since; or an image cannot
      be read.
  """
  identity = id_files.identity(split.as_dict())
  id_files.write(path, {"rule": rule, "seed": seed} | identity)
  return str(identity["content_sha256"])


def content_digest(split: Split) -> str:
  """SHA-256 over everything that the questions of a split are.

  Raises:
    ValueError: an image cannot be read.
  """
  return str(id_files.identity(split.as_dict())["content_sha256"])


def read_ids(path: str | os.PathLike, examples: Iterable[Example]) -> Split:
  """The split whose ids a file of `write_ids` lists.

  Args:
    path: the file.
    examples: at least the questions that it lists, as they were.

  Raises:
    ValueError: the file is damaged or was changed, lists an id twice, one that no question has, or one whose question
      or image has changed since.
  """
  record = id_files.stored(path, SPLITS)
  listed = [one for part in record["ids"].values() for one in part]
  known = {example.id: example for example in examples}
  if missing := [one for one in listed if one not in known]:
    raise ValueError(f"{path}: the data lack {len(missing)} of its {len(listed)} questions, such as {missing[0]!r}")
  split = Split(**{name: in_order(known[one] for one in part) for name, part in record["ids"].items()})
  if changed := id_files.changes(record, id_files.identity(split.as_dict())):
    raise ValueError(f"{path}: {changed}; restore the data that it was written for, or write it again")
  return split
