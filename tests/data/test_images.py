"""Bit equality with the reference processor, and errors that name the file."""

import json
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from transformers import image_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kepo_jax.data import images

MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16", "YCbCr")
SETTINGS = {
  "published": {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
  },
  "clamped": {
    "min_pixels": 4096, "max_pixels": 9216, "patch_size": 8, "merge_size": 2, "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.27, 0.26, 0.25],
  },
  "merge1": {"min_pixels": 256, "max_pixels": 16384, "patch_size": 16, "merge_size": 1, "temporal_patch_size": 1},
  "defaults": {},
}  # fmt: skip


def drawn(mode: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
  """A noisy image of a mode; P carries a transparent colour."""
  if mode == "I;16":
    return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
  image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert(mode)
  if mode == "P":
    image.info["transparency"] = image.getpixel((0, 0))
  return image


def write_settings(directory, settings):
  (directory / "preprocessor_config.json").write_text(json.dumps(settings))
  return directory


def assert_bit_equal(processor, reference, image):
  expected = reference(images=[image], return_tensors="np")
  patches, grid = processor.patches(image)
  assert grid == tuple(expected["image_grid_thw"][0].tolist())
  assert patches.dtype == np.float32
  np.testing.assert_array_equal(patches.view(np.uint32), expected["pixel_values"].view(np.uint32))


@pytest.mark.parametrize("name", SETTINGS)
def test_bit_equal_over_sizes(name, tmp_path, rng):
  processor = images.ImageProcessor.from_directory(write_settings(tmp_path, SETTINGS[name]))
  reference = Qwen2VLImageProcessorPil(**SETTINGS[name])
  sizes = [(64, 64), (57, 67), (128, 128), (300, 7), (9, 512), (1, 1), (33, 200), (301, 203)]
  for width, height in [*sizes, *rng.integers(2, 400, (12, 2)).tolist()]:  # none is too narrow
    assert_bit_equal(processor, reference, drawn("RGB", width, height, rng))


def test_bit_equal_over_modes(tmp_path, rng):
  processor = images.ImageProcessor.from_directory(write_settings(tmp_path, SETTINGS["clamped"]))
  reference = Qwen2VLImageProcessorPil(**SETTINGS["clamped"])
  for mode in MODES:
    for size in ((64, 48), (131, 77)):
      assert_bit_equal(processor, reference, drawn(mode, *size, rng))


def test_a_transparent_colour_is_white(tmp_path):
  for number in (0, 7):  # 0 is a colour like any other
    Image.new("L", (4, 4), number).save(tmp_path / "a.png", transparency=number)
    assert (np.asarray(images.rgb(images.load_image(tmp_path / "a.png"))) == 255).all(), number


def test_both_styles_of_bounds_and_the_nested_file(tmp_path):
  size = {"shortest_edge": 4096, "longest_edge": 9216}
  pixels = {"min_pixels": 4096, "max_pixels": 9216}
  by_size = images.ImageProcessor.from_directory(write_settings(tmp_path, {"size": size}))
  assert by_size == images.ImageProcessor.from_directory(write_settings(tmp_path, pixels))
  # With both present the explicit pair wins, as in the reference.
  both = images.ImageProcessor.from_directory(write_settings(tmp_path, {"size": size, "min_pixels": 1024}))
  assert (both.min_pixels, both.max_pixels) == (1024, 9216)
  # As transformers 5 has it, the nested settings count before those of the older file.
  (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": size}}))
  assert by_size == images.ImageProcessor.from_directory(tmp_path)


def test_squash_gives_one_shape(tmp_path, rng):
  write_settings(tmp_path, SETTINGS["published"])
  processor = images.ImageProcessor.from_directory(tmp_path, resize="squash384")
  wide = drawn("RGB", 500, 120, rng)
  patches, grid = processor.patches(wide)
  assert grid == (1, 24, 24) == processor.grid(120, 500)
  native = images.ImageProcessor.from_directory(tmp_path)
  np.testing.assert_array_equal(patches, native.patches(wide.resize((384, 384), Image.Resampling.BICUBIC))[0])


def test_unusable_settings_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no preprocessor_config.json"):
    images.ImageProcessor.from_directory(tmp_path)
  (tmp_path / "preprocessor_config.json").write_text("{")
  with pytest.raises(ValueError, match="preprocessor_config.json: not valid JSON"):
    images.ImageProcessor.from_directory(tmp_path)
  for settings, message in [
    ({"image_mean": [0.5]}, "three channels"),
    ({"image_mean": [0.5] * 10**5}, "^.{,400}three channels"),
    ({"min_pixels": 10**6, "max_pixels": 10**5}, "max_pixels=100000"),
    ({"patch_size": 1.5}, "patch_size is 1.5"),
    *(({key: False}, f"{key} is False, expected true") for key in ("do_rescale", "do_normalize", "do_convert_rgb")),
    ({"do_resize": "x" * 10**6}, "^.{,400}do_resize is .*, expected true"),
  ]:
    with pytest.raises(ValueError, match=message):
      images.ImageProcessor.from_directory(write_settings(tmp_path, settings))


BOUNDS = {"shortest_edge": 1024, "longest_edge": 9216}
PAIR = {"min_pixels": 1024, "max_pixels": 9216}
SQUARE = {"height": 64, "width": 64}


@pytest.mark.parametrize(
  "settings",
  [
    {"size": {}}, {"size": SQUARE}, {"size": SQUARE} | PAIR, {"size": BOUNDS | {"height": 64}}, {"size": {}} | PAIR,
    {"size": BOUNDS | {"height": None}}, {"size": BOUNDS | {"min_pixels": 2048}}, {"size": {"shortest_edge": 1024}},
    {"size": {"shortest_edge": None, "longest_edge": 9216}}, {"size": {"shortest_edge": 1024}, "max_pixels": 9216},
    {"size": {"shortest_edge": 1024.0, "longest_edge": 9216.0}}, {"size": BOUNDS, "min_pixels": None}, {"size": None},
    {"image_mean": 0.5}, {"image_mean": 0, "image_std": 1}, {"image_mean": [1, 0, 1]}, {"rescale_factor": 1},
    {"patch_size": 16.0}, {"do_center_crop": True}, {"do_center_crop": None}, {"do_resize": 0},
    *({key: None} for key in ("patch_size", "merge_size", "temporal_patch_size", "resample", "do_resize")),
    *({key: None} for key in ("image_mean", "image_std", "rescale_factor", "min_pixels", "max_pixels")),
  ],
  ids=json.dumps,
)  # fmt: skip
def test_settings_are_refused_where_the_reference_refuses_them_and_equal_where_not(settings, tmp_path, rng):
  write_settings(tmp_path, settings)
  image = drawn("RGB", 90, 70, rng)
  try:
    reference = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    reference(images=[image], return_tensors="np")
  except (ValueError, TypeError):
    with pytest.raises(ValueError, match="preprocessor_config.json: .* expected|do_center_crop"):
      images.ImageProcessor.from_directory(tmp_path)
  else:
    assert_bit_equal(images.ImageProcessor.from_directory(tmp_path), reference, image)


def test_damaged_files_are_named(tmp_path, rng, monkeypatch):
  image = drawn("RGB", 60, 40, rng)
  for suffix in ("png", "jpg", "bmp", "tif"):
    image.save(tmp_path / f"good.{suffix}")
    assert images.load_image(tmp_path / f"good.{suffix}").size == (60, 40)
    data = (tmp_path / f"good.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}: damaged or truncated"):
      images.load_image(tmp_path / f"cut.{suffix}")
  (tmp_path / "text.png").write_text("not an image")
  for path, message in [
    (tmp_path / "text.png", r"text\.png: not an image"),
    (tmp_path / "absent.png", r"absent\.png: no such file"),
    (tmp_path, "damaged or truncated"),
    (tmp_path / "good.png", r"good\.png: too large to decode"),
  ]:
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    with pytest.raises(ValueError, match=message):
      images.load_image(path)


def test_deep_grey_is_spread_over_eight_bits(tmp_path):
  values = np.array([[1000, 1000], [2000, 3000]], dtype=np.uint16)
  Image.fromarray(values).save(tmp_path / "deep.png")
  np.testing.assert_array_equal(np.asarray(images.load_image(tmp_path / "deep.png")), [[0, 0], [128, 255]])


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, LARGEST, -LARGEST, 1.8e38])
def test_pixels_that_are_no_number_leave_the_others_as_they_are(tmp_path, odd):
  values = np.arange(12, dtype=np.float32).reshape(3, 4) + 1000
  Image.fromarray(values).save(tmp_path / "whole.tif")
  values[1, 1] = odd
  Image.fromarray(values).save(tmp_path / "odd.tif")
  whole, found = (np.array(images.load_image(tmp_path / f"{name}.tif")) for name in ("whole", "odd"))
  whole[1, 1] = 255 if odd > 0 else 0
  np.testing.assert_array_equal(found, whole)
  Image.fromarray(np.full((2, 2), odd, np.float32)).save(tmp_path / "none.tif")
  with pytest.raises(ValueError, match="none.tif: .*no pixel is a finite number"):
    images.load_image(tmp_path / "none.tif")


@pytest.mark.parametrize(("kind", "fill"), [(np.float32, -9999.1), (np.float32, 1e9), (np.int32, -32768)])
def test_what_a_tiff_names_as_its_fill_is_no_value(kind, fill, tmp_path):
  values = (np.arange(12).reshape(3, 4) + 1000).astype(kind)
  Image.fromarray(values).save(tmp_path / "whole.tif")
  values[1, 1] = fill
  tags = TiffImagePlugin.ImageFileDirectory_v2()
  for text in (f"{fill} ", "nothing"):
    tags[42113] = text
    Image.fromarray(values).save(tmp_path / "filled.tif", tiffinfo=tags)
    whole, found = (np.array(images.load_image(tmp_path / f"{name}.tif")) for name in ("whole", "filled"))
    whole[1, 1] = 255 if fill > 0 else 0
    assert (found == whole).all() == (text != "nothing")


@pytest.mark.parametrize(
  "tag",
  [
    struct.pack("<HHII", 0x100, 2, 4, 0xFFFFFFFF),  # text that is none
    struct.pack("<HHII", 0x10F, 2, 10**6, 10**6),  # beyond the end
    struct.pack("<HHII", 0x11A, 5, 2, 8),
    b"\xff" * 12,
  ],
)
def test_odd_metadata_leave_the_pixels_as_they_are(tag, tmp_path, rng):
  picture = drawn("RGB", 8, 6, rng)
  turn = struct.pack("<HHII", 0x112, 3, 1, 6)
  for name, data in (("plain", turn), ("odd", turn + tag)):
    directory = struct.pack("<H", len(data) // 12) + data + bytes(4)
    picture.save(tmp_path / f"{name}.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + directory)
  picture.save(tmp_path / "none.jpg", exif=b"Exif\0\0nothing of the kind")
  with warnings.catch_warnings(action="error"):
    plain, odd, none = (images.load_image(tmp_path / f"{name}.jpg") for name in ("plain", "odd", "none"))
  assert plain.size == (6, 8) and none.size == (8, 6)
  np.testing.assert_array_equal(np.asarray(odd), np.asarray(plain))


def test_pictures_are_turned_as_transformers_turns_them(tmp_path, rng):
  exif = Image.Exif()
  for orientation in range(1, 9):
    exif[0x0112] = orientation
    drawn("RGB", 8, 6, rng).save(tmp_path / "a.png", exif=exif)
    expected = image_utils.load_image(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(np.asarray(images.load_image(tmp_path / "a.png")), np.asarray(expected))
