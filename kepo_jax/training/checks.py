"""What is refused, or warned of, before anything large is loaded."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from kepo_jax.data import images, pipeline, prompts, tokenization
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import advantages, gates
from kepo_jax.types import Example

DTYPES = ("float32", "bfloat16", "float16")
# Fields with a few legal values, and those values.
CHOICES: Mapping[str, Sequence[str]] = {
  "model.compute_dtype": DTYPES,
  "model.teacher_dtype": DTYPES,
  "data.resize": tuple(images.RESIZES),
  "data.templates": tuple(prompts.TEMPLATES),
  "objective.advantage": tuple(advantages.ESTIMATORS),
  "objective.gate_signal": ("accuracy", "mean", "sum"),
  "objective.gate_mode": gates.MODES,
  "exploration.trigger": ("accuracy_all_zero", "never"),
  "exploration.hint_prompt": ("hint_only", "hint_and_answer"),
}
# Fields with a smallest legal value.
LEAST: Mapping[str, float] = {
  "mesh.data": -1,
  "mesh.fsdp": 1,
  "mesh.tensor": 1,
  "batch.prompts": 1,
  "batch.rollouts": 1,
  "batch.micro_batches": 1,
  "sampling.max_new_tokens": 1,
  "sampling.top_k": 0,
  "objective.divergence_weight": 0,
  "objective.distill_weight": 0,
  "objective.reference_weight": 0,
  "objective.chunk": 1,
  "exploration.rounds": 0,
  "exploration.hint_tokens": 1,
  "exploration.hint_temperature": 0,
  "optimizer.warmup_steps": 0,
  "train.steps": 1,
  "eval.every": 0,
  "eval.prompts": 1,
  "eval.max_new_tokens": 1,
  "checkpoint.every": 0,
  "checkpoint.keep": 1,
  "profile.steps": 0,
}


def explores(config: Any) -> bool:
  """Whether the config asks for hints at all."""
  exploration = config.exploration
  return exploration.trigger != "never" and exploration.rounds > 0 and exploration.replacements > 0


def check_config(config: Any) -> None:
  """Refuses values that would fail later, or silently do something else.

  Raises:
    ValueError: the field, its value and the way out.
  """
  for field, choices in CHOICES.items():
    if _value(config, field) not in choices:
      raise ValueError(f"{field}={_value(config, field)!r} is unknown; use one of {sorted(choices)}.")
  for field, least in LEAST.items():
    if _value(config, field) < least:
      raise ValueError(f"{field}={_value(config, field)} is too small; use {least} or more.")
  batch = config.batch
  if batch.prompts % batch.micro_batches:
    raise ValueError(
      f"batch.prompts={batch.prompts} does not divide into batch.micro_batches={batch.micro_batches} parts."
    )
  if not 0 <= config.exploration.replacements < batch.rollouts:
    raise ValueError(
      f"exploration.replacements={config.exploration.replacements} must lie in 0..{batch.rollouts - 1}, "
      "so that a group keeps a rollout of its own."
    )
  if config.sampling.temperature <= 0:
    raise ValueError(f"sampling.temperature={config.sampling.temperature} gives G equal rollouts; use a value above 0.")
  if not 0 < config.sampling.top_p <= 1:
    raise ValueError(f"sampling.top_p={config.sampling.top_p} must lie above 0 and at most at 1.")
  if config.objective.divergence_weight > 1:
    raise ValueError(f"objective.divergence_weight={config.objective.divergence_weight} must lie in [0, 1].")
  if (config.objective.distill_weight or explores(config)) and not config.model.teacher:
    raise ValueError("distillation and hints need model.teacher; set it, or use experiments/configs/grpo.py.")


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


def check_questions(questions: Mapping[str, Sequence[Example]], config: Any) -> None:
  """Refuses splits that the config cannot use, and records that no reward could judge.

  Raises:
    ValueError: which split is missing or too small, or which record is wrong and how.
  """
  needed = {"train": config.batch.prompts, "validation": config.eval.every > 0, "test": config.eval.test}
  for split, least in needed.items():
    found = len(questions.get(split, ()))
    if found < least:
      raise ValueError(
        f"the {split} split has {found} questions and needs {int(least)} or more; see data.* and eval.*."
      )
  for split, examples in questions.items():
    for example in examples:
      letters = [chr(ord("A") + i) for i in range(len(example.options))]
      if example.answer not in letters:
        raise ValueError(
          f"{split} question {example.id}: answer {example.answer!r} is not the letter of one of its "
          f"{len(letters)} options ({', '.join(letters)})."
        )
    repeated = [each for each, count in collections.Counter(example.id for example in examples).items() if count > 1]
    if repeated:
      raise ValueError(
        f"{split} has {len(repeated)} ids more than once, {repeated[0]!r} among them; an id names one question."
      )


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
