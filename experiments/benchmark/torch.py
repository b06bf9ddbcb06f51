"""The step of `experiments.benchmark` in torch, as transformers and TRL run it: every rollout a row of its own.

Sampling is `generate` with num_return_sequences. Scoring is a forward pass of the teacher over prompts and completions,
G times each; logits are made for completions alone. The update is one forward and backward pass of the student, the
policy term and the generalised JSD on its logits, clipping and AdamW. With trl, the loss is `GRPOTrainer._compute_loss`
and the divergence `GKDTrainer.generalized_jsd_loss` on the same logits: one forward pass, which favours TRL, whose own
trainers would each make one.
"""

import collections
import importlib.metadata
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
import transformers

from experiments.benchmark import step
from kepo_jax import sharding
from kepo_jax.config import Config
from kepo_jax.models.qwen3_vl import side_files
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.planning.compile import special_tokens

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_comparable(config: Config) -> None:
  """Refuses a comparison in which one side would do work that the other is spared.

  Args:
    config: of the run; a frozen vision tower is frozen on both sides.

  Raises:
    ValueError: the step has something that is not made in torch here.
  """
  wanted = {
    "model.lora_rank": (config.model.lora_rank, 0),
    "objective.reference_weight": (config.objective.reference_weight, 0),
    "batch.updates": (config.batch.updates, 1),
  }
  for name, (value, needed) in wanted.items():
    if value != needed:
      raise ValueError(f"--against runs no step with {name}={value} in torch; pass --config.{name}={needed}.")


class Rival:
  """The models and the batch of a benchmark in torch."""

  def __init__(self, ours: step.Benchmark, *, trl: bool = False):
    """Makes random models of the same sizes.

    Args:
      ours: what is run beside it.
      trl: use TRL's losses.

    Raises:
      ImportError: trl is wanted and not installed.
      ValueError: the step of the config cannot be compared.
    """
    check_comparable(ours.config)
    torch.manual_seed(0)
    self._threads = torch.get_num_threads()
    self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self._config, self._sizes = ours.config, ours.sizes
    self._special = special_tokens(ours.configs["student"])
    self._samples = ours.config.batch.rollouts
    dtype = _DTYPES[ours.config.model.compute_dtype]
    self._autocast = dtype if dtype != torch.float32 else None
    self._student = self._model(ours.configs["student"], torch.float32)
    others = [config for role, config in ours.configs.items() if role == "teacher"]
    frozen = _DTYPES[ours.config.model.teacher_dtype]
    self._teacher = self._model(others[0], frozen).requires_grad_(False) if others else None
    if ours.config.model.freeze_vision:
      self._student.model.visual.requires_grad_(False)
    trained = [weight for weight in self._student.parameters() if weight.requires_grad]
    self._optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
    self._prompts = self._batch(ours)
    self._loss = _trl_loss(ours.config) if trl else _plain_loss
    self._name = f"trl {_version('trl')}" if trl else f"transformers {transformers.__version__}"
    self.seconds: dict[str, list[float]] = collections.defaultdict(list)

  def _model(self, config: Qwen3VLConfig, dtype: torch.dtype) -> Any:
    record = transformers.Qwen3VLConfig.from_dict(side_files.config_record(config))
    record._attn_implementation = "sdpa"
    model: Any = transformers.Qwen3VLForConditionalGeneration(record)
    return model.to(self._device, dtype).eval()

  def _batch(self, ours: step.Benchmark) -> dict[str, torch.Tensor]:
    host = jax.tree.map(sharding.to_host, ours.prompts)
    config = ours.configs["student"]
    tokens = torch.tensor(np.array(host.tokens), dtype=torch.long)
    batch = {
      "input_ids": tokens,
      "attention_mask": torch.ones_like(tokens),
      "mm_token_type_ids": (tokens == config.image_token_id).long(),
    }
    if self._sizes.image_tokens:
      grid = host.vision.coordinates[0].max(axis=0) + 1
      batch["pixel_values"] = torch.tensor(np.array(host.vision.patches)).flatten(0, 1)
      batch["image_grid_thw"] = torch.tensor([[1, *grid.tolist()]] * len(tokens))
    return {name: value.to(self._device) for name, value in batch.items()}

  def turn(self, *, timed: bool) -> None:
    """One step; its seconds are kept where it is timed."""
    taken: dict[str, float] = {}
    rollouts = self._timed(taken, "sampling", self._sampled)
    rows = self._rows(rollouts)
    scored = self._timed(taken, "scoring", lambda: self._scored(rows)) if self._teacher is not None else None
    self._timed(taken, "update", lambda: self._updated(rows, scored))
    if timed:
      for name, seconds in taken.items():
        self.seconds[name].append(seconds)

  def _timed(self, taken: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    if self._device.type == "cuda":
      torch.cuda.synchronize()
    taken[name] = time.perf_counter() - start
    return result

  def _context(self) -> torch.autocast:
    return torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None)

  @torch.no_grad()
  def _sampled(self) -> torch.Tensor:
    """int64[P G, S + T], of which none has ended early."""
    with self._context():
      return self._student.generate(
        **self._prompts,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=self._samples,
        max_new_tokens=self._sizes.new_tokens,
        min_new_tokens=self._sizes.new_tokens,
        pad_token_id=self._special.pad_id,
        eos_token_id=self._special.end_ids[0],
      )

  def _rows(self, rollouts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass over whole rows, images and prompts repeated for each of them."""
    # `generate` bans nothing, and a forward pass refuses an image token without an image.
    length = self._prompts["input_ids"].shape[1]
    usable = torch.tensor(self._special.allowed, device=self._device)[rollouts[:, length:]]
    rollouts = torch.cat([rollouts[:, :length], torch.where(usable, rollouts[:, length:], 1)], dim=1)
    rows = {"input_ids": rollouts, "attention_mask": torch.ones_like(rollouts)}
    types = self._prompts["mm_token_type_ids"].repeat_interleave(self._samples, 0)
    rows["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, self._sizes.new_tokens))
    if "pixel_values" in self._prompts:
      grids = self._prompts["image_grid_thw"]
      images = self._prompts["pixel_values"].unflatten(0, (len(grids), -1))
      rows["pixel_values"] = images.repeat_interleave(self._samples, 0).flatten(0, 1)
      rows["image_grid_thw"] = grids.repeat_interleave(self._samples, 0)
    return rows

  def _logits(self, model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """[P G, T, V], each predicting its completion token."""
    with self._context():
      return model(**rows, logits_to_keep=self._sizes.new_tokens + 1, use_cache=False).logits[:, :-1]

  @torch.no_grad()
  def _scored(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    return self._logits(self._teacher, rows)

  def _updated(self, rows: dict[str, torch.Tensor], scored: torch.Tensor | None) -> None:
    tokens = rows["input_ids"][:, -self._sizes.new_tokens :]
    advantages = torch.linspace(-1, 1, len(tokens), device=self._device)
    loss = self._loss(self._logits(self._student, rows).float(), scored, tokens, advantages)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._student.parameters(), self._config.optimizer.clip_norm)
    self._optimizer.step()
    self._optimizer.zero_grad()

  def record(self, result: dict[str, Any]) -> dict[str, Any]:
    """Returns medians of both and their ratios, for `result` of `experiments.benchmark.record`."""
    phases = {}
    theirs = {name: statistics.median(seconds) for name, seconds in self.seconds.items()}
    mine = {name: result["phases"][name]["seconds"] for name in theirs}
    mine["sampling"] += result["phases"]["decode weights"]["seconds"]
    if "scoring" in theirs:
      for each in (theirs, mine):
        each["scoring and update"] = each["scoring"] + each["update"]
    for each in (theirs, mine):
      each["step"] = sum(each[name] for name in self.seconds)
    for name, seconds in theirs.items():
      phases[name] = {"torch": seconds, "ours": mine[name], "ratio": seconds / mine[name]}
    return {
      "name": f"{self._name}, torch {torch.__version__}",
      "threads": self._threads,
      "phases": phases,
    }


def _plain_loss(
  student: torch.Tensor, teacher: torch.Tensor | None, tokens: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
  """Policy term with a ratio of one, and the JSD of weight 0.5 where there is a teacher."""
  logps = student.log_softmax(-1)
  chosen = logps.gather(-1, tokens[..., None])[..., 0]
  loss = -(torch.exp(chosen - chosen.detach()) * advantages[:, None]).mean()
  if teacher is None:
    return loss
  other = teacher.float().log_softmax(-1)
  mixture = torch.logaddexp(logps, other) - np.log(2.0)
  jsd = 0.5 * (logps.exp() * (logps - mixture) + other.exp() * (other - mixture)).sum(-1)
  return loss + jsd.mean()


def _trl_loss(config: Config) -> Callable[..., torch.Tensor]:
  """GRPO as TRL's trainer computes it, plus the JSD of its GKD trainer."""
  from trl import GRPOTrainer
  from trl.experimental.gkd.gkd_trainer import GKDTrainer
  from trl.trainer.utils import selective_log_softmax

  objective = config.objective

  def loss(student, teacher, tokens, advantages):
    chosen = selective_log_softmax(student, tokens)
    mask = torch.ones_like(tokens)
    inputs = {
      "prompt_ids": tokens[:, :0],
      "prompt_mask": tokens[:, :0],
      "completion_ids": tokens,
      "completion_mask": mask,
      "advantages": advantages,
      "num_items_in_batch": mask.sum(),
    }
    total = GRPOTrainer._compute_loss(_trainer(objective, tokens.shape[1], chosen), None, inputs)
    if teacher is not None:
      labels = torch.zeros_like(tokens)
      total = total + GKDTrainer.generalized_jsd_loss(student, teacher.float(), labels, beta=0.5)
    return total

  return loss


def _trainer(objective: Any, most_tokens: int, logps: torch.Tensor) -> Any:
  """What TRL's loss reads of its trainer: one process, one micro-batch; entropies are not asked for."""
  accelerator = types.SimpleNamespace(
    gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
  )
  entropies = torch.zeros_like(logps)
  return types.SimpleNamespace(
    _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
    _entropy_bonus_enabled=False,
    _metrics={"train": collections.defaultdict(list)},
    accelerator=accelerator,
    args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    aux_loss_enabled=False,
    beta=0.0,
    current_gradient_accumulation_steps=1,
    epsilon_high=objective.clip_high,
    epsilon_low=objective.clip_low,
    importance_sampling_level="token",
    loss_type="grpo",
    max_completion_length=most_tokens,
    model=types.SimpleNamespace(training=True),
    off_policy_mask_threshold=None,
    top_entropy_quantile=1.0,
    use_vllm=False,
    vllm_importance_sampling_correction=False,
  )


def _version(package: str) -> str:
  return importlib.metadata.version(package)
