"""A training step compiled for TPU slices that are not here: memory, collectives and floors of each of its programs.

The programs are those of training, made from shapes: `assembly.build_programs` builds them, and the compiler that runs
on a TPU host compiles them here.
"""

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kepo_jax import links, sampling, sharding
from kepo_jax.data import pipeline
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.planning import benchmark, hlo, memory
from kepo_jax.planning.topologies import Topology
from kepo_jax.training import assembly, checks, compiling, rehearsal, setup
from kepo_jax.types import Prompts, RunPlan

# Share of a chip's memory that a plan may fill: the compiler keeps some for itself, and allocation is never perfect.
LIMIT = 0.85
# What programs are called.
_OF_A_LAYER = "the decode weights of a layer"
_GRADIENTS, _OPTIMIZER, _COMPARISON = "the gradients", "the optimizer", "the comparison of gradients"
# What a run may need and no plan compiles.
NOT_COMPILED = (
  "hints and candidates for more than a quarter of the prompts",
  "updates with rows that hints have made longer",
  "the evaluation",
)
# Replicated arrays from so many bytes on are worth a question.
LARGE = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Padded lengths of a batch, as its buckets have them."""

  prompt_tokens: int
  hinted_tokens: int  # of a prompt with a hint
  patches: int  # rows per image


def bucket_sizes(config: Any) -> Sizes:
  """What `memory.estimate` assumes: the second bucket of prompts, the next one with a hint, the first one of images."""
  lengths = config.data.prompt_buckets
  usual = min(1, len(lengths) - 1)
  return Sizes(lengths[usual], lengths[min(usual + 1, len(lengths) - 1)], config.data.patch_buckets[0])


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """One program of a step on one chip."""

  phase: str  # of memory.PHASES, or "decode weights"
  name: str
  runs: float  # per step
  calls: int  # in each of them
  seconds: float  # that it compiled
  arguments: float  # bytes
  results: float  # bytes, without those that take the place of an argument
  temporaries: float  # bytes
  resident: float  # bytes of everything that is there while it runs, its arguments included
  cost: hlo.Cost  # of one run
  code: float = 0.0  # bytes of its instructions, which stay in a chip's memory between its runs
  processor_seconds: float = 0.0  # of tracing and compiling it: what it takes on a core of its own

  @property
  def total(self) -> float:
    """Bytes at its peak."""
    return self.resident + self.temporaries + self.results

  def floors(self, topology: Topology) -> dict[str, float]:
    """Seconds of one call that arithmetic, memory, links and the network between slices take at least."""
    chip = topology.chip
    return {
      "flops": self.cost.flops / chip.flops,
      "hbm": self.cost.moved / chip.bandwidth,
      "link": sum(map(topology.link_seconds, self.cost.collectives)),
      "network": sum(self.cost.crossed.values()) / chip.network,
    }

  def projected(self, topology: Topology) -> float:
    """Seconds of all its calls in one run of its phase.

    The larger of arithmetic and memory, and all communication after it: nothing overlaps.
    """
    floors = self.floors(topology)
    return self.calls * (max(floors["flops"], floors["hbm"]) + floors["link"] + floors["network"])


@dataclasses.dataclass(frozen=True)
class PodPlan:
  """A training step on a topology."""

  topology: Topology
  mesh: dict[str, int]
  programs: tuple[ProgramPlan, ...]
  failures: dict[str, str]  # phase -> why the compiler refused it

  @property
  def code(self) -> float:
    """Bytes of all programs, which stay on a chip."""
    return sum(each.code for each in self.programs)

  @property
  def peak(self) -> float:
    """Bytes of the fullest program, and the code of all; infinite where one does not compile."""
    if self.failures:
      return math.inf
    return max(each.total for each in self.programs) + self.code

  @property
  def limit(self) -> float:
    """Bytes that it may fill."""
    return LIMIT * self.topology.chip.memory

  @property
  def fits(self) -> bool:
    """Whether everything compiles and stays below the limit."""
    return self.peak <= self.limit

  @property
  def step_seconds(self) -> float:
    """Projected seconds of a step."""
    return sum(each.runs * each.projected(self.topology) for each in self.programs)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind along the same axes of the mesh, in one call of a program."""

  kind: str
  over: tuple[str, ...]  # axes; () where only a transfer between slices is seen
  sent: float  # bytes that a chip sends in its slice
  crossed: float  # bytes that it sends to others
  seconds: float  # on links and network


def traffic(program: ProgramPlan, place: Topology, mesh: Mapping[str, int]) -> list[Traffic]:
  """What a program communicates, by kind and axes, the longest first.

  Args:
    program: compiled.
    place: where.
    mesh: axis -> devices.
  """
  found: dict[tuple[str, tuple[str, ...]], list[float]] = {}
  for each in program.cost.collectives:
    sums = found.setdefault((each.kind, axes_of(each.groups, mesh)), [0.0, 0.0, 0.0])
    seconds = place.link_seconds(each) + each.crossed / place.chip.network
    for index, value in enumerate((each.sent, each.crossed, seconds)):
      sums[index] += value
  rows = (Traffic(kind, over, *sums) for (kind, over), sums in found.items() if any(sums))
  return sorted(rows, key=lambda row: -row.seconds)


def axes_of(groups: links.Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The axes of a mesh along which the members of a group differ.

  Args:
    groups: of devices, numbered along the axes, the last one fastest.
    mesh: axis -> devices.
  """
  members = [np.stack(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
  return tuple(name for axis, name in enumerate(mesh) if any(np.ptp(places[axis]) for places in members))


def bytes_per_device(tree: Any) -> float:
  """Bytes of one device's shards of a tree of shapes with shardings."""
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def replicated(tree: Any, least: int = LARGE) -> dict[str, int]:
  """Path -> bytes of the arrays of a tree that every device of a mesh of several holds whole, from `least` bytes on."""
  return {
    jax.tree_util.keystr(path): leaf.size * leaf.dtype.itemsize
    for path, leaf in jax.tree.leaves_with_path(tree)
    if leaf.size * leaf.dtype.itemsize >= least and leaf.sharding.num_devices > 1 and leaf.sharding.is_fully_replicated
  }


def abstract_weights(config: Qwen3VLConfig, mesh: jax.sharding.Mesh, dtype: Any) -> Any:
  """Shapes of parameters in the train layout."""
  shapes = model.abstract_params(config, dtype)
  places = sharding.weight_shardings(mesh, shapes, model.logical_axes(config))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


class PodRun:
  """A run of a config on the devices of a mesh that may not be here, made of shapes."""

  def __init__(self, config: Any, models: Mapping[str, Qwen3VLConfig], mesh: jax.sharding.Mesh, sizes: Sizes):
    """Builds its programs; nothing compiles yet.

    Args:
      config: of the run.
      models: role ("student", "teacher") -> sizes; a reference is the student.
      mesh: of it, of any devices.
      sizes: of its batches.

    Raises:
      ValueError: the config does not fit together.
    """
    config.validate()
    self.config, self.mesh, self.sizes = config, mesh, sizes
    roles = {"student": models["student"]}
    roles |= {"teacher": models["teacher"]} if config.needs_teacher else {}
    roles |= {"reference": models["student"]} if config.objective.reference_weight else {}
    with self._in_force():
      loaded = {
        role: setup.model_of(config, role, each, abstract_weights(each, mesh, setup.model_dtype(config, role)))
        for role, each in roles.items()
      }
      checks.check_attention(config, models["student"])
      special = benchmark.special_tokens(models["student"])
      self.state, self.programs = assembly.build_programs(config, special, loaded)
    self.models = loaded
    self._patch_width = models["student"].vision.patch_width
    self._key: Any = jax.ShapeDtypeStruct(
      (), jax.eval_shape(jax.random.key, 0).dtype, sharding=sharding.replicated(mesh)
    )

  def _in_force(self) -> Any:
    # An abstract mesh, since small constants are made on the devices of a real one, and these cannot run anything.
    return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)

  def prompts(self, count: int, length: int) -> Prompts:
    """Shapes of a batch of prompts on the mesh."""
    shapes = pipeline.prompt_shapes(count, length, self.sizes.patches, self._patch_width)
    return sharding.placed_shapes(self.mesh, shapes)

  def plan(self, topology: Topology, *, hint_rounds: float = 1.0, compiled: Callable[[str, float], None]) -> PodPlan:
    """Compiles every program of a step.

    Args:
      topology: whose devices the mesh has.
      hint_rounds: rounds of exploration in a step, each with a hint for a quarter of its prompts.
      compiled: called with the name of each program, and the seconds that it took.
    """
    found: list[ProgramPlan] = []
    failures = {}
    start = time.process_time()  # a machine may have other work

    def seen(phase: str, each: compiling.Compiled) -> None:
      nonlocal start
      taken = time.process_time() - start
      program = self._program(phase, each, topology, hint_rounds)
      found.append(dataclasses.replace(program, processor_seconds=taken))
      compiled(f"{each.name} ({phase})", each.seconds)
      start = time.process_time()

    with self._in_force():
      for phase, call in self.phases():
        with compiling.watched(functools.partial(seen, phase)):
          try:
            call()
          except compiling.CompilationError as error:
            failures[phase] = str(error)
            if phase == "scoring":  # the update takes what it returns
              break
    return PodPlan(topology, dict(self.mesh.shape), tuple(found), failures)

  def _program(self, phase: str, each: compiling.Compiled, topology: Topology, hint_rounds: float) -> ProgramPlan:
    analysis = each.executable.memory_analysis()
    turns = {"sampling": self.config.sampling.max_new_tokens, "answers": self.config.sampling.max_new_tokens}
    turns |= {"candidates": self.config.sampling.max_new_tokens, "hints": self.config.exploration.hint_tokens}
    loops = token_turns(turns[phase]) if each.name.endswith("sampler") else ()
    try:
      cost = hlo.cost(
        each.executable.as_text(), turns=loops, slices=topology.slices, slice_devices=topology.slice_devices
      )
    except ValueError as error:
      raise ValueError(f"{each.name} ({phase}) compiles, and its text is not understood: {error}") from error
    return ProgramPlan(
      phase=phase,
      name=each.name,
      runs=hint_rounds if phase in ("hints", "candidates") else self._runs(each.name),
      calls=self._calls(each.name),
      seconds=each.seconds,
      arguments=float(analysis.argument_size_in_bytes),
      results=float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
      temporaries=float(analysis.temp_size_in_bytes),
      resident=self._resident(phase, each.name),
      cost=cost,
      code=float(analysis.generated_code_size_in_bytes),
    )

  def _runs(self, name: str) -> float:
    updates = assembly.update_settings(self.config).updates
    compared = 1 / self.config.log.gradients_every if self.config.compares_gradients else 0.0
    if name == _COMPARISON:
      return compared
    if name == _GRADIENTS:
      return updates + 2 * compared  # those of each term alone
    return float(updates if name == _OPTIMIZER else 1)

  def _calls(self, name: str) -> int:
    return self.models["student"].config.text.num_hidden_layers if name == _OF_A_LAYER else 1

  def _resident(self, phase: str, name: str) -> float:
    """Bytes of everything that is on a device while a program runs, its results and temporaries apart."""
    frozen = {role: bytes_per_device(each.resident.shapes) for role, each in self.models.items() if role != "student"}
    on_host = self.config.model.teacher_memory == "host"
    total = bytes_per_device(self.state) + (0.0 if on_host else sum(frozen.values()))
    if phase in ("sampling", "hints", "candidates", "answers") and self.config.own_rollouts:
      total += bytes_per_device(self.actor())
    if phase in ("hints", "candidates", "answers"):  # a teacher on the hosts comes once for all rounds of exploration
      total += frozen["teacher"] if on_host else 0.0
    if phase == "scoring":
      total += sum(frozen.values()) if on_host else 0.0
    if phase in ("scoring", "update"):
      total += bytes_per_device(self.experience())
    if phase == "update":
      targets = self.targets()
      total += sum(
        bytes_per_device(each.hidden) + (bytes_per_device(each.head) if on_host else 0.0) for each in targets
      )
      total += self._gradients_beside(name) * bytes_per_device(self._trained())
    return total

  def _trained(self) -> dict[str, Any]:
    frozen = self.config.frozen_parts
    return {name: x for name, x in self.state.params.items() if name not in frozen}

  def _gradients_beside(self, name: str) -> int:
    """Sets of gradients that are there while a program of the update runs."""
    # From time to time those of one term wait for those of the other.
    waiting = 1 if self.config.compares_gradients else 0
    return {_OPTIMIZER: 1, _GRADIENTS: waiting, _COMPARISON: 2}.get(name, 0)

  def phases(self) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name of a phase, and the calls that compile it."""
    config = self.config
    count, usual = config.batch.prompts, self.sizes.prompt_tokens
    few = max(1, count // 4)
    if config.own_rollouts:
      yield "decode weights", self.actor
      yield "sampling", lambda: self.programs.rollout(self.actor(), self.prompts(count, usual), self._key)
    if config.explores:
      yield "hints", lambda: self.programs.hint(self.prompts(few, usual), self._key)
      hinted = self.sizes.hinted_tokens
      yield "candidates", lambda: self.programs.candidate(self.actor(), self.prompts(few, hinted), self._key)
    if config.teacher_answers:
      yield "answers", lambda: self.programs.answer(self.prompts(count, usual), self._key)
    yield "scoring", self.targets
    compare = config.compares_gradients
    yield (
      "update",
      lambda: self.programs.update.rehearse(self.state, self.experience(), self.targets(), compare=compare),
    )

  def actor(self) -> Any:
    """Shapes of the student's decode weights."""
    return self.programs.decode_weights(self.state.params)

  def experience(self) -> Any:
    """Shapes of the batch of an update."""
    config = self.config
    rows = (config.batch.prompts, config.batch.rollouts, config.sampling.max_new_tokens)
    return rehearsal.experience_shapes(self.mesh, self.prompts(rows[0], self.sizes.prompt_tokens), rows)

  def targets(self) -> Any:
    """Shapes of what frozen models say about it."""
    experience = self.experience()
    return self.programs.targets(experience.prompts, experience.tokens)


def plan(
  config: Any, topology: Topology, *, hint_rounds: float = 1.0, compiled: Callable[[str, float], None]
) -> PodPlan:
  """A training step of a config on a topology, every program compiled.

  Args:
    config: of the run; its models are folders with a config.json, or published sizes that a name begins with.
    topology: where.
    hint_rounds: rounds of exploration in a step, each with a hint for a quarter of its prompts.
    compiled: called with the name of each program, and the seconds that it took.

  Raises:
    ValueError: the config does not fit together, or its mesh not the topology.
  """
  mesh = topology.mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  models = {role: benchmark.model_config(getattr(config.model, role)) for role in ("student", "teacher")}
  run = PodRun(config, models, mesh, bucket_sizes(config))
  return run.plan(topology.laid(mesh), hint_rounds=hint_rounds, compiled=compiled)


def record(config: Any, plan: PodPlan) -> dict[str, Any]:
  """Everything about a plan, JSON-able."""
  place = plan.topology
  return {
    "topology": place.name,
    "slices": place.slices,
    "devices": len(place.devices),
    "chip": place.chip.name,
    "mesh": plan.mesh,
    "prompts": config.batch.prompts,
    "rollouts": config.batch.rollouts,
    "micro_batches": config.batch.micro_batches,
    "new_tokens": config.sampling.max_new_tokens,
    "fits": plan.fits,
    "peak_bytes": None if plan.failures else plan.peak,
    "code_bytes": plan.code,
    "chip_bytes": place.chip.memory,
    "step_seconds": None if plan.failures else plan.step_seconds,
    "failures": plan.failures,
    "programs": [
      {
        "phase": each.phase,
        "name": each.name,
        "runs": each.runs,
        "calls": each.calls,
        "compile_seconds": each.seconds,
        "compile_processor_seconds": each.processor_seconds,
        "arguments": each.arguments,
        "results": each.results,
        "temporaries": each.temporaries,
        "resident": each.resident,
        "total": each.total,
        "code": each.code,
        "flops": each.cost.flops,
        "moved": each.cost.moved,
        "sent": each.cost.sent,
        "crossed": each.cost.crossed,
        "traffic": [dataclasses.asdict(row) for row in traffic(each, place, plan.mesh)],
        "floors": each.floors(place),
        "projected": each.projected(place),
      }
      for each in plan.programs
    ],
  }


def token_turns(tokens: int) -> tuple[int, ...]:
  """Turns of each loop of a sampler of so many tokens, none of which ends early; the first token needs no turn."""
  lengths = sampling.cache_lengths(tokens)
  return tuple(after - before for before, after in zip((1, *lengths), lengths, strict=False))


def smaller(config: Any, devices: int, slices: int = 1) -> Iterator[tuple[dict[str, Any], Any]]:
  """Changes of a config that make it smaller on each device, from the least to the largest: (fields, changed config).

  Args:
    config: of the run.
    devices: of the topology.
    slices: of it, over which only the data axis may extend.
  """
  mesh, batch = config.mesh, config.batch
  steps: list[dict[str, Any]] = []
  split = [2**n for n in range(1, 4) if devices % 2**n == 0 and 2**n > mesh.tensor]
  meshes = [
    {"mesh.data": devices // (fsdp * tensor), "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    for tensor in (mesh.tensor, *split)
    for fsdp in (2**n for n in range(12))
    if devices % (fsdp * tensor * slices) == 0 and fsdp * tensor > mesh.fsdp * mesh.tensor
  ]
  steps += [{"batch.micro_batches": n} for n in (2, 4, 8, 16, 32, 64) if batch.micro_batches < n <= batch.prompts]
  steps += [{"model.remat": "full"}] if config.model.remat == "none" else []
  steps += sorted(meshes, key=lambda fields: (fields["mesh.tensor"], fields["mesh.fsdp"]))
  steps += [{"optimizer.moments": "bfloat16"}] if config.optimizer.moments == "float32" else []
  steps += [{"model.teacher_memory": "host"}] if config.model.teacher_memory == "device" else []
  pairs = [a | b for a in meshes for b in steps if not a.keys() & b.keys() and "mesh.fsdp" not in b]
  for fields in [*steps, *pairs]:
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict(fields)
    if changed.batch.prompts % changed.batch.micro_batches == 0:
      yield fields, changed


def suggestion(config: Any, estimated: Callable[[Any], RunPlan], plan: PodPlan) -> Iterator[tuple[dict[str, Any], Any]]:
  """The changes that should make a plan fit, by the estimate from shapes; compile to be sure.

  Args:
    config: of the plan.
    estimated: config -> what `memory.estimate` takes, on the devices of the plan.
    plan: that does not fit.
  """
  now = memory.estimate(estimated(config))["peak"]
  # The estimate is off by what the compiler shows, where everything compiled.
  factor = plan.peak / now if math.isfinite(plan.peak) else 1.0
  for fields, changed in smaller(config, len(plan.topology.devices), plan.topology.slices):
    if factor * memory.estimate(estimated(changed))["peak"] <= plan.limit:
      yield fields, changed
