import threading

import jax
import jax.numpy as jnp
import pytest

from kepo_jax import sharding
from kepo_jax.training import compiling
from kepo_jax.training.compiling import Compilation, Program, compile_all
from kepo_jax.training.monitoring import CompileCounter


@pytest.fixture
def counter():
  compiled = CompileCounter()
  yield lambda: compiled.metrics()["compiled/programs"]
  compiled.close()


def placed(mesh, rows=8):
  with jax.set_mesh(mesh):
    return jax.device_put(jnp.arange(rows, dtype=jnp.float32), sharding.batch_sharding(mesh, (rows,)))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_call_after_the_shapes_compiles_nothing(mesh_of, counter, devices):
  mesh = mesh_of(data=devices)
  first = Program("the first", lambda x: {"twice": x * 2, "sum": x.sum()})
  second = Program("the second", lambda found, y, *, n: found["twice"] + y + found["sum"] + n, donate_argnums=1)
  x, y, expected = placed(mesh), placed(mesh), 2 * jnp.arange(8.0) + jnp.arange(8.0) + 28 + 1
  with jax.set_mesh(mesh):
    told = second(first(compiling.shapes_of(x)), compiling.shapes_of(y), n=1)
    before = counter()
    result = second(first(x), y, n=1)
  assert counter() == before
  assert (result == expected).all() and y.is_deleted() and (told.shape, told.dtype) == (result.shape, result.dtype)
  assert told.sharding.is_equivalent_to(result.sharding, 1)


def test_threads_that_ask_for_the_same_compile_it_once(mesh_of, counter):
  mesh = mesh_of()
  program, shapes = Program("a program", lambda x: jnp.sin(x) @ jnp.cos(x)), compiling.shapes_of(placed(mesh))
  before = counter()
  compile_all(
    [Compilation(f"call {n}", lambda: program(shapes)) for n in range(4)], mesh, progress=lambda done, total: None
  )
  assert counter() == before + 1


def test_progress_comes_in_order_and_ends_the_work(mesh_of):
  class Enough(Exception):
    pass

  def progress(done, total):
    seen.append((done, total, threading.current_thread() is threading.main_thread()))
    if done == 2:
      raise Enough

  seen, made = [], []
  gate = threading.Event()
  late = [Compilation("late", lambda: gate.wait(20) and made.append("late"))]
  compilations = [Compilation(f"call {n}", lambda n=n: made.append(n)) for n in range(2)] + late * 50
  threading.Timer(0.5, gate.set).start()
  with pytest.raises(Enough):
    compile_all(compilations, mesh_of(), progress=progress)
  assert seen == [(1, 52, True), (2, 52, True)]
  assert len(made) < 52  # what had not begun was left


def test_an_error_of_the_compiler_names_program_and_shapes(mesh_of, monkeypatch):
  mesh = mesh_of()
  program, shapes = Program("the gradients", jnp.sin), compiling.shapes_of(placed(mesh))

  def compile(self, *_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 GB")

  monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
  message = r"update of 4 prompts: compiling the gradients for arguments of float32\[8\] failed: RESOURCE_EXHAUSTED"
  with pytest.raises(ValueError, match=message + ".*batch.micro_batches"):
    compile_all([Compilation("update of 4 prompts", lambda: program(shapes))], mesh, progress=lambda done, total: None)
