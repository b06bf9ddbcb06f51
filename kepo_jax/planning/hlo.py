"""What a compiled program costs on each device, read from the text of its HLO: loops as often as they turn.

XLA's own cost analysis counts the body of a loop once, and says nothing of collectives. The text has both, and is what
the device runs: products that the partitioner left whole on every device count in full on every device.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Kinds whose groups are pairs of a source and a target; the second one goes between slices.
PERMUTATIONS = ("collective-permute", "one-to-one")
# Instructions that move nothing themselves.
_FREE = {
  *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota"),
  *("copy-done", "slice-done", "async-done", "async-update", "partition-id", "replica-id", "after-all"),
  *("opt-barrier", "broadcast", "send", "send-done", "recv", "recv-done"),
  *(kind + ending for kind in COLLECTIVES for ending in ("", "-start", "-done")),
}
# Instructions that hand their operand on inside a fusion.
_UNCHANGED = ("bitcast", "copy", "convert", "reshape")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "token": 0}
_BITS |= {"f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_BITS |= {"c64": 64, "c128": 128}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
# A mesh with named axes, the devices along it unless they are 0, 1, 2, ..., and the axes over which groups extend.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([^)]*\))?)\))?\s*\{([^}]*)\}")
# How a TPU's compiler marks what it sends to other slices.
_TRANSFER = "_xla_megascale_transfer_type"
# How it marks the start of a collective that goes on in the fusions that follow.
_STARTING = 'custom_call_target="AsyncCollectiveStart"'
# What it calls a fusion of an all-reduce with the slices of its results that a device keeps, which scatters them.
_SCATTERING = "all-reduce-scatter"
# What a product that a GPU's library computes has among its settings.
_LIBRARY_PRODUCT = '"gemm_backend_config"'
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
  """Type of one array."""

  bits: int  # of an element
  shape: tuple[int, ...]
  in_memory: bool  # HBM; False: in a faster memory of the chip

  @property
  def size(self) -> float:
    """Bytes."""
    return self.bits * math.prod(self.shape) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  arrays: tuple[Array, ...]  # its result; several of a tuple
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool

  def called(self, attribute: str) -> str:
    """The computation that an attribute names."""
    return _found(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)[0]


@dataclasses.dataclass(frozen=True)
class Collective:
  """Communication of a kind among groups of devices."""

  kind: str  # of COLLECTIVES, or what a transfer between slices is called
  size: float  # bytes of the gathered, reduced or exchanged array on a device, all times together
  group: int  # devices
  slices: int = 1  # that a group has devices of, equally many of each
  groups: tuple[tuple[int, ...], ...] = ()  # of devices, as programs number them; empty between slices alone

  @property
  def sent(self) -> float:
    """Bytes that a device sends to others of its slice, in rings."""
    near = self.group // self.slices
    if self.kind == "all-to-all":  # a part for each device, those of other slices too
      return self.size * (near - 1) / self.group
    return self.size * self._share(near)

  @property
  def crossed(self) -> float:
    """Bytes that a device sends to other slices: its part of what its slice has gathered or reduced."""
    near = self.group // self.slices
    if self.kind == "all-to-all":
      return self.size * (self.group - near) / self.group
    return self.size * self._share(self.slices) / near

  def _share(self, devices: int) -> float:
    if devices < 2:
      return 0.0
    if self.kind in PERMUTATIONS:
      return 1.0
    return (2 if self.kind == "all-reduce" else 1) * (devices - 1) / devices


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program on each device."""

  flops: float = 0.0  # products; what a kernel of its own does inside is not seen
  moved: float = 0.0  # bytes from and to HBM, what is fused counted once
  collectives: tuple[Collective, ...] = ()

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.flops + other.flops, self.moved + other.moved, self.collectives + other.collectives)

  def times(self, count: float) -> "Cost":
    """So many runs."""
    several = tuple(dataclasses.replace(each, size=count * each.size) for each in self.collectives)
    return Cost(count * self.flops, count * self.moved, several)

  @property
  def sent(self) -> dict[str, float]:
    """Kind of a collective -> bytes that each device sends inside its slice."""
    return self._by_kind(lambda each: each.sent)

  @property
  def crossed(self) -> dict[str, float]:
    """Kind of a collective -> bytes that each device sends to other slices."""
    return self._by_kind(lambda each: each.crossed)

  def _by_kind(self, of: Callable[[Collective], float]) -> dict[str, float]:
    total: dict[str, float] = collections.defaultdict(float)
    for each in self.collectives:
      if of(each):
        total[each.kind] += of(each)
    return dict(total)


def cost(text: str, *, turns: Sequence[int] = (), slices: int = 1, slice_devices: int = 0) -> Cost:
  """What one run of a compiled program costs on each device.

  Args:
    text: `compiled.as_text()`, after partitioning and fusion.
    turns: of the loops whose number of turns depends on data, in their order in the program.
    slices: over which the program runs.
    slice_devices: devices of each, where there are several.

  Raises:
    ValueError: the number of loops that depend on data is not that of `turns`.
  """
  program = Program(text, slices, slice_devices)
  found = program.cost(program.entry, tuple(turns))
  if len(program.open_loops) != len(turns):
    raise ValueError(
      f"{len(program.open_loops)} loops turn as often as their data say, and `turns` has {len(turns)} numbers."
    )
  return found


class Program:
  """The computations of a module."""

  def __init__(self, text: str, slices: int = 1, slice_devices: int = 0):
    """Reads them.

    Args:
      text: of the module.
      slices: over which it runs.
      slice_devices: devices of each, where there are several.
    """
    self.entry = ""
    header = text.partition("\n")[0]
    counts = (re.search(rf"\b{name}=(\d+)", header) for name in ("num_partitions", "replica_count"))
    self._devices = math.prod(int(count.group(1)) for count in counts if count)
    self._computations: dict[str, dict[str, Instruction]] = {}
    self._slices, self._slice = slices, slice_devices if slices > 1 else 0
    self.open_loops: list[str] = []
    self._turns: tuple[int, ...] = ()
    self._starts: dict[tuple[str, str], str] = {}
    self._scattered: set[str] = set()  # all-reduces of which every device keeps its part alone
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
      if match := _COMPUTATION.match(line):
        lines = self._computations[match.group(2)] = {}
        self.entry = match.group(2) if match.group(1) else self.entry
      elif match := _INSTRUCTION.match(line):
        lines[match.group(1)] = _instruction(match.group(1), line, match.end())
    for name, lines in self._computations.items():
      self._scattered |= lines.keys() if name.startswith(_SCATTERING) else set()
      starts = (each for each in lines.values() if _STARTING in each.attributes)
      collectives = (lines[name] for each in starts for name in each.operands)
      self._starts |= {_channel(each): each.name for each in collectives}

  def cost(self, name: str, turns: tuple[int, ...]) -> Cost:
    """Of one run of a computation."""
    self._turns = turns
    return self._computation(name)

  def carried(self) -> list[Array]:
    """What a device carries through each loop of the program."""
    loops = (each for lines in self._computations.values() for each in lines.values() if each.opcode == "while")
    return [array for loop in loops for array in loop.arrays]

  def results(self) -> list[Array]:
    """What a device is left with."""
    return [array for each in self._computations[self.entry].values() if each.root for array in each.arrays]

  def _computation(self, name: str) -> Cost:
    total = Cost()
    for instruction in self._computations[name].values():
      total += self._instruction(instruction, name)
      for each, around in self._collectives(instruction, self._computations[name]):
        total += self._communicated(each, around)
    return total

  def _instruction(self, instruction: Instruction, computation: str) -> Cost:
    opcode = instruction.opcode
    if opcode == "while":
      body, condition = (instruction.called(name) for name in ("body", "condition"))
      turns = self._loop_turns(instruction, computation)
      return self._computation(body).times(turns) + self._computation(condition).times(turns + 1)
    if opcode == "conditional":
      # Any of them may be taken: the dearest, by products, then by what is sent, then by memory.
      return max((self._computation(each) for each in _branches(instruction)), key=_weight)
    if opcode in ("call", "async-start"):
      return self._computation(instruction.called("to_apply" if opcode == "call" else "calls"))
    flops = self._fused_flops(instruction, self._computations[computation])
    return Cost(flops, self._moved(instruction, computation))

  def _fused_flops(self, instruction: Instruction, around: Mapping[str, Instruction]) -> float:
    if instruction.opcode != "fusion":
      return _products(instruction, around)
    inside = self._computations[instruction.called("calls")]
    return sum(self._fused_flops(each, inside) for each in inside.values())

  def _loop_turns(self, loop: Instruction, computation: str) -> int:
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
      return int(known.group(1))
    condition = self._computations[loop.called("condition")]
    root = next(each for each in condition.values() if each.root)
    bound, place = self._bound(root, condition), self._counter(root, condition)
    if bound is not None and place is not None:
      start, step = self._start(place, loop, computation), self._step(place, loop)
      if start is not None and step:
        return max(0, math.ceil((bound - start) / step))
    if loop.name not in self.open_loops:
      self.open_loops.append(loop.name)
    index = self.open_loops.index(loop.name)
    return self._turns[index] if index < len(self._turns) else 0

  def _bound(self, root: Instruction, condition: Mapping[str, Instruction]) -> int | None:
    """n of a condition that is i < n alone."""
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
      return None
    return _constant(condition[root.operands[1]])

  def _counter(self, root: Instruction, condition: Mapping[str, Instruction]) -> int | None:
    """The place of i in what the loop carries."""
    counter = condition[root.operands[0]]
    return _place(counter) if counter.opcode == "get-tuple-element" else None

  def _start(self, place: int, loop: Instruction, computation: str) -> int | None:
    """The first i."""
    around = self._computations[computation]
    source = around[loop.operands[0]]
    while source.opcode in ("copy", "bitcast", "opt-barrier"):
      source = around[source.operands[0]]
    if source.opcode != "tuple":
      return None
    value = around[source.operands[place]]
    while value.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
      value = around[value.operands[0]]
    return _constant(value)

  def _step(self, place: int, loop: Instruction) -> int | None:
    """What a turn adds to i: 2 where the compiler has unrolled the body, as it does with products that it overlaps."""
    body = self._computations[loop.called("body")]
    root = next(each for each in body.values() if each.root)
    if root.opcode != "tuple":
      return None
    value, added = body[root.operands[place]], 0
    while value.opcode != "get-tuple-element":
      if value.opcode in ("copy", "bitcast"):
        value = body[value.operands[0]]
        continue
      terms = [body[name] for name in value.operands] if value.opcode == "add" else []
      constants = [term for term in map(_constant, terms) if term is not None]
      if len(constants) != 1:
        return None
      added += constants[0]
      value = next(each for each in terms if _constant(each) is None)
    return added if _place(value) == place else None

  def _collectives(
    self, instruction: Instruction, around: Mapping[str, Instruction]
  ) -> list[tuple[Instruction, Mapping[str, Instruction]]]:
    """What an instruction communicates itself or inside its fusion, and the computation in which that stands."""
    opcode = instruction.opcode
    if opcode.removesuffix("-start") in COLLECTIVES or (opcode == "send" and _TRANSFER in instruction.attributes):
      # An asynchronous one stands in its start, in its end and in all that runs between, loops too: it is sent once.
      once = self._starts.get(_channel(instruction), instruction.name) == instruction.name
      return [(instruction, around)] if once else []
    if opcode == "fusion" or (opcode == "custom-call" and "calls=" in instruction.attributes):
      inside = self._computations.get(instruction.called("calls"), {})
      return list(itertools.chain.from_iterable(self._collectives(each, inside) for each in inside.values()))
    return []

  def _communicated(self, collective: Instruction, around: Mapping[str, Instruction]) -> Cost:
    """Of a collective: what it sends is read, and what it receives is written."""
    kind, groups = collective.opcode.removesuffix("-start"), _groups(collective.attributes, self._devices)
    operands = [array for name in collective.operands if name in around for array in around[name].arrays]
    if kind == "send":  # between slices, of what each chip has left after a collective in its own
      kind = _found(rf'{_TRANSFER}="(\w+)"', collective.attributes)[0].lower().replace("_", "-")
      (sent, *_) = collective.arrays
      size = sent.size * (self._slices if kind == "all-gather" else 1)
      moved = 2 * sent.size if sent.in_memory else 0.0  # as much comes as goes
      return Cost(moved=moved, collectives=(Collective(kind, size, self._slices, self._slices),))
    # Several arrays may go at once. A start returns its operands before its results, but for that of an all-reduce.
    several = len(collective.operands)
    ahead = collective.opcode.endswith("-start") and kind != "all-reduce"
    results = collective.arrays[several : 2 * several] if ahead else collective.arrays
    size, kept = sum(array.size for array in results), 1.0
    if kind == "reduce-scatter":
      size *= len(groups[0])
    elif collective.name in self._scattered:
      kind, kept = "reduce-scatter", 1 / len(groups[0])
    slices = max(len({device // self._slice for device in group}) for group in groups) if self._slice else 1
    moved = _in_memory(operands) + kept * _in_memory(results)
    return Cost(moved=moved, collectives=(Collective(kind, size, len(groups[0]), slices, groups),))

  def _moved(self, instruction: Instruction, computation: str) -> float:
    """Bytes from and to HBM of one instruction that runs by itself, apart from collectives."""
    if instruction.opcode in _FREE:
      return 0.0
    if instruction.opcode in ("copy-start", "slice-start"):  # between two memories: (result, operand, context)
      ends = instruction.arrays[:2]
      return min(array.size for array in ends) * sum(array.in_memory for array in ends)
    around = self._computations[computation]
    read = 0.0
    for index, name in enumerate(instruction.operands):
      whole = sum(array.size for array in around[name].arrays if array.in_memory) if name in around else 0.0
      read += min(whole, self._read_by(instruction, index, whole)) if whole else 0.0
    if instruction.opcode in _UNCHANGED:  # by itself, whatever it copies
      return read + _in_memory(instruction.arrays)
    if instruction.opcode != "fusion":
      return read + _written(instruction, around)
    inside = self._computations[instruction.called("calls")]
    root = next(each for each in inside.values() if each.root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    # The fusion says in which memory its results lie.
    written = (
      min(_written(result, inside), array.size)
      for result, array in zip(results, instruction.arrays, strict=False)
      if array.in_memory
    )
    return read + sum(written)

  def _read_by(self, instruction: Instruction, index: int, whole: float) -> float:
    """Bytes that an instruction reads of its operand `index`, which has `whole`."""
    opcode = instruction.opcode
    if opcode in ("tuple", "get-tuple-element", "parameter") or opcode.removesuffix("-start") in COLLECTIVES:
      return 0.0
    if opcode == "custom-call" and "AsyncCollective" in instruction.attributes:
      return 0.0
    if opcode in ("dynamic-slice", "slice", "gather") and index == 0:
      return instruction.arrays[0].size
    if opcode == "dynamic-update-slice" and index == 0:
      return 0.0  # in place
    if opcode == "fusion":
      inside = self._computations[instruction.called("calls")]
      names = (each.name for each in inside.values() if each.opcode == "parameter" and each.operands == (str(index),))
      return sum(self._read(inside, name, whole) for name in names)
    return whole

  def _read(self, inside: Mapping[str, Instruction], name: str, whole: float) -> float:
    """Bytes that the instructions of a fusion read of one of its values, which has `whole`: all uses share one read."""
    total = 0.0
    for each in inside.values():
      if name in each.operands:
        if each.opcode in (*_UNCHANGED, "pad") and not each.root:
          # What is read of the result, in bytes of the operand: a slice of it may be all, padding is not read.
          size = max(1.0, each.arrays[0].size)
          total += self._read(inside, each.name, size) * whole / size
        else:
          total += self._read_by(each, each.operands.index(name), whole)
    return min(whole, total)


def _in_memory(arrays: Sequence[Array]) -> float:
  """Bytes of those that lie in HBM."""
  return sum(array.size for array in arrays if array.in_memory)


def _weight(cost: Cost) -> tuple[float, float, float]:
  """What makes one cost dearer than another."""
  return cost.flops, sum(cost.sent.values()) + sum(cost.crossed.values()), cost.moved


def _written(instruction: Instruction, around: Mapping[str, Instruction]) -> float:
  """Bytes that the result of an instruction writes."""
  while instruction.opcode in _UNCHANGED and instruction.operands[0] in around:
    instruction = around[instruction.operands[0]]
  if instruction.opcode == "dynamic-update-slice":  # in place
    return around[instruction.operands[1]].arrays[0].size
  passed = ("parameter", "get-tuple-element")
  if instruction.opcode in passed or instruction.opcode.removesuffix("-start") in COLLECTIVES:
    return 0.0
  if instruction.opcode == "custom-call" and "AsyncCollective" in instruction.attributes:
    return 0.0
  return sum(array.size for array in instruction.arrays if array.in_memory)


def _found(pattern: str, text: str) -> tuple[str, ...]:
  """The groups of a pattern that the text of an instruction must have.

  Raises:
    ValueError: it has not.
  """
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"the text of a program has no {pattern!r} where its compiler used to write it: {text[:200]}")
  return match.groups()


def _instruction(name: str, line: str, start: int) -> Instruction:
  kind, rest = _type(line, start)
  opcode, _, rest = rest.partition("(")
  depth, end = 1, 0
  for end, letter in enumerate(rest):  # noqa: B007
    depth += (letter == "(") - (letter == ")")
    if not depth:
      break
  operands = rest[:end]
  names = tuple(_OPERAND.findall(operands)) or tuple(part.strip() for part in operands.split(",") if part.strip())
  attributes = rest[end + 1 :] if opcode.strip() != "constant" else f"value={operands}"
  return Instruction(name, kind, opcode.strip(), names, attributes, line.lstrip().startswith("ROOT "))


def _type(line: str, start: int) -> tuple[tuple[Array, ...], str]:
  """The arrays of a result, and the line behind them."""
  if line[start] != "(":
    end = line.index(" ", start)
    return _arrays(line[start:end]), line[end + 1 :]
  depth = 0
  for end in range(start, len(line)):
    depth += (line[end] == "(") - (line[end] == ")")
    if not depth:
      return _arrays(line[start : end + 1]), line[end + 2 :]
  raise ValueError(f"a type without an end in the text of a program: {line[start : start + 100]}")


@functools.lru_cache(maxsize=100_000)
def _arrays(text: str) -> tuple[Array, ...]:
  found = []
  for dtype, shape, layout in _ARRAY.findall(text):
    if dtype in _BITS:
      sizes = tuple(int(size) for size in shape.split(",") if size)
      found.append(Array(_BITS[dtype], sizes, "S(" not in layout))
  return tuple(found)


def _constant(instruction: Instruction) -> int | None:
  match = re.fullmatch(r"value=(-?\d+)", instruction.attributes)
  return int(match.group(1)) if instruction.opcode == "constant" and match else None


def _place(element: Instruction) -> int:
  """Index of a get-tuple-element."""
  return int(_found(r"index=(\d+)", element.attributes)[0])


def _channel(collective: Instruction) -> tuple[str, str]:
  """What an asynchronous collective shares with its end, and with no other one of its kind."""
  match = re.search(r"channel_id=(\d+)", collective.attributes)
  return collective.opcode, match.group(1) if match else collective.name


def _branches(instruction: Instruction) -> list[str]:
  several = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  if several:
    return [name.strip().lstrip("%") for name in several.group(1).split(",")]
  return [instruction.called(name) for name in ("true_computation", "false_computation")]


def _products(instruction: Instruction, around: Mapping[str, Instruction]) -> float:
  """FLOP of a product: 2 per multiplication and addition."""
  if instruction.opcode == "dot":
    left = around[instruction.operands[0]].arrays[0].shape
    axes = _found(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[0]
    contracted = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
    return 2.0 * math.prod(instruction.arrays[0].shape) * contracted
  if instruction.opcode == "convolution":
    return _convolution(instruction, around)
  if instruction.opcode == "custom-call" and _LIBRARY_PRODUCT in instruction.attributes:
    left = around[instruction.operands[0]].arrays[0].shape
    axes = _found(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)[0]
    return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(left[axis] for axis in _numbers(axes))
  return 0.0


def _convolution(instruction: Instruction, around: Mapping[str, Instruction]) -> float:
  """FLOP of a convolution, which on a TPU every product is: taps in padding and between dilated places are no work."""
  left, right = (around[name].arrays[0].shape for name in instruction.operands[:2])
  out = instruction.arrays[0].shape
  labels = _found(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  window = _window(instruction.attributes)
  spatial = [letter for letter in labels[2] if letter.isdigit()]
  taps = 1
  for letter in spatial:
    index = int(letter)
    taps *= _taps(
      *(shape[label.index(letter)] for shape, label in zip((left, right, out), labels, strict=True)),
      **{name: values[index] for name, values in window.items()},
    )
  features = right[labels[1].index("i")]  # of one group already
  around_window = math.prod(out[labels[2].index(letter)] for letter in "bf")
  groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
  return 2.0 * around_window * features * taps / (int(groups.group(1)) if groups else 1)


@functools.lru_cache(maxsize=10_000)
def _taps(size: int, kernel: int, out: int, *, stride: int, low: int, lhs: int, rhs: int) -> int:
  """Pairs of an output and a tap that meet an element of the input, along one axis of a window."""
  places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * rhs - low
  return int(((places >= 0) & (places <= (size - 1) * lhs) & (places % lhs == 0)).sum())


def _window(attributes: str) -> dict[str, list[int]]:
  """stride, low padding and dilations along the axes of a window."""
  text = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(re.findall(r"(\w+)=([\w\-]+)", text.group(1))) if text else {}
  axes = len(fields["size"].split("x")) if "size" in fields else 0

  def numbers(name: str, default: int) -> list[int]:
    return [int(part) for part in fields[name].split("x")] if name in fields else [default] * axes

  low = [int(part.rpartition("_")[0]) for part in fields["pad"].split("x")] if "pad" in fields else [0] * axes
  return {"stride": numbers("stride", 1), "low": low, "lhs": numbers("lhs_dilate", 1), "rhs": numbers("rhs_dilate", 1)}


def _groups(attributes: str, all_devices: int = 1) -> tuple[tuple[int, ...], ...]:
  """The groups of devices of a collective, in any of the ways in which HLO writes them; where it writes none, all."""
  mesh = _MESH_GROUPS.search(attributes)
  if mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
    devices = _iota(mesh.group(2)) if mesh.group(2) else np.arange(math.prod(sizes.values()))
    names = [name for name in sizes if f"'{name}'" not in mesh.group(3)]
    joined = [name for name in sizes if name not in names]
    order = [list(sizes).index(name) for name in names + joined]
    grid = devices.reshape(tuple(sizes.values())).transpose(order)
    return _rows(grid.reshape(-1, math.prod(sizes[name] for name in joined)))
  iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
  if iota:
    shape, _, source = iota.group(1).partition("<=")
    return _rows(_iota(source).reshape(_numbers(shape)))
  listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
  if listed:
    return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed.group(1)))
  pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
  if pairs:
    return tuple(tuple(_numbers(pair)) for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1)))
  return (tuple(range(all_devices)),)


def _rows(grid: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(int(device) for device in row) for row in grid)


def _iota(text: str) -> np.ndarray:
  """The devices of "[2,8]T(1,0)"."""
  shape, _, order = text.partition("T")
  devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
