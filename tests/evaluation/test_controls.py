import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from kepo_jax import evaluation
from kepo_jax.data import images, prompts
from kepo_jax.data.processor import Processor
from tests.training.cases import example
from tests.training.runs import ASSETS


@pytest.fixture(scope="module")
def processor():
  return Processor.from_directory(ASSETS / "confused", templates=prompts.BRIEF)


@pytest.fixture
def drawn(tmp_path, rng):
  """Questions about one picture, two pictures of unlike sizes, and none, in the same words."""
  paths = [str(tmp_path / f"{n}.png") for n in range(3)]
  for path, size in zip(paths, ((64, 64), (96, 64), (64, 128)), strict=True):
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
  shown = enumerate((paths[:1], paths[1:], ()))
  return [dataclasses.replace(example("q"), id=f"q{n}", images=tuple(each)) for n, each in shown]


def differing(first, second):
  leaves = zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True)
  return {jax.tree_util.keystr(path) for (path, a), b in leaves if not np.array_equal(a, b)}


def test_blank_pictures_keep_everything_but_the_pixels(processor, drawn):
  shown = processor.prompts(drawn, "think")
  assert differing(evaluation.shown_prompts(processor, drawn, "think"), shown) == set()
  blank = evaluation.shown_prompts(processor, drawn, "think", "blank")
  assert differing(shown, blank) == {".vision.patches"}
  assert shown.vision.patches.any() and not blank.vision.patches.any()
  assert (blank.image_slot >= 0).sum() == 16 + 24 + 32  # 64 pixels a merged token
  assert shown.vision.patches[1].any()  # the cache still holds the real pictures
  assert differing(processor.prompts(drawn, "think"), shown) == set()


def test_a_blank_picture_is_mid_grey(processor, drawn, tmp_path):
  # Zero after normalisation lies between the grey levels 127 and 128.
  blank = evaluation.shown_prompts(processor, drawn[:1], "think", "blank")
  for level, sign in ((127, -1), (128, 1)):
    path = str(tmp_path / f"grey-{level}.png")
    Image.fromarray(np.full((64, 64, 3), level, np.uint8)).save(path)
    grey = processor.prompts([dataclasses.replace(drawn[0], images=(path,))], "think")
    assert differing(grey, blank) == {".vision.patches"}
    np.testing.assert_allclose(grey.vision.patches, sign * 0.5 / 127.5, rtol=1e-4)
  # So it does in the published checkpoints' settings: mean and deviation one half.
  assert set(images.ImageProcessor.from_directory(ASSETS / "confused").mean) == {0.5}


def test_text_alone_has_no_image_tokens(processor, drawn):
  shown = processor.prompts(drawn, "think")
  text = evaluation.shown_prompts(processor, drawn, "think", "text")
  ids = processor.config.image_token_id, processor.config.vision_start_token_id
  assert np.isin(shown.tokens, ids).any() and not np.isin(text.tokens, ids).any()
  assert (text.image_slot == -1).all() and text.vision.patches.size == 0
  # The same words: what is left of the prompt without its pictures, which is what a question without any looks like.
  for row in text.tokens:
    np.testing.assert_array_equal(row, text.tokens[2])
  assert text.row.tolist() == shown.row.tolist()  # and the same random streams
  assert drawn[0].images  # the question itself is as it was
  with pytest.raises(ValueError, match=r"control 'grey' is unknown; use one of \('none', 'blank', 'text'\)"):
    evaluation.shown_prompts(processor, drawn, "think", "grey")


@pytest.mark.parametrize("control", ["none", "blank"])
def test_an_evaluation_asks_under_its_control(processor, drawn, control):
  class Asked(Exception):
    pass

  def sample(batch):
    raise Asked(bool(batch.vision.patches.any()))

  with pytest.raises(Asked, match=str(control == "none")):
    evaluation.evaluate(sample, processor, drawn, batch_size=3, control=control)
