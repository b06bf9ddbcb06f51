"""Compiles a training step for TPU slices or GPUs that are not here, and collects what the compiler says.

The programs are those of training, made from shapes: `setup.build_programs` builds them, and the compiler that runs
on a TPU or GPU host compiles them on this one.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kepo_jax import sampling, sharding
from kepo_jax.config import Config
from kepo_jax.data import processor
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.planning import chips, hlo, memory
from kepo_jax.training import checks, compile_ahead, compiling, setup
from kepo_jax.types import Prompts

# Share of a chip's memory that a plan may fill: the compiler keeps some for itself, and allocation is never perfect.
LIMIT = 0.85
# What a run may need and no plan compiles.
NOT_COMPILED = (
  "hints and candidates for more than a quarter of the prompts",
  "updates with rows that hints have made longer",
  "the evaluation",
)
# As the compiler calls them; other shapes of these generations work as well.
GPUS = ("H200", "H100")  # in one host, such as H200 or H100:8
EXAMPLES = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:4x4", "v5p:4x4x4", "v4:4x4x4", "tpu7x:4x4x4")
# libtpu else asks a server that only TPU hosts have, and complains about what it does not find.
_NO_HOST = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at a time: no TPU is held
}
# What programs are called.
_LAYER_COPY = "the decode weights of a layer"
_GRADIENTS, _OPTIMIZER, _COMPARISON = "the gradients", "the optimizer", "the comparison of gradients"


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more slices of TPU chips, or the GPUs of one host."""

  name: str  # of one slice
  slices: int
  devices: tuple[Any, ...]  # that programs can be compiled for, and cannot run on
  chip: chips.Chip  # one of them

  @property
  def label(self) -> str:
    """Name, with the number of slices."""
    return f"{self.slices} x {self.name}" if self.slices > 1 else self.name

  def mesh(self, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    """Makes the mesh of a run on it, as `sharding.make_mesh` makes it there.

    Raises:
      ValueError: the axes do not fit.
    """
    mesh = sharding.make_mesh(data, fsdp, tensor, self.devices)
    if mesh.size != len(self.devices):  # which several hosts refuse, and this process could not know
      raise ValueError(
        f"mesh data={data} x fsdp={fsdp} x tensor={tensor} leaves {len(self.devices) - mesh.size} of the "
        f"{len(self.devices)} chips of {self.label} idle; set mesh.data=-1, or axes that multiply to all of them."
      )
    return mesh


def topology(name: str, slices: int = 1) -> Topology:
  """Describes the slices of a name such as v5e:8x8 or "2 x v5e:16x16", or GPUs such as H100:8.

  It needs the compiler, libtpu or JAX's plugin for CUDA, and no TPU or GPU.

  Args:
    name: generation, and chips along each axis.
    slices: how many of them.

  Raises:
    ValueError: libtpu is not installed or does not know the name, nothing is known about its chips, or the name has
      another number of slices.
  """
  if several := re.fullmatch(r"(\d+)\s*x\s*(\D.*)", name):
    if slices not in (1, int(several.group(1))):
      raise ValueError(f"--topology={name!r} and --slices={slices} contradict each other; leave one of them out.")
    slices, name = int(several.group(1)), several.group(2)
  if gpus := re.fullmatch(r"(H100|H200)(?::(\d+))?", name, re.IGNORECASE):
    return gpu_topology(gpus.group(1).upper(), slices * int(gpus.group(2) or 1))
  if not re.fullmatch(r"\w+:\d+(x\d+)+", name):
    raise ValueError(f"--topology={name!r} is not of the form v5e:8x8; for example {', '.join(EXAMPLES)}.")
  for variable, value in _NO_HOST.items():
    os.environ.setdefault(variable, value)
  try:
    import libtpu  # noqa: F401, PLC0415
    from jax.experimental import topologies  # noqa: PLC0415
  except ImportError:
    raise ValueError(
      "planning for a TPU needs its compiler: pip install jax[tpu], or `make plan`, which does it."
    ) from None
  settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if name.startswith("v4:"):  # JAX shows the two cores of this chip as one device
    settings["chip_config_name"] = "megacore"
  try:
    devices = tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"--topology={name}: {reason} Known are, for example, {', '.join(EXAMPLES)}.") from error
  chips_in_all = slices * math.prod(int(length) for length in name.partition(":")[2].split("x"))
  return Topology(name, slices, devices, device_peaks(devices[0], cores=len(devices) // chips_in_all))


# What XLA wants to know of a GPU (GpuTargetConfigProto); Hopper's sizes, from CUDA's device query.
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f} cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {name}"
"""
# Autotuning needs the device; without it Triton refuses some products of the vision tower.
_GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")


def gpu_topology(name: str, count: int) -> Topology:
  """Describes GPUs of one host, joined by NVLink; needs JAX's plugin for CUDA, and no GPU.

  The compiler chooses its kernels for products without measuring them. Structure, buffers, copies and numbers of
  kernels are real, the choice among a library's kernels is not.

  Args:
    name: of `GPUS`.
    count: how many.

  Raises:
    ValueError: the plugin is not installed.
  """
  os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_GPU_FLAGS)).strip()
  from jax.experimental import topologies  # noqa: PLC0415

  chip = chips.CHIPS[name]
  target = _HOPPER.format(name=name, bandwidth=chip.bandwidth, memory=chip.memory)
  try:
    described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
    raise ValueError(
      f'planning for a GPU needs its compiler ({str(error).splitlines()[0]}): pip install -e ".[plan-gpu]", or '
      "`make plan-gpu`, which does it."
    ) from error
  return Topology(name if count == 1 else f"{name}:{count}", 1, tuple(described.devices), chip)


def device_peaks(device: Any, cores: int) -> chips.Chip:
  """Peaks of a device: a chip, or one of its cores where each is a device of its own.

  Raises:
    ValueError: no data sheet is known.
  """
  chip = chips.data_sheet(device)
  if chip is None:
    known = sorted(part for part, chip in chips.CHIPS.items() if chip.ici)
    raise ValueError(f"nothing is known about {device.device_kind}; kepo_jax/planning/chips.py has {known}.")
  if cores == 1 or "core" in chip.name:
    return chip
  shares = {name: getattr(chip, name) / cores for name in ("flops", "bandwidth", "memory", "ici", "network")}
  return dataclasses.replace(chip, name=f"{chip.name}, one core", **shares)


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """One program of a step on one chip."""

  phase: str  # of memory.PHASES, or "decode weights"
  name: str
  runs: float  # calls in a step
  compile_seconds: float
  arguments: float  # bytes
  results: float  # bytes, without those that take the place of an argument
  temporaries: float  # bytes
  resident: float  # bytes of everything that is there while it runs, its arguments included
  code: float  # bytes of its instructions, which stay in a chip's memory between its runs
  cost: hlo.Cost  # of one call
  token: hlo.Cost  # of a sampler, one token of every row

  @property
  def total(self) -> float:
    """Bytes at its peak."""
    return self.resident + self.temporaries + self.results

  def floors(self, chip: chips.Chip) -> dict[str, float]:
    """Seconds that one call takes at least for its arithmetic, HBM, links of the slice and network between slices."""
    sent, crossed = sum(self.cost.sent.values()), sum(self.cost.crossed.values())
    return {
      "flops": self.cost.flops / chip.flops,
      "hbm": self.cost.moved / chip.bandwidth,
      "ici": sent / chip.ici if sent else 0.0,
      "network": crossed / chip.network if crossed else 0.0,
    }


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training step on a topology."""

  topology: Topology
  mesh: dict[str, int]
  programs: tuple[ProgramPlan, ...]
  failures: dict[str, str]  # phase -> why the compiler refused it

  @property
  def code(self) -> float:
    """Bytes of the code of all programs, which stays on a chip."""
    return sum(program.code for program in self.programs)

  @property
  def peak(self) -> float:
    """Bytes of the fullest program and the code of all; infinite where one does not compile."""
    if self.failures:
      return math.inf
    return max(program.total for program in self.programs) + self.code

  @property
  def limit(self) -> float:
    """Bytes that it may fill."""
    return LIMIT * self.topology.chip.memory

  @property
  def fits(self) -> bool:
    """Whether everything compiles and stays below the limit."""
    return self.peak <= self.limit

  @property
  def floor(self) -> float:
    """Seconds that a step takes at least: its programs run one after the other, each as long as its highest floor."""
    return sum(program.runs * max(program.floors(self.topology.chip).values()) for program in self.programs)


def traffic(cost: hlo.Cost, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
  """Adds up what a program communicates by kind and by axes of the mesh, the most bytes first.

  Args:
    cost: of the program.
    mesh: axis -> devices.

  Returns:
    Rows of kind, axes that the groups extend over (none where only a transfer between slices is seen), bytes that a
    chip sends in its slice, and bytes that it sends to other slices.
  """
  rows: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
  for collective in cost.collectives:
    kind, over = collective.kind, axes_of(collective.groups, mesh)
    row = rows.setdefault((kind, over), {"kind": kind, "over": over, "sent": 0.0, "crossed": 0.0})
    row["sent"] += collective.sent
    row["crossed"] += collective.crossed
  return sorted((row for row in rows.values() if row["sent"] or row["crossed"]), key=lambda row: -row["sent"])


def axes_of(groups: tuple[tuple[int, ...], ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Finds the axes of a mesh along which the members of a group differ.

  Args:
    groups: of devices, numbered along the axes, the last one fastest.
    mesh: axis -> devices.
  """
  members = [np.stack(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
  return tuple(name for axis, name in enumerate(mesh) if any(np.ptp(places[axis]) for places in members))


def bytes_per_device(tree: Any) -> float:
  """Bytes of one device's shards of a tree of shapes with shardings."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """What programs read of a processor."""

  allowed: np.ndarray  # bool[V]
  end_ids: tuple[int, ...]
  pad_id: int


def special_tokens(config: Qwen3VLConfig) -> Any:
  """Stands in for a processor: the one end token is banned, so that no completion ends, and so are vision tokens."""
  allowed = np.ones(config.text.vocab_size, bool)
  allowed[[0, config.image_token_id, config.video_token_id, config.vision_start_token_id]] = False
  allowed[config.vision_end_token_id] = False
  return SpecialTokens(allowed=allowed, end_ids=(0,), pad_id=0)


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Padded lengths of a batch."""

  prompt_tokens: int
  hinted_tokens: int  # of a prompt with a hint
  patches: int  # rows per image


def usual_lengths(config: Config) -> Lengths:
  """Takes what `memory.estimate` assumes: the second bucket of prompts, the next with a hint, the first of images."""
  buckets = config.data.prompt_buckets
  usual = min(1, len(buckets) - 1)
  return Lengths(buckets[usual], buckets[min(usual + 1, len(buckets) - 1)], config.data.patch_buckets[0])


class AbstractRun:
  """A run of a config on the devices of a mesh that may not be here, made of shapes."""

  def __init__(self, config: Config, models: Mapping[str, Qwen3VLConfig], mesh: jax.sharding.Mesh, lengths: Lengths):
    """Builds its programs; nothing compiles yet.

    Args:
      config: of the run.
      models: role ("student", "teacher") -> sizes; a reference is the student.
      mesh: of any devices.
      lengths: of its batches.

    Raises:
      ValueError: the config does not fit together.
    """
    config.validate()
    self.config, self.mesh, self.lengths = config, mesh, lengths
    roles = {"student": models["student"]}
    roles |= {"teacher": models["teacher"]} if config.needs_teacher else {}
    roles |= {"reference": models["student"]} if config.objective.reference_weight else {}
    with self.in_force():
      self.models = {
        role: setup.model_of(config, role, sizes, _abstract_weights(sizes, mesh, setup.model_dtype(config, role)))
        for role, sizes in roles.items()
      }
      checks.check_attention(config, models["student"])
      special = special_tokens(models["student"])
      self.state, self.programs = setup.build_programs(config, special, self.models)
    self._patch_width = models["student"].vision.patch_width
    key = jax.eval_shape(jax.random.key, 0)
    self.key: Any = jax.ShapeDtypeStruct((), key.dtype, sharding=sharding.replicated(mesh))

  def in_force(self) -> Any:
    """Sets the mesh, abstract: small constants are made on the devices of a real one, which cannot run anything."""
    return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

  def prompts(self, count: int, length: int) -> Prompts:
    """Shapes of a batch of prompts on the mesh."""
    shapes = processor.prompt_shapes(count, length, self.lengths.patches, self._patch_width)
    return sharding.placed_shapes(self.mesh, shapes)

  def actor(self) -> Any:
    """Shapes of the student's decode weights."""
    return self.programs.decode_weights(self.state.params)

  def experience(self) -> Any:
    """Shapes of the batch of an update."""
    config = self.config
    rows = (config.batch.prompts, config.batch.rollouts, config.sampling.max_new_tokens)
    return compile_ahead.experience_shapes(self.mesh, self.prompts(rows[0], self.lengths.prompt_tokens), rows)

  def targets(self) -> Any:
    """Shapes of what frozen models say about it."""
    experience = self.experience()
    return self.programs.targets(experience.prompts, experience.tokens)

  def phases(self) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields the name of each phase, and a call that compiles its programs."""
    config, programs, lengths = self.config, self.programs, self.lengths
    count = config.batch.prompts
    few = max(1, count // 4)
    if config.own_rollouts:
      yield "decode weights", self.actor
      yield "sampling", lambda: programs.rollout(self.actor(), self.prompts(count, lengths.prompt_tokens), self.key)
    if config.explores:
      rounds = config.rounds_at_once
      keys = functools.partial(compile_ahead.key_shapes, self.mesh)
      yield "hints", lambda: programs.hint(self.prompts(few, lengths.prompt_tokens), keys(1, rounds))
      rows = few * rounds
      hinted = functools.partial(self.prompts, rows, lengths.hinted_tokens)
      yield "candidates", lambda: programs.candidate(self.actor(), hinted(), keys(rows, 1))
    if config.teacher_answers:
      yield "answers", lambda: programs.answer(self.prompts(count, lengths.prompt_tokens), self.key)
    yield "scoring", self.targets
    compare = config.compares_gradients
    yield "update", lambda: programs.update.compile(self.state, self.experience(), self.targets(), compare=compare)

  def plan(self, topology: Topology, compiled: Callable[[str, float], None]) -> Plan:
    """Compiles every program of a step.

    Args:
      topology: whose devices the mesh has.
      compiled: called with the name of each program, and the seconds that it took.
    """
    programs: list[ProgramPlan] = []
    failures = {}

    def seen(phase: str, program: compiling.Compiled) -> None:
      programs.append(self._program(phase, program, topology))
      compiled(f"{program.name} ({phase})", program.seconds)

    with self.in_force():
      for phase, call in self.phases():
        with compiling.watched(functools.partial(seen, phase)):
          try:
            call()
          except compiling.CompilationError as error:
            failures[phase] = str(error)
            if phase == "scoring":  # the update takes what it returns
              break
    return Plan(topology, dict(self.mesh.shape), tuple(programs), failures)

  def _program(self, phase: str, program: compiling.Compiled, topology: Topology) -> ProgramPlan:
    tokens = self.config.exploration.hint_tokens if phase == "hints" else self.config.sampling.max_new_tokens
    turns = token_turns(tokens) if program.name.endswith("sampler") else ()
    per_slice = len(topology.devices) // topology.slices
    try:
      cost, token = hlo.costs(
        program.executable.as_text(), turns=turns, slices=topology.slices, slice_devices=per_slice
      )
    except ValueError as error:
      raise ValueError(f"cannot parse the compiled HLO of {program.name} ({phase}): {error}") from error
    used = program.executable.memory_analysis()
    return ProgramPlan(
      phase=phase,
      name=program.name,
      runs=self._runs(program.name),
      compile_seconds=program.seconds,
      arguments=float(used.argument_size_in_bytes),
      results=float(used.output_size_in_bytes - used.alias_size_in_bytes),
      temporaries=float(used.temp_size_in_bytes),
      resident=self.resident(phase, program.name),
      code=float(used.generated_code_size_in_bytes),
      cost=cost,
      token=token,
    )

  def _runs(self, name: str) -> float:
    updates = setup.update_settings(self.config).updates
    compared = 1 / self.config.log.gradients_every if self.config.compares_gradients else 0.0
    return {
      _LAYER_COPY: float(self.models["student"].config.text.num_hidden_layers),
      _GRADIENTS: updates + 2 * compared,  # those of each term alone
      _OPTIMIZER: float(updates),
      _COMPARISON: compared,
    }.get(name, 1.0)

  def resident(self, phase: str, name: str) -> float:
    """Bytes of everything that is on a device while a program runs, its results and temporaries apart."""
    frozen = {role: bytes_per_device(held.weights.shapes) for role, held in self.models.items() if role != "student"}
    on_host = self.config.model.teacher_memory == "host"
    total = bytes_per_device(self.state) + (0.0 if on_host else sum(frozen.values()))
    if phase in ("sampling", "hints", "candidates", "answers") and self.config.own_rollouts:
      total += bytes_per_device(self.actor())
    if on_host and phase in ("hints", "candidates", "answers"):  # it comes once for all rounds of exploration
      total += frozen["teacher"]
    if on_host and phase == "scoring":
      total += sum(frozen.values())
    if phase in ("scoring", "update"):
      total += bytes_per_device(self.experience())
    if phase == "update":
      for target in self.targets():
        total += bytes_per_device(target.hidden) + (bytes_per_device(target.head) if on_host else 0.0)
      # The gradients of one term wait for those of the other where the two are compared.
      waiting = int(self.config.compares_gradients)
      total += {_OPTIMIZER: 1, _GRADIENTS: waiting, _COMPARISON: 2}.get(name, 0) * self._gradient_bytes()
    return total

  def _gradient_bytes(self) -> float:
    frozen = self.config.frozen_parts
    return bytes_per_device({name: part for name, part in self.state.params.items() if name not in frozen})


def _abstract_weights(config: Qwen3VLConfig, mesh: jax.sharding.Mesh, dtype: Any) -> Any:
  """Shapes of parameters in the train layout."""
  shapes = model.abstract_params(config, dtype)
  places = sharding.weight_shardings(mesh, shapes, model.logical_axes(config))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def token_turns(tokens: int) -> tuple[int, ...]:
  """Turns of each loop of a sampler of so many tokens, none of which ends early; the first token needs no turn."""
  lengths = sampling.cache_lengths(tokens)
  return tuple(after - before for before, after in zip((1, *lengths), lengths, strict=False))


def plan(config: Config, topology: Topology, compiled: Callable[[str, float], None]) -> Plan:
  """Compiles a training step of a config for a topology.

  Args:
    config: of the run; its models are folders with a config.json, or published sizes that a name begins with.
    topology: where.
    compiled: called with the name of each program, and the seconds that it took.

  Raises:
    ValueError: the config does not fit together, or its mesh not the topology.
  """
  mesh = topology.mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  models = {role: memory.model_sizes(getattr(config.model, role)) for role in ("student", "teacher")}
  return AbstractRun(config, models, mesh, usual_lengths(config)).plan(topology, compiled)


def record(config: Config, plan: Plan) -> dict[str, Any]:
  """Everything about a plan, JSON-able."""
  chip = plan.topology.chip

  def of_program(program: ProgramPlan) -> dict[str, Any]:
    fields = {name: value for name, value in vars(program).items() if name not in ("cost", "token")}
    cost = program.cost
    counts = {"flops": cost.flops, "moved": cost.moved, "sent": cost.sent, "crossed": cost.crossed}
    counts |= {"kernels": cost.kernels, "exchanges": cost.exchanges}
    counts |= {f"token_{name}": getattr(program.token, name) for name in ("moved", "kernels", "exchanges")}
    more = {"traffic": traffic(cost, plan.mesh), "floors": program.floors(chip)}
    return {**fields, "total": program.total, **counts, **more}

  return {
    "topology": plan.topology.name,
    "slices": plan.topology.slices,
    "devices": len(plan.topology.devices),
    "chip": chip.name,
    "mesh": plan.mesh,
    "prompts": config.batch.prompts,
    "rollouts": config.batch.rollouts,
    "micro_batches": config.batch.micro_batches,
    "new_tokens": config.sampling.max_new_tokens,
    "fits": plan.fits,
    "peak_bytes": None if plan.failures else plan.peak,
    "code_bytes": plan.code,
    "chip_bytes": chip.memory,
    "floor_seconds": None if plan.failures else plan.floor,
    "failures": plan.failures,
    "programs": [of_program(program) for program in plan.programs],
  }
