"""Ahead-of-time compilation of programs for the shapes of their arguments, several at a time.

A `Program` that is called with shapes compiles and returns the shapes of its results: the calls of a step, made with
shapes, compile the step without data and without running anything on a device. jax keeps what
`jit(f).lower(shapes).compile()` made, and an ordinary call of the same shapes, shardings and mesh uses it.
"""

import contextlib
import contextvars
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from kepo_jax import multihost

# Compilations at a time: XLA needs one core for the most part, and some GB of the host for a program of a large model.
WORKERS = min(8, os.cpu_count() or 1)


def shapes_of(tree: Any) -> Any:
  """Returns shape, dtype and sharding of every array of a tree."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def is_abstract(tree: Any) -> bool:
  """Returns whether a tree holds shapes instead of arrays."""
  return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program that has just been compiled for the shapes of its arguments."""

  name: str
  executable: Any  # jax.stages.Compiled
  seconds: float  # of tracing and compiling


_WATCHER: contextvars.ContextVar[Callable[[Compiled], None] | None] = contextvars.ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(seen: Callable[[Compiled], None]) -> Iterator[None]:
  """Calls `seen` with every program that this thread compiles from shapes inside the block."""
  token = _WATCHER.set(seen)
  try:
    yield
  finally:
    _WATCHER.reset(token)


class CompilationError(ValueError):
  """The compiler refuses a program."""


class Program:
  """A jitted function; called with shapes, it compiles for them instead and returns the shapes of its results."""

  def __init__(self, name: str, function: Callable[..., Any], **settings: Any):
    """Wraps a function; nothing compiles yet.

    Args:
      name: what errors call it.
      function: of arrays.
      **settings: of `jax.jit`.
    """
    self._name = name
    self._jitted = jax.jit(function, **settings)
    self._lock = threading.Lock()
    self._compiled: dict[Any, Future[Any]] = {}  # shapes of arguments -> shapes of results

  def __call__(self, *arguments: Any, **named: Any) -> Any:
    """Returns the function's results, or their shapes.

    Raises:
      CompilationError: it cannot be compiled for these shapes; says which, and the way out.
    """
    if not is_abstract((arguments, named)):
      return self._jitted(*arguments, **named)
    key = _signature((arguments, named))
    with self._lock:
      is_new = key not in self._compiled
      result = self._compiled.setdefault(key, Future())
    if is_new:  # another thread that asks for the same waits
      try:
        result.set_result(self._results(arguments, named))
      except ValueError as error:
        result.set_exception(error)
      finally:
        result.cancel()  # after any other error, which is this thread's to raise
    return result.result()

  def _results(self, arguments: Any, named: Any) -> Any:
    start = time.perf_counter()
    try:
      lowered = self._jitted.lower(*arguments, **named)
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      raise CompilationError(
        f"compiling {self._name} for {_described((arguments, named))} failed: {error}. If memory is short, lower "
        "batch.prompts, eval.prompts or the largest of data.prompt_buckets and data.patch_buckets, or raise "
        "batch.micro_batches, mesh.fsdp or mesh.tensor."
      ) from error
    if watcher := _WATCHER.get():
      watcher(Compiled(self._name, compiled, time.perf_counter() - start))
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      lowered.out_info,
      compiled.output_shardings,
    )


def _signature(tree: Any) -> Any:
  """Returns what a compilation depends on, hashable."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple(
    (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) if hasattr(leaf, "dtype") else type(leaf)
    for leaf in leaves
  )


def _described(tree: Any) -> str:
  """Returns the shapes of the largest arguments in words."""
  shapes = {f"{leaf.dtype}{list(leaf.shape)}": leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size")}
  largest = sorted(shapes, key=lambda shape: -shapes[shape])[:6]
  return f"arguments of {', '.join(largest)}{' and others' if len(shapes) > len(largest) else ''}"


@dataclasses.dataclass(frozen=True)
class Compilation:
  """Calls of programs with shapes, which compile them."""

  name: str  # in words, with its shapes
  compile: Callable[[], Any]


def compile_all(
  compilations: Sequence[Compilation], mesh: jax.sharding.Mesh, *, progress: Callable[[int, int], None]
) -> None:
  """Makes all calls, several at a time; nothing of them runs on a device, and so no process waits in one.

  Args:
    compilations: on every process the same, in the same order.
    mesh: of the run.
    progress: called in this thread after each of them, in their order, with (number compiled, number of all);
      what it raises ends the work once the compilations under way are through.

  Raises:
    ValueError: a program cannot be compiled; names the compilation, the program and its shapes.
    OSError: it cannot on another process.
  """

  def run(compilation: Compilation) -> None:
    with jax.set_mesh(mesh):  # threads have a context of their own
      try:
        compilation.compile()
      except ValueError as error:
        raise ValueError(f"{compilation.name}: {error}") from error

  pool = ThreadPoolExecutor(max_workers=WORKERS, thread_name_prefix="compiling")
  try:
    pending = [pool.submit(run, compilation) for compilation in compilations]
    for count, compilation in enumerate(pending, 1):
      multihost.run_on_all(compilation.result)
      progress(count, len(pending))
  finally:
    pool.shutdown(cancel_futures=True)
