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
MOST = 8  # tokens that a completion may have, for the constant length of dr_grpo
CAP = 2.0  # of the truncated importance weight
MASKS = {
  "ragged": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]],
  "empty row": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
  "all empty": [[0] * T] * N,
}
# TRL's names of our aggregations. dapo divides by the tokens of all micro-batches, bnpo by those of one, which is the
# whole batch here.
LOSS_TYPES = {
  "grpo": "sequence_mean",
  "dapo": "token_mean",
  "bnpo": "token_mean",
  "dr_grpo": "constant_length",
}
LEVELS = ("token", "sequence")

JSD_CASES = [
  {"weight": weight, "temperature": temperature, "mask": mask}
  for weight, temperature, mask in itertools.product((0, 0.1, 0.5, 0.9, 1), (1.0, 0.7, 2.0), MASKS)
]
# Beyond V - 1 ids TRL's bucket, which is clamped, is no longer empty as ours is.
TOP_K_CASES = [{"weight": weight, "top_k": k} for weight, k in itertools.product((0, 0.5, 1), (1, 3, V - 1))]


def _grpo_case(loss_type, level, beta=0.0, clip=(0.2, 0.2), old="same", mask="ragged", sampler="off"):
  return {
    "loss_type": loss_type, "level": level, "beta": beta, "clip": clip, "old": old, "mask": mask, "sampler": sampler,
  }  # fmt: skip


GRPO_CASES = [
  *itertools.starmap(
    _grpo_case,
    itertools.product(LOSS_TYPES, LEVELS, (0.0, 0.04), ((0.2, 0.2), (0.1, 0.28)), ("same", "different")),
  ),
  *(
    _grpo_case(loss_type, level, beta=0.04, old="different", mask=mask)
    for loss_type, level, mask in itertools.product(LOSS_TYPES, LEVELS, ("empty row", "all empty"))
  ),
  # By tokens alone: TRL's gradient of a sequence's ratio has the mean weight of the sequence, ours each token's own.
  *(
    _grpo_case(loss_type, "token", old=old, mask=mask, sampler="on")
    for loss_type, old, mask in itertools.product(LOSS_TYPES, ("same", "different"), ("ragged", "empty row"))
  ),
]


def named(case: dict[str, Any]) -> str:
  """The name under which the answers to a case are stored."""
  return "; ".join(str(value) for value in case.values())


def arrays(seed: int) -> dict[str, np.ndarray]:
  """Inputs of a case, in numbers short enough to be read."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return np.round(rng.normal(size=shape), 3).astype(np.float32)

  def logps():
    return np.round(rng.uniform(-3.0, -1.0, (N, T)), 3).astype(np.float32)

  return {
    "student": normal(N, T, V) * 2,
    "teacher": normal(N, T, V) * 2,
    "tokens": rng.integers(0, V, (N, T)).astype(np.int32),
    "advantages": normal(N),
    "old_logps": logps(),
    "reference_logps": logps(),
    "sampler_logps": logps(),
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


def trl_top_k(values: dict[str, np.ndarray], case: dict[str, Any]) -> tuple[float, np.ndarray]:
  """Sum over tokens, and gradient of the student's logits, of TRL's divergence on top-k ids and a tail bucket."""
  import torch
  from trl.experimental.server_distillation import server_distillation_trainer as trl

  # In float64: TRL's bucket is 1 - sum, which has few digits left where the rest is small.
  student = torch.tensor(values["student"], dtype=torch.float64, requires_grad=True)
  top, ids = torch.log_softmax(torch.tensor(values["teacher"], dtype=torch.float64), -1).topk(case["top_k"])
  valid = torch.ones_like(ids, dtype=torch.bool)
  sides = torch.log_softmax(student, -1).gather(-1, ids), top
  (coarse, support), (teacher, _) = (trl._add_tail_bucket(side, valid) for side in sides)
  loss = trl._jsd_divergence(coarse, teacher, case["weight"], support).sum()
  loss.backward()
  return loss.item(), student.grad.numpy()


def _stub(case: dict[str, Any], logps: Any, entropy: Any) -> types.SimpleNamespace:
  """What TRL's loss reads of its trainer: one process, one micro-batch, plain k3."""
  accelerator = types.SimpleNamespace(
    gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
  )
  return types.SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropy, None),
    _entropy_bonus_enabled=False,
    _metrics={"train": collections.defaultdict(list)},
    accelerator=accelerator,
    args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    aux_loss_enabled=False,
    beta=case["beta"],
    current_gradient_accumulation_steps=1,
    epsilon_high=case["clip"][1],
    epsilon_low=case["clip"][0],
    importance_sampling_level=case["level"],
    loss_type=case["loss_type"],
    max_completion_length=MOST,
    model=types.SimpleNamespace(training=True),
    off_policy_mask_threshold=None,
    top_entropy_quantile=1.0,
    use_vllm=case["sampler"] == "on",
    vllm_importance_sampling_correction=True,
  )


def trl_grpo(values: dict[str, np.ndarray], case: dict[str, Any]) -> tuple[float, np.ndarray]:
  """Loss, and gradient of the logits, of TRL's GRPO loss."""
  import torch
  from trl.trainer.grpo_trainer import GRPOTrainer

  logits = torch.tensor(values["student"], requires_grad=True)
  distribution = torch.log_softmax(logits, -1)
  tokens = torch.tensor(values["tokens"], dtype=torch.int64)
  logps = distribution.gather(-1, tokens[..., None])[..., 0]
  entropy = -(distribution.exp() * distribution).sum(-1)
  mask = torch.tensor(MASKS[case["mask"]])
  inputs = {
    "prompt_ids": torch.zeros(N, 1, dtype=torch.int64),
    "prompt_mask": torch.ones(N, 1, dtype=torch.int64),
    "completion_ids": tokens,
    "completion_mask": mask,
    "num_items_in_batch": mask.sum(),
    "advantages": torch.tensor(values["advantages"]),
    "ref_per_token_logps": torch.tensor(values["reference_logps"]),
  }
  old_logps = logps.detach()
  if case["old"] == "different":
    old_logps = inputs["old_per_token_logps"] = torch.tensor(values["old_logps"])
  if case["sampler"] == "on":
    # TRL makes the weight while it samples, which needs a model: its mode "token_truncate" in one line.
    weight = ((old_logps - torch.tensor(values["sampler_logps"])) * mask).exp().clamp(max=CAP)
    inputs["importance_sampling_ratio"] = weight
  loss = GRPOTrainer._compute_loss(_stub(case, logps, entropy), None, inputs)
  loss.backward()
  return loss.item(), logits.grad.numpy()


ORACLES = {"jsd": (trl_jsd, JSD_CASES), "top_k": (trl_top_k, TOP_K_CASES), "grpo": (trl_grpo, GRPO_CASES)}


def answer(values: dict[str, np.ndarray], loss: float, gradient: np.ndarray) -> list[float]:
  """What is stored of an answer: loss, norm of the gradient, and gradient along the teacher's logits."""
  gradient = np.float64(gradient)
  return [float(loss), float(np.linalg.norm(gradient)), float((gradient * values["teacher"]).sum())]


def main() -> None:
  values = arrays(seed=7)
  # A line per array and per case. The inputs have three digits, and nine are a float32 exactly.
  digits = {
    name: x.tolist() if x.dtype == np.int32 else np.round(np.float64(x), 3).tolist() for name, x in values.items()
  }
  parts = {"inputs": [f"{json.dumps(name)}: {json.dumps(x)}" for name, x in digits.items()]}
  for objective, (oracle, cases) in ORACLES.items():
    parts[objective] = []
    for case in cases:
      numbers = ", ".join(f"{x:.9g}" for x in answer(values, *oracle(values, case)))
      parts[objective].append(f"{json.dumps(named(case))}: [{numbers}]")
  text = ",\n".join(json.dumps(name) + ": {\n" + ",\n".join(lines) + "\n}" for name, lines in parts.items())
  GOLDEN.write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
  main()
