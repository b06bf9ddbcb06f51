"""Estimates the memory that a run needs on one device, from shapes alone, before anything is compiled."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from kepo_jax import sampling, sharding
from kepo_jax.config import Config
from kepo_jax.models.qwen3_vl import lora, model
from kepo_jax.models.qwen3_vl.config import SIZES, Qwen3VLConfig
from kepo_jax.training import setup
from kepo_jax.types import RunPlan

# Counts that shapes do not give, set to what XLA's CPU compiler allocated for small models (the slow test compares).
# float32 arrays with a vocabulary axis alive together in a chunk: the student's logits, log-probs and their gradient;
# for each other model its logits, log-probs and what the divergence makes of the two.
_LOGITS_OF_STUDENT = 3
_LOGITS_OF_OTHER = 5
# Logits, and what top-k, top-p and the categorical draw make of them.
_LOGITS_OF_SAMPLER = 3
# Phases of a step and the evaluation after it, one after the other; each frees its memory before the next.
PHASES = ("sampling", "hints", "scoring", "update", "evaluation")
# float32 arrays as large as what is trained that the optimizer makes: clipped gradients, and changes.
_OPTIMIZER_ARRAYS = 2
# Copies of a value inside a layer: before and after its norm, rotation, mask or activation.
_COPIES = 2


def estimate(plan: RunPlan) -> dict[str, int]:
  """Estimates the bytes per device of the parts of a run, and their peak.

  The peak is what stays (the student with the moments of what it trains, frozen models) plus the largest of the phases:

  - sampling: decode copy, caches, logits;
  - hints: caches and logits of the teacher, which decodes from the weights that it has, beside the student's copy;
  - scoring: a layer's activations on one micro-batch, hidden states, and a copy of the head;
  - update: gradients and, one after the other, the backward pass (compute copy, activations of one micro-batch, logits
    of one chunk) and the optimizer;
  - evaluation: as sampling, with one completion for each question of a batch.

  Frozen models in host memory count in the phases that use them. Prompts fill the second prompt bucket and images the
  first patch bucket; longer ones need more. Fragmentation and the runtime's own buffers are left out.

  Args:
    plan: as the hooks receive it.

  Returns:
    part -> bytes; "peak" is the last entry.
  """
  config = plan.config
  student = plan.models["student"]
  shape = _training_shape(config, plan.mesh)
  compute, frozen = (jnp.dtype(getattr(config.model, name)).itemsize for name in ("compute_dtype", "teacher_dtype"))
  weights = parameters_per_device(student, plan.mesh)
  fixed = config.frozen_parts
  trained = parameters_per_device(student, plan.mesh, without=fixed)
  stored = setup.student_dtype(config.model).itemsize  # of what is not trained
  others = {role: other for role, other in plan.models.items() if role != "student"}
  models = {role: frozen * parameters_per_device(other, plan.mesh) for role, other in others.items()}
  moments = 2 * jnp.dtype(config.optimizer.moments).itemsize * trained
  parts = {"student and moments": stored * (weights - trained) + 4 * trained + moments}
  on_host = config.model.teacher_memory == "host"
  stays = parts["student and moments"] + (0 if on_host else sum(models.values()))
  visiting = models if on_host else dict.fromkeys(models, 0)  # bytes that come for a phase
  parts |= {f"{role} in host memory" if on_host else role: size for role, size in models.items()}
  actor = _decode_copy(student, plan.mesh, compute)
  parts["sampling"] = actor + cache_bytes(student, shape, compute) + _sampler_logits(student, shape)
  if "teacher" in others and (config.explores or config.teacher_answers):
    # The student's decode copy waits for the candidates meanwhile.
    parts["hints"] = actor + max(_asked(others["teacher"], each, frozen, plan.mesh) for each in _asked_shapes(plan))
    if config.explores:
      candidates = _candidate_shape(config, plan.mesh)
      held = cache_bytes(student, candidates, compute) + _sampler_logits(student, candidates)
      parts["hints"] = max(parts["hints"], actor + held)
    if on_host:  # it stays for all rounds, so candidates are sampled beside it
      parts["hints"] += visiting["teacher"]
  hidden = sum(_hidden(other, shape, frozen) for other in others.values())
  # A target holds a copy of the head that it was made with.
  heads = sum(frozen * _head_per_device(other, plan.mesh) for other in others.values())
  if others:
    parts["scoring"] = (
      sum(visiting.values()) + hidden + heads + max(_one_layer(other, shape, frozen) for other in others.values())
    )
  terms = config.objective.policy_weight and config.objective.distill_weight
  backward = (
    (4 * trained if config.log.gradients_every and terms else 0)  # gradients of one term and another, if compared
    + compute * ((weights - trained if compute < stored else 0) + (trained if compute < 4 else 0))
    + head_gradient_bytes(student, shape, fixed=fixed)
    + activation_bytes(
      student,
      shape,
      compute,
      remat=config.model.remat,
      fixed=fixed,
      logits=chunk_logits_bytes(student, shape, chunk=config.objective.chunk, others=len(others)),
    )
  )
  parts["update"] = 4 * trained + hidden + heads + max(backward, 4 * _OPTIMIZER_ARRAYS * trained)
  if config.eval.every or config.eval.test:
    asked = _evaluation_shape(config, plan.mesh)
    parts["evaluation"] = actor + cache_bytes(student, asked, compute) + _sampler_logits(student, asked)
  return parts | {"peak": stays + max(parts[phase] for phase in PHASES if phase in parts)}


def model_sizes(name: str) -> Qwen3VLConfig:
  """Reads the sizes of a checkpoint folder, or finds those of the published model that the name begins with.

  Raises:
    ValueError: neither, or the folder's config.json is not a Qwen3-VL's.
  """
  if (epath.Path(name) / "config.json").exists():
    return Qwen3VLConfig.from_directory(name)
  known = [sizes for published, sizes in SIZES.items() if name.split("/")[-1].startswith(published)]
  if not known:
    raise ValueError(f"{name!r} is neither a folder with a config.json nor one of {sorted(SIZES)}.")
  return known[0]


def plan(config: Config, *, devices: int = 1) -> RunPlan:
  """Makes what a run of a config would show before its first step; nothing is loaded.

  Args:
    config: of the run; its models are as for `model_sizes`.
    devices: of which mesh.data = -1 takes the rest.

  Raises:
    ValueError: a model is neither.
  """
  student = model_sizes(config.model.student)
  models = {"student": dataclasses.replace(student, lora=setup.lora_config(config.model))}
  if config.needs_teacher:
    models["teacher"] = model_sizes(config.model.teacher)
  if config.objective.reference_weight:
    models["reference"] = student
  mesh = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
  if mesh["data"] == -1:
    mesh["data"] = max(1, devices // (mesh["fsdp"] * mesh["tensor"]))
  return RunPlan(config=config, workdir="", models=models, mesh=mesh, questions={}, programs=(), start_step=0)


def parameters_per_device(
  config: Qwen3VLConfig, mesh: dict[str, int], layout: str = "train", *, without: tuple[str, ...] = ()
) -> int:
  """Counts the weights of a model that one device of a mesh holds; what does not divide is held whole.

  Args:
    config: of the model.
    mesh: devices per axis "data", "fsdp", "tensor".
    layout: "train" or "decode".
    without: top-level parts that are not counted, for example "visual".
  """
  shards = {name: part for name, part in _shard_shapes(config, mesh, layout).items() if name not in without}
  return sum(map(math.prod, jax.tree.leaves(shards, is_leaf=lambda node: isinstance(node, tuple))))


def _shard_shapes(config: Qwen3VLConfig, mesh: dict[str, int], layout: str = "train") -> dict[str, Any]:
  """The parameter tree with the shape of what one device holds at each leaf."""
  shapes = model.abstract_params(config, jnp.float32)
  abstract = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh))
  shardings = sharding.weight_shardings(abstract, shapes, model.logical_axes(config), layout)
  return jax.tree.map(lambda leaf, placed: placed.shard_shape(leaf.shape), shapes, shardings)


def _head_per_device(config: Qwen3VLConfig, mesh: dict[str, int]) -> int:
  """Weights of the head on one device, which a target of a frozen model holds on to."""
  return math.prod(model.head_weight(config, _shard_shapes(config, mesh)))


@dataclasses.dataclass(frozen=True)
class _BatchShape:
  """Rows and lengths of the rollouts on one device."""

  tensor: int  # devices that split heads and vocabulary
  rollouts: int  # completions on the device
  prompts: int  # prefixes on the device
  micro_batches: int
  prompt_tokens: int
  patches: int
  new_tokens: int


def _training_shape(config: Config, mesh: dict[str, int]) -> _BatchShape:
  batch, data = config.batch, config.data
  rows = math.ceil(batch.prompts * batch.rollouts / (mesh["data"] * mesh["fsdp"]))
  return _BatchShape(
    tensor=mesh["tensor"],
    rollouts=rows,
    prompts=math.ceil(rows / batch.rollouts),
    micro_batches=batch.micro_batches,
    prompt_tokens=data.prompt_buckets[min(1, len(data.prompt_buckets) - 1)],
    patches=data.patch_buckets[0],
    new_tokens=config.sampling.max_new_tokens,
  )


def _evaluation_shape(config: Config, mesh: dict[str, int]) -> _BatchShape:
  """One completion per question; where questions do not divide over the devices, several hold the same ones."""
  asked = config.eval.prompts
  split = next(n for n in (mesh["data"] * mesh["fsdp"], mesh["data"], 1) if asked % n == 0)
  return dataclasses.replace(
    _training_shape(config, mesh),
    rollouts=asked // split,
    prompts=asked // split,
    new_tokens=config.eval.max_new_tokens,
  )


def _asked_shapes(plan: RunPlan) -> list[_BatchShape]:
  """What the teacher may be asked for: a hint for every prompt, and the answers of supervised rows."""
  config = plan.config
  asked = [(config.rounds_at_once, config.exploration.hint_tokens)] if config.explores else []
  if config.teacher_answers:
    asked += [(config.batch.rollouts - config.own_rollouts, config.sampling.max_new_tokens)]
  shape = _training_shape(config, plan.mesh)
  return [dataclasses.replace(shape, rollouts=samples * shape.prompts, new_tokens=tokens) for samples, tokens in asked]


def _candidate_shape(config: Config, mesh: dict[str, int]) -> _BatchShape:
  """The candidates of every prompt, with longer prompts, of as many rounds as are asked at once."""
  shape, buckets = _training_shape(config, mesh), config.data.prompt_buckets
  prompts = shape.prompts * config.rounds_at_once
  longer = buckets[min(2, len(buckets) - 1)]
  return dataclasses.replace(shape, prompts=prompts, rollouts=prompts * config.candidates, prompt_tokens=longer)


def _asked(config: Qwen3VLConfig, shape: _BatchShape, itemsize: int, mesh: dict[str, int]) -> int:
  """Caches and logits of the teacher's sampler; every device of fsdp has the logits of all of their rows."""
  return cache_bytes(config, shape, itemsize) + mesh["fsdp"] * _sampler_logits(config, shape)


def cache_bytes(config: Qwen3VLConfig, shape: _BatchShape, itemsize: int) -> int:
  """Keys and values of the shared prompts and of the completions, as the cache of a sampler grows for the last time."""
  text = config.text
  heads = _divided(text.num_key_value_heads, shape.tensor)
  lengths = sampling.cache_lengths(shape.new_tokens)
  positions = shape.prompts * shape.prompt_tokens + shape.rollouts * sum(lengths[-2:])
  return 2 * text.num_hidden_layers * positions * heads * text.head_dim * itemsize


def chunk_logits_bytes(config: Qwen3VLConfig, shape: _BatchShape, *, chunk: int, others: int) -> int:
  """What has a vocabulary axis inside one chunk of the loss of one micro-batch."""
  rows = math.ceil(shape.rollouts / shape.micro_batches)
  tokens = min(max(chunk, rows), rows * shape.new_tokens)
  arrays = _LOGITS_OF_STUDENT + _LOGITS_OF_OTHER * others
  return 4 * _divided(config.text.vocab_size, shape.tensor) * arrays * tokens


def head_gradient_bytes(config: Qwen3VLConfig, shape: _BatchShape, *, fixed: tuple[str, ...] = ()) -> int:
  """The gradient of a trained head, which the chunks of the loss add up beside the gradients of the other weights."""
  if ("language_model" if config.tie_word_embeddings else "lm_head") in fixed:
    return 0
  return 4 * _divided(config.text.vocab_size, shape.tensor) * config.text.hidden_size


def activation_bytes(
  config: Qwen3VLConfig, shape: _BatchShape, itemsize: int, *, remat: str, fixed: tuple[str, ...] = (), logits: int = 0
) -> int:
  """What the forward and backward pass of one micro-batch keep, with `logits` bytes between the two.

  Without remat the inside of every layer, and the logits beside. With it the input of every layer, with "dots" the
  products with weights of every layer besides, and the largest of the logits and the inside of one layer of each tower,
  which are computed once more one after the other. A vision tower that is `fixed` is run forwards alone and keeps one
  layer.
  """
  text, vision = _layers(config, shape, parts=shape.micro_batches)
  depths = (config.text.num_hidden_layers, 1 if "visual" in fixed else config.vision.depth)
  if remat == "none":
    return logits + sum(
      tower.bytes(itemsize, layers=depth, inside=depth) for tower, depth in zip((text, vision), depths, strict=True)
    )
  kept = sum(
    tower.bytes(itemsize, layers=depth, inside=0, products=depth if remat == "dots" else 0)
    for tower, depth in zip((text, vision), depths, strict=True)
  )
  return kept + max(logits, *(tower.bytes(itemsize, layers=0, inside=1) for tower in (text, vision)))


def _one_layer(config: Qwen3VLConfig, shape: _BatchShape, itemsize: int) -> int:
  """The working set of a forward pass over one micro-batch."""
  return max(layer.bytes(itemsize, layers=1, inside=1) for layer in _layers(config, shape, parts=shape.micro_batches))


@dataclasses.dataclass(frozen=True)
class _Layer:
  """Numbers that a transformer layer computes on a batch."""

  stream: int  # residual stream
  products: int  # of activations and weights
  inside: int  # norms, projections and the MLP
  scores: int  # attention weights, float32 before and in the compute dtype after their softmax

  def bytes(self, itemsize: int, *, layers: int, inside: int, products: int = 0) -> int:
    """Bytes of the inputs of `layers` layers, of all within `inside` of them and of the products of `products`."""
    within = _COPIES * (self.inside * itemsize + self.scores * (4 + itemsize))
    return (layers * self.stream + products * self.products) * itemsize + inside * within


def _layers(config: Qwen3VLConfig, shape: _BatchShape, *, parts: int) -> tuple[_Layer, _Layer]:
  """A decoder layer and a vision block on one of `parts` equal parts of the batch."""
  text, vision = config.text, config.vision
  prompts, rollouts = math.ceil(shape.prompts / parts), math.ceil(shape.rollouts / parts)
  heads = _divided(text.num_attention_heads, shape.tensor)
  kv_heads = _divided(text.num_key_value_heads, shape.tensor)
  mlp = _divided(text.intermediate_size, shape.tensor)
  projections = 2 * (heads + kv_heads) * text.head_dim + 3 * mlp
  tokens = prompts * shape.prompt_tokens + rollouts * shape.new_tokens
  pairs = prompts * shape.prompt_tokens**2 + rollouts * shape.new_tokens * (shape.prompt_tokens + shape.new_tokens)
  patches = prompts * shape.patches
  return (
    _Layer(
      tokens * text.hidden_size,
      tokens * ((heads + 2 * kv_heads) * text.head_dim + 2 * mlp + 2 * text.hidden_size),
      tokens * (3 * text.hidden_size + projections),
      heads * pairs,
    ),
    _Layer(
      patches * vision.hidden_size,
      patches * (5 * vision.hidden_size + vision.intermediate_size),
      patches * (7 * vision.hidden_size + 2 * vision.intermediate_size),
      vision.num_heads * patches * shape.patches,
    ),
  )


def _decode_copy(config: Qwen3VLConfig, mesh: dict[str, int], itemsize: int) -> int:
  """A second set of weights in the decode layout."""
  return itemsize * parameters_per_device(lora.base(config), mesh, "decode")  # merged


def _sampler_logits(config: Qwen3VLConfig, shape: _BatchShape) -> int:
  return 4 * _LOGITS_OF_SAMPLER * shape.rollouts * _divided(config.text.vocab_size, shape.tensor)


def _hidden(config: Qwen3VLConfig, shape: _BatchShape, itemsize: int) -> int:
  """Final hidden states of a frozen model on the whole batch, which wait for the update."""
  return shape.rollouts * shape.new_tokens * config.text.hidden_size * itemsize


def _divided(dimension: int, parts: int) -> int:
  """A dimension's share on one device; whole where it does not divide."""
  return dimension // parts if dimension % parts == 0 else dimension
