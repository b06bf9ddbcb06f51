"""Counts what a data set holds: questions, chance, letters, and sizes and formats of images."""

import collections
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kepo_jax.data import cleaning, images
from kepo_jax.data.cleaning import Summary
from kepo_jax.types import Example

# (items, function of some of them) -> its results for all of them, in their order.
Divided = Callable[[Sequence[str], Callable[[Sequence[str]], Sequence[Any]]], Sequence[Any]]


def question_counts(examples: Sequence[Example]) -> dict[str, Any]:
  """Counts questions and images, as JSON-able values.

  Returns:
    `overall`, and by `modalities`, `question_types` and `datasets`, each with questions, the accuracy of guessing, and
    how often each number of options and each gold letter occurs; the number of distinct images, and of images with
    several questions.
  """
  images_asked = collections.Counter(image for example in examples for image in example.images)
  return {
    "overall": _group_counts(examples),
    "modalities": _by(examples, lambda example: example.modality),
    "question_types": _by(examples, lambda example: example.question_type or "not told"),
    "datasets": _by(examples, lambda example: example.dataset),
    "images": len(images_asked),
    "images_with_several_questions": sum(count > 1 for count in images_asked.values()),
  }


def _group_counts(examples: Sequence[Example]) -> dict[str, Any]:
  return {
    "questions": len(examples),
    "chance": sum(1 / len(example.options) for example in examples) / max(1, len(examples)),
    "options": _sorted_counts(len(example.options) for example in examples),
    "letters": _sorted_counts(example.answer for example in examples),
  }


def _by(examples: Iterable[Example], key: Callable[[Example], str]) -> dict[str, Any]:
  groups = collections.defaultdict(list)
  for example in examples:
    groups[key(example)].append(example)
  return {name: _group_counts(groups[name]) for name in sorted(groups)}


def _sorted_counts(values: Iterable[Any]) -> dict[str, int]:
  counts = collections.Counter(values)
  return {str(value): counts[value] for value in sorted(counts)}


def open_images(
  examples: Sequence[Example],
  summary: Summary,
  *,
  decode: bool = False,
  progress: Callable[[int, int], None] = lambda done, total: None,
  divided: Divided = lambda items, work: work(items),
) -> tuple[list[Example], dict[str, Any]]:
  """Opens every image once; questions about unreadable ones are dropped and counted in the summary.

  Args:
    examples: questions.
    summary: of their reading.
    decode: decode the pixels too, which finds files that are cut off.
    progress: called with the number of images done and of all that this process looks at.
    divided: (images, function of some of them) -> its JSON-able results for all, in their order; several processes
      can share the work.

  Returns:
    the questions whose images can be read; counts of formats and sizes, bytes, and the unreadable files.
  """
  paths = list(dict.fromkeys(image for example in examples for image in example.images))
  formats: collections.Counter[str] = collections.Counter()
  sizes: collections.Counter[tuple[int, int]] = collections.Counter()
  unreadable: dict[str, str] = {}
  total_bytes = 0

  def opened(some: Sequence[str]) -> list[Any]:
    results = []
    for done, path in enumerate(some, start=1):
      results.append(_opened(path, decode=decode))
      progress(done, len(some))
    return results

  for path, result in zip(paths, divided(paths, opened), strict=True):
    if isinstance(result, str):
      unreadable[path] = result
    else:
      image_format, width, height, size = result
      total_bytes += size
      formats[image_format] += 1
      sizes[width, height] += 1
  kept = []
  for example in examples:
    bad = next((path for path in example.images if path in unreadable), None)
    if bad is None:
      kept.append(example)
    else:
      rule = "unreadable_image" if os.path.exists(bad) else "missing_image"
      summary.count(rule, f"question {example.id}: image {bad}: {unreadable[bad].removeprefix(f'image {bad}: ')}")
  summary.kept = len(kept)
  widths, heights = [width for width, _ in sizes], [height for _, height in sizes]
  return kept, {
    "formats": dict(sorted(formats.items())),
    "sizes": {f"{width}x{height}": count for (width, height), count in sizes.most_common(20)},
    "different_sizes": len(sizes),
    "smallest": [min(widths, default=0), min(heights, default=0)],  # of each side by itself
    "largest": [max(widths, default=0), max(heights, default=0)],
    "bytes": total_bytes,
    "unreadable": unreadable,
  }


def _opened(path: str, *, decode: bool) -> tuple[str, int, int, int] | str:
  """Reads format, width, height and bytes of an image file, or says why it cannot be read."""
  try:
    image_format, width, height = images.header(path)
    if decode:
      images.load_image(path)
    return image_format, width, height, os.stat(path).st_size
  except (cleaning.Rejected, ValueError, OSError) as error:
    return str(error)
