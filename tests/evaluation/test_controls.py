"""What the controls take away: grey pictures of the same size, or none at all; and what is left is chance."""

import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from kepo_jax import evaluation, sharding
from kepo_jax.data import dealing, images, omnimedvqa, prompts, splits
from kepo_jax.data.pipeline import Processor
from kepo_jax.models.qwen3_vl import conversion
from kepo_jax.training import programs
from kepo_jax.types import Example

ASSETS = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "assets" / "phantom"


@pytest.fixture(scope="module")
def processor():
  return Processor.from_directory(ASSETS / "confused", templates=prompts.BRIEF)


@pytest.fixture
def drawn(tmp_path, rng):
  """Questions about one picture, two pictures of unlike sizes, and none."""
  paths = []
  for n, size in enumerate(((64, 64), (96, 64), (64, 128))):
    paths.append(str(tmp_path / f"{n}.png"))
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
  shown = [(paths[0],), (paths[1], paths[2]), ()]
  return [
    Example(id=f"q{n}", question="What organ?", options=("brain", "liver"), answer="A", images=each, modality="MRI")
    for n, each in enumerate(shown)
  ]


def differing(first, second):
  """Names of the arrays that are not equal."""
  leaves = zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True)
  return {jax.tree_util.keystr(path) for (path, a), b in leaves if not np.array_equal(a, b)}


def test_none_changes_nothing(processor, drawn):
  assert differing(evaluation.shown_prompts(processor, drawn, "think"), processor.prompts(drawn, "think")) == set()


def test_blank_pictures_keep_everything_but_the_pixels(processor, drawn):
  shown = processor.prompts(drawn, "think")
  blank = evaluation.shown_prompts(processor, drawn, "think", "blank")
  assert differing(shown, blank) == {".vision.patches"}
  assert shown.vision.patches.any() and not blank.vision.patches.any()
  assert (blank.image_slot >= 0).sum() == 16 + 24 + 32  # 64 pixels a merged token
  assert shown.vision.patches[1].any()  # the cache still holds the real pictures
  assert differing(processor.prompts(drawn, "think"), shown) == set()


def test_a_blank_picture_is_mid_grey(processor, drawn, tmp_path):
  """Zero after normalisation lies between the grey levels 127 and 128."""
  blank = evaluation.shown_prompts(processor, drawn[:1], "think", "blank")
  for level, sign in ((127, -1), (128, 1)):
    path = str(tmp_path / f"grey-{level}.png")
    Image.fromarray(np.full((64, 64, 3), level, np.uint8)).save(path)
    grey = processor.prompts([Example(**{**vars(drawn[0]), "images": (path,)})], "think")
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


def test_an_unknown_control(processor, drawn):
  with pytest.raises(ValueError, match=r"control 'grey' is unknown; use one of \('none', 'blank', 'text'\)"):
    evaluation.shown_prompts(processor, drawn, "think", "grey")


@pytest.mark.slow
def test_a_shipped_model_without_pictures_is_at_chance(processor, mesh_of):
  """Over 100 test questions of each modality: a model that always names the same one is right on it alone."""
  examples = dealing.limited(omnimedvqa.read(splits.phantom_roots()["test"])[0], 100, 0)
  mesh = mesh_of()
  config, params = conversion.load_pretrained(ASSETS / "confused", np.dtype("float32"), mesh, layout="decode")
  settings = programs.SamplingSettings(samples=1, max_new_tokens=24, temperature=0.0)
  program = programs.sampling_program(config, processor, settings)

  def sample(batch):
    return program(params, sharding.place(mesh, batch), jax.random.key(0))

  with jax.set_mesh(mesh):
    for control in ("blank", "text"):
      found = evaluation.evaluate(sample, processor, examples, batch_size=160, control=control)
      chance = found["chance"]["overall"]
      assert chance["accuracy"] == pytest.approx(0.32, abs=0.01)
      assert chance["low"] <= found["overall"]["accuracy"] <= chance["high"], (control, found["overall"], chance)
    with_pictures = evaluation.evaluate(sample, processor, examples[::4], batch_size=160)
  assert with_pictures["overall"]["low"] > with_pictures["chance"]["overall"]["high"]
