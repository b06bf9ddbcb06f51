"""The cases on which our objective meets TRL 1.16.0, and TRL's answers to them.

  python -m tests.objectives.trl_oracle     # with torch and trl installed: writes golden/trl.json again

`make test` compares with the stored answers, `make parity` asks TRL again.
"""

import collections
import itertools
import json
import pathlib
import types
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden" / "trl.json"
N, T, V = 4, 5, 7  # rollouts, tokens, vocabulary
MASKS = {
  "ragged": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
  "empty row": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
  "all empty": [[0] * T] * N,
}
JSD_CASES = [
  {"weight": weight, "temperature": temperature, "mask": mask}
  for weight, temperature, mask in itertools.product((0, 0.1, 0.5, 0.9, 1), (1.0, 0.7, 2.0), MASKS)
]
GRPO_CASES = [
  {"beta": beta, "clip": clip, "off_policy": off_policy}
  for beta, clip, off_policy in itertools.product((0.0, 0.04), ((0.2, 0.2), (0.1, 0.28)), (False, True))
]


def arrays(seed: int) -> dict[str, np.ndarray]:
  """Inputs of a case, in numbers short enough to be read."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return np.round(rng.normal(size=shape), 3).astype(np.float32)

  return {
    "student": normal(N, T, V) * 2,
    "teacher": normal(N, T, V) * 2,
    "tokens": rng.integers(0, V, (N, T)).astype(np.int32),
    "advantages": normal(N),
    "old_logps": np.round(rng.uniform(-3.0, -1.0, (N, T)), 3).astype(np.float32),
    "reference_logps": np.round(rng.uniform(-3.0, -1.0, (N, T)), 3).astype(np.float32),
  }


def trl_jsd(values: dict[str, np.ndarray], case: dict[str, Any]) -> tuple[float, np.ndarray]:
  """Loss, and gradient of the student's logits, of TRL's generalised JSD."""
  import torch
  from trl.experimental.gkd.gkd_trainer import GKDTrainer

  student = torch.tensor(values["student"], requires_grad=True)
  labels = torch.where(torch.tensor(MASKS[case["mask"]]) == 1, 0, -100)
  loss = GKDTrainer.generalized_jsd_loss(
    student, torch.tensor(values["teacher"]), labels, beta=case["weight"], temperature=case["temperature"]
  )
  loss.backward()
  return loss.item(), student.grad.numpy()


def trl_grpo(values: dict[str, np.ndarray], case: dict[str, Any]) -> tuple[float, np.ndarray]:
  """Loss, and gradient of the logits, of TRL's GRPO loss with sequence mean and plain k3."""
  import torch
  from trl.trainer.grpo_trainer import GRPOTrainer

  logits = torch.tensor(values["student"], requires_grad=True)
  distribution = torch.log_softmax(logits, -1)
  tokens = torch.tensor(values["tokens"], dtype=torch.int64)
  logps = distribution.gather(-1, tokens[..., None])[..., 0]
  entropy = -(distribution.exp() * distribution).sum(-1)
  accelerator = types.SimpleNamespace(
    gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
  )
  trainer = types.SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropy, None),
    _entropy_bonus_enabled=False,
    _metrics={"train": collections.defaultdict(list)},
    accelerator=accelerator,
    args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
    aux_loss_enabled=False,
    beta=case["beta"],
    current_gradient_accumulation_steps=1,
    epsilon_high=case["clip"][1],
    epsilon_low=case["clip"][0],
    importance_sampling_level="token",
    loss_type="grpo",
    model=types.SimpleNamespace(training=True),
    off_policy_mask_threshold=None,
    top_entropy_quantile=1.0,
    use_vllm=False,
  )
  mask = torch.tensor(MASKS["ragged"])
  inputs = {
    "prompt_ids": torch.zeros(N, 1, dtype=torch.int64),
    "prompt_mask": torch.ones(N, 1, dtype=torch.int64),
    "completion_ids": tokens,
    "completion_mask": mask,
    "advantages": torch.tensor(values["advantages"]),
    "ref_per_token_logps": torch.tensor(values["reference_logps"]),
  }
  if case["off_policy"]:
    inputs["old_per_token_logps"] = torch.tensor(values["old_logps"])
  loss = GRPOTrainer._compute_loss(trainer, None, inputs)
  loss.backward()
  return loss.item(), logits.grad.numpy()


ORACLES = {"jsd": (trl_jsd, JSD_CASES), "grpo": (trl_grpo, GRPO_CASES)}


def main() -> None:
  values = arrays(seed=7)
  record: dict[str, Any] = {"inputs": {name: x.tolist() for name, x in values.items()}}
  for name, (oracle, cases) in ORACLES.items():
    record[name] = []
    for case in cases:
      loss, gradient = oracle(values, case)
      # Nine digits are a float32 exactly; the gradient is stored along one direction to stay readable.
      along = float((gradient * values["teacher"]).sum())
      norm = float(np.linalg.norm(gradient))
      record[name].append(case | {"loss": loss, "gradient_along_teacher": along, "gradient_norm": norm})
  GOLDEN.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
