"""The jitted programs of a run, and frozen models that may be offloaded to host memory between them."""

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


def check_host_memory(mesh: jax.sharding.Mesh) -> None:
  """Refuses to offload the teacher where there is no host memory that the devices can address.

  Raises:
    ValueError: there is none; says which memory there is, and the way out.
  """
  device = mesh.local_devices[0]
  kinds = sorted(memory.kind for memory in device.addressable_memories())
  if _HOST not in kinds:
    raise ValueError(
      f"model.teacher_memory=host needs memory of the kind {_HOST}, and {device.platform} has {kinds}; use device."
    )


def offloaded(params: Any) -> Any:
  """Moves arrays to the memory of their hosts, sharded as they are; the device copies are deleted one by one."""

  def move(x: jax.Array) -> jax.Array:
    on_host = jax.block_until_ready(jax.device_put(x, x.sharding.with_memory_kind(_HOST)))
    x.delete()
    return on_host

  return jax.tree.map(move, params)


class OffloadableWeights:
  """Weights of a frozen model, which wait on the devices or in host memory between the phases that use them."""

  def __init__(self, params: Any):
    """Keeps the arrays where they are: on the devices or, from `offloaded`, in host memory."""
    self._params = params
    self._shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), params)
    self._on_device: Any = None
    self._phases = 0  # that are open

  @property
  def shapes(self) -> Any:
    """The tree as `jax.ShapeDtypeStruct`, with its shardings on the devices."""
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(shape, self._params, self._shardings)

  @contextlib.contextmanager
  def on_device(self) -> Iterator[Any]:
    """Yields the arrays on the devices for a phase; phases inside it share them.

    The copy is only started: programs that take the arrays wait for it, and the host goes on. Nor are they deleted at
    the end, since programs may still run on them, and results may be one of them (the head of a target): they are freed
    when nothing uses them any more.
    """
    if not self._phases:
      self._on_device = jax.device_put(self._params, self._shardings)  # no copy of arrays that are there already
    self._phases += 1
    try:
      yield self._on_device
    finally:
      self._phases -= 1
      if not self._phases:
        self._on_device = None

  @contextlib.contextmanager
  def beside(self, arguments: Any) -> Iterator[Any]:
    """Yields the weights for a call: `shapes` where the other arguments are shapes, else the arrays on the devices."""
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
  def weights(self) -> OffloadableWeights:
    """The weights of a frozen model, for the phases that use them."""
    return OffloadableWeights(self.params)


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
  weight_stationary: bool = False,
) -> Callable[[Any, Prompts, jax.Array], Rollouts]:
  """Compiles `sampling.sample` for one model and one setting: (params, prompts, key) -> Rollouts [P, G, T].

  Several keys come as their data, uint32[..., 2]. Of a model with LoRA it takes merged weights, as
  `decode_weights_program` gives them.

  Args:
    config: of the model.
    processor: of the model.
    settings: of the sampling.
    name: what errors call it.
    weight_stationary: decode from weights of the train layout, see `sampling.sample`.
  """
  config = lora.base(config)
  allowed = jnp.asarray(processor.allowed)

  def program(params, prompts, key):
    key = jax.random.wrap_key_data(key) if key.dtype == jnp.uint32 else key
    return sampling.sample(
      config,
      params,
      prompts,
      key,
      end_ids=processor.end_ids,
      pad_id=processor.pad_id,
      allowed=allowed,
      weight_stationary=weight_stationary,
      **dataclasses.asdict(settings),
    )

  return compiling.Program(name, program)


def decode_weights_program(config: Qwen3VLConfig, params: Any, dtype: Any) -> Callable[[Any], Any]:
  """Returns the program that copies weights to the layout and dtype of the token loop, LoRA merged, layers unstacked.

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
    """Returns layer `index` of the decoder, merged with its matrices of LoRA where there are some."""
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), stacks)
    return lora.merged(config, model.unstack_layers(part), dtype)["language_model"]["layers"][0]

  def others(parts):
    return jax.tree.map(lambda x: x.astype(dtype), parts)

  depth = config.text.num_hidden_layers
  stacks, rest = _stacks_and_rest(params)
  shapes = jax.eval_shape(layer, stacks, 0), jax.eval_shape(others, rest)
  names = model.unstacked_axes(lora.base(config))
  axes = names["language_model"]["layers"][0], _stacks_and_rest(names)[1]
  places = [sharding.weight_shardings(mesh, *part, layout="decode") for part in zip(shapes, axes, strict=True)]
  layer_program = compiling.Program("the decode weights of a layer", layer, out_shardings=places[0])
  others_program = compiling.Program("the decode weights but for the layers", others, out_shardings=places[1])

  def decode_weights(params):
    stacks, rest = _stacks_and_rest(params)
    copies = others_program(rest)
    layers = tuple(layer_program(stacks, np.int32(index)) for index in range(depth))
    return copies | {"language_model": copies["language_model"] | {"layers": layers}}

  return decode_weights


def _stacks_and_rest(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into the decoder's layers, with their matrices of LoRA, and everything else."""
  decoder = params["language_model"]
  rest = {name: part for name, part in decoder.items() if name != "layers"}
  stacks = {"language_model": {"layers": decoder["layers"]}}
  stacks |= {lora.PART: params[lora.PART]} if lora.PART in params else {}
  return stacks, lora.without(params) | {"language_model": rest}


@dataclasses.dataclass(frozen=True)
class Programs:
  """The programs that run on the devices during training."""

  decode_weights: Callable[[Any], Any]  # student's master weights -> weights of its token loop
  rollout: Callable[[Any, Prompts, jax.Array], Rollouts]
  candidate: Callable[[Any, Prompts, jax.Array], Rollouts]  # hinted sampling, from the same weights
  greedy: Callable[[Any, Prompts, jax.Array], Rollouts]  # evaluation
  hint: Callable[[Prompts, jax.Array], Rollouts]  # by the teacher; an error where the config has no use for it
  answer: Callable[[Prompts, jax.Array], Rollouts]  # by the teacher as well, for supervised rows
  # By the teacher, then the reference, where the loss uses them.
  targets: Callable[[Prompts, jax.Array], tuple[update_lib.Target, ...]]
  update: update_lib.Update


def teacher_program(
  teacher: Model, processor: Any, settings: SamplingSettings
) -> Callable[[Prompts, jax.Array], Rollouts]:
  """Returns the teacher's sampler, (prompts, key) -> Rollouts, which decodes from its weights as they are sharded.

  A second copy of a large teacher costs more memory than its few rows are worth, whatever its layout.
  """
  sample = sampling_program(teacher.config, processor, settings, name="the teacher's sampler", weight_stationary=True)

  def sample_teacher(prompts, key):
    with teacher.weights.beside(prompts) as params:
      return sample(params, prompts, key)

  return sample_teacher


def no_teacher(prompts: Prompts, key: jax.Array) -> Rollouts:
  """Raises ValueError; in the place of the teacher's programs where no teacher is loaded."""
  del prompts, key
  raise ValueError("this run has no teacher to ask; see exploration.*, supervised.source and model.teacher.")


def targets_program(
  models: Sequence[Model], parts: int
) -> Callable[[Prompts, jax.Array], tuple[update_lib.Target, ...]]:
  """Returns (prompts, tokens) -> what each frozen model says about the rollouts, scored in `parts` micro-batches."""

  def scoring(config: Qwen3VLConfig) -> Callable[[Any, Prompts, jax.Array], update_lib.Target]:
    def target(params, prompts, tokens):
      return update_lib.target(config, params, prompts, tokens, parts=parts)

    return compiling.Program("scoring by a frozen model", target)

  programs = [scoring(frozen.config) for frozen in models]

  def targets(prompts, tokens):
    hidden = []
    for program, frozen in zip(programs, models, strict=True):
      # Programs only start here: the copy of the next model runs beside the work of this one.
      with frozen.weights.beside(tokens) as params:
        hidden.append(program(params, prompts, tokens))
    return tuple(hidden)

  return targets
