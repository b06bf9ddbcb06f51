"""Adam whose two moments are stored in fewer bits; what is computed with them is optax's, in float32.

Rounding is stochastic: up with the probability that keeps the expected value. With b2 = 0.999 an update moves the
second moment by a thousandth of the way, far less than half a step of bfloat16 (1/256) or of an 8-bit float (1/16), so
rounding to nearest would return the old value for good and the average would never follow the gradients.

In 8 bits a moment is float8_e4m3fn codes and one scale for each row (the last axis). The second moment is stored as its
root, which halves the range of exponents it needs. Scales are powers of two: a row whose largest value grows or shrinks
keeps its other values on the grid, where another factor would round all of them anew with every update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

DTYPES = ("float32", "bfloat16", "float8")

_FLOAT8 = jnp.float8_e4m3fn
_LARGEST = 448.0  # 0.875 * 2^9
_SMALLEST = 2.0**-9
_SMALLEST_NORMAL = 2.0**-6  # the grid is even below it, with steps of the smallest code
_LEAST_SCALE = -100  # binary exponent; its codes decode to numbers whose squares are zero in float32

# Bits of a float32 behind the last one that the stored type has.
_BITS_BEHIND = {"bfloat16": 16, "float8": 20}


class Float8(NamedTuple):
  """Numbers as codes times the scale of their row."""

  codes: jax.Array  # float8_e4m3fn[..., N]
  scale: jax.Array  # float32[...], powers of two


def scale_by_adam(*, b1: float, b2: float, eps: float, dtype: str) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with its moments stored in `dtype`; in float32 it is that function's.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    dtype: of the moments between updates, of `DTYPES`.

  Raises:
    ValueError: an unknown dtype.
  """
  if dtype not in DTYPES:
    raise ValueError(f"moments={dtype!r} is unknown; use one of {sorted(DTYPES)}.")
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if dtype == "float32":
    return adam
  encoded, decoded = (_bfloat16, _from_bfloat16) if dtype == "bfloat16" else (_float8, _from_float8)

  def init(params):
    nothing = lambda x: jnp.zeros(x.shape, jnp.uint32)  # noqa: E731
    state = adam.init(params)
    return state._replace(
      mu=jax.tree.map(lambda x: encoded(x, nothing(x), root=False), state.mu),
      nu=jax.tree.map(lambda x: encoded(x, nothing(x), root=True), state.nu),
    )

  def update(updates, state, params=None):
    del params
    gradients, structure = jax.tree.flatten(updates)
    moments = (jax.tree.leaves(tree, is_leaf=is_encoded) for tree in (state.mu, state.nu))
    count = optax.safe_increment(state.count)
    # From the count alone: a resumed run draws the same bits, on any mesh.
    key = jax.random.fold_in(jax.random.key(0), count)

    def moved(key, gradient, mu, nu):
      wide = state._replace(mu=decoded(mu, root=False), nu=decoded(nu, root=True))
      change, wide = adam.update(gradient, wide)
      bits = [jax.random.bits(part, gradient.shape, jnp.uint32) for part in jax.random.split(key)]
      return change, encoded(wide.mu, bits[0], root=False), encoded(wide.nu, bits[1], root=True)

    leaves: list[tuple[Any, ...]] = []
    for number, leaf in enumerate(zip(gradients, *moments, strict=True)):
      leaf_key = jax.random.fold_in(key, number)
      if leaf[0].ndim < 3:
        leaves.append(moved(leaf_key, *leaf))
      else:
        # Layer by layer: decoded moments and random bits of a whole stack are many times what its codes save.
        keys = jax.random.split(leaf_key, len(leaf[0]))
        leaves.append(jax.lax.map(lambda layer: moved(*layer), (keys, *leaf)))
    changes, mu, nu = (jax.tree.unflatten(structure, part) for part in zip(*leaves, strict=True))
    return changes, state._replace(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def is_encoded(leaf: Any) -> bool:
  """Whether a node of a state stands for one array of parameters."""
  return isinstance(leaf, Float8)


def sharding_of(leaf: Any, parameter: NamedSharding) -> Any:
  """Where a moment lies: as its parameter; scales as its rows do, whole along the last axis.

  Args:
    leaf: one moment, of a state or its shape.
    parameter: sharding of the parameter.
  """
  if not is_encoded(leaf):
    return parameter
  rows = PartitionSpec(*parameter.spec[: leaf.scale.ndim])
  return leaf._replace(codes=parameter, scale=NamedSharding(parameter.mesh, rows))


def _cut(x: jax.Array, behind: int) -> jax.Array:
  """float32 x with its last `behind` bits zero: the number of a shorter type next to it towards zero."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jax.lax.bitcast_convert_type(bits >> behind << behind, jnp.float32)


def rounded(x: jax.Array, bits: jax.Array, behind: int) -> jax.Array:
  """float32 x without its last `behind` bits, away from zero with the share of a step that is cut off as probability.

  Args:
    x: float32[...].
    bits: uint32[...], random; the last `behind` of them are used.
    behind: bits that the shorter type does not have.
  """
  raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & jnp.uint32((1 << behind) - 1))
  return _cut(jax.lax.bitcast_convert_type(raised, jnp.float32), behind)


def _bfloat16(x: jax.Array, bits: jax.Array, *, root: bool) -> jax.Array:
  del root  # it has the exponents of float32
  return rounded(x, bits, _BITS_BEHIND["bfloat16"]).astype(jnp.bfloat16)


def _from_bfloat16(x: jax.Array, *, root: bool) -> jax.Array:
  del root
  return x.astype(jnp.float32)


def _float8(x: jax.Array, bits: jax.Array, *, root: bool) -> Float8:
  """float32[..., N] as codes; with `root`, those of its square root."""
  x = jnp.sqrt(x) if root else x
  scale = _scale(jnp.abs(x))
  scaled = x / _per_row(scale, x)
  magnitude = jnp.abs(scaled)
  # Below the smallest normal number float8 has even steps. Added to it, they are those of a mantissa.
  shift = jnp.where(magnitude < _SMALLEST_NORMAL, _SMALLEST_NORMAL, 0.0)
  shifted = magnitude + shift
  if root:
    shifted = _for_the_square(magnitude, shifted, shift)
  code = rounded(shifted, bits, _BITS_BEHIND["float8"]) - shift
  return Float8(codes=(jnp.sign(scaled) * code).astype(_FLOAT8), scale=scale)


def _from_float8(x: Float8, *, root: bool) -> jax.Array:
  code = x.codes.astype(jnp.float32)
  if not root:
    return code * _per_row(x.scale, code)
  # A second moment that was rounded to zero beside a first one that was not would make a huge update.
  return jnp.square(jnp.maximum(code, _SMALLEST) * _per_row(x.scale, code))


def _for_the_square(magnitude: jax.Array, shifted: jax.Array, shift: jax.Array) -> jax.Array:
  """Moves a root between its two neighbours so that the square of what it is rounded to has the right mean.

  A root that is right on average has a square that is too large on average, by the variance of the rounding: over
  many updates a second moment 3 % too large.
  """
  behind = _BITS_BEHIND["float8"]
  low = _cut(shifted, behind)
  step = (
    jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(low, jnp.uint32) + jnp.uint32(1 << behind), jnp.float32)
    - low
  )
  least, most = low - shift, low - shift + step
  # (x^2 - a^2) / (b^2 - a^2) with b - a = step, from differences of roots: squares of near numbers would cancel.
  share = (magnitude - least) / step * ((magnitude + least) / (most + least))
  return low + share * step


def _scale(magnitude: jax.Array) -> jax.Array:
  """float32[...]: for each row of [..., N] the least power of two with which its largest number is no more than 448."""
  largest = magnitude.max(axis=-1) if magnitude.ndim else magnitude
  mantissa, exponent = jnp.frexp(largest)
  exponent = exponent - jnp.where(mantissa <= _LARGEST / 2**9, 9, 8)
  return jnp.ldexp(jnp.float32(1), jnp.where(largest > 0, jnp.maximum(exponent, _LEAST_SCALE), _LEAST_SCALE))


def _per_row(scale: jax.Array, x: jax.Array) -> jax.Array:
  return scale[..., None] if x.ndim else scale
