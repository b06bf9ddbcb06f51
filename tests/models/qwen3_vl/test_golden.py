"""Against transformers: vectors that are stored for `make test`, and further models live in `make parity`."""

import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import checkpoint
from tests.models.qwen3_vl import cases, runs

LIVE = [pytest.param(case, marks=pytest.mark.parity) for case in cases.CASES]


class Reference:
  def __init__(self, case: cases.Case):
    self.case, self.config, self.params, self.completions = case, case.config, case.params(), case.completions()
    self.prompts, _, _ = case.prompts()
    if case in cases.GOLDEN:
      with np.load(case.stored, allow_pickle=False) as stored:
        self.arrays = dict(stored)
    else:
      pytest.importorskip("torch")
      from tests.models.qwen3_vl import oracle

      self.arrays = oracle.arrays(case, steps=16)

  def expected(self, name: str) -> list[tuple[int, np.ndarray]]:
    """(prompt, array) of every prompt that has one."""
    pairs = [(key.split("/"), value) for key, value in self.arrays.items()]
    return [(int(key[1]), value) for key, value in pairs if key[0] == name]


@pytest.fixture(scope="module", params=[*cases.GOLDEN, *LIVE], ids=lambda case: case.name)
def reference(request):
  return Reference(request.param)


@pytest.fixture(scope="module")
def backward(reference):
  # Layers recomputed in some cases, kept in the others: all are compared with the same reference.
  remat = "none" if reference.case.name == "text_untied" else "full"
  return runs.loss_and_gradient(reference.config, reference.params, reference.prompts, reference.completions, remat)


def test_hidden_states_after_every_layer(reference):
  """Of decoder and tower, and what the tower hands over."""
  found = runs.layer_outputs(reference.config, reference.params, reference.prompts)
  assert len(reference.expected("layers")) == len(reference.case.layouts)
  for name, actual in found.items():
    for prompt, expected in reference.expected(name):
      layers = [(actual[prompt], expected)] if name == "features" else zip(actual[:, prompt], expected, strict=True)
      for number, (mine, theirs) in enumerate(layers):
        assert runs.difference(mine[: len(theirs)], theirs) <= 1e-5, (name, prompt, number)


def test_logits_and_loss(reference, backward):
  (loss, logits), _ = backward
  assert runs.difference(logits, reference.arrays["logits"]) <= 1e-5
  assert float(loss) == pytest.approx(float(reference.arrays["loss"]), rel=1e-5)


def test_gradients(reference, backward):
  found = cases.as_tensors(reference.config, backward[1])
  # transformers lists the tied head once, as the embedding.
  assert {f"gradient/{name}" for name in found} == {name for name in reference.arrays if name.startswith("gradient/")}
  for name, value in found.items():
    norm, projection = reference.arrays[f"gradient/{name}"]
    # A projection on a normal direction has the size of the norm.
    np.testing.assert_allclose(cases.summary(value), [norm, projection], atol=3e-5 * norm, rtol=0, err_msg=name)


def test_greedy_tokens(reference):
  expected = np.stack([tokens for _, tokens in reference.expected("greedy")])
  steps = expected.shape[1]
  np.testing.assert_array_equal(runs.greedy(reference.config, reference.params, reference.prompts, steps), expected)


@pytest.mark.parity
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_transformers_and_back_is_bit_exact(case, tmp_path):
  torch = pytest.importorskip("torch")
  from tests.models.qwen3_vl import oracle

  theirs = oracle.Oracle(oracle.saved(tmp_path / "model", case), case).model
  theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
  config, params = checkpoint.load_pretrained(tmp_path / "theirs")
  assert config == case.config
  checkpoint.save_pretrained(tmp_path / "ours", config, params, source=tmp_path / "theirs", dtype=np.float32)
  back = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
  stored = theirs.state_dict()
  assert back.keys() == stored.keys()
  for name, value in back.items():
    np.testing.assert_array_equal(value.numpy(), stored[name].numpy(), err_msg=name)
