"""The frozen benchmark: hash, splits without overlap, layout that the reader of the real data reads."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from kepo_jax.data.phantom import build, drawing, scenes
from kepo_jax.data.readers import omnimedvqa


@pytest.fixture(scope="module")
def splits():
  return {split: build.make_items(split) for split in build.SPLITS}


def test_items_are_the_frozen_ones_and_a_changed_scene_is_seen(splits):
  assert build.items_digest(splits) == build.ITEMS_SHA256
  first = splits["train"][0]
  moved = dataclasses.replace(first, scene=dataclasses.replace(first.scene, tilt=first.scene.tilt + 1e-6))
  assert build.items_digest({"train": [moved]}) != build.items_digest({"train": [first]})


def test_sizes_and_no_shared_scene(splits):
  counts = {split: collections.Counter(item.scene.modality for item in items) for split, items in splits.items()}
  assert counts["train"] == {"MRI": 600}
  assert counts["validation"] == dict.fromkeys(scenes.MODALITIES, 40)
  assert counts["test"] == dict.fromkeys(scenes.MODALITIES, 300)
  items = [item for split in splits.values() for item in split]
  assert len({item.question_id for item in items}) == len(items)
  assert len({item.scene.digest() for item in items}) == len(items)


@pytest.fixture
def few(monkeypatch):
  """Makes four items per modality the frozen ones."""
  monkeypatch.setattr(build, "SPLITS", {split: dict.fromkeys(sizes, 4) for split, sizes in build.SPLITS.items()})
  items = {split: build.make_items(split) for split in build.SPLITS}
  monkeypatch.setattr(build, "ITEMS_SHA256", build.items_digest(items))
  return items


def test_the_reader_of_real_data_reads_it(tmp_path, few):
  roots = build.write(tmp_path)
  examples, summary = omnimedvqa.read(roots["test"])
  assert len(examples) == 32 and len({example.modality for example in examples}) == 8
  by_id = {item.question_id: item for item in few["test"]}
  for example in examples:
    item = by_id[example.id.split("/")[-1]]
    assert example.options == item.question.options and example.answer == item.question.letter
    np.testing.assert_array_equal(np.asarray(Image.open(example.images[0])), drawing.draw(item.scene))
  listing = roots["test"] / "QA_information/Open-access/Phantom-OCT-test.json"
  records = json.loads(listing.read_text())
  assert records[0]["modality_type"] == "OCT (Optical Coherence Tomography"  # as the original spells it
  before = listing.stat().st_mtime_ns
  build.write(tmp_path)  # the second call finds it there
  assert listing.stat().st_mtime_ns == before


def test_unfrozen_items_are_refused(tmp_path, few, monkeypatch):
  monkeypatch.setattr(build, "ITEMS_SHA256", "0" * 64)
  with pytest.raises(ValueError, match="bump VERSION"):
    build.write(tmp_path)
  assert not list(tmp_path.iterdir())
