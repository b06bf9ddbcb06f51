"""Adam whose two moments are stored in bfloat16; what is computed with them is optax's, in float32.

Rounding is stochastic: up with the probability that keeps the expected value. With b2 = 0.999 an update moves the
second moment by a thousandth of the way, far less than half a step of bfloat16 (1/256), so rounding to nearest would
return the old value for good and the average would never follow the gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def scale_by_adam(*, b1: float, b2: float, eps: float, dtype: str) -> optax.GradientTransformation:
  """Returns `optax.scale_by_adam` with its moments stored in `dtype`; in float32 it is that function's.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    dtype: of the moments between updates, float32 or bfloat16.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if dtype == "float32":
    return adam

  def init(params):
    state = adam.init(params)
    mu, nu = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (state.mu, state.nu))
    return state._replace(mu=mu, nu=nu)

  def update(updates, state, params=None):
    del params
    gradients, structure = jax.tree.flatten(updates)
    moments = (jax.tree.leaves(tree) for tree in (state.mu, state.nu))
    count = optax.safe_increment(state.count)
    # From the count alone: a resumed run draws the same bits, on any mesh.
    key = jax.random.fold_in(jax.random.key(0), count)

    def moved(key, gradient, mu, nu):
      wide = state._replace(mu=mu.astype(jnp.float32), nu=nu.astype(jnp.float32))
      change, wide = adam.update(gradient, wide)
      bits = [jax.random.bits(part, gradient.shape, jnp.uint32) for part in jax.random.split(key)]
      return change, rounded(wide.mu, bits[0]), rounded(wide.nu, bits[1])

    leaves: list[tuple[Any, ...]] = []
    for number, leaf in enumerate(zip(gradients, *moments, strict=True)):
      leaf_key = jax.random.fold_in(key, number)
      if leaf[0].ndim < 3:
        leaves.append(moved(leaf_key, *leaf))
      else:
        # Layer by layer: wide moments and random bits of a whole stack would take more than bfloat16 saves.
        keys = jax.random.split(leaf_key, len(leaf[0]))
        leaves.append(jax.lax.map(lambda layer: moved(*layer), (keys, *leaf)))
    changes, mu, nu = (jax.tree.unflatten(structure, part) for part in zip(*leaves, strict=True))
    return changes, state._replace(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def rounded(x: jax.Array, bits: jax.Array) -> jax.Array:
  """Rounds to bfloat16, away from zero with the share of a step that is cut off as probability.

  Args:
    x: float32[...].
    bits: uint32[...], random; the last 16 of them are used.
  """
  raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & jnp.uint32(0xFFFF))
  return jax.lax.bitcast_convert_type(raised >> 16 << 16, jnp.float32).astype(jnp.bfloat16)
