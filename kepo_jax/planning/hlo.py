"""Reads FLOPs, HBM bytes and collectives of a compiled program from the text of its HLO.

`compiled.cost_analysis()` counts the body of a loop once, mixes HBM with a TPU's own memory, and says nothing of
collectives. Here loops count as often as they turn. The text is what each device runs: products that the partitioner
left whole on every device count in full on every device.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

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
# How a TPU's compiler marks what it sends to other slices,
_TRANSFER = "_xla_megascale_transfer_type"
# the start of a collective that goes on in the fusions that follow,
_STARTING = 'custom_call_target="AsyncCollectiveStart"'
# and a fusion of an all-reduce with the slices of its results that a device keeps.
_SCATTERING = "all-reduce-scatter"
# What a product that a GPU's library computes has among its settings.
_LIBRARY_PRODUCT = '"gemm_backend_config"'
_LIBRARY = 'custom_call_target="__cu'  # cuBLAS or cuDNN
_OPERAND = re.compile(r"%([\w.\-]+)")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Array:
  """Type of one array."""

  bits: int  # of an element
  shape: tuple[int, ...]
  in_hbm: bool  # False: in a faster memory of the chip

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
    """Returns the computation that an attribute names."""
    return _search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)[0]

  @functools.cached_property
  def kind(self) -> str:
    """Opcode, without what marks the start of something asynchronous."""
    return self.opcode.removesuffix("-start")

  @property
  def hbm_bytes(self) -> float:
    """Bytes of its result that lie in HBM."""
    return sum(array.size for array in self.arrays if array.in_hbm)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
  """Communication of a kind among groups of devices."""

  kind: str  # of COLLECTIVES, or what a transfer between slices is called
  size: float  # bytes of the gathered, reduced or exchanged array on a device, all times together
  group: int  # devices
  slices: int = 1  # that a group has devices of, equally many of each
  groups: Groups = ()  # of devices, as programs number them; empty between slices alone

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
  """What one run of a program costs on each device."""

  flops: float = 0.0  # products; what a kernel of its own does inside is not seen
  moved: float = 0.0  # bytes from and to HBM, what is fused counted once
  collectives: tuple[Collective, ...] = ()
  kernels: float = 0.0  # instructions that run by themselves, collectives apart
  exchanges: float = 0.0  # collectives, each as often as it runs

  def __add__(self, other: "Cost") -> "Cost":
    pairs = zip(dataclasses.astuple(self)[3:], dataclasses.astuple(other)[3:], strict=True)
    collectives = self.collectives + other.collectives
    return Cost(self.flops + other.flops, self.moved + other.moved, collectives, *map(sum, pairs))

  def times(self, count: float) -> "Cost":
    """Multiplies by a number of runs."""
    collectives = tuple(dataclasses.replace(part, size=count * part.size) for part in self.collectives)
    return Cost(count * self.flops, count * self.moved, collectives, count * self.kernels, count * self.exchanges)

  @property
  def sent(self) -> dict[str, float]:
    """Kind of a collective -> bytes that each device sends inside its slice."""
    return self._by_kind(lambda collective: collective.sent)

  @property
  def crossed(self) -> dict[str, float]:
    """Kind of a collective -> bytes that each device sends to other slices."""
    return self._by_kind(lambda collective: collective.crossed)

  def _by_kind(self, size: Callable[[Collective], float]) -> dict[str, float]:
    total: dict[str, float] = collections.defaultdict(float)
    for collective in self.collectives:
      if size(collective):
        total[collective.kind] += size(collective)
    return dict(total)


def cost(text: str, *, turns: Sequence[int] = (), slices: int = 1, slice_devices: int = 0) -> Cost:
  """Counts what one run of a compiled program costs on each device; arguments as for `costs`."""
  return costs(text, turns=turns, slices=slices, slice_devices=slice_devices)[0]


def costs(text: str, *, turns: Sequence[int] = (), slices: int = 1, slice_devices: int = 0) -> tuple[Cost, Cost]:
  """Counts what one run of a compiled program costs on each device, and one turn of its last open loop.

  Args:
    text: `compiled.as_text()`, after partitioning and fusion.
    turns: of the loops whose number of turns depends on data, in their order in the program.
    slices: over which the program runs.
    slice_devices: devices of each, where there are several.

  Raises:
    ValueError: the text has no form that is known, or the number of loops that depend on data is not that of `turns`.
  """
  program = Program(text, slices, slice_devices, turns)
  total = program.cost(program.entry)
  if len(program.open_loops) != len(turns):
    raise ValueError(
      f"{len(program.open_loops)} loops turn as often as their data say, and `turns` has {len(turns)} numbers."
    )
  return total, program.turn_cost()


class Program:
  """The computations of a module."""

  def __init__(self, text: str, slices: int = 1, slice_devices: int = 0, turns: Sequence[int] = ()):
    """Parses the text; arguments as for `cost`."""
    self.entry = ""
    header = text.partition("\n")[0]
    counts = (re.search(rf"\b{name}=(\d+)", header) for name in ("num_partitions", "replica_count"))
    self._devices = math.prod(int(count.group(1)) for count in counts if count)
    self._slices, self._slice = slices, slice_devices if slices > 1 else 0
    self._turns = tuple(turns)
    self.open_loops: list[str] = []  # those that turn as often as their data say
    self._bodies: dict[str, str] = {}  # of open loops
    self._computations: dict[str, dict[str, Instruction]] = {}
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
      if match := _COMPUTATION.match(line):
        lines = self._computations[match.group(2)] = {}
        self.entry = match.group(2) if match.group(1) else self.entry
      elif match := _INSTRUCTION.match(line):
        lines[match.group(1)] = _instruction(match.group(1), line, match.end())
    self._starts: dict[tuple[str, str], str] = {}  # channel -> the collective inside its asynchronous start
    self._scattered: set[str] = set()  # all-reduces of which every device keeps its part alone
    for name, lines in self._computations.items():
      self._scattered |= lines.keys() if name.startswith(_SCATTERING) else set()
      starts = (line for line in lines.values() if _STARTING in line.attributes)
      self._starts |= {_channel(lines[operand]): operand for start in starts for operand in start.operands}

  def carried(self) -> list[Array]:
    """Lists what a device carries through the loops of the program."""
    instructions = (line for lines in self._computations.values() for line in lines.values())
    return [array for line in instructions if line.opcode == "while" for array in line.arrays]

  def results(self) -> list[Array]:
    """Lists what a device is left with."""
    return list(_root(self._computations[self.entry]).arrays)

  def cost(self, name: str) -> Cost:
    """Counts one run of a computation."""
    total, lines = Cost(), self._computations[name]
    for line in lines.values():
      total += self._instruction(line, lines)
      for collective, around in self._collectives(line, lines):
        total += self._communicated(collective, around)
    return total

  def turn_cost(self) -> Cost:
    """Counts one turn of the last loop that turns as often as its data say: of a sampler, one token of every row."""
    return self.cost(self._bodies[self.open_loops[-1]]) if self.open_loops else Cost()

  def _instruction(self, line: Instruction, around: Computation) -> Cost:
    opcode = line.opcode
    if opcode == "while":
      turns = self._loop_turns(line, around)
      return self.cost(line.called("body")).times(turns) + self.cost(line.called("condition")).times(turns + 1)
    if opcode == "conditional":  # any branch may be taken: the dearest by products, then by what is sent, then by HBM
      return max(
        (self.cost(branch) for branch in _branches(line)),
        key=lambda cost: (cost.flops, sum(cost.sent.values()) + sum(cost.crossed.values()), cost.moved),
      )
    if opcode in ("call", "async-start"):
      return self.cost(line.called("to_apply" if opcode == "call" else "calls"))
    runs = line.opcode not in _FREE and not _communicates(line)
    return Cost(self._fused_flops(line, around), self._moved(line, around), kernels=float(runs))

  def _fused_flops(self, line: Instruction, around: Computation) -> float:
    if line.opcode != "fusion":
      return _product_flops(line, around)
    inside = self._computations[line.called("calls")]
    return sum(self._fused_flops(part, inside) for part in inside.values())

  def _loop_turns(self, loop: Instruction, around: Computation) -> int:
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    turns = int(known.group(1)) if known else self._counted_turns(loop, around)
    if turns is not None:
      return turns
    if loop.name not in self.open_loops:
      self.open_loops.append(loop.name)
      self._bodies[loop.name] = loop.called("body")
    index = self.open_loops.index(loop.name)
    return self._turns[index] if index < len(self._turns) else 0

  def _counted_turns(self, loop: Instruction, around: Computation) -> int | None:
    """Returns the turns of a loop whose condition is i < n alone, with constant n, start and step."""
    condition, body = (self._computations[loop.called(name)] for name in ("condition", "body"))
    test, carried, changed = _root(condition), _source(loop.operands[0], around), _root(body)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, bound = condition[test.operands[0]], _constant(condition[test.operands[1]])
    if counter.opcode != "get-tuple-element" or {carried.opcode, changed.opcode} != {"tuple"}:
      return None
    place = _tuple_index(counter)
    start = _constant(_source(carried.operands[place], around))
    step = _added(changed.operands[place], place, body)
    if bound is None or start is None or not step:
      return None
    return max(0, math.ceil((bound - start) / step))

  def _collectives(self, line: Instruction, around: Computation) -> Iterator[tuple[Instruction, Computation]]:
    """Yields what an instruction communicates itself or inside its fusion, and the computation where that stands."""
    if line.kind in COLLECTIVES or (line.opcode == "send" and _TRANSFER in line.attributes):
      # An asynchronous one stands in its start, in its end and in all that runs between, loops too: it is sent once.
      if self._starts.get(_channel(line), line.name) == line.name:
        yield line, around
    elif line.opcode == "fusion" or (line.opcode == "custom-call" and "calls=" in line.attributes):
      inside = self._computations.get(line.called("calls"), {})
      yield from itertools.chain.from_iterable(self._collectives(part, inside) for part in inside.values())

  def _communicated(self, line: Instruction, around: Computation) -> Cost:
    """Counts a collective: what it sends is read, and what it receives is written."""
    if line.opcode == "send":  # between slices, of what each chip has left after a collective in its own
      kind = _search(rf'{_TRANSFER}="(\w+)"', line.attributes)[0].lower().replace("_", "-")
      sent = line.arrays[0]
      size = sent.size * (self._slices if kind == "all-gather" else 1)
      moved = 2 * sent.size if sent.in_hbm else 0.0  # as much comes as goes
      return Cost(moved=moved, collectives=(Collective(kind, size, self._slices, self._slices),), exchanges=1.0)
    kind, groups, several = line.kind, _groups(line.attributes, self._devices), len(line.operands)
    # Several arrays may go at once. A start returns its operands before its results, but for that of an all-reduce.
    ahead = line.opcode.endswith("-start") and kind != "all-reduce"
    results = line.arrays[several : 2 * several] if ahead else line.arrays
    size, kept = sum(array.size for array in results), 1.0
    if kind == "reduce-scatter":
      size *= len(groups[0])
    elif line.name in self._scattered:
      kind, kept = "reduce-scatter", 1 / len(groups[0])
    slices = max(len({device // self._slice for device in group}) for group in groups) if self._slice else 1
    read = sum(around[name].hbm_bytes for name in line.operands if name in around)
    moved = read + kept * sum(array.size for array in results if array.in_hbm)
    return Cost(moved=moved, collectives=(Collective(kind, size, len(groups[0]), slices, groups),), exchanges=1.0)

  def _moved(self, line: Instruction, around: Computation) -> float:
    """Counts the bytes from and to HBM of one instruction that runs by itself, apart from collectives."""
    if line.opcode in _FREE:
      return 0.0
    if line.opcode in ("copy-start", "slice-start"):  # between two memories: (result, operand, context)
      ends = line.arrays[:2]
      return min(array.size for array in ends) * sum(array.in_hbm for array in ends)
    read = 0.0
    for index, name in enumerate(line.operands):
      size = around[name].hbm_bytes if name in around else 0.0
      read += min(size, self._read_by(line, index, size)) if size else 0.0
    if line.opcode in _UNCHANGED:  # by itself, whatever it copies
      return read + line.hbm_bytes
    if line.opcode != "fusion":
      return read + _written(line, around)
    inside = self._computations[line.called("calls")]
    root = _root(inside)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    # The fusion says in which memory its results lie.
    pairs = zip(results, line.arrays, strict=False)
    return read + sum(min(_written(result, inside), array.size) for result, array in pairs if array.in_hbm)

  def _read_by(self, line: Instruction, index: int, size: float) -> float:
    """Counts the bytes that an instruction reads of its operand `index`, which has `size`."""
    if line.opcode in ("tuple", "get-tuple-element", "parameter") or _communicates(line):
      return 0.0
    if index == 0 and line.opcode in ("dynamic-slice", "slice", "gather"):
      return line.arrays[0].size
    if index == 0 and line.opcode == "dynamic-update-slice":
      return 0.0  # in place
    if line.opcode == "fusion":
      inside = self._computations[line.called("calls")]
      names = (part.name for part in inside.values() if part.opcode == "parameter" and part.operands == (str(index),))
      return sum(self._read(inside, name, size) for name in names)
    return size

  def _read(self, inside: Computation, name: str, size: float) -> float:
    """Counts what the instructions of a fusion read of a value of `size` bytes: all uses share one read."""
    total = 0.0
    for line in inside.values():
      if name not in line.operands:
        continue
      if line.opcode in (*_UNCHANGED, "pad") and not line.root:
        # What is read of the result, in bytes of the operand: a slice of it may be all, padding is not read.
        result = max(1.0, line.arrays[0].size)
        total += self._read(inside, line.name, result) * size / result
      else:
        total += self._read_by(line, line.operands.index(name), size)
    return min(size, total)


def _root(computation: Computation) -> Instruction:
  return next(line for line in computation.values() if line.root)


def _source(name: str, around: Computation) -> Instruction:
  """Follows copies back to what made a value."""
  while around[name].opcode in ("copy", "bitcast", "opt-barrier", "copy-done", "copy-start"):
    name = around[name].operands[0]
  return around[name]


def _added(name: str, place: int, body: Computation) -> int | None:
  """Returns what a turn adds to a counter: 2 where the compiler has unrolled the body, to overlap its products."""
  value, total = _source(name, body), 0
  while value.opcode == "add":
    terms = [_source(operand, body) for operand in value.operands]
    constants = [constant for constant in map(_constant, terms) if constant is not None]
    if len(constants) != 1:
      return None
    total += constants[0]
    value = next(term for term in terms if _constant(term) is None)
  return total if value.opcode == "get-tuple-element" and _tuple_index(value) == place else None


def _communicates(line: Instruction) -> bool:
  return line.kind in COLLECTIVES or (line.opcode == "custom-call" and "AsyncCollective" in line.attributes)


def _written(line: Instruction, around: Computation) -> float:
  """Counts the bytes that the result of an instruction writes."""
  while line.opcode in _UNCHANGED and line.operands[0] in around:
    line = around[line.operands[0]]
  if line.opcode == "dynamic-update-slice":  # in place
    return around[line.operands[1]].arrays[0].size
  return 0.0 if line.opcode in ("parameter", "get-tuple-element") or _communicates(line) else line.hbm_bytes


def _search(pattern: str, text: str) -> tuple[str, ...]:
  """Returns the groups of a pattern that the text of an instruction must have.

  Raises:
    ValueError: it has not.
  """
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"the compiled HLO has no {pattern!r} where its compiler used to write it: {text[:200]}")
  return match.groups()


def _instruction(name: str, line: str, start: int) -> Instruction:
  end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
  opening = line.index("(", end)
  opcode, closing = line[end:opening].strip(), _closing(line, opening)
  operands = line[opening + 1 : closing]
  names = tuple(_OPERAND.findall(operands)) or tuple(part.strip() for part in operands.split(",") if part.strip())
  attributes = line[closing + 1 :] if opcode != "constant" else f"value={operands}"
  arrays = _arrays(line[start:end])
  if opcode == "custom-call" and _LIBRARY in attributes and len(arrays) > 1 and arrays[-1].bits == 8:
    arrays = arrays[:-1]  # the last one is the library's workspace, most of which nothing touches
  return Instruction(name, arrays, opcode, names, attributes, line.lstrip().startswith("ROOT "))


def _closing(line: str, opening: int) -> int:
  """Finds the parenthesis that closes another one."""
  depth = 0
  for match in re.compile(r"[()]").finditer(line, opening):
    depth += 1 if match.group() == "(" else -1
    if not depth:
      return match.start()
  raise ValueError(f"a parenthesis without an end in the compiled HLO: {line[opening : opening + 100]}")


@functools.lru_cache(maxsize=100_000)
def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(_BITS[dtype], tuple(_numbers(shape)), "S(" not in layout)
    for dtype, shape, layout in _ARRAY.findall(text)
    if dtype in _BITS
  )


def _constant(line: Instruction) -> int | None:
  match = re.fullmatch(r"value=(-?\d+)", line.attributes)
  return int(match.group(1)) if line.opcode == "constant" and match else None


def _tuple_index(element: Instruction) -> int:
  return int(_search(r"index=(\d+)", element.attributes)[0])


def _channel(collective: Instruction) -> tuple[str, str]:
  """Returns what an asynchronous collective shares with its end, and with no other one of its kind."""
  match = re.search(r"channel_id=(\d+)", collective.attributes)
  return collective.opcode, match.group(1) if match else collective.name


def _branches(line: Instruction) -> list[str]:
  several = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
  if several:
    return [name.strip().lstrip("%") for name in several.group(1).split(",")]
  return [line.called(name) for name in ("true_computation", "false_computation")]


def _product_flops(line: Instruction, around: Computation) -> float:
  """Counts 2 FLOP per multiplication and addition of a product."""
  if line.opcode == "convolution":
    return _convolution_flops(line, around)
  if line.opcode == "dot":
    pattern = r"lhs_contracting_dims=\{([\d,]*)\}"
  elif line.opcode == "custom-call" and _LIBRARY_PRODUCT in line.attributes:
    pattern = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
  else:
    return 0.0
  left = around[line.operands[0]].arrays[0].shape
  contracted = math.prod(left[axis] for axis in _numbers(_search(pattern, line.attributes)[0]))
  return 2.0 * math.prod(line.arrays[0].shape) * contracted


def _convolution_flops(line: Instruction, around: Computation) -> float:
  """Counts a convolution, which every product is on a TPU: taps in padding and between dilated places are no work."""
  labels = _search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
  left, right = (around[name].arrays[0].shape for name in line.operands[:2])
  shapes = (left, right, line.arrays[0].shape)
  window = re.search(r"window=\{([^}]*)\}", line.attributes)
  fields = dict(re.findall(r"(\w+)=([\w\-]+)", window.group(1))) if window else {}

  def setting(name: str, axis: int, default: int) -> int:
    return int(fields[name].split("x")[axis].rpartition("_")[0 if name == "pad" else 2]) if name in fields else default

  taps = 1
  for letter in filter(str.isdigit, labels[2]):
    size, kernel, out = (shape[label.index(letter)] for shape, label in zip(shapes, labels, strict=True))
    stride, low, lhs, rhs = (
      setting(name, int(letter), default)
      for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    )
    taps *= _taps(size, kernel, out, stride, low, lhs, rhs)
  features = right[labels[1].index("i")]  # of one group already
  out_rows = math.prod(shapes[2][labels[2].index(letter)] for letter in "bf")
  groups = re.search(r"batch_group_count=(\d+)", line.attributes)
  return 2.0 * out_rows * features * taps / (int(groups.group(1)) if groups else 1)


@functools.lru_cache(maxsize=10_000)
def _taps(size: int, kernel: int, out: int, stride: int, low: int, lhs: int, rhs: int) -> int:
  """Counts pairs of an output and a tap that meet an element of the input, along one axis of a window."""
  places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * rhs - low
  return int(((places >= 0) & (places <= (size - 1) * lhs) & (places % lhs == 0)).sum())


def _groups(attributes: str, all_devices: int = 1) -> Groups:
  """Reads the groups of devices of a collective, however HLO writes them; where it writes none, all are one."""
  mesh = _MESH_GROUPS.search(attributes)
  if mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
    devices = _iota(mesh.group(2)) if mesh.group(2) else np.arange(math.prod(sizes.values()))
    joined = [name for name in sizes if f"'{name}'" in mesh.group(3)]
    order = [list(sizes).index(name) for name in (*(name for name in sizes if name not in joined), *joined)]
    grid = devices.reshape(tuple(sizes.values())).transpose(order)
    return _rows(grid.reshape(-1, math.prod(sizes[name] for name in joined)))
  iota = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
  if iota:
    return _rows(_iota(iota.group(2)).reshape(_numbers(iota.group(1))))
  listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
  if listed:
    return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed.group(1)))
  return (tuple(range(all_devices)),)


def _rows(grid: np.ndarray) -> Groups:
  return tuple(tuple(row) for row in grid.tolist())


def _iota(text: str) -> np.ndarray:
  """Numbers the devices of "[2,8]T(1,0)"."""
  shape, _, order = text.partition("T")
  devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
