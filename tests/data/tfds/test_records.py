"""Records hold the fields of an example, and images that decode to the same pixels."""

import dataclasses
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from kepo_jax.data import images
from kepo_jax.data.tfds import records
from kepo_jax.types import Example

KEPT = {"grey.png", "colour.png", "a (1).jpg", "LOUD.JPG"}


def test_a_record_has_the_fields_of_an_example():
  assert set(records.features()) == {field.name for field in dataclasses.fields(Example)}


def test_images_keep_their_bytes_or_their_pixels(download):
  paths = sorted((download / "Images" / "Set M").iterdir())
  assert len(paths) == 12
  for path in paths:
    data = records.encoded_image(path)
    assert (data == path.read_bytes()) == (path.name in KEPT), path.name
    with Image.open(io.BytesIO(data)) as stored:
      assert stored.format == ("JPEG" if path.suffix.lower() == ".jpg" else "PNG"), path.name
      assert stored.mode in ("L", "RGB"), path.name
    # What the rest of the project sees of the file, and what plain TFDS makes of the bytes.
    expected = np.asarray(images.rgb(images.load_image(path)))
    decoded = tfds.features.Image(shape=(None, None, 3)).decode_example_np(data)
    np.testing.assert_array_equal(decoded, expected, err_msg=path.name)
