"""The config of a run: every field with its default, unit and legal values.

The defaults train Qwen3-VL-2B with GRPO at the sizes of arXiv:2602.00400; `objective.distill_weight` and `exploration`
add the teacher. Change fields by name: `Config().replace({"train.steps": 300})`.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from absl import logging


@dataclasses.dataclass(frozen=True)
class Least:
  """The smallest legal value of a number."""

  value: float


Count = Annotated[int, Least(0)]
Size = Annotated[int, Least(1)]
Weight = Annotated[float, Least(0)]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = typing.get_args(Projection)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Student and teacher, their precision and memory."""

  student: str = "Qwen/Qwen3-VL-2B-Instruct"  # Qwen3-VL folder or Hub id
  teacher: str = "Qwen/Qwen3-VL-32B-Instruct"  # the same, with the student's tokenizer; loaded if used
  compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # student's activations; trained weights are float32
  teacher_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # weights and activations of frozen models
  teacher_memory: Literal["device", "host"] = "device"  # where frozen models live while they are not used
  freeze_vision: bool = False  # True keeps the vision tower and its mergers as loaded
  remat: Literal["none", "dots", "full"] = "full"  # what the backward pass recomputes; docs/operations.md
  attention: Literal["auto", "plain", "fused"] = "auto"  # fused kernel: used if possible, never used, or required
  lora_rank: Count = 0  # rank of LoRA matrices, which are then trained alone; 0 trains all weights
  lora_alpha: float = 32.0  # their product is scaled by lora_alpha / lora_rank
  lora_targets: tuple[Projection, ...] = PROJECTIONS  # decoder projections with LoRA matrices


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh."""

  data: Annotated[int, Least(-1)] = -1  # -1: all devices that fsdp and tensor leave
  fsdp: Size = 1
  tensor: Size = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Questions, their splits, images and prompts; docs/data.md."""

  directory: str | None = None  # data in a format of docs/data.md; "": the phantom benchmark; None: must be given
  split_files: str = ""  # folder with train/ and test/ of a published split, used as it is; "": split by our rule
  lenient: bool = False  # True leaves out and counts what would stop a run
  train_modality: str = "MRI"
  train_items: int = 600  # questions
  validation_items: int = 40  # questions per modality, for evaluation during training
  test_items: int = 300  # questions per modality, for evaluation before and after
  split_seed: int = 0  # membership of the splits; those of the phantom are fixed
  resize: Literal["native", "squash384"] = "squash384"  # native: the model's own resizing; squash384: 384 x 384 first
  prompt: Literal["think", "no_think"] = "think"  # what a student is asked in training
  templates: Literal["standard", "brief"] = "standard"  # wordings, in kepo_jax/data/prompts.py
  prompt_buckets: tuple[int, ...] = (256, 512, 1024, 2048)  # padded prompt lengths, tokens
  patch_buckets: tuple[int, ...] = (576, 1024, 2304, 4096, 16384)  # padded patch rows per prompt


@dataclasses.dataclass(frozen=True)
class BatchConfig:
  """Prompts, rollouts and updates of a step."""

  prompts: Size = 8  # P, per step over all devices
  rollouts: Size = 8  # G, per prompt
  on_policy_fraction: Weight = 1.0  # share of the G rollouts that the student samples; the rest are supervised
  updates: Size = 1  # per batch; with more, pi_old is scored before the first and the clip matters
  micro_batches: Size = 1  # the update runs over prompts / micro_batches at a time


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """The student's rollouts."""

  max_new_tokens: Size = 1024  # T
  temperature: float = 1.0
  top_p: float = 1.0  # below 1 the policy ratio is slightly off
  top_k: Count = 0  # 0: all
  dynamic_rounds: Count = 0  # further batches asked in a step until P groups have a signal (DAPO); 0: none


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """What a completion is worth."""

  convention: Literal["med_r1", "medvlm_r1", "no_think", "lenient"] = "med_r1"  # what is accurate and well formed
  combination: Literal["sum", "product"] = "sum"  # of accuracy and format in the advantage
  accuracy: float = 1.0  # weight of accuracy, or of the product
  format: float = 1.0  # weight of format in the sum
  more: str = ""  # "name:weight, ...": names of rewards.REWARDS or package.module.function


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """The loss; docs/method.md."""

  policy_weight: Weight = 1.0  # of the policy term; 0: only distillation or supervision
  advantage: Literal["group_std", "no_std", "rloo", "batch_std"] = "group_std"  # no_std: Dr.GRPO
  aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"  # DAPO; Dr.GRPO
  ratio: Literal["token", "sequence"] = "token"  # level of the ratio; sequence: GSPO, clips of about 3e-4
  clip_low: Weight = 0.2  # of the policy ratio; idle as long as a batch serves one update
  clip_high: Weight = 0.2
  importance_cap: Weight = 0.0  # cap on importance weights pi_old / pi_sampler, for example 2; 0: no weights
  mask_truncated: bool = False  # True: completions without an end token enter no term of the loss
  # Importance ratio of injected rollouts, whose hint is dropped.
  off_context: Literal["drop_on_policy", "drop_behaviour_shaped", "drop_unit_shaped"] = "drop_on_policy"
  distill_weight: Weight = 0.0  # lambda; 0 drops the teacher from the update
  distill_schedule: Literal["constant", "linear"] = "constant"  # linear: lambda falls by 1/train.steps each step
  divergence: Literal["jsd", "forward_kl", "reverse_kl", "sampled_k2"] = "jsd"
  divergence_weight: Weight = 0.5  # b of the generalised Jensen-Shannon divergence
  divergence_top_k: Count = 0  # the teacher's k most likely ids and one bucket for the rest; 0: all ids
  distill_temperature: float = 1.0  # of teacher and student inside the divergence
  distill_normaliser: Literal["gated_tokens", "group_mean"] = "gated_tokens"
  gate_signal: Literal["accuracy", "mean", "sum", "product"] = "accuracy"  # the others join accuracy and format
  gate_threshold: float = 1.0  # tau: smallest signal that is distilled
  gate_mode: Literal["positive", "negative", "none"] = "positive"  # signal >= tau; below; all
  gate_injected: bool = True  # False: injected rollouts are never distilled
  reference_weight: Weight = 0.0  # beta; 0 drops the reference model
  reference_estimator: Literal["k1", "k2", "k3"] = "k3"  # k1 has no mean gradient
  supervised_weight: Weight = 0.0  # of the likelihood of supervised rows
  chunk: Size = 1024  # completion tokens per device whose logits are held at once; at least one per row


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
  """Rows that the student does not sample."""

  source: Literal["none", "answer", "teacher"] = "none"  # answer: the gold letter
  temperature: Weight = 1.0  # of the teacher's answers


@dataclasses.dataclass(frozen=True)
class ExplorationConfig:
  """Hinted rollouts for prompts on which every rollout fails."""

  trigger: Literal["accuracy_all_zero", "reward_all_zero", "always", "never"] = "accuracy_all_zero"
  replacements: Count = 0  # K, rollouts of a failed group that accepted candidates may replace
  rounds: Count = 0  # B, rounds of hinted sampling per failed prompt
  serial: bool = False  # True: rounds one after the other, until K are accepted; False: all at once, with more hints
  candidates: Count = 0  # M, sampled per prompt and round; 0: as many as replacements
  hints: Literal["each_round", "once"] = "each_round"  # when the teacher writes a new hint
  hint_prompt: Literal["hint_and_answer", "hint_only"] = "hint_and_answer"  # what a hinted student is shown
  hint_tokens: Size = 256  # longest hint, tokens
  hint_temperature: Weight = 0.7
  # Candidates one by one; or all of a prompt and round if every one is accurate.
  acceptance: Literal["accurate_and_formatted", "all_or_none_accurate"] = "accurate_and_formatted"
  leak_filter: bool = True  # refuse candidates that talk about the help


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adam and its learning rate."""

  learning_rate: Weight = 2e-6  # peak
  warmup_steps: Count = 0
  b1: Weight = 0.9
  b2: Weight = 0.999
  eps: float = 1e-8
  weight_decay: Weight = 0.0
  moments: Literal["float32", "bfloat16"] = "float32"  # how Adam's two moments are stored; docs/operations.md
  clip_norm: float = 1.0  # global gradient norm
  skip_limit: Size = 5  # stop after this many updates in a row with loss or gradient not finite


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length of a run."""

  steps: Size = 75  # batches; the learning rate decays linearly to 0 over them
  compile_ahead: bool = True  # compile for all sizes of prompts and images before the first step; False: as met


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Greedy evaluation."""

  every: Count = 25  # steps between evaluations on the validation set; 0: none
  prompts: Size = 64  # questions per batch
  prompt: Literal["evaluation", "no_think"] = "evaluation"  # evaluation: reason, then answer
  max_new_tokens: Size = 1024
  test: bool = True  # evaluate the test set after training
  before: bool = True  # and before it


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When the state is saved, and what is kept."""

  every: Count = 10  # steps; 0: only by the clock, and the last step
  minutes: Weight = 10.0  # also this long after the last one; 0: never by the clock
  keep: Size = 2  # newest checkpoints kept
  best: Literal["none", "in_domain", "out_of_domain", "overall"] = "out_of_domain"  # keeps the best by this metric too


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is logged, and where."""

  samples: Count = 1  # prompts per step whose rollouts go to samples.jsonl
  gradients_every: Count = 0  # steps between comparisons of the two terms' gradients, if both exist; 0: never
  stall_seconds: Weight = 900.0  # warn, with stack traces, when nothing was completed for so long; 0: never
  tensorboard: bool = True
  wandb: str = ""  # project name; needs wandb installed
  trackio: str = ""  # project name; needs trackio installed


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Traces of the JAX profiler."""

  steps: Count = 0  # steps traced, after the second step


# What users of other libraries may write, and what does the same here.
_ELSEWHERE: Mapping[str, str] = {
  "grpo": "objective.advantage=group_std with objective.aggregation=sequence_mean",
  "dapo": "objective.aggregation=token_mean",
  "bnpo": "objective.aggregation=token_mean, over the global batch; per micro-batch, it would depend on their number",
  "dr_grpo": "objective.advantage=no_std with objective.aggregation=constant_length",
  "gspo": "objective.ratio=sequence",
  "group": "objective.advantage=group_std",
  "batch": "objective.advantage=batch_std",
  "loo": "objective.advantage=rloo",
  "forward": "objective.divergence=forward_kl",
  "reverse": "objective.divergence=reverse_kl",
}
# Largest value of each signal of the gate; accuracy and format are at most 1.
_GATE_MAXIMUM = {"accuracy": 1.0, "mean": 1.0, "sum": 2.0, "product": 1.0}


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that decides what a run computes, shows and keeps."""

  seed: Count = 0  # every random stream of a run derives from it
  model: ModelConfig = ModelConfig()
  mesh: MeshConfig = MeshConfig()
  data: DataConfig = DataConfig()
  batch: BatchConfig = BatchConfig()
  sampling: SamplingConfig = SamplingConfig()
  reward: RewardConfig = RewardConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  supervised: SupervisedConfig = SupervisedConfig()
  exploration: ExplorationConfig = ExplorationConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  profile: ProfileConfig = ProfileConfig()

  @classmethod
  def from_dict(cls, tree: Mapping[str, Any]) -> "Config":
    """Reads what `to_dict` or a config.json holds; fields that are missing keep their defaults.

    Raises:
      ValueError: there is no such field.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
      flat |= {f"{name}.{field}": x for field, x in value.items()} if isinstance(value, Mapping) else {name: value}
    return cls().replace(flat)

  def replace(self, fields: Mapping[str, Any]) -> "Config":
    """Returns a copy with some fields changed: `config.replace({"train.steps": 300, "seed": 1})`.

    Raises:
      ValueError: there is no such field.
    """
    sections: dict[str, dict[str, Any]] = {}
    known = {name: name for name in self.fields()}
    for name, value in fields.items():
      if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"the config has no field {name}{f'; did you mean {close[0]}?' if close else '.'}")
      section, _, field = name.rpartition(".")
      sections.setdefault(section, {})[field] = tuple(value) if isinstance(value, list) else value
    top = sections.pop("", {})
    return dataclasses.replace(
      self, **top, **{name: dataclasses.replace(getattr(self, name), **new) for name, new in sections.items()}
    )

  def fields(self) -> dict[str, Any]:
    """Returns every field by its full name, `train.steps` for example."""
    return {
      f"{name}.{field}" if field else name: x
      for name, value in self.to_dict().items()
      for field, x in (value.items() if isinstance(value, dict) else [("", value)])
    }

  def to_dict(self) -> dict[str, Any]:
    """Returns the sections as dicts."""
    return dataclasses.asdict(self)

  def to_json(self, indent: int | None = None) -> str:
    """Returns JSON, with sorted keys, that `from_dict` can read back."""
    return json.dumps(self.to_dict(), sort_keys=True, indent=indent)

  @property
  def own_rollouts(self) -> int:
    """Rollouts of each group that the student samples; the others are supervised rows."""
    return round(self.batch.on_policy_fraction * self.batch.rollouts)

  @property
  def candidates(self) -> int:
    """Hinted completions sampled for a failed prompt in a round."""
    return max(1, self.exploration.candidates or self.exploration.replacements)

  @property
  def rounds_at_once(self) -> int:
    """Rounds of exploration whose hints are asked in one batch."""
    return 1 if self.exploration.serial else self.exploration.rounds

  @property
  def explores(self) -> bool:
    """Whether failed prompts get hints."""
    exploration = self.exploration
    return exploration.trigger != "never" and exploration.rounds > 0 and exploration.replacements > 0

  @property
  def teacher_answers(self) -> bool:
    """Whether the teacher writes supervised rows."""
    return self.batch.on_policy_fraction < 1 and self.supervised.source == "teacher"

  @property
  def needs_teacher(self) -> bool:
    """Whether the teacher is loaded."""
    return bool(self.objective.distill_weight) or self.explores or self.teacher_answers

  @property
  def compares_gradients(self) -> bool:
    """Whether the gradients of two loss terms are compared from time to time."""
    return bool(self.log.gradients_every and self.objective.policy_weight and self.objective.distill_weight)

  @property
  def frozen_parts(self) -> tuple[str, ...]:
    """Top-level parts of the parameters that are not trained."""
    if self.model.lora_rank:
      return ("visual", "language_model", "lm_head")
    return ("visual",) if self.model.freeze_vision else ()

  def validate(self) -> None:
    """Refuses values that would fail later or silently do something else, before anything large is loaded.

    Raises:
      ValueError: the field, its value and the way out.
    """
    for section, hint in typing.get_type_hints(type(self), include_extras=True).items():
      value = getattr(self, section)
      if not dataclasses.is_dataclass(hint):
        _check_value(section, value, hint)
        continue
      for field, kind in typing.get_type_hints(hint, include_extras=True).items():
        _check_value(f"{section}.{field}", getattr(value, field), kind)
    _check_ranges(self)
    _check_lora(self.model)
    _check_rows(self)
    _check_terms(self)


def _check_value(name: str, value: Any, hint: Any) -> None:
  """Compares a value with the type of its field."""
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    _check_value(name, value, inner[0])
    if not (math.isfinite(value) and value >= inner[1].value):
      raise ValueError(f"{name}={value} is too small; use {inner[1].value} or more.")
  elif origin is Literal:
    if value not in inner:
      elsewhere = f" (what others call {value} is {_ELSEWHERE[value]})" if value in _ELSEWHERE else ""
      raise ValueError(f"{name}={value!r} is unknown; use one of {sorted(inner)}{elsewhere}.")
  elif origin is tuple:
    if not isinstance(value, tuple):
      raise ValueError(f"{name}={value!r} must be a tuple.")
    for item in value:
      _check_value(name, item, inner[0])
  elif origin is types.UnionType:
    if value is not None:
      _check_value(name, value, inner[0])
  elif type(value) is not hint and not (hint is float and type(value) is int):
    raise ValueError(f"{name}={value!r} must be {'an' if hint is int else 'a'} {hint.__name__}.")


def _check_ranges(config: Config) -> None:
  """Checks numbers with more than a lower bound."""
  sampling, optimizer, objective = config.sampling, config.optimizer, config.objective
  if not config.mesh.data:
    raise ValueError("mesh.data=0 is a mesh without devices; use -1 for all that fsdp and tensor leave, or 1 or more.")
  if sampling.temperature <= 0:
    raise ValueError(f"sampling.temperature={sampling.temperature} gives G equal rollouts; use a value above 0.")
  if not 0 < sampling.top_p <= 1:
    raise ValueError(f"sampling.top_p={sampling.top_p} must lie above 0 and at most at 1.")
  for name, value in (("b1", optimizer.b1), ("b2", optimizer.b2)):
    if not value < 1:
      raise ValueError(f"optimizer.{name}={value} must lie in [0, 1).")
  if not optimizer.eps > 0:
    raise ValueError(f"optimizer.eps={optimizer.eps} must lie above 0.")
  if not optimizer.clip_norm > 0:
    raise ValueError(f"optimizer.clip_norm={optimizer.clip_norm} leaves no gradient; use a value above 0.")
  if not objective.distill_temperature > 0:
    raise ValueError(f"objective.distill_temperature={objective.distill_temperature} must lie above 0.")
  if objective.divergence_weight > 1:
    raise ValueError(f"objective.divergence_weight={objective.divergence_weight} must lie in [0, 1].")
  if 0 < objective.importance_cap < 1:
    raise ValueError(f"objective.importance_cap={objective.importance_cap} scales every token down; use 1 or more.")
  if not (objective.clip_low > 0 and objective.clip_high > 0):
    raise ValueError(
      f"objective.clip_low={objective.clip_low} and clip_high={objective.clip_high} must be above 0; at 0 the clip "
      "would cut the gradient of an unchanged policy; large numbers switch it off."
    )


def _check_lora(model: ModelConfig) -> None:
  if not model.lora_rank:
    return
  if not (math.isfinite(model.lora_alpha) and model.lora_alpha > 0):
    raise ValueError(f"model.lora_alpha={model.lora_alpha} must lie above 0, or the matrices of LoRA change nothing.")
  if not model.lora_targets or len(set(model.lora_targets)) < len(model.lora_targets):
    raise ValueError(
      f"model.lora_targets={model.lora_targets} must name one or more of {sorted(PROJECTIONS)}, each once."
    )


def _check_rows(config: Config) -> None:
  """Checks prompts, rollouts and sources."""
  batch, exploration = config.batch, config.exploration
  if batch.prompts % batch.micro_batches:
    raise ValueError(
      f"batch.prompts={batch.prompts} does not divide into batch.micro_batches={batch.micro_batches} parts."
    )
  own = batch.on_policy_fraction * batch.rollouts
  if batch.on_policy_fraction > 1 or abs(own - round(own)) > 1e-6:
    raise ValueError(
      f"batch.on_policy_fraction={batch.on_policy_fraction} of batch.rollouts={batch.rollouts} is {own:g} rollouts; "
      f"use a multiple of 1/{batch.rollouts} from 0 to 1."
    )
  if batch.on_policy_fraction < 1 and config.supervised.source == "none":
    raise ValueError(
      f"batch.on_policy_fraction={batch.on_policy_fraction} leaves rows unfilled; set supervised.source to answer or "
      "teacher."
    )
  if config.explores and not exploration.replacements < config.own_rollouts:
    raise ValueError(
      f"exploration.replacements={exploration.replacements} must lie in 0..{max(0, config.own_rollouts - 1)}, so that "
      "a group keeps a rollout of its own."
    )
  if config.sampling.dynamic_rounds and not config.own_rollouts:
    raise ValueError(
      "sampling.dynamic_rounds looks at the student's rollouts, and batch.on_policy_fraction=0 has none."
    )
  if config.needs_teacher and not config.model.teacher:
    raise ValueError(
      "distillation, hints and the teacher's answers need model.teacher; set it, or set objective.distill_weight=0 "
      "and exploration.rounds=0."
    )


def _check_terms(config: Config) -> None:
  """Checks the terms of the loss and what each needs."""
  objective, fraction, own = config.objective, config.batch.on_policy_fraction, config.own_rollouts
  if objective.divergence == "sampled_k2" and objective.divergence_top_k:
    raise ValueError("objective.divergence=sampled_k2 looks at one id; set objective.divergence_top_k=0.")
  if objective.supervised_weight and fraction == 1:
    raise ValueError("objective.supervised_weight needs supervised rows; set batch.on_policy_fraction below 1.")
  if objective.policy_weight and own == 1:
    raise ValueError(
      "the student samples one rollout per group, which therefore has no advantage; raise batch.rollouts "
      "or batch.on_policy_fraction, or set objective.policy_weight=0."
    )
  if fraction < 1 and not (objective.distill_weight or objective.supervised_weight):
    raise ValueError("supervised rows enter no term: set objective.supervised_weight or objective.distill_weight.")
  if objective.reference_weight and not own:
    raise ValueError("objective.reference_weight looks at the student's rollouts, and there are none.")
  tau, largest = objective.gate_threshold, _GATE_MAXIMUM[objective.gate_signal]
  closed = {"positive": not tau <= largest, "negative": not tau > 0, "none": False}[objective.gate_mode]
  if objective.distill_weight and closed:
    raise ValueError(
      f"objective.gate_threshold={tau} with gate_mode={objective.gate_mode} distils nothing: gate_signal="
      f"{objective.gate_signal} lies between 0 and {largest:g}."
    )
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
