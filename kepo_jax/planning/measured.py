"""The cost model of `pods` beside a step that runs: the same functions project it for the devices that are here.

What a data sheet says of a chip is measured here instead, on all devices of the mesh at once: virtual devices of one
machine share its cores, its memory and what stands for links.
"""

import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kepo_jax.planning import benchmark, chips, hlo, pods
from kepo_jax.planning.topologies import Topology
from kepo_jax.training import compiling

_WORK = 2e10  # FLOP of one measurement of a product on a device, about
_SWEPT = 2**26  # bytes of an array that is read and written: more than caches hold
_SENT = 2**23  # bytes of an array that is gathered and reduced, about that of activations
_TIMES = 8  # in one measurement of memory or links


@dataclasses.dataclass(frozen=True)
class Rates:
  """What each device of a mesh reaches while all of them work."""

  products: dict[str, float]  # shape in words -> FLOP/s
  bandwidth: float  # bytes/s of memory
  link: float  # bytes/s that it sends in collectives; infinite on a mesh of one

  @property
  def flops(self) -> float:
    """FLOP/s of the fastest product: what a data sheet calls the peak."""
    return max(self.products.values())


def median(rates: list[Rates]) -> Rates:
  """Of several measurements, each rate by itself."""
  middle = statistics.median
  products = {name: middle(each.products[name] for each in rates) for name in rates[0].products}
  return Rates(products, middle(each.bandwidth for each in rates), middle(each.link for each in rates))


def product_shapes(config: Any, bench: benchmark.Benchmark) -> dict[str, tuple[int, int, int]]:
  """Name -> (rows, inputs, outputs) of products that one device computes in scoring and in the update."""
  mesh, text = bench.mesh.shape, bench.configs["student"].text
  rows = config.batch.prompts * config.batch.rollouts * config.sampling.max_new_tokens
  rows //= config.batch.micro_batches * mesh["data"] * mesh["fsdp"]
  width, inner, vocabulary = text.hidden_size, text.intermediate_size, text.vocab_size
  tensor = mesh["tensor"]
  return {
    "into the MLP": (rows, width, inner // tensor),
    "out of the MLP": (rows, inner // tensor, width),
    "logits": (rows, width, vocabulary // tensor),
    "2048 x 2048 x 2048": (2048, 2048, 2048),
  }


class Probes:
  """Programs that measure `Rates`."""

  def __init__(self, mesh: jax.sharding.Mesh, shapes: Mapping[str, tuple[int, int, int]], dtype: Any):
    """Makes them; they compile when they first measure.

    Args:
      mesh: of the devices.
      shapes: name -> (rows, inputs, outputs) of the products.
      dtype: of the products.
    """
    self._mesh = mesh
    everywhere = PartitionSpec(mesh.axis_names)
    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)

    @jax.jit
    @split
    def product(left, right):
      return jnp.einsum("dmk,dnk->dmn", left, right)

    @jax.jit
    @split
    def exchange(x):
      # Both kinds that a step is made of: parts of weights are gathered, sums of activations reduced.
      whole = jax.lax.all_gather(x, mesh.axis_names, tiled=True)
      return jax.lax.psum(whole.reshape(mesh.size, -1), mesh.axis_names)[:1]

    self._product, self._exchange = product, exchange
    self._sweep = jax.jit(split(lambda x: x + 1), donate_argnums=0)
    self._shapes, self._dtype = dict(shapes), dtype

  def rates(self) -> Rates:
    """Measures all of them once."""
    products = {name: self._products(*shape) for name, shape in self._shapes.items()}
    return Rates(products, self._bandwidth(), self._link())

  def _ones(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An array of this shape on each device."""
    place = jax.NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    return jnp.ones((self._mesh.size, *shape), dtype, device=place)

  def _products(self, rows: int, inputs: int, outputs: int) -> float:
    work = 2.0 * rows * inputs * outputs
    times = max(1, round(_WORK / work))
    left, right = self._ones((rows, inputs), self._dtype), self._ones((outputs, inputs), self._dtype)
    jax.block_until_ready(self._product(left, right))
    return work * times / chips.seconds(_several(times, lambda *_: self._product(left, right)))

  def _bandwidth(self) -> float:
    # In place: pages that are new to a process cost far more.
    values = self._sweep(self._ones((_SWEPT // 4,), jnp.float32))
    return 2 * _SWEPT * _TIMES / chips.seconds(_several(_TIMES, self._sweep), values)

  def _link(self) -> float:
    if self._mesh.size == 1:
      return math.inf
    part = self._ones((_SENT // 4 // self._mesh.size,), jnp.float32)
    sent = hlo.cost(self._exchange.lower(part).compile().as_text() or "").sent
    jax.block_until_ready(self._exchange(part))
    taken = chips.seconds(_several(_TIMES, lambda *_: self._exchange(part)))
    return sum(sent.values()) * _TIMES / taken


def _several(times: int, function: Callable[..., Any]) -> Callable[..., Any]:
  """The function so many times, of its own last result."""

  def run(*arguments):
    for _ in range(times):
      arguments = (function(*arguments),)
    return arguments

  return run


def topology(mesh: jax.sharding.Mesh, rates: Rates) -> Topology:
  """The devices of a mesh as a slice of chips that reach these rates."""
  kind = mesh.devices.flat[0].device_kind or mesh.devices.flat[0].platform
  # What was measured is all that a device sends, in whatever direction.
  chip = chips.Chip(kind, rates.flops, rates.bandwidth, 0.0, True, rates.link, math.inf)
  return Topology(f"{mesh.devices.flat[0].platform}:{mesh.size}", 1, tuple(mesh.devices.flat), chip)


class RunHere(pods.PodRun):
  """The programs of a benchmark as those of a plan."""

  def __init__(self, bench: benchmark.Benchmark):
    """Takes its programs, and shapes in the place of its arrays."""
    hinted = bench.hinted.tokens.shape[1]
    self.sizes = pods.Sizes(bench.prompts.tokens.shape[1], hinted, bench.prompts.vision.patches.shape[1])
    self.mesh, self.models, self.programs = bench.mesh, bench.models, bench.programs
    self.config = copy.deepcopy(bench.config)
    self.config.log.gradients_every = 0  # no turn of a benchmark compares gradients
    self.state = compiling.shapes_of(bench.state)
    batches = (compiling.shapes_of(batch) for batch in (bench.prompts, bench.few, bench.hinted))
    self._batches = {batch.tokens.shape: batch for batch in batches}
    self._key = jax.eval_shape(jax.random.key, 0)  # on no device yet, as the keys of its turns

  def _in_force(self) -> Any:
    return jax.set_mesh(self.mesh)

  def prompts(self, count: int, length: int) -> Any:
    """Shapes of the benchmark's own batch of this size."""
    return self._batches[count, length]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A phase of a step as the model projects it, and as it ran."""

  name: str
  programs: tuple[pods.ProgramPlan, ...]
  place: Topology
  counted: float  # FLOP of its products on each device, by the traced program
  measured: float  # median seconds

  def floors(self) -> dict[str, float]:
    """Seconds of arithmetic, memory and links, of all its programs."""
    each = [(one.runs * one.calls, one.floors(self.place)) for one in self.programs]
    return {name: sum(times * floors[name] for times, floors in each) for name in ("flops", "hbm", "link")}

  @property
  def flops(self) -> float:
    """FLOP of its products on each device, by the compiled programs."""
    return sum(one.runs * one.calls * one.cost.flops for one in self.programs)

  @property
  def projected(self) -> float:
    """Seconds by the model."""
    return sum(one.runs * one.projected(self.place) for one in self.programs)

  @property
  def error(self) -> float:
    """How much longer the model says than the run took, as a share of what it took."""
    return self.projected / self.measured - 1


def compare(
  bench: benchmark.Benchmark, repeats: int, compiled: Callable[[str, float], None]
) -> tuple[list[Comparison], Rates]:
  """Projects the phases of a benchmark, runs them, and measures what the devices reach beside every turn.

  Args:
    bench: whose config explores in every step, or not at all.
    repeats: timed turns.
    compiled: called with the name of each program, and the seconds that it took.

  Raises:
    ValueError: a program does not compile.
  """
  run = RunHere(bench)
  probes = Probes(bench.mesh, product_shapes(bench.config, bench), jnp.dtype(bench.config.model.compute_dtype))
  rates: list[Rates] = []

  def between(turn: int) -> None:
    if turn:  # what disturbs a turn on a shared machine disturbs what is measured beside it as well
      rates.append(probes.rates())

  # Before anything is timed: the plan compiles what the turns then find.
  plan = run.plan(topology(bench.mesh, probes.rates()), compiled=compiled)
  if plan.failures:
    raise ValueError("; ".join(f"{phase}: {reason}" for phase, reason in plan.failures.items()))
  phases = bench.phases(repeats, between)
  found = median(rates)
  return list(_comparisons(plan, topology(bench.mesh, found), phases)), found


def _comparisons(plan: pods.PodPlan, place: Topology, phases: list[benchmark.Phase]) -> Iterator[Comparison]:
  for phase in phases:
    programs = tuple(each for each in plan.programs if each.phase == phase.name)
    yield Comparison(phase.name, programs, place, phase.work.flops / len(place.devices), phase.median)


def step(comparisons: list[Comparison]) -> Comparison:
  """The sum of the phases."""
  programs = tuple(each for one in comparisons for each in one.programs)
  counted, taken = (sum(getattr(each, name) for each in comparisons) for name in ("counted", "measured"))
  return Comparison("step", programs, comparisons[0].place, counted, taken)
