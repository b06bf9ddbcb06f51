"""The same quantities from transformers, one sequence at a time and without padding. Needs torch.

python -m tests.models.qwen3_vl.oracle     # writes the golden vectors that `make test` checks without torch
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
import transformers

from kepo_jax.models.qwen3_vl import checkpoint
from tests.models.qwen3_vl import cases


class Oracle:
  """A transformers model in float32, and the prompts of a case as its inputs."""

  def __init__(self, directory: pathlib.Path, case: cases.Case):
    self.model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
      directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    self.image_token = case.config.image_token_id
    self.prompts, self.tokens, self.grids = case.prompts()

  def inputs(self, prompt: int, completion: list[int] = []) -> dict[str, Any]:  # noqa: B006
    ids = torch.tensor([list(self.tokens[prompt]) + list(completion)])
    self.model.model.rope_deltas = None
    grids = self.grids[prompt]
    if not grids:
      return {"input_ids": ids}
    rows = sum(height * width for _, height, width in grids)
    return {
      "input_ids": ids,
      "pixel_values": torch.tensor(np.asarray(self.prompts.vision.patches[prompt][:rows])),
      "image_grid_thw": torch.tensor(grids),
      "mm_token_type_ids": (ids == self.image_token).int(),
    }

  def layer_outputs(self, prompt: int) -> dict[str, np.ndarray]:
    """Hidden states after every decoder layer (DeepStack added) and every block, and the tower's outputs."""
    decoder, tower = self.model.model.language_model, self.model.model.visual
    layers, blocks, handed = [], [], []

    def entered(_, args, kwargs):
      layers.append((args[0] if args else kwargs["hidden_states"]).detach()[0])

    def left_tower(_, args, out):  # copied at once: the caller splits these fields in place
      handed.extend([out.pooler_output, torch.stack(list(out.deepstack_features))])

    # The input of the next module is the output of a layer after the DeepStack addition.
    next_modules = [*decoder.layers[1:], decoder.norm]
    hooks = [module.register_forward_pre_hook(entered, with_kwargs=True) for module in next_modules]
    hooks += [block.register_forward_hook(lambda _, args, out: blocks.append(out.detach())) for block in tower.blocks]
    hooks.append(tower.register_forward_hook(left_tower))
    with torch.no_grad():
      self.model(**self.inputs(prompt))
    for hook in hooks:
      hook.remove()
    found = {"layers": torch.stack(layers).numpy()}
    if self.grids[prompt]:
      found["blocks"] = torch.stack(blocks).numpy()
      found["features"], found["deepstack"] = (value.numpy() for value in handed)
    return found

  def loss_and_logits(self, completions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Mean negative log-likelihood of all completions, with its graph, and the logits [P, G, T, V]."""
    total, logits = 0.0, []
    for prompt, group in enumerate(completions):
      for completion in group:
        start = len(self.tokens[prompt]) - 1
        found = self.model(**self.inputs(prompt, completion.tolist())).logits[0, start : start + len(completion)]
        targets = torch.tensor(completion.astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(found, targets, reduction="sum")
        logits.append(found.detach().numpy())
    return total / completions.size, np.stack(logits).reshape(*completions.shape, -1)

  def gradient(self, loss: torch.Tensor) -> dict[str, np.ndarray]:
    """Gradient of every parameter by its name in the checkpoint; zeros where the loss does not reach."""
    self.model.zero_grad()
    loss.backward()
    return {
      name: np.zeros(value.shape, np.float32) if value.grad is None else value.grad.numpy()
      for name, value in self.model.named_parameters()
    }

  def greedy(self, prompt: int, steps: int) -> list[int]:
    inputs = self.inputs(prompt)
    out = self.model.generate(
      **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=cases.PAD
    )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def saved(folder: pathlib.Path, case: cases.Case) -> pathlib.Path:
  """A checkpoint of the case, with the case's own config.json: both schemas then reach both readers."""
  checkpoint.save_pretrained(folder, case.config, case.params(), dtype=np.float32)
  (folder / "config.json").write_text(json.dumps(case.record))
  return folder


def arrays(case: cases.Case, steps: int) -> dict[str, np.ndarray]:
  """What transformers makes of a case, by name: `layers/<prompt>` and so on; of gradients the `cases.summary`."""
  with tempfile.TemporaryDirectory() as folder:
    reference = Oracle(saved(pathlib.Path(folder) / "model", case), case)
  found = {}
  for prompt in range(len(case.layouts)):
    found |= {f"{name}/{prompt}": value for name, value in reference.layer_outputs(prompt).items()}
    found[f"greedy/{prompt}"] = np.asarray(reference.greedy(prompt, steps), np.int32)
  loss, logits = reference.loss_and_logits(case.completions())
  found |= {"loss": np.float32(loss.item()), "logits": logits}
  return found | {f"gradient/{name}": cases.summary(value) for name, value in reference.gradient(loss).items()}


if __name__ == "__main__":
  for golden in cases.GOLDEN:
    version = np.asarray(transformers.__version__)
    np.savez_compressed(golden.stored, **arrays(golden, steps=8), transformers=version)
