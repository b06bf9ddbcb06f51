"""One question as a TFDS record: the fields of `Example`, its images as encoded bytes."""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from kepo_jax.data import images
from kepo_jax.types import Example

TEXTS = ("id", "question", "answer", "modality", "question_type", "dataset")


def features() -> tfds.features.FeaturesDict:
  """Returns the features of a record; names and meaning are those of `Example`."""
  return tfds.features.FeaturesDict(
    {name: tfds.features.Text() for name in TEXTS}
    | {
      "options": tfds.features.Sequence(tfds.features.Text()),
      "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
    }
  )


def record(example: Example) -> dict[str, Any]:
  """Makes the record of a question.

  Raises:
    ValueError: an image cannot be read; names the file.
  """
  texts = {name: getattr(example, name) for name in TEXTS}
  pictures = [encoded_image(path) for path in example.images]
  return texts | {"options": list(example.options), "images": pictures}


def example(fields: Mapping[str, Any], paths: Sequence[str]) -> Example:
  """Makes the question of a record of a data source, strings as bytes; `paths` hold its images."""
  texts = {name: fields[name].decode("utf-8") for name in TEXTS}
  options = tuple(option.decode("utf-8") for option in fields["options"])
  return Example(**texts, options=options, images=tuple(paths))


def encoded_image(path: str | os.PathLike) -> bytes:
  """Encodes an image file as PNG or JPEG whose decoded pixels need no further rule.

  Such files keep their bytes. Everything else becomes a PNG of what `images.load_image` and `images.rgb` make of it:
  TIFF and BMP, and also palettes, transparency, CMYK and more than 8 bits, whose raw values TFDS would take for pixels.

  Raises:
    ValueError: the file is missing, damaged or of another format; names it.
  """
  picture = images.load_image(path)  # decoded in any case: a data set with a damaged image is not built
  with images.quiet(), Image.open(path, formats=images.FORMATS) as stored:
    plain = stored.mode in ("L", "RGB") and stored.info.get("transparency") is None
    if plain and stored.format in ("PNG", "JPEG"):
      return pathlib.Path(path).read_bytes()
  grey = picture.mode == "L" and picture.info.get("transparency") is None
  buffer = io.BytesIO()
  (picture if grey else images.rgb(picture)).save(buffer, format="PNG")
  return buffer.getvalue()
