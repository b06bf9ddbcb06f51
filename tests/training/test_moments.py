"""Moments in fewer bits follow those in float32: on average exactly, in size as promised, on any mesh to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from kepo_jax.training import moments, state, step
from kepo_jax.training.checkpoints import Checkpoints

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
ENCODED = [name for name in moments.DTYPES if name != "float32"]
BEHIND = {"bfloat16": 16, "float8": 20}


def optimizer_of(dtype, rate=0.1):
  return state.make_optimizer(lambda _: rate, **ADAM, weight_decay=0.0, clip_norm=1.0, moments_dtype=dtype)


def decoded(leaf, *, root):
  """What a stored moment stands for, from its definition."""
  if not isinstance(leaf, moments.Float8):
    return np.asarray(leaf, np.float64)
  code = np.asarray(leaf.codes, np.float64)
  if root:
    code = np.maximum(code, 2.0**-9)
  value = code * np.asarray(leaf.scale, np.float64)[..., None]
  return value**2 if root else value


def every_draw(behind):
  """4,096 evenly spaced words of random bits: a mean over them is an expected value."""
  return jnp.arange(4096, dtype=jnp.uint32) << (behind - 12)


# ---- rounding ----


@settings(deadline=None)
@given(st.floats(2.0**-20, 2.0**20, width=32, allow_subnormal=False), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_number_is_rounded_to_a_neighbour(value, negative, bits):
  value = np.float32(-value if negative else value)
  found = moments.rounded(jnp.float32(value), jnp.uint32(bits), 16)
  near = np.float32(value.astype(jnp.bfloat16))
  # One step of bfloat16 is 2^-7 of the power of two below.
  assert found == jnp.bfloat16(found) and abs(found - value) < 2.0 ** (np.floor(np.log2(abs(value))) - 7)
  assert found == value if near == value else True


@pytest.mark.parametrize("value", [1.0, 1.003, -1.003, 3.1415927, 1e-30, -250.4])
def test_rounding_is_right_on_average(value):
  found = moments.rounded(jnp.full(4096, value, jnp.float32), every_draw(16), 16)
  np.testing.assert_allclose(np.float64(found).mean(), value, rtol=2.0**-7 / 4000)
  assert len(np.unique(found)) == (1 if value == 1.0 else 2)


# Normal and subnormal codes, the smallest ones, and the largest; the last number sets the scale of the row to 1.
VALUES = [0.0, 1e-4, 2.0**-9, 0.003, 0.0149, 2.0**-6, 0.017, 1.0, 1.06, 100.0, 417.0, 448.0]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("root", [False, True])
def test_codes_of_eight_bits_are_right_on_average(value, root):
  rows = jnp.broadcast_to(jnp.array([value, 448.0]), (4096, 2))
  bits = jnp.broadcast_to(every_draw(20)[:, None], rows.shape)
  encoded = moments._float8(jnp.square(rows) if root else rows, bits, root=root)
  assert (encoded.scale == 1).all() and (np.float32(encoded.codes[:, 1]) == 448).all()
  codes = np.float64(encoded.codes[:, 0])
  # The codes on both sides, from the definition of the type; exactly there the number stays.
  grid = np.unique(np.abs(np.arange(128, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)))
  below, above = grid[grid <= value].max(), grid[grid >= value].min()
  assert set(np.unique(codes)) == {below, above}
  power = 2 if root else 1
  np.testing.assert_allclose((codes**power).mean(), value**power, rtol=1e-5, atol=(above**power - below**power) / 2000)
  negative = moments._float8(-rows, bits, root=False)
  assert root or (np.float64(negative.codes[:, 0]) == -codes).all()


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=3, max_size=3))
def test_a_scale_is_the_least_power_of_two_that_fits(row):
  row = np.float32(row)
  row[np.abs(row) < 1e-20] = 0
  scale = float(moments._scale(jnp.abs(jnp.asarray(row))))
  largest = float(np.abs(row).max())
  assert np.log2(scale) == np.round(np.log2(scale)) and largest <= 448 * scale
  assert largest > 224 * scale if largest else scale == 2.0**-100
  codes = moments._float8(jnp.asarray(row), jnp.full(row.shape, 2**32 - 1, jnp.uint32), root=False).codes
  assert np.isfinite(np.float32(codes)).all()


def test_nothing_is_stored_as_nothing():
  for root in (False, True):
    encoded = moments._float8(jnp.zeros((2, 3)), jnp.full((2, 3), 2**32 - 1, jnp.uint32), root=root)
    assert (np.asarray(moments._from_float8(encoded, root=root)) == 0).all()


def test_a_second_moment_too_small_for_its_row_makes_no_huge_update():
  adam = moments.scale_by_adam(**ADAM, dtype="float8")
  # The others are 10^-7 of the first: 448 / 2^-9 = 229,376 is the range of a row. In one update of a hundred the first
  # moment of one of them is rounded up to the smallest code.
  gradient = {"a": jnp.full((1, 65), 1e-7).at[0, 0].set(1.0)}
  moved, largest = adam.init(gradient), 0.0
  update = jax.jit(adam.update)
  for _ in range(100):
    updates, moved = update(gradient, moved)
    largest = max(largest, float(jnp.abs(updates["a"]).max()))
  assert largest < 1.5
  assert (decoded(moved.nu["a"], root=True) > 0).all()


# ---- the average ----


@pytest.mark.parametrize("dtype", ENCODED)
def test_rounding_to_nearest_stalls_and_ours_follows(dtype):
  # A second moment at 1, and gradients of zero from then on: 0.999^n.
  steps, count = 300, 4096
  adam = moments.scale_by_adam(**ADAM, dtype=dtype)
  ones = {"a": jnp.ones((count // 16, 16))}
  bits = jnp.zeros(ones["a"].shape, jnp.uint32)
  encode = moments._float8 if dtype == "float8" else moments._bfloat16
  start = adam.init(ones)._replace(nu={"a": encode(ones["a"], bits, root=True)})
  nothing = jax.tree.map(jnp.zeros_like, ones)
  update = jax.jit(lambda moved: adam.update(nothing, moved)[1])
  moved, nearest = start, np.ones(1)
  small = jnp.bfloat16 if dtype == "bfloat16" else jnp.float8_e4m3fn
  for _ in range(steps):
    moved = update(moved)
    stored = np.sqrt(0.999 * nearest) if dtype == "float8" else 0.999 * nearest
    nearest = stored.astype(small).astype(np.float64) ** (2 if dtype == "float8" else 1)
  assert nearest == 1  # nothing has moved
  found = decoded(moved.nu["a"], root=True)
  # Within five deviations of a mean over so many elements.
  assert abs(found.mean() - 0.999**steps) < 5 * found.std() / count**0.5 < 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("float8", 0.2)])
def test_updates_follow_those_of_float32(dtype, tolerance):
  # Noisy gradients of sizes that differ a thousandfold inside a row.
  sizes = 10.0 ** jax.random.uniform(jax.random.key(1), (8, 256), minval=-3.0, maxval=0.0)
  ours, theirs = moments.scale_by_adam(**ADAM, dtype=dtype), optax.scale_by_adam(**ADAM)

  @jax.jit
  def both(mine, other, key):
    gradient = sizes * jax.random.normal(key, sizes.shape)
    change, mine = ours.update(gradient, mine)
    expected, other = theirs.update(gradient, other)
    return mine, other, change, expected

  mine, other = ours.init(sizes), theirs.init(sizes)
  for n in range(300):
    mine, other, change, expected = both(mine, other, jax.random.key(n))
  assert np.linalg.norm(change - expected) < tolerance * np.linalg.norm(expected)
  ratio = decoded(mine.nu, root=True) / np.asarray(other.nu)
  assert abs(ratio.mean() - 1) < 5 * ratio.std() / ratio.size**0.5 + 1e-3
  assert np.abs(change).max() < 1.5 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ENCODED)
def test_a_quadratic_is_minimised_as_in_float32(dtype):
  target = jax.random.normal(jax.random.key(2), (16, 32))
  curvature = 10.0 ** jax.random.uniform(jax.random.key(3), (16, 32), minval=-2.0, maxval=0.0)
  loss = lambda x: (curvature * (x - target) ** 2).sum()  # noqa: E731

  def descent(dtype):
    optimizer = optimizer_of(dtype, rate=0.02)

    @jax.jit
    def move(x, moved):
      change, moved = optimizer.update(jax.grad(loss)(x), moved, x, step=0)
      return x + change, moved

    x, moved, seen = jnp.zeros_like(target), optimizer.init(target), []
    for n in range(300):
      x, moved = move(x, moved)
      seen += [float(loss(x))] if n % 100 == 99 else []
    return np.array(seen)

  exact, ours = descent("float32"), descent(dtype)
  start = float(loss(jnp.zeros_like(target)))
  assert exact[-1] < 0.01 * start
  np.testing.assert_allclose(ours, exact, atol=0.02 * start)


def test_float32_is_optax_to_the_bit():
  gradient = {"a": jax.random.normal(jax.random.key(0), (3, 4, 5)), "b": jnp.array([0.5, -2.0])}
  ours, theirs = moments.scale_by_adam(**ADAM, dtype="float32"), optax.scale_by_adam(**ADAM)
  mine, other = ours.init(gradient), theirs.init(gradient)
  for _ in range(3):
    change, mine = ours.update(gradient, mine)
    expected, other = theirs.update(gradient, other)
    jax.tree.map(np.testing.assert_array_equal, (change, mine), (expected, other))
  assert type(mine) is type(other)


@pytest.mark.parametrize("dtype", ENCODED)
def test_the_first_update_is_that_of_float32(dtype):
  # Nothing is rounded yet: the maths is optax's, on stacks of layers as on single arrays.
  gradient = {"a": jax.random.normal(jax.random.key(0), (3, 4, 5)), "b": jnp.array([0.5, -2.0])}
  ours, theirs = moments.scale_by_adam(**ADAM, dtype=dtype), optax.scale_by_adam(**ADAM)
  change, after = ours.update(gradient, ours.init(gradient))
  expected, _ = theirs.update(gradient, theirs.init(gradient))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), change, expected)
  assert int(after.count) == 1


def test_an_unknown_dtype_is_refused():
  with pytest.raises(ValueError, match=r"moments='int8' is unknown; use one of \['bfloat16', 'float32', 'float8'\]"):
    moments.scale_by_adam(**ADAM, dtype="int8")


# ---- the state ----


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 8.0), ("bfloat16", 4.0), ("float8", 2 + 2 * 4 / 512)])
def test_bytes_per_parameter(dtype, expected):
  params = {"a": jnp.zeros((4, 64, 512)), "b": jnp.zeros((8, 512))}
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(optimizer_of(dtype).init(params)) if leaf.ndim)
  assert size / sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def placed(mesh):
  """Parameters of a stack cut over fsdp and tensor, a table cut over both, and a vector."""
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
  tree = {"stack": np.ones((3, 8, 16)), "table": np.ones((8, 16)), "norm": np.ones(16)}
  places = {"stack": place(None, "tensor", "fsdp"), "table": place("tensor", "fsdp"), "norm": place()}
  return jax.device_put(jax.tree.map(np.float32, tree), places)


def gradients(params, n):
  """Of sizes that differ, the same on any mesh."""
  draw = lambda x: np.random.RandomState(n).normal(size=x.shape).astype(np.float32)  # noqa: E731
  return jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), params)


@pytest.mark.parametrize("dtype", ENCODED)
def test_moments_lie_where_their_parameters_lie(mesh_of, dtype):
  params = placed(mesh_of(fsdp=2, tensor=2))
  first = state.initial_state(params, optimizer_of(dtype))
  for name in ("mu", "nu"):
    tree = optax.tree_utils.tree_get(first.opt_state, name)
    for key, parameter in params.items():
      leaf = tree[key]
      codes = leaf.codes if dtype == "float8" else leaf
      assert codes.dtype.itemsize == {"bfloat16": 2, "float8": 1}[dtype]
      assert codes.sharding.is_equivalent_to(parameter.sharding, codes.ndim)
      if dtype == "float8":
        rows = NamedSharding(parameter.sharding.mesh, PartitionSpec(*parameter.sharding.spec[:-1]))
        assert leaf.scale.shape == parameter.shape[:-1]
        assert leaf.scale.sharding.is_equivalent_to(rows, leaf.scale.ndim)


def updates_on(mesh, dtype, count=3):
  """The state after some updates of Adam alone: the norm of a clip would be summed in another order."""
  params = placed(mesh)
  adam = moments.scale_by_adam(**ADAM, dtype=dtype)
  first = state.initial_state(params, adam)
  places = jax.tree.map(lambda x: x.sharding, first.opt_state)
  update = jax.jit(adam.update, out_shardings=(None, places))
  moved = first.opt_state
  for n in range(count):
    changes, moved = update(gradients(params, n), moved)
  return jax.device_get((changes, moved))


def same(a, b):
  """Whether two trees are equal to the bit."""
  raw = lambda x: np.atleast_1d(np.asarray(x)).view(np.uint8)  # noqa: E731
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(raw(x), raw(y)), a, b)))


@pytest.mark.parametrize("dtype", ENCODED)
def test_one_device_and_eight_store_the_same_codes(mesh_of, dtype):
  one, eight = updates_on(mesh_of(), dtype), updates_on(mesh_of(data=2, fsdp=2, tensor=2), dtype)
  # What is stored is the same to the bit; what moves the parameters is so but for the order of a multiply and an add.
  assert same(one[1], eight[1])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), one[0], eight[0])
  mu = one[1].mu["stack"]
  layers = np.float32(mu.codes if dtype == "float8" else mu)
  assert not np.array_equal(layers[0], layers[1])


def test_each_array_layer_moment_and_update_has_bits_of_its_own():
  adam = moments.scale_by_adam(b1=0.5, b2=0.5, eps=1e-8, dtype="bfloat16")
  value = jnp.full((2, 3, 64), 1.003)
  tree, moved, seen = {"a": value, "b": value}, adam.init({"a": value, "b": value}), []
  for _ in range(2):
    _, moved = adam.update(tree, moved._replace(mu=jax.tree.map(jnp.zeros_like, tree), nu=moved.nu))
    seen += [np.float32(moved.mu[name])[layer].tobytes() for name in "ab" for layer in range(2)]
  assert len(set(seen)) == 8


@pytest.mark.parametrize("dtype", ENCODED)
def test_an_update_that_is_not_finite_leaves_every_bit(mesh_of, dtype):
  params, optimizer = placed(mesh_of(fsdp=2)), optimizer_of(dtype)
  first = state.initial_state(params, optimizer)
  apply = jax.jit(functools.partial(step.apply_gradients, optimizer, steps=1))
  before, _ = apply(first, gradients(params, 0), jnp.float32(1))
  wrong = jax.tree.map(lambda x: x.at[0].set(jnp.nan), gradients(params, 1))
  after, figures = apply(before, wrong, jnp.float32(1))
  assert float(figures["update/skipped"]) == 1
  assert same(jax.device_get(after.opt_state), jax.device_get(before.opt_state))
  assert not same(jax.device_get(before.opt_state), jax.device_get(first.opt_state))


@pytest.mark.parametrize("dtype", moments.DTYPES)
def test_the_state_is_donated_whole(mesh_of, dtype):
  params, optimizer = placed(mesh_of()), optimizer_of(dtype)
  first = state.initial_state(params, optimizer)
  apply = jax.jit(functools.partial(step.apply_gradients, optimizer, steps=1), donate_argnums=0)
  compiled = apply.lower(first, gradients(params, 0), jnp.float32(1)).compile()
  assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(first))


@pytest.mark.parametrize("dtype", ENCODED)
def test_a_checkpoint_brings_back_every_bit_and_the_updates_after_it(tmp_path, mesh_of, dtype):
  params, optimizer = placed(mesh_of(fsdp=2, tensor=2)), optimizer_of(dtype)
  apply = jax.jit(functools.partial(step.apply_gradients, optimizer, steps=1))

  def go_on(reached, start, stop):
    for n in range(start, stop):
      reached, _ = apply(reached, gradients(params, n), jnp.float32(1))
    return reached

  checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, minutes=0.0, keep=1)
  middle = go_on(state.initial_state(params, optimizer), 0, 2)
  checkpoints.save(2, middle, {})
  checkpoints.close()
  expected, end = jax.device_get(middle), jax.device_get(go_on(middle, 2, 4))
  again = Checkpoints(tmp_path / "checkpoints", every=1, minutes=0.0, keep=1)
  restored, _ = again.restore(state.initial_state(jax.tree.map(jnp.copy, params), optimizer))
  again.close()
  assert same(jax.device_get(restored), expected)
  assert same(jax.device_get(go_on(restored, 2, 4)), end)


def test_a_checkpoint_of_other_moments_says_so(tmp_path, mesh_of):
  params = placed(mesh_of())
  checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, minutes=0.0, keep=1)
  checkpoints.save(1, state.initial_state(params, optimizer_of("float32")), {})
  with pytest.raises(ValueError, match="does not fit the models of this config.*the optimizer of the run"):
    checkpoints.wait()
    checkpoints.restore(state.initial_state(jax.tree.map(jnp.copy, params), optimizer_of("float8")))
  checkpoints.close()
