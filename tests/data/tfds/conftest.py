"""A small download in OmniMedVQA's layout with images of every kind, and the data set built from it."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from kepo_jax.data.tfds import building
from kepo_jax.data.tfds.omnimedvqa import omnimedvqa_dataset_builder as builder
from tests.data.cases import Layout, record


def write_images(folder: pathlib.Path, seed: int) -> list[str]:
  """Images of different files and modes; returns their names."""
  rng = np.random.default_rng(seed)
  colour = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
  deep = Image.fromarray(rng.integers(500, 3000, (30, 20)).astype(np.uint16))
  kinds = {
    "grey.png": colour.convert("L"), "colour.png": colour, "a (1).jpg": colour, "LOUD.JPG": colour.convert("L"),
    "palette.png": colour.convert("P", palette=Image.Palette.ADAPTIVE, colors=16),
    "alpha.png": Image.merge("RGBA", (*colour.split(), colour.convert("L"))), "deep.png": deep, "deep.tif": deep,
    "print.jpeg": colour.convert("CMYK"), "scan.tif": colour, "old.bmp": colour, "bits.bmp": colour.convert("1"),
  }  # fmt: skip
  folder.mkdir(parents=True)
  for name, picture in kinds.items():
    picture.save(folder / name)
  return list(kinds)


@pytest.fixture(scope="session")
def download(tmp_path_factory) -> pathlib.Path:
  """Twelve MRI and twelve CT questions about the images of `write_images`, an image of its own for each."""
  layout = Layout(tmp_path_factory.mktemp("download") / "OmniMedVQA")
  for dataset, modality in (("Set M", "MR (Mag-netic Resonance Imaging)"), ("Set C", "CT(Computed Tomography)")):
    records = []
    for number, name in enumerate(write_images(layout.root / "Images" / dataset, seed=ord(dataset[-1]))):
      texts = {"question": f"Où est-ce, {number}?", "question_id": f"{dataset}_{number:04d}", "modality_type": modality}
      third = {} if number % 2 else {"option_C": ...}
      records.append(record(dataset=dataset, image_path=f"Images/{dataset}/{name}", option_D=..., **texts, **third))
    layout.write(*records, name=dataset)
  return layout.root


@pytest.fixture(scope="session")
def small() -> builder.Config:
  """A config that asks for every MRI question of the download, and for half of the CT questions."""
  return builder.split_config(train_items=6, validation_items=2, test_items=4, split_seed=3)


@pytest.fixture(scope="session")
def built(download, small, tmp_path_factory) -> building.Built:
  return building.build(tmp_path_factory.mktemp("tfds"), manual_dir=download, config=small)
