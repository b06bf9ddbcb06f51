"""Finds questions that a run has no room for before its first step, since prompts are never truncated."""

from collections.abc import Mapping, Sequence

from kepo_jax.data import images, prompts, records
from kepo_jax.data import processor as processor_lib
from kepo_jax.data.cleaning import Rejected
from kepo_jax.types import Example

_AT_ONCE = 4096  # prompts tokenized in one call
_SQUASH = "set data.resize=squash384"


def refusals(
  examples: Sequence[Example], processor: processor_lib.Processor, kinds: Mapping[str, int]
) -> dict[str, Rejected]:
  """Returns id -> rule and reason of the questions whose text, prompts or images are too large.

  Images are measured by the headers of their files.

  Args:
    examples: questions with different ids and readable images.
    processor: its buckets are the room that there is.
    kinds: wordings that the questions will be asked in, see `prompts.prompt_text`, each with the number of tokens that
      a hint may add to it: the hint itself is not known yet.
  """
  refused: dict[str, Rejected] = {}
  merged: dict[str, list[int]] = {}
  for example in examples:
    try:
      records.check_length(example.question, example.options)
      merged[example.id] = _image_tokens(example, processor)
    except Rejected as rejected:
      refused[example.id] = rejected
  for kind, hint in kinds.items():
    left = [example for example in examples if example.id not in refused]
    for start in range(0, len(left), _AT_ONCE):
      part = left[start : start + _AT_ONCE]
      texts = [prompts.prompt_text(example, processor.templates, kind) for example in part]
      lengths = processor.tokenizer.lengths(texts, [merged[example.id] for example in part])
      for example, length in zip(part, lengths, strict=True):
        if length + hint > processor.prompt_buckets[-1]:
          parts = f"{sum(merged[example.id])} of them for images" + (
            f" and {hint} for the longest hint" if hint else ""
          )
          way_out = "; add a larger bucket" + (", or lower exploration.hint_tokens" if hint else "")
          refused[example.id] = Rejected(
            "prompt_too_long",
            f"the prompt {kind} has {length + hint} tokens ({parts}), more than the largest of "
            f"data.prompt_buckets={processor.prompt_buckets}{way_out}",
          )
  return refused


def _image_tokens(example: Example, processor: processor_lib.Processor) -> list[int]:
  """Returns the merged tokens of each image of a question.

  Raises:
    Rejected: no grid of patches, or more patches than there is room for.
  """
  settings, largest = processor.image_processor, processor.patch_buckets[-1]
  sizes, patches = [], []
  for path in example.images:
    _, width, height = images.header(path)
    sizes.append(f"{path} of {width} x {height} pixels")
    try:
      _, rows, columns = settings.grid(height, width)
    except ValueError as error:
      raise Rejected("image_too_narrow", f"image {path}: {error}; crop it, or {_SQUASH}") from error
    patches.append(rows * columns)
  if sum(patches) > largest:
    raise Rejected(
      "image_too_large",
      f"image {', '.join(sizes)}: {sum(patches)} patch rows, more than the largest of "
      f"data.patch_buckets={processor.patch_buckets}; add a larger bucket, scale the image down, or {_SQUASH}",
    )
  return [count // settings.merge_size**2 for count in patches]
