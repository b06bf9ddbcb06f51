"""The jitted programs of a run, and where frozen models wait between them: on the devices, or in host memory."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax import sampling, sharding
from kepo_jax.models.qwen3_vl import lora, model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import compiling
from kepo_jax.training import update as update_lib
from kepo_jax.types import Prompts, Rollouts

PLACES = ("device", "host")

_HOST = "pinned_host"  # pages that a device copies from by itself, beside its work


def check_host_memory(mesh: jax.sharding.Mesh, field: str, instead: str) -> None:
  """Refuses a choice that needs host memory on a backend without.

  Args:
    mesh: of the run.
    field: "section.name=value", as the message says it.
    instead: a value that works.

  Raises:
    ValueError: there is no host memory that the devices can address.
  """
  device = mesh.local_devices[0]
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if _HOST not in kinds:
    raise ValueError(f"{field} needs memory of the kind {_HOST}, and {device.platform} has {kinds}; use {instead}.")


def on_host(params: Any) -> Any:
  """The arrays in the memory of their hosts, sharded as they were; those on the devices are given up one by one."""

  def moved(x: jax.Array) -> jax.Array:
    there = jax.block_until_ready(jax.device_put(x, x.sharding.with_memory_kind(_HOST)))
    x.delete()
    return there

  return jax.tree.map(moved, params)


class Resident:
  """Weights that are wanted on the devices now and then."""

  def __init__(self, params: Any):
    """Keeps them where they are.

    Args:
      params: arrays, on the devices or, from `on_host`, in host memory.
    """
    self._home = params
    self._places = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), params)
    self._on_device: Any = None
    self._phases = 0  # that are open

  @property
  def shapes(self) -> Any:
    """The tree as `jax.ShapeDtypeStruct`, with the shardings that it has on the devices."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self._home, self._places)

  @contextlib.contextmanager
  def on_device(self) -> Iterator[Any]:
    """The arrays on the devices for a phase; phases inside it share them, and the outermost one gives them up.

    The copy is only started: programs that take the arrays wait for it, and the host goes on. Nor are they deleted at
    the end, since programs may still run on them, and results may be one of them (the head of a target): they are gone
    when nothing uses them any more.
    """
    if not self._phases:
      self._on_device = jax.device_put(self._home, self._places)  # arrays that are there already stay as they are
    self._phases += 1
    try:
      yield self._on_device
    finally:
      self._phases -= 1
      if not self._phases:
        self._on_device = None

  @contextlib.contextmanager
  def beside(self, arguments: Any) -> Iterator[Any]:
    """`on_device` for a call with these arguments; where they are shapes, its own `shapes`, and nothing is moved."""
    if compiling.is_abstract(arguments):
      yield self.shapes
      return
    with self.on_device() as params:
      yield params


@dataclasses.dataclass(frozen=True)
class Model:
  """A loaded checkpoint."""

  config: Qwen3VLConfig
  params: Any  # in the train layout; of a frozen model on the devices or in host memory

  @functools.cached_property
  def resident(self) -> Resident:
    """The weights of a frozen model, for the phases that use them."""
    return Resident(self.params)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """What one sampling program is compiled for."""

  samples: int  # completions per prompt
  max_new_tokens: int
  temperature: float  # 0: greedy
  top_p: float = 1.0
  top_k: int = 0


def sampling_program(
  config: Qwen3VLConfig,
  processor: Any,
  settings: SamplingSettings,
  *,
  name: str = "a sampler",
  stationary: bool = False,
) -> Callable[[Any, Prompts, jax.Array], Rollouts]:
  """`sampling.sample` compiled for one model and one setting: (params, prompts, key) -> Rollouts [P, G, T].

  Of a model with LoRA it takes merged weights, as `decode_weights_program` gives them.

  Args:
    config: of the model.
    processor: of the model.
    settings: of the sampling.
    name: what errors call it.
    stationary: its weights are in the train layout and stay so, see `sampling.sample`.
  """
  config = lora.base(config)
  allowed = jnp.asarray(processor.allowed)

  def program(params, prompts, key):
    return sampling.sample(
      config,
      params,
      prompts,
      key,
      end_ids=processor.end_ids,
      pad_id=processor.pad_id,
      allowed=allowed,
      stationary=stationary,
      **dataclasses.asdict(settings),
    )

  return compiling.Program(name, program)


def decode_weights_program(config: Qwen3VLConfig, params: Any, dtype: Any) -> Callable[[Any], Any]:
  """A copy of the weights in the layout and dtype of the token loop, LoRA merged, with layers side by side.

  Decoding from weights sharded over fsdp would gather every layer for every token, and from stacked ones slice it
  out; this does both once per step. It makes one layer at a time: in one program for all of them, a TPU keeps what it
  gathers of every layer beside the results until its end, which is a second copy.

  Args:
    config: of the model.
    params: its weights.
    dtype: of the copy.
  """
  mesh = jax.tree.leaves(params)[0].sharding.mesh

  def layer(stacks, index):
    """Layer `index`; stacks are those of the decoder, and of the matrices of LoRA where there are some."""
    cut = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), stacks)
    return lora.merged(config, model.unstack_layers(cut), dtype)["language_model"]["layers"][0]

  def others(parts):
    return jax.tree.map(lambda x: x.astype(dtype), parts)

  depth = config.text.num_hidden_layers
  stacks, rest = _stacks_and_rest(params)
  shapes = jax.eval_shape(layer, stacks, 0), jax.eval_shape(others, rest)
  names = model.unstacked_axes(lora.base(config))
  axes = names["language_model"]["layers"][0], _stacks_and_rest(names)[1]
  places = [sharding.weight_shardings(mesh, *each, layout="decode") for each in zip(shapes, axes, strict=True)]
  layer_program = compiling.Program("the decode weights of a layer", layer, out_shardings=places[0])
  others_program = compiling.Program("the decode weights but for the layers", others, out_shardings=places[1])

  def decode_weights(params):
    stacks, rest = _stacks_and_rest(params)
    made = others_program(rest)
    layers = tuple(layer_program(stacks, np.int32(index)) for index in range(depth))
    return made | {"language_model": made["language_model"] | {"layers": layers}}

  return decode_weights


def _stacks_and_rest(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """The decoder's layers, with the matrices of LoRA where there are some, and everything else."""
  decoder = params["language_model"]
  rest = {name: part for name, part in decoder.items() if name != "layers"}
  stacks = {"language_model": {"layers": decoder["layers"]}}
  stacks |= {lora.PART: params[lora.PART]} if lora.PART in params else {}
  return stacks, lora.without(params) | {"language_model": rest}


@dataclasses.dataclass(frozen=True)
class Programs:
  """Everything that runs on the device during training."""

  decode_weights: Callable[[Any], Any]  # student's master weights -> weights of its token loop
  rollout: Callable[[Any, Prompts, jax.Array], Rollouts]
  candidate: Callable[[Any, Prompts, jax.Array], Rollouts]  # hinted sampling, from the same weights
  greedy: Callable[[Any, Prompts, jax.Array], Rollouts]  # evaluation
  hint: Callable[[Prompts, jax.Array], Rollouts]  # by the teacher; an error where the config has no use for it
  answer: Callable[[Prompts, jax.Array], Rollouts]  # by the teacher as well, for supervised rows
  targets: Callable[
    [Prompts, jax.Array], tuple[update_lib.Target, ...]
  ]  # teacher, then reference, where the loss uses them
  update: update_lib.Update


def teacher_program(
  teacher: Model, processor: Any, settings: SamplingSettings
) -> Callable[[Prompts, jax.Array], Rollouts]:
  """The teacher's sampler, from the weights that it has: (prompts, key).

  A second copy of a large teacher costs more memory than its few rows are worth, whatever its layout. Its weights stay
  as they are cut, and stacked as they are.
  """
  sample = sampling_program(teacher.config, processor, settings, name="the teacher's sampler", stationary=True)

  def sampled(prompts, key):
    with teacher.resident.beside(prompts) as params:
      return sample(params, prompts, key)

  return sampled


def no_teacher(prompts: Prompts, key: jax.Array) -> Rollouts:
  """Stands where no teacher is loaded."""
  del prompts, key
  raise ValueError("this run has no teacher to ask; see exploration.*, supervised.source and model.teacher.")


def targets_program(
  models: Sequence[Model], parts: int
) -> Callable[[Prompts, jax.Array], tuple[update_lib.Target, ...]]:
  """What each frozen model says about the rollouts of a batch, scored in `parts` micro-batches: (prompts, tokens)."""

  def scoring(config: Qwen3VLConfig) -> Callable[[Any, Prompts, jax.Array], update_lib.Target]:
    def target(params, prompts, tokens):
      return update_lib.target(config, params, prompts, tokens, parts=parts)

    return compiling.Program("scoring by a frozen model", target)

  score = [scoring(each.config) for each in models]

  def targets(prompts, tokens):
    found = []
    for program, each in zip(score, models, strict=True):
      # Programs only start here: the copy of the next model runs beside the work of this one.
      with each.resident.beside(tokens) as params:
        found.append(program(params, prompts, tokens))
    return tuple(found)

  return targets
