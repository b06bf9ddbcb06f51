"""Live comparison with transformers in float32: `make parity`."""

import dataclasses

import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import conversion, model
from tests.models.qwen3_vl import cases, runs

pytest.importorskip("torch")
pytestmark = pytest.mark.parity

STEPS = 32


@dataclasses.dataclass(frozen=True)
class Run:
  """A case with its parameters, its inputs and its oracle."""

  case: cases.Case
  params: dict
  prompts: object
  oracle: object


@pytest.fixture(scope="module", params=cases.CASES, ids=lambda case: case.name)
def run(request, tmp_path_factory):
  from tests.models.qwen3_vl import oracle

  case = request.param
  directory = tmp_path_factory.mktemp(case.name) / "model"
  params = cases.redrawn(model.abstract_params(case.config), seed=len(case.name))
  conversion.save_pretrained(directory, case.config, params, dtype=np.float32)
  prompts, tokens, grids = cases.make_prompts(case.config, list(case.layouts), extra=case.extra)
  # The record of the case, not the one that the export wrote: both schemas then reach both readers.
  (directory / "config.json").write_text(cases.as_json(case.record))
  return Run(case, params, prompts, oracle.Oracle(directory, case, prompts, tokens, grids))


def valid_rows(prompts, prompt):
  """Real tokens, patch rows and image tokens of one prompt."""
  slots = np.asarray(prompts.image_slot[prompt])
  return {
    "layers": int(prompts.mask[prompt].sum()),
    "blocks": int((prompts.vision.segments[prompt] >= 0).sum()),
    "features": int((slots >= 0).sum()),
    "deepstack": int((slots >= 0).sum()),
  }


def test_hidden_states_after_every_layer(run):
  found = runs.layer_outputs(run.case.config, run.params, run.prompts)
  for prompt in range(len(run.case.layouts)):
    rows = valid_rows(run.prompts, prompt)
    for name, expected in run.oracle.layer_outputs(prompt).items():
      actual = found[name][prompt] if name == "features" else found[name][:, prompt]
      actual = actual[..., : rows[name], :]
      per_layer = [runs.difference(a, e) for a, e in zip(actual, expected, strict=True)] if actual.ndim == 3 else []
      assert max([runs.difference(actual, expected), *per_layer]) <= 1e-5, (name, prompt, per_layer)


def test_logits_loss_and_gradients(run):
  completions = cases.completions(run.case)
  (loss, logits), gradient = runs.loss_and_gradient(run.case.config, run.params, run.prompts, completions)
  expected_loss, expected_logits = run.oracle.loss_and_logits(completions)
  assert runs.difference(logits, expected_logits) <= 1e-5
  assert float(loss) == pytest.approx(expected_loss.item(), rel=1e-5)
  expected = run.oracle.gradient(expected_loss)
  stored = cases.as_tensors(run.case.config, gradient)
  # transformers lists the tied head once, as the embedding.
  assert stored.keys() == expected.keys()
  for name, value in stored.items():
    if not np.any(expected[name]):
      assert not np.any(value), name  # without images the tower has no gradient
      continue
    assert runs.difference_in_norm(value, expected[name]) <= 3e-5, name


def test_greedy_tokens(run):
  tokens = np.asarray(runs.greedy(run.case.config, run.params, run.prompts, STEPS))
  for prompt in range(len(run.case.layouts)):
    assert tokens[prompt].tolist() == run.oracle.greedy(prompt, STEPS)


def test_transformers_and_back_is_bit_exact(run, tmp_path):
  import torch

  stored = {name: value.detach().numpy() for name, value in run.oracle.model.state_dict().items()}
  run.oracle.model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
  config, params = conversion.load_pretrained(tmp_path / "theirs")
  assert config == run.case.config
  conversion.save_pretrained(tmp_path / "ours", config, params, source=tmp_path / "theirs", dtype=np.float32)
  back = type(run.oracle.model).from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
  assert back.keys() == stored.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value.numpy(), stored[name], err_msg=name)
