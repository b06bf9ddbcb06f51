"""From questions to device-ready prompts, and back from tokens to text.

`Processor` joins a checkpoint's tokenizer, chat template, image settings and model geometry. Everything here is
host-side NumPy; sizes go to a small set of buckets, so that a run compiles a handful of programs.
"""

import dataclasses
import itertools
import math
import pathlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import chex
import jax
import numpy as np

from kepo_jax.data import images, tokenization
from kepo_jax.data import prompts as wordings
from kepo_jax.data.batching import row_id
from kepo_jax.data.cleaning import Rejected
from kepo_jax.models.qwen3_vl import checkpoint, positions
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.types import Example, Prompts, VisionInputs

PROMPT_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens
PATCH_BUCKETS = (64, 256, 576, 1024, 2304, 4096, 16384)  # patch rows
CACHE_BYTES = 1 << 30  # decoded patches held in memory; 2,400 images of 384 x 384


class ImageCache:
  """Holds decoded patches by path, the least recently used dropped first; safe to use from several threads."""

  def __init__(self, processor: images.ImageProcessor, limit_bytes: int = CACHE_BYTES):
    self._processor = processor
    self._limit = limit_bytes
    self._bytes = 0
    self._entries: OrderedDict[str, tuple[np.ndarray, tuple[int, int, int]]] = OrderedDict()
    self._lock = threading.Lock()

  def pixels(self, path: str) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Returns `ImageProcessor.pixels` of the file."""
    with self._lock:
      if path in self._entries:
        self._entries.move_to_end(path)
        return self._entries[path]
    try:
      entry = self._processor.pixels(images.load_image(path))
    except ValueError as error:
      raise error if str(path) in str(error) else ValueError(f"image {path}: {error}") from error
    with self._lock:
      if path not in self._entries and entry[0].nbytes <= self._limit:
        self._entries[path] = entry
        self._bytes += entry[0].nbytes
      while self._bytes > self._limit:
        self._bytes -= self._entries.popitem(last=False)[1][0].nbytes
    return entry


def prompt_shapes(size: int, length: int, patches: int, width: int) -> Prompts:
  """Returns shape and dtype of every array of prompts.

  Args:
    size: P, questions.
    length: S, of the prompt buckets.
    patches: R, of the patch buckets; 0 without images.
    width: numbers of a patch row.
  """

  def of(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *shape), dtype)

  return Prompts(
    tokens=of(np.int32, length),
    mask=of(np.bool_, length),
    positions=of(np.int32, 3, length),
    next_position=of(np.int32),
    image_slot=of(np.int32, length),
    row=of(np.uint32),
    vision=VisionInputs(
      patches=of(np.float32, patches, width),
      segments=of(np.int32, patches),
      coordinates=of(np.int32, patches, 2),
      table_index=of(np.int32, patches, 4),
      table_weight=of(np.float32, patches, 4),
    ),
  )


class Processor:
  """Text and images of one checkpoint family, in and out; see `from_directory`.

  `prompt_buckets` are padded prompt lengths S in tokens, `patch_buckets` padded patch rows R per prompt. `held_rows`
  maps a number of prompts P to the rows of a batch whose pixels this host needs (`sharding.held_rows`): the others are
  left at zero, of the same shape. Every host must make the same batches.
  """

  def __init__(
    self,
    config: Qwen3VLConfig,
    tokenizer: tokenization.Tokenizer,
    image_processor: images.ImageProcessor,
    *,
    templates: wordings.Templates,
    prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
    patch_buckets: Sequence[int] = PATCH_BUCKETS,
    held_rows: Callable[[int], Collection[int]] = range,
  ):
    vision = config.vision
    geometry = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    expected = (image_processor.patch_size, image_processor.merge_size, image_processor.temporal_patch_size)
    if geometry != expected:
      raise ValueError(
        f"{tokenizer.name}: patch, merge and temporal size are {expected} in the image settings and {geometry} in "
        "config.json; the two files belong to different checkpoints."
      )
    merged = vision.spatial_merge_size**2
    if any(rows % merged for rows in patch_buckets) or min((*prompt_buckets, *patch_buckets)) < 1:
      raise ValueError(
        f"data.patch_buckets={tuple(patch_buckets)} must be positive multiples of {merged}, "
        f"and data.prompt_buckets={tuple(prompt_buckets)} positive."
      )
    self.config = config
    self.templates = templates
    self.tokenizer = tokenizer
    self.image_processor = image_processor
    self.prompt_buckets = tuple(sorted(prompt_buckets))
    self.patch_buckets = tuple(sorted(patch_buckets))
    self.end_ids = tokenizer.end_ids
    self.pad_id = tokenizer.pad_id
    self.allowed = tokenizer.allowed  # bool[V]
    self._cache = ImageCache(image_processor)
    self._held_rows = held_rows

  @classmethod
  def from_directory(
    cls, directory: str | pathlib.Path, *, resize: str = "native", templates: wordings.Templates, **settings: Any
  ) -> "Processor":
    """Reads the processor of a checkpoint folder; no code of the folder is run.

    Args:
      directory: Hugging Face folder (or Hub id) of a Qwen3-VL checkpoint; weights are not read.
      resize: "native" or "squash384", see `images.RESIZES`.
      templates: family of wordings.
      **settings: `prompt_buckets`, `patch_buckets` and `held_rows` of the class.

    Raises:
      ValueError: a file is missing or contradicts another; names it.
    """
    directory = checkpoint.resolved_folder(directory)
    config = Qwen3VLConfig.from_directory(directory)
    tokenizer = tokenization.Tokenizer.from_directory(directory, config)
    image_processor = images.ImageProcessor.from_directory(directory, resize=resize)
    return cls(config, tokenizer, image_processor, templates=templates, **settings)

  def same_vocabulary(self, directory: str | pathlib.Path) -> bool:
    """Tells whether another checkpoint folder's tokenizer maps every entry to the same id."""
    folder = checkpoint.resolved_folder(directory)
    other = tokenization.load(folder, Qwen3VLConfig.from_directory(folder).text.vocab_size)
    return other.get_vocab() == self.tokenizer.vocabulary

  def prompts(
    self,
    examples: Sequence[Example],
    kind: str,
    *,
    hints: Sequence[str] | None = None,
    rows: Sequence[int] | None = None,
  ) -> Prompts:
    """Makes host arrays of len(examples) prompts, padded on the right to the smallest buckets that hold all.

    Args:
      examples: P questions.
      kind: wording, as in `data.prompts.prompt_text`.
      hints: one hint per question, for the hinted kinds.
      rows: uint32 identity per prompt; by default the checksum of the question's id.

    Raises:
      ValueError: a prompt is longer than the largest bucket (nothing is truncated), or an image cannot be read;
        names the question.
    """
    hints = [""] * len(examples) if hints is None else hints
    chex.assert_equal(len(hints), len(examples))
    held = frozenset(self._held_rows(len(examples)))
    grids, pixels, tokens = [], [], []
    for i, (example, hint) in enumerate(zip(examples, hints, strict=True)):
      decoded = [self._cache.pixels(path) for path in example.images] if i in held else []
      grids.append([grid for _, grid in decoded] if i in held else self._grids(example.images))
      pixels.append([rows for rows, _ in decoded])
      text = wordings.prompt_text(example, self.templates, kind, hint=hint)
      tokens.append(self.tokenizer.encode(text, [self._merged(grid) for grid in grids[-1]], example.id))
    counts = [sum(map(math.prod, grid)) for grid in grids]
    length = self._bucket([len(ids) for ids in tokens], self.prompt_buckets, examples, "tokens", "data.prompt_buckets")
    patches = 0
    if any(counts):
      patches = self._bucket(counts, self.patch_buckets, examples, "patch rows", "data.patch_buckets")
    prompts = self._padding(len(examples), length, patches)
    prompts.row[:] = [row_id(example.id) for example in examples] if rows is None else rows
    for i, (ids, grid, n) in enumerate(zip(tokens, grids, map(len, tokens), strict=True)):
      prompts.tokens[i, :n], prompts.mask[i, :n] = ids, True
      place, prompts.next_position[i], prompts.image_slot[i, :n] = positions.prompt_positions(ids, grid, self.config)
      prompts.positions[i, :, :n] = place
      if pixels[i]:
        tables = positions.vision_tables(grid, self.config)
        names = ("segments", "coordinates", "table_index", "table_weight")
        for name, table in zip(names, tables, strict=True):
          getattr(prompts.vision, name)[i, : counts[i]] = table
        prompts.vision.patches[i, : counts[i]] = self.image_processor.normalised(np.concatenate(pixels[i]))
    return prompts

  def shapes(self, size: int, length: int, patches: int) -> Prompts:
    """Returns shape and dtype of every array of `prompts`; arguments as in `prompt_shapes`."""
    settings = self.image_processor
    return prompt_shapes(size, length, patches, 3 * settings.temporal_patch_size * settings.patch_size**2)

  def sizes(self, examples: Sequence[Example], kind: str) -> list[tuple[int, int]]:
    """Counts prompt tokens and patch rows of each question, from its text and the headers of its images.

    Args:
      examples: questions.
      kind: wording, as in `data.prompts.prompt_text`; a hint in it is empty.

    Raises:
      ValueError: a file is no image; names it.
    """
    grids = [self._grids(example.images) for example in examples]
    texts = [wordings.prompt_text(example, self.templates, kind) for example in examples]
    tokens = self.tokenizer.lengths(texts, [list(map(self._merged, prompt)) for prompt in grids])
    return list(zip(tokens, (sum(map(math.prod, prompt)) for prompt in grids), strict=True))

  def image_tokens(self, examples: Sequence[Example], *, resize: str = "", limit: int = 256) -> list[int]:
    """Counts the prompt tokens of the first images of some questions, from the headers of their files.

    Args:
      examples: questions.
      resize: what they would cost if they were brought to size in this way; "": in the processor's own.
      limit: most images looked at.

    Raises:
      ValueError: a file is no image; names it.
    """
    paths = dict.fromkeys(path for example in examples for path in example.images)
    sizes = dataclasses.replace(self.image_processor, resize=resize or self.image_processor.resize)
    return [self._merged(grid) for grid in self._grids(itertools.islice(paths, limit), sizes)]

  def _grids(self, paths: Iterable[str], sizes: images.ImageProcessor | None = None) -> list[tuple[int, int, int]]:
    """Reads grids of images from the headers of their files, without decoding them."""
    grids = []
    for path in paths:
      try:
        _, width, height = images.header(path)
        grids.append((sizes or self.image_processor).grid(height, width))
      except (Rejected, ValueError) as error:
        raise ValueError(f"image {path}: {error}") from error
    return grids

  def _merged(self, grid: tuple[int, int, int]) -> int:
    return math.prod(grid) // self.config.vision.spatial_merge_size**2

  def _bucket(self, sizes, buckets, examples, unit, field) -> int:
    largest = max(sizes)
    if largest > buckets[-1]:
      example = examples[sizes.index(largest)]
      raise ValueError(
        f"question {example.id}: its prompt has {largest} {unit}, more than the largest of {field}={buckets}; "
        f"add a larger bucket, since prompts are never cut."
      )
    return next(bucket for bucket in buckets if bucket >= largest)

  def _padding(self, size: int, length: int, patches: int) -> Prompts:
    """Returns host arrays of `shapes` that hold nothing but padding."""
    fill = {"tokens": self.pad_id, "image_slot": -1, "segments": -1}

    def padding(path, shape):
      value = fill.get(path[-1].name)
      return np.zeros(shape.shape, shape.dtype) if value is None else np.full(shape.shape, value, shape.dtype)

    return jax.tree.map_with_path(padding, self.shapes(size, length, patches))

  def completions(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Encodes texts as completions, (tokens int32[N, T], mask bool[N, T]), each with an end token.

    Args:
      texts: N texts.
      length: T.

    Raises:
      ValueError: a text and its end token need more than T tokens; nothing is cut.
    """
    tokens, mask = np.full((len(texts), length), self.pad_id, np.int32), np.zeros((len(texts), length), bool)
    for i, text in enumerate(texts):
      row = self.tokenizer.completion(text)
      if len(row) > length:
        raise ValueError(f"{text!r} needs {len(row)} tokens; raise sampling.max_new_tokens={length}.")
      tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask

  def decode(self, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Decodes completions int32[N, T] where bool[N, T], without special tokens; tags of the answer survive."""
    return self.tokenizer.decode([row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)])
