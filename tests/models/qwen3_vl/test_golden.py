"""Stored vectors of transformers, without torch: hidden states, logits, gradients, greedy tokens."""

import pathlib

import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import model
from tests.models.qwen3_vl import cases, runs

DIRECTORY = pathlib.Path(__file__).parent / "golden"


class Golden:
  """A case, its parameters and prompts, and what transformers made of them."""

  def __init__(self, case: cases.Case):
    self.config, self.completions = case.config, cases.completions(case)
    self.params = cases.redrawn(model.abstract_params(self.config), seed=cases.GOLDEN_SEED)
    self.prompts, _, _ = cases.make_prompts(self.config, list(case.layouts), extra=case.extra)
    with np.load(DIRECTORY / f"{case.name}.npz", allow_pickle=False) as stored:
      self.stored = dict(stored)

  def expected(self, name: str) -> list[tuple[int, np.ndarray]]:
    """(prompt, array) of every prompt that has one."""
    pairs = [(key.split("/"), value) for key, value in self.stored.items()]
    return [(int(key[1]), value) for key, value in pairs if key[0] == name]


@pytest.fixture(scope="module", params=cases.GOLDEN, ids=lambda case: case.name)
def golden(request):
  return Golden(request.param)


@pytest.fixture(scope="module")
def tower(golden):
  if not golden.expected("blocks"):
    pytest.skip("no images")
  found = runs.tower_outputs(golden.config, golden.params, golden.prompts)
  return {name: np.asarray(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def layers(golden):
  return runs.layer_outputs(golden.config, golden.params, golden.prompts)["layers"]


@pytest.fixture(scope="module")
def backward(golden):
  # Layers recomputed in one case, kept in the other: both are compared with the same reference.
  remat = "full" if golden.prompts.vision.patches.shape[1] else "none"
  return runs.loss_and_gradient(golden.config, golden.params, golden.prompts, golden.completions, remat)


def worst(actual, expected):
  return max(runs.difference(a, e) for a, e in zip(actual, expected, strict=True))


def test_tower_after_every_block(golden, tower):
  for prompt, expected in golden.expected("blocks"):
    assert worst(tower["blocks"][:, prompt, : expected.shape[1]], expected) <= 1e-5


def test_image_tokens(golden, tower):
  for prompt, expected in golden.expected("features"):
    assert runs.difference(tower["features"][prompt, : expected.shape[0]], expected) <= 1e-5


def test_deepstack_features(golden, tower):
  for prompt, expected in golden.expected("deepstack"):
    assert worst(tower["deepstack"][:, prompt, : expected.shape[1]], expected) <= 1e-5


def test_decoder_after_every_layer(golden, layers):
  for prompt, expected in golden.expected("layers"):
    assert worst(layers[:, prompt, : expected.shape[1]], expected) <= 1e-5


def test_logits_and_loss(golden, backward):
  (loss, logits), _ = backward
  assert runs.difference(logits, golden.stored["logits"]) <= 1e-5
  assert float(loss) == pytest.approx(float(golden.stored["loss"]), rel=1e-5)


def test_gradients(golden, backward):
  tensors = cases.as_tensors(golden.config, backward[1])
  for name, value in tensors.items():
    norm, projection = golden.stored[f"gradient/{name}"]
    # A projection on a normal direction has the size of the norm.
    np.testing.assert_allclose(cases.summary(value), [norm, projection], atol=3e-5 * norm, rtol=0, err_msg=name)


def test_greedy_tokens(golden):
  steps = golden.expected("greedy")[0][1].size
  tokens = np.asarray(runs.greedy(golden.config, golden.params, golden.prompts, steps))
  for prompt, expected in golden.expected("greedy"):
    assert tokens[prompt].tolist() == expected.tolist()
