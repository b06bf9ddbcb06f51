"""Writes the golden vectors that `make test` checks without torch.

  python -m tests.models.qwen3_vl.make_golden

Parameters and inputs come from seeds (`cases`), so a file holds only what transformers makes of them: hidden states
after every layer, the tower's outputs, logits, greedy tokens, and of each gradient its norm and one projection.
"""

import pathlib
import tempfile

import numpy as np
import transformers

from kepo_jax.models.qwen3_vl import conversion, model
from tests.models.qwen3_vl import cases, oracle

DIRECTORY = pathlib.Path(__file__).parent / "golden"
STEPS = 8


def golden(case: cases.Case) -> dict[str, np.ndarray]:
  """Arrays by name: `layers/<prompt>` and so on."""
  params = cases.redrawn(model.abstract_params(case.config), seed=cases.GOLDEN_SEED)
  prompts, tokens, grids = cases.make_prompts(case.config, list(case.layouts), extra=case.extra)
  with tempfile.TemporaryDirectory() as folder:
    directory = pathlib.Path(folder) / "model"
    conversion.save_pretrained(directory, case.config, params, dtype=np.float32)
    (directory / "config.json").write_text(cases.as_json(case.record))
    reference = oracle.Oracle(directory, case, prompts, tokens, grids)
  arrays = {}
  for prompt in range(len(case.layouts)):
    arrays |= {f"{name}/{prompt}": value for name, value in reference.layer_outputs(prompt).items()}
    arrays[f"greedy/{prompt}"] = np.asarray(reference.greedy(prompt, STEPS), np.int32)
  loss, logits = reference.loss_and_logits(cases.completions(case))
  arrays |= {"loss": np.float32(loss.item()), "logits": logits}
  for name, value in reference.gradient(loss).items():
    arrays[f"gradient/{name}"] = cases.summary(value)
  return arrays


def main() -> None:
  DIRECTORY.mkdir(exist_ok=True)
  for case in cases.GOLDEN:
    arrays = golden(case) | {"transformers": np.asarray(transformers.__version__)}
    np.savez_compressed(DIRECTORY / f"{case.name}.npz", **arrays)
    print(f"{case.name}: {len(arrays)} arrays")


if __name__ == "__main__":
  main()
