"""The training state, the optimizer, and Adam with moments in bfloat16."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from kepo_jax import sharding
from kepo_jax.training import compiling


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
  """Rounds to bfloat16 stochastically: away from zero with the truncated share of a step as probability.

  Args:
    x: float32[...].
    bits: uint32[...], random; the last 16 of them are used.
  """
  raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & jnp.uint32(0xFFFF))
  return jax.lax.bitcast_convert_type(raised >> 16 << 16, jnp.float32).astype(jnp.bfloat16)


@chex.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes."""

  step: jax.Array  # int32[], steps done, each with its own batch
  params: Any  # float32 master weights
  opt_state: Any  # of the parts of params that are trained
  skipped: jax.Array  # int32[], updates in a row, up to the last one, that were not finite and changed nothing


def learning_rate_schedule(*, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
  """Returns step -> rate: linear warm-up to the peak, then linear decay to 0 at `steps`."""
  decay = optax.linear_schedule(learning_rate, 0.0, max(1, steps - warmup_steps))
  if not warmup_steps:
    return decay
  # The first update already moves: the ramp reaches its peak with update `warmup_steps`.
  ramp = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1))
  return optax.join_schedules([ramp, decay], [warmup_steps])


def make_optimizer(
  schedule: optax.Schedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
  moments_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
  """Returns AdamW after clipping by the global norm; `update` takes the number of steps done as `step`.

  The rate follows the step, not a counter of updates: all updates of a step have its rate, and one that is skipped
  does not shift those after it.

  Args:
    schedule: step -> learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled weight decay, 0 for none.
    clip_norm: largest global gradient norm.
    moments_dtype: of the two moments between updates, float32 or bfloat16.
  """
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    scale_by_adam(b1=b1, b2=b2, eps=eps, dtype=moments_dtype),
    optax.add_decayed_weights(weight_decay),
    _scale_by_rate(schedule),
  )


def _scale_by_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
  """Returns the last part of AdamW: minus the learning rate of the step, times the update."""

  def update(updates, state, params=None, *, step, **_):
    del params
    rate = -schedule(step)
    return jax.tree.map(lambda x: jnp.asarray(rate, x.dtype) * x, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def trained(params: dict[str, Any], frozen: tuple[str, ...] = ()) -> dict[str, Any]:
  """Returns the top-level parts of a parameter tree that are not `frozen`: only they have gradients and moments."""
  return {name: part for name, part in params.items() if name not in frozen}


def initial_state(
  params: dict[str, Any], optimizer: optax.GradientTransformation, frozen: tuple[str, ...] = ()
) -> TrainState:
  """Returns the state before the first update, moments sharded as their parameters.

  Args:
    params: float32 master weights on a mesh, or their shapes with shardings, of which the state then consists too.
    optimizer: from `make_optimizer`.
    frozen: top-level parts of params that stay as they are.
  """
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  moving = trained(params, frozen)
  shapes = jax.eval_shape(optimizer.init, moving)
  shardings = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, place: place,
    shapes,
    jax.tree.map(lambda x: x.sharding, moving),
    transform_non_params=lambda _: sharding.replicated(mesh),
  )
  if compiling.is_abstract(params):
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    opt_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return TrainState(step=counter, params=params, opt_state=opt_state, skipped=counter)
  opt_state = jax.jit(optimizer.init, out_shardings=shardings)(moving)
  step, skipped = (jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh)) for _ in range(2))
  return TrainState(step=step, params=params, opt_state=opt_state, skipped=skipped)
