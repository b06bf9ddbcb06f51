"""A shipped student, saved by us and loaded by transformers, answers real questions with the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sampling
from kepo_jax.data import omnimedvqa, pipeline, prompts, splits
from kepo_jax.models.qwen3_vl import conversion
from tests.conftest import ROOT

NEW_TOKENS = 24
STUDENT = ROOT / "experiments" / "assets" / "phantom" / "confused"

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The folder that a run would leave in WORKDIR/model."""
  folder = tmp_path_factory.mktemp("export") / "model"
  config, params = conversion.load_pretrained(STUDENT, jnp.float32)
  conversion.save_pretrained(folder, dataclasses.replace(config, attention="plain"), params, source=STUDENT)
  return folder


@pytest.fixture(scope="module")
def questions():
  """One test question of each modality."""
  examples, _ = omnimedvqa.read(splits.phantom_roots()["test"])
  return list({example.modality: example for example in examples}.values())


def ours(folder, examples):
  """Greedy tokens int32[P, T] and their mask, and the prompts."""
  config, params = conversion.load_pretrained(folder, jnp.float32)
  processor = pipeline.Processor.from_directory(folder, templates=prompts.BRIEF)
  batch = processor.prompts(examples, "evaluation")
  rollouts = jax.jit(
    lambda params, batch: sampling.sample(
      config,
      params,
      batch,
      jax.random.key(0),
      samples=1,
      max_new_tokens=NEW_TOKENS,
      end_ids=processor.end_ids,
      pad_id=processor.pad_id,
      allowed=jnp.asarray(processor.allowed),
      temperature=0.0,
    )
  )(params, batch)
  return np.asarray(rollouts.tokens)[:, 0], np.asarray(rollouts.mask)[:, 0], batch


def test_transformers_generates_the_same_tokens(exported, questions):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  tokens, mask, batch = ours(exported, questions)
  for p, example in enumerate(questions):
    real = batch.mask[p]
    inputs = {
      "input_ids": torch.tensor(batch.tokens[p][real][None].astype(np.int64)),
      "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
      "pixel_values": torch.tensor(batch.vision.patches[p]),
      "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
      output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, int(real.sum()) :]
    mine = tokens[p][mask[p]].tolist()
    assert output.tolist() == mine, (example.id, tokenizer.decode(output), tokenizer.decode(mine))
    assert "<answer>" in tokenizer.decode(mine)
