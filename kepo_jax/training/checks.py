"""Checks before anything large is loaded: the config, the questions, and that all hosts train on the same."""

import collections
import functools
import json
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from kepo_jax import multihost
from kepo_jax.config import Config
from kepo_jax.data import cleaning, inspection, tokenization
from kepo_jax.data import processor as processor_lib
from kepo_jax.data.cleaning import Rejected, Summary
from kepo_jax.evaluation import outputs
from kepo_jax.models.qwen3_vl import attention, lora
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import run_record
from kepo_jax.types import Example


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
  """Warns when the prompt asks for another format than the reward wants."""
  if (config.data.prompt == "no_think") != (config.reward.convention == "no_think"):
    logging.warning(
      "data.prompt=%s asks for another format than reward.convention=%s rewards: set both to no_think, or neither.",
      *(config.data.prompt, config.reward.convention),
    )


def warn_of_replication(config: Config, mesh: Mapping[str, int]) -> None:
  """Warns when a batch does not divide over the mesh, so that several devices do the same work."""
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
  """Warns when a checkpoint was trained on other wordings than the config's."""
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


# Fields of Qwen3VLConfig that student and teacher must have in common: token ids and patches.
_SHARED = (
  *("text.vocab_size", "image_token_id", "vision_start_token_id", "vision.patch_size"),
  *("vision.spatial_merge_size", "vision.temporal_patch_size", "vision.num_position_embeddings"),
)


def check_teacher(config: Config, processor: processor_lib.Processor, folder: pathlib.Path) -> None:
  """Refuses a teacher that does not read the student's token ids and patches.

  Args:
    config: of the run.
    processor: the student's.
    folder: the teacher's, on this machine.

  Raises:
    ValueError: what differs.
  """
  student, teacher = processor.config, Qwen3VLConfig.from_directory(folder)
  values = {name: [operator.attrgetter(name)(model) for model in (student, teacher)] for name in _SHARED}
  different = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
  if not processor.same_vocabulary(folder):
    different["tokenizer"] = ["its own", "another"]
  if different:
    raise ValueError(
      f"student {config.model.student} and teacher {config.model.teacher} do not match: "
      + ", ".join(f"{name} {a} and {b}" for name, (a, b) in different.items())
      + "; distillation compares them token by token, so both must come from one family."
    )


# What changes how many questions a split has, or needs.
WAYS_OUT = {
  "train": "lower batch.prompts, raise data.train_items, or bring more questions of data.train_modality",
  "validation": "raise data.validation_items, or set eval.every=0",
  "test": "raise data.test_items, or set eval.test=False",
}


def check_questions(questions: Mapping[str, Sequence[Example]], config: Config) -> None:
  """Refuses splits that the config cannot use, and records that no reward could judge.

  Raises:
    ValueError: which split is missing or too small, or which record is wrong and how.
  """
  needed = {"train": config.batch.prompts, "validation": config.eval.every > 0, "test": config.eval.test}
  for split, least in needed.items():
    count = len(questions.get(split, ()))
    if count < least:
      raise ValueError(f"the {split} split has {count} questions and needs {int(least)} or more: {WAYS_OUT[split]}.")
  for split, examples in questions.items():
    for example in examples:
      letters = [chr(ord("A") + i) for i in range(len(example.options))]
      if example.answer not in letters:
        raise ValueError(
          f"{split} question {example.id}: answer {example.answer!r} is not the letter of one of its "
          f"{len(letters)} options ({', '.join(letters)})."
        )
    counts = collections.Counter(example.id for example in examples)
    repeated = [example_id for example_id, count in counts.items() if count > 1]
    if repeated:
      raise ValueError(
        f"{split} has {len(repeated)} ids more than once, {repeated[0]!r} among them; an id names one question."
      )


def with_readable_images(
  questions: Mapping[str, Sequence[Example]],
  *,
  lenient: bool,
  progress: Callable[[int, int], None],
  refusals: Callable[[str, Sequence[Example]], Mapping[str, Rejected]] = lambda split, examples: {},
  report: Callable[[Summary], None] = lambda summary: None,
) -> dict[str, list[Example]]:
  """Decodes every image once and measures every question, so that none stops a run in its middle.

  The check is sharded across hosts; a fault that one of them finds holds for all.

  Args:
    questions: split -> questions, the same on every process.
    lenient: leave out, and count, questions whose image cannot be read or for which there is no room.
    progress: called with the number of images done and of all that this process decodes, for each split.
    refusals: (split, questions with readable images) -> id -> why there is no room for it, as `usable.refusals` tells.
    report: called with what was left out of each split.

  Returns:
    split -> questions that can be asked.

  Raises:
    ValueError: a question cannot be asked, unless lenient; names it, the file, sizes, and the way out.
    OSError: another process of the run has failed.
  """

  def reasons(split: str, examples: Sequence[Example]) -> list[tuple[str, str] | None]:
    refused = refusals(split, examples)
    return [(refused[e.id].rule, str(refused[e.id])) if e.id in refused else None for e in examples]

  kept = {}
  for split, examples in questions.items():
    summary = Summary(root=f"{split} questions of the run", format="checked", records=len(examples))
    readable, _ = inspection.open_images(
      examples, summary, decode=True, progress=progress, divided=multihost.shard_across_hosts
    )
    refused = multihost.shard_across_hosts(readable, functools.partial(reasons, split))
    for example, reason in zip(readable, refused, strict=True):
      if reason:
        summary.count(reason[0], f"question {example.id}: {reason[1]}")
    kept[split] = [example for example, reason in zip(readable, refused, strict=True) if not reason]
    summary.kept = len(kept[split])
    report(summary)
    if summary.rules and not lenient:
      raise ValueError(
        f"{split} {next(iter(summary.first.values()))} ({cleaning.counted(summary.rules)}); "
        "mend the data, or set data.lenient to leave them out."
      )
    if summary.rules:
      logging.warning("%d questions left out: %s", summary.dropped, summary.text())
  return kept


def prompt_wordings(config: Config, split: str) -> dict[str, int]:
  """Returns the wordings in which a run asks the questions of a split -> most tokens that a hint adds to it.

  A hint is at most `exploration.hint_tokens` tokens long, and its tags, which the student is not shown, are among them:
  they leave some room for a text that is cut into other tokens when it is read than when it was written.
  """
  if split != "train":
    return {config.eval.prompt: 0}
  hinted = {"hint_request": 0, config.exploration.hint_prompt: config.exploration.hint_tokens}
  return {config.data.prompt: 0} | (hinted if config.explores else {})


def check_hosts_agree(
  config: Config,
  *,
  questions: Mapping[str, Sequence[Example]] | None = None,
  models: Mapping[str, pathlib.Path] | None = None,
) -> None:
  """Refuses processes of a run that differ in config, questions or models; all must call it at the same point.

  Args:
    config: of the run.
    questions: split -> questions, in the order in which they were read.
    models: role -> local folder of the checkpoint; of weights evenly spread blocks are read.

  Raises:
    ValueError: processes differ; says in what and which of them, and the way out, on every process.
    OSError: a file of a model cannot be read, here or on another process.
  """
  if jax.process_count() == 1:
    return
  if differences := host_differences(multihost.all_gather(lambda: host_facts(config, questions or {}, models or {}))):
    raise ValueError(differences)


def host_facts(
  config: Config, questions: Mapping[str, Sequence[Example]], models: Mapping[str, pathlib.Path]
) -> dict[str, Any]:
  """Returns what is compared of a process, JSON-able: the config, number and digest of questions, hashes of models."""
  return {
    "config": json.loads(config.to_json()),
    "questions": {split: [len(examples), _digest(examples)] for split, examples in questions.items()},
    "models": {role: outputs.model_hash(folder) for role, folder in models.items()},
  }


def host_differences(facts: Sequence[Mapping[str, Any]]) -> str:
  """Describes which processes differ from the first one, in what, and the way out; "" where all are equal.

  Args:
    facts: `host_facts` of each process, in their order.
  """
  differences = collections.defaultdict(list)
  for number, other in enumerate(facts):
    if difference := _difference(facts[0], other):
      differences[difference].append(number)
  parts = []
  for (what, way_out), numbers in differences.items():
    who = f"process {numbers[0]} has" if len(numbers) == 1 else f"processes {', '.join(map(str, numbers))} have"
    parts.append(f"{who} {what} than process 0{way_out}")
  return " ".join(parts)


def _difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str] | None:
  """Returns the first difference of another process, and the rest of the sentence."""
  if changes := run_record.changes(first["config"], other["config"]):
    return "another config", f" ({changes}); start all of them with the same command."
  for split in sorted(first["questions"].keys() | other["questions"].keys()):
    ours, theirs = (facts["questions"].get(split, [0, ""]) for facts in (first, other))
    if ours != theirs:
      return f"other questions of {split}", (
        f": {theirs[0]} against {ours[0]}. All must read the same data: see that each reaches all of them, and start "
        "again. With data.lenient, what one process cannot read for a moment is left out there alone."
      )
  for role in sorted(first["models"].keys() | other["models"].keys()):
    if first["models"].get(role) != other["models"].get(role):
      return f"another {role}", "; give all of them folders with the same files."
  return None


def _digest(examples: Sequence[Example]) -> str:
  """Returns SHA-256 over questions in their order; of images the number, as each process may have its own copies."""
  return outputs.digest(
    json.dumps([e.id, e.question, e.options, e.answer, e.modality, e.question_type, e.dataset, len(e.images)])
    for e in examples
  )
