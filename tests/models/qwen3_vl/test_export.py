"""A shipped student, saved by us and loaded by transformers, answers real questions with the same tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sampling
from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts, splits
from kepo_jax.data.readers import omnimedvqa
from kepo_jax.models.qwen3_vl import checkpoint
from tests.conftest import ROOT

NEW_TOKENS = 24
STUDENT = ROOT / "experiments" / "assets" / "phantom" / "confused"


@pytest.mark.parity
def test_transformers_generates_the_same_tokens(tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = tmp_path / "model"  # as a run leaves it
  config, params = checkpoint.load_pretrained(STUDENT, jnp.float32)
  checkpoint.save_pretrained(folder, dataclasses.replace(config, attention="plain"), params, source=STUDENT)
  examples, _ = omnimedvqa.read(splits.phantom_roots()["test"])
  questions = list({example.modality: example for example in examples}.values())  # one of each

  config, params = checkpoint.load_pretrained(folder, jnp.float32)
  processor = processor_lib.Processor.from_directory(folder, templates=prompts.BRIEF)
  batch = processor.prompts(questions, "evaluation")
  greedy = functools.partial(sampling.sample, samples=1, max_new_tokens=NEW_TOKENS, temperature=0.0)
  special = {"end_ids": processor.end_ids, "pad_id": processor.pad_id, "allowed": jnp.asarray(processor.allowed)}
  rollouts = jax.jit(lambda *x: greedy(config, *x, jax.random.key(0), **special))(params, batch)

  model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
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
      theirs = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, int(real.sum()) :]
    ours = rollouts.tokens[p, 0][rollouts.mask[p, 0]].tolist()
    assert theirs.tolist() == ours, (example.id, tokenizer.decode(theirs), tokenizer.decode(ours))
    assert "<answer>" in tokenizer.decode(ours)
