"""Published splits: where their parts lie, so that they are read one by one and never mixed."""

import collections
import os
import pathlib
import re

from kepo_jax.data import hf_folders, json_files, omnimedvqa
from kepo_jax.data.split_files import PARTS

_NEEDED = {"train", "test"}


def parts(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
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


def refuse(directory: str | os.PathLike) -> None:
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
