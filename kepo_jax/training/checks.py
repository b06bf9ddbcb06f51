"""What is refused, or warned of, before anything large is loaded."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from absl import logging

from kepo_jax import exploration, rewards
from kepo_jax.data import images, pipeline, prompts, tokenization
from kepo_jax.models.qwen3_vl import attention, layers, lora
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import advantages, divergences, gates, ratios, weights
from kepo_jax.training import groups, inputs, moments, residence

DTYPES = ("float32", "bfloat16", "float16")
# Largest value of each signal of the gate; accuracy and format are at most 1.
GATE_MAXIMUM = {"accuracy": 1.0, "mean": 1.0, "sum": 2.0, "product": 1.0}
# Fields with a few legal values, and those values.
CHOICES: Mapping[str, Sequence[str]] = {
  "model.compute_dtype": ("float32", "bfloat16"),  # float16 has no room for the gradients of a large vocabulary
  "model.teacher_dtype": DTYPES,
  "model.teacher_memory": residence.PLACES,
  "model.remat": layers.REMAT,
  "model.attention": attention.FORMS,
  "data.resize": tuple(images.RESIZES),
  "data.prompt": ("think", "no_think"),
  "data.templates": tuple(prompts.TEMPLATES),
  "reward.convention": tuple(rewards.CONVENTIONS),
  "reward.combination": rewards.COMBINATIONS,
  "objective.advantage": tuple(advantages.ESTIMATORS),
  "objective.aggregation": weights.AGGREGATIONS,
  "objective.ratio": ("token", "sequence"),
  "objective.off_context": inputs.OFF_CONTEXT,
  "objective.distill_schedule": ("constant", "linear"),
  "objective.divergence": divergences.KINDS,
  "objective.distill_normaliser": weights.NORMALISERS,
  "objective.gate_signal": tuple(groups.GATE_SIGNALS),
  "objective.gate_mode": gates.MODES,
  "objective.reference_estimator": tuple(ratios.KL_ESTIMATORS),
  "optimizer.moments": moments.DTYPES,
  "supervised.source": ("none", "answer", "teacher"),
  "exploration.trigger": exploration.TRIGGERS,
  "exploration.hints": exploration.HINTS,
  "exploration.hint_prompt": ("hint_only", "hint_and_answer"),
  "exploration.acceptance": exploration.RULES,
  "eval.prompt": ("evaluation", "no_think"),
  "checkpoint.best": ("none", "in_domain", "out_of_domain", "overall"),
}
# What users of TRL may write instead, and what does the same here.
ELSEWHERE: Mapping[str, str] = {
  "grpo": "objective.advantage=group_std with objective.aggregation=sequence_mean",
  "dapo": "objective.aggregation=token_mean",
  "bnpo": "objective.aggregation=token_mean, over the global batch: one of a micro-batch would depend on their number",
  "dr_grpo": "objective.advantage=no_std with objective.aggregation=constant_length",
  "gspo": "objective.ratio=sequence",
  "group": "objective.advantage=group_std",
  "batch": "objective.advantage=batch_std",
  "loo": "objective.advantage=rloo",
  "forward": "objective.divergence=forward_kl",
  "reverse": "objective.divergence=reverse_kl",
}
# Fields with a smallest legal value.
LEAST: Mapping[str, float] = {
  "model.lora_rank": 0,
  "mesh.data": -1,
  "mesh.fsdp": 1,
  "mesh.tensor": 1,
  "batch.prompts": 1,
  "batch.rollouts": 1,
  "batch.on_policy_fraction": 0,
  "batch.updates": 1,
  "batch.micro_batches": 1,
  "sampling.max_new_tokens": 1,
  "sampling.top_k": 0,
  "sampling.dynamic_rounds": 0,
  "objective.policy_weight": 0,
  "objective.clip_low": 0,
  "objective.clip_high": 0,
  "objective.importance_cap": 0,
  "objective.divergence_weight": 0,
  "objective.divergence_top_k": 0,
  "objective.distill_weight": 0,
  "objective.reference_weight": 0,
  "objective.supervised_weight": 0,
  "objective.chunk": 1,
  "supervised.temperature": 0,
  "exploration.replacements": 0,
  "exploration.rounds": 0,
  "exploration.candidates": 0,
  "exploration.quoted_words": 0,
  "exploration.hint_tokens": 1,
  "exploration.hint_temperature": 0,
  "optimizer.learning_rate": 0,
  "optimizer.b1": 0,
  "optimizer.b2": 0,
  "optimizer.warmup_steps": 0,
  "optimizer.weight_decay": 0,
  "optimizer.skip_limit": 1,
  "train.steps": 1,
  "eval.every": 0,
  "eval.prompts": 1,
  "eval.max_new_tokens": 1,
  "checkpoint.every": 0,
  "checkpoint.minutes": 0,
  "checkpoint.keep": 1,
  "log.samples": 0,
  "log.gradients_every": 0,
  "log.stall_seconds": 0,
  "profile.steps": 0,
}


def explores(config: Any) -> bool:
  """Whether the config asks for hints at all."""
  return config.exploration.trigger != "never" and config.exploration.rounds > 0 and config.exploration.replacements > 0


def teacher_answers(config: Any) -> bool:
  """Whether the teacher writes supervised rows."""
  return config.batch.on_policy_fraction < 1 and config.supervised.source == "teacher"


def needs_teacher(config: Any) -> bool:
  """Whether the teacher is loaded."""
  return bool(config.objective.distill_weight) or explores(config) or teacher_answers(config)


def check_config(config: Any) -> None:
  """Refuses values that would fail later, or silently do something else.

  Raises:
    ValueError: the field, its value and the way out.
  """
  for field, choices in CHOICES.items():
    if (value := _value(config, field)) not in choices:
      hint = f" (what others call {value} is {ELSEWHERE[value]})" if value in ELSEWHERE else ""
      raise ValueError(f"{field}={value!r} is unknown; use one of {sorted(choices)}{hint}.")
  for field, least in LEAST.items():
    value = _value(config, field)
    if not (math.isfinite(value) and value >= least):
      raise ValueError(f"{field}={value} is too small; use {least} or more.")
  if config.seed < 0:
    raise ValueError(f"seed={config.seed} must be 0 or more.")
  if not config.mesh.data:
    raise ValueError("mesh.data=0 is a mesh without devices; use -1 for all that fsdp and tensor leave, or 1 or more.")
  _check_lora(config.model)
  _check_sampling(config)
  _check_rows(config)
  _check_terms(config)


def _check_lora(model: Any) -> None:
  if not model.lora_rank:
    return
  if not (math.isfinite(model.lora_alpha) and model.lora_alpha > 0):
    raise ValueError(f"model.lora_alpha={model.lora_alpha} must lie above 0, or the matrices of LoRA change nothing.")
  targets = tuple(model.lora_targets)
  unknown = [target for target in targets if target not in lora.TARGETS]
  if unknown or not targets or len(set(targets)) < len(targets):
    raise ValueError(
      f"model.lora_targets={targets} must name one or more of {sorted(lora.TARGETS)}, each once"
      + (f"; {unknown} are no projections of the decoder." if unknown else ".")
    )


def check_rank(config: Any, student: Qwen3VLConfig) -> None:
  """Refuses matrices of LoRA that are not smaller than the weights they stand for.

  Raises:
    ValueError: the rank, and the largest that this student allows.
  """
  rank = config.model.lora_rank
  if rank and rank > (largest := lora.largest_rank(student.text, tuple(config.model.lora_targets))):
    raise ValueError(
      f"model.lora_rank={rank} is no lower than a side of the weights of {config.model.student}; "
      f"use {largest} or less, or 0 to train the weights themselves."
    )


def _check_sampling(config: Any) -> None:
  if config.sampling.temperature <= 0:
    raise ValueError(f"sampling.temperature={config.sampling.temperature} gives G equal rollouts; use a value above 0.")
  if not 0 < config.sampling.top_p <= 1:
    raise ValueError(f"sampling.top_p={config.sampling.top_p} must lie above 0 and at most at 1.")
  for name in ("b1", "b2"):
    if not config.optimizer[name] < 1:
      raise ValueError(f"optimizer.{name}={config.optimizer[name]} must lie in [0, 1).")
  if not config.optimizer.eps > 0:
    raise ValueError(f"optimizer.eps={config.optimizer.eps} must lie above 0.")
  if not config.optimizer.clip_norm > 0:
    raise ValueError(f"optimizer.clip_norm={config.optimizer.clip_norm} leaves no gradient; use a value above 0.")
  if config.objective.distill_temperature <= 0:
    raise ValueError(f"objective.distill_temperature={config.objective.distill_temperature} must lie above 0.")


def _check_rows(config: Any) -> None:
  """Prompts, rollouts, and who writes them."""
  batch, fraction, source = config.batch, config.batch.on_policy_fraction, config.supervised.source
  if batch.prompts % batch.micro_batches:
    raise ValueError(
      f"batch.prompts={batch.prompts} does not divide into batch.micro_batches={batch.micro_batches} parts."
    )
  own = fraction * batch.rollouts
  if fraction > 1 or abs(own - round(own)) > 1e-6:
    raise ValueError(
      f"batch.on_policy_fraction={fraction} of batch.rollouts={batch.rollouts} is {own:g} rollouts; "
      f"use a multiple of 1/{batch.rollouts} from 0 to 1."
    )
  if fraction < 1 and source == "none":
    raise ValueError(
      f"batch.on_policy_fraction={fraction} leaves rows to others; set supervised.source to answer or teacher."
    )
  if explores(config) and not config.exploration.replacements < round(own):
    raise ValueError(
      f"exploration.replacements={config.exploration.replacements} must lie in 0..{max(0, round(own) - 1)}, "
      "so that a group keeps a rollout of its own."
    )
  if config.sampling.dynamic_rounds and not round(own):
    raise ValueError(
      "sampling.dynamic_rounds looks at the student's rollouts, and batch.on_policy_fraction=0 has none."
    )
  if needs_teacher(config) and not config.model.teacher:
    raise ValueError(
      "distillation, hints and the teacher's answers need model.teacher; set it, or use experiments/configs/grpo.py."
    )


def _check_gate(objective: Any) -> None:
  """A gate that can never open, or never close although it is asked to."""
  tau, largest = objective.gate_threshold, GATE_MAXIMUM[objective.gate_signal]
  closed = {"positive": not tau <= largest, "negative": not tau > 0, "none": False}[objective.gate_mode]
  if objective.distill_weight and closed:
    raise ValueError(
      f"objective.gate_threshold={tau} with gate_mode={objective.gate_mode} distils nothing: gate_signal="
      f"{objective.gate_signal} lies between 0 and {largest:g}."
    )


def warn_of_prompts(config: Any) -> None:
  """Says when the prompt asks for another format than the reward wants."""
  alone, wanted = config.data.prompt == "no_think", config.reward.convention == "no_think"
  if alone != wanted:
    logging.warning(
      "data.prompt=%s asks for another format than reward.convention=%s rewards: set both to no_think, or neither.",
      *(config.data.prompt, config.reward.convention),
    )


def _check_terms(config: Any) -> None:
  """The terms of the loss, and what each of them needs."""
  objective, fraction = config.objective, config.batch.on_policy_fraction
  if objective.divergence_weight > 1:
    raise ValueError(f"objective.divergence_weight={objective.divergence_weight} must lie in [0, 1].")
  if objective.divergence == "sampled_k2" and objective.divergence_top_k:
    raise ValueError("objective.divergence=sampled_k2 looks at one id; set objective.divergence_top_k=0.")
  if objective.supervised_weight and fraction == 1:
    raise ValueError("objective.supervised_weight needs supervised rows; set batch.on_policy_fraction below 1.")
  own = round(fraction * config.batch.rollouts)
  if objective.policy_weight and own == 1:
    raise ValueError(
      "one rollout of the student's in a group has no other to be compared with, so no advantage; raise batch.rollouts "
      "or batch.on_policy_fraction, or set objective.policy_weight=0."
    )
  if fraction < 1 and not (objective.distill_weight or objective.supervised_weight):
    raise ValueError("supervised rows enter no term: set objective.supervised_weight or objective.distill_weight.")
  if objective.reference_weight and not own:
    raise ValueError("objective.reference_weight looks at the student's rollouts, and there are none.")
  if 0 < objective.importance_cap < 1:
    raise ValueError(f"objective.importance_cap={objective.importance_cap} scales every token down; use 1 or more.")
  if not (objective.clip_low > 0 and objective.clip_high > 0):
    raise ValueError(
      f"objective.clip_low={objective.clip_low} and clip_high={objective.clip_high} must be above 0, where the clip "
      "would cut the gradient of an unchanged policy; large numbers switch it off."
    )
  _check_gate(objective)
  learns = objective.policy_weight and fraction > 0
  if not (learns or objective.distill_weight or objective.supervised_weight):
    raise ValueError(
      "nothing is learnt: set objective.policy_weight (with a batch.on_policy_fraction above 0), "
      "objective.distill_weight or objective.supervised_weight above 0."
    )
  if objective.reference_weight and objective.reference_estimator == "k1":
    logging.warning(
      "objective.reference_estimator=k1: the mean gradient of k1 is zero; use k2 or k3 to hold the policy."
    )


def _value(config: Any, field: str) -> Any:
  section, name = field.split(".")
  return config[section][name]


def warn_of_replication(config: Any, mesh: Mapping[str, int]) -> None:
  """Says when a batch does not divide over the mesh, so that several devices do the same work."""
  rows, fsdp = mesh["data"], mesh["fsdp"]
  batch = config.batch
  part = batch.prompts // batch.micro_batches
  for what, prompts_at_once in (("the rollouts", batch.prompts), ("a micro-batch", part)):
    if prompts_at_once % (rows * fsdp) and (prompts_at_once % rows or batch.rollouts % fsdp):
      logging.warning(
        "%s: %d prompts x %d rollouts do not divide over mesh.data=%d x mesh.fsdp=%d; devices repeat work.",
        *(what, prompts_at_once, batch.rollouts, rows, fsdp),
      )
  if config.eval.prompts % (rows * fsdp):
    logging.warning("eval.prompts=%d does not divide over %d devices.", config.eval.prompts, rows * fsdp)


def warn_of_templates(config: Any, student: pathlib.Path) -> None:
  """Says when a checkpoint was trained on other wordings than the config's."""
  declared = tokenization.declared_templates(student)
  expected = declared or "standard"
  if expected != config.data.templates:
    logging.warning(
      "data.templates=%s, but %s knows the wordings %s.", config.data.templates, config.model.student, expected
    )


def check_attention(config: Any, student: Qwen3VLConfig) -> None:
  """Under the run's mesh, refuses model.attention=fused where a model would have the plain form.

  Raises:
    ValueError: what the fused kernel of the platform cannot serve.
  """
  dtypes = [config.model.compute_dtype]
  if needs_teacher(config) or config.objective.reference_weight:
    dtypes.append(config.model.teacher_dtype)
  for dtype in dtypes:
    for head_dim in (student.text.head_dim, student.vision.head_dim):
      attention.kernel_for(config.model.attention, jnp.dtype(dtype), head_dim)


def check_teacher(config: Any, processor: pipeline.Processor, folder: pathlib.Path) -> None:
  """Student and teacher must read the same token ids and the same patches.

  Args:
    config: of the run.
    processor: the student's.
    folder: the teacher's, on this machine.

  Raises:
    ValueError: what differs.
  """
  student, teacher = processor.config, Qwen3VLConfig.from_directory(folder)
  pairs = {
    "vocab_size": (student.text.vocab_size, teacher.text.vocab_size),
    "image_token_id": (student.image_token_id, teacher.image_token_id),
    "vision_start_token_id": (student.vision_start_token_id, teacher.vision_start_token_id),
    "patch_size": (student.vision.patch_size, teacher.vision.patch_size),
    "spatial_merge_size": (student.vision.spatial_merge_size, teacher.vision.spatial_merge_size),
    "temporal_patch_size": (student.vision.temporal_patch_size, teacher.vision.temporal_patch_size),
    "num_position_embeddings": (student.vision.num_position_embeddings, teacher.vision.num_position_embeddings),
  }
  different: dict[str, tuple[Any, Any]] = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
  if not processor.same_vocabulary(folder):
    different["tokenizer"] = ("its own", "another")
  if different:
    raise ValueError(
      f"student {config.model.student} and teacher {config.model.teacher} do not match: "
      + ", ".join(f"{name} {a} and {b}" for name, (a, b) in different.items())
      + "; distillation compares them token by token, so both must come from one family."
    )
