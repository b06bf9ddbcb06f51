"""What is refused, or warned of, before anything large is loaded."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from absl import logging

from kepo_jax.config import Config
from kepo_jax.data import pipeline, tokenization
from kepo_jax.models.qwen3_vl import attention, lora
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig


def check_rank(config: Config, student: Qwen3VLConfig) -> None:
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


def warn_of_prompts(config: Config) -> None:
  """Says when the prompt asks for another format than the reward wants."""
  alone, wanted = config.data.prompt == "no_think", config.reward.convention == "no_think"
  if alone != wanted:
    logging.warning(
      "data.prompt=%s asks for another format than reward.convention=%s rewards: set both to no_think, or neither.",
      *(config.data.prompt, config.reward.convention),
    )


def warn_of_replication(config: Config, mesh: Mapping[str, int]) -> None:
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


def warn_of_templates(config: Config, student: pathlib.Path) -> None:
  """Says when a checkpoint was trained on other wordings than the config's."""
  declared = tokenization.declared_templates(student)
  expected = declared or "standard"
  if expected != config.data.templates:
    logging.warning(
      "data.templates=%s, but %s knows the wordings %s.", config.data.templates, config.model.student, expected
    )


def check_attention(config: Config, student: Qwen3VLConfig) -> None:
  """Under the run's mesh, refuses model.attention=fused where a model would have the plain form.

  Raises:
    ValueError: what the fused kernel of the platform cannot serve.
  """
  dtypes: list[str] = [config.model.compute_dtype]
  if config.needs_teacher or config.objective.reference_weight:
    dtypes.append(config.model.teacher_dtype)
  for dtype in dtypes:
    for head_dim in (student.text.head_dim, student.vision.head_dim):
      attention.kernel_for(config.model.attention, jnp.dtype(dtype), head_dim)


def check_teacher(config: Config, processor: pipeline.Processor, folder: pathlib.Path) -> None:
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
