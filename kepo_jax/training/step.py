"""The update: loss and gradients over micro-batches, the optimizer, and the only jit with donation.

Everything that depends on the global batch (the weight of each token) is computed before the batch is cut, so the
number of micro-batches and devices changes nothing but rounding.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from kepo_jax import sharding
from kepo_jax.models import scoring
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import losses
from kepo_jax.types import Experience, Prompts


@chex.dataclass(frozen=True)
class TrainState:
  """Everything that an update changes."""

  step: jax.Array  # int32[], updates done
  params: Any  # float32 master weights
  opt_state: Any


@chex.dataclass(frozen=True)
class Target:
  """What a frozen model says about the rollouts of a batch."""

  hidden: jax.Array  # [P, G, T, D], predicts the token at its own index
  head: jax.Array  # [V, D]


def learning_rate_schedule(*, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
  """Linear warm-up to the peak, then linear decay to 0 at `steps`; step -> rate."""
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
  trainable: Any = True,
) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm.

  Args:
    schedule: step -> learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled weight decay, 0 for none.
    clip_norm: largest global gradient norm.
    trainable: prefix tree of the parameters with False at frozen parts, which get no moments.
  """
  chain = optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
  )
  return optax.masked(chain, trainable)


def initial_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update, moments sharded as their parameters."""
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  param_shardings = jax.tree.map(lambda x: x.sharding, params)
  shardings = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, s: s,
    jax.eval_shape(optimizer.init, params),
    param_shardings,
    transform_non_params=lambda _: sharding.replicated(mesh),
  )
  opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
  return TrainState(step=step, params=params, opt_state=opt_state)


def hidden_of(config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, *, remat: bool) -> jax.Array:
  """Hidden states [P, G, T, D] that predict tokens int32[P, G, T]; image and prompt are run once per group."""
  prefix = model.prefill(config, params, prompts, remat=remat)
  return model.completion_hidden(config, params, prefix, tokens, remat=remat)


def micro_batches(batch: Any, count: int, axes: tuple[str, ...] = ("prompt",)) -> Any:
  """[P, ...] leaves cut to [count, P / count, ...], every device giving each part the same number of rows.

  Args:
    batch: tree of arrays that lead with `axes`.
    count: parts.
    axes: ("prompt",) or ("prompt", "rollout").
  """

  def cut(x):
    rows = x.reshape((x.shape[0] // count, count) + x.shape[1:])
    return sharding.constrain(jnp.moveaxis(rows, 1, 0), None, *axes, *[None] * (x.ndim - len(axes)))

  return jax.tree.map(cut, batch)


def _cut_experience(experience: Experience, count: int) -> Experience:
  prompts = micro_batches(experience.prompts, count)
  rows = ("tokens", "mask", "logps", "advantages", "gate", "injected")
  parts = micro_batches({name: getattr(experience, name) for name in rows}, count, ("prompt", "rollout"))
  return Experience(prompts=prompts, **parts)


def target(config: Qwen3VLConfig, params: Any, experience: Experience, *, parts: int) -> Target:
  """Hidden states [P, G, T, D] and head [V, D] of a frozen model on the rollouts, without gradient.

  Args:
    config: of the frozen model.
    params: its weights.
    experience: the global batch.
    parts: micro-batches, one after the other: the attention scores of a large teacher on a whole batch are tens of GB.
  """
  hidden = jax.lax.map(
    lambda part: hidden_of(config, params, *part, remat=False),
    (micro_batches(experience.prompts, parts), micro_batches(experience.tokens, parts, ("prompt", "rollout"))),
  )
  # Undoes the cut of `micro_batches`.
  hidden = jnp.moveaxis(hidden, 0, 1).reshape(*experience.tokens.shape, hidden.shape[-1])
  hidden = sharding.constrain(hidden, "prompt", "rollout", None, None)
  return jax.lax.stop_gradient(Target(hidden=hidden, head=model.head_weight(config, params)))


def batch_sums(inputs: losses.TokenInputs, aux: dict[str, jax.Array], experience: Experience) -> dict[str, Any]:
  """(sum, count) of each logged figure over a part of the batch.

  Args:
    inputs: of the part.
    aux: float32[P, G, T] per-token values of the loss.
    experience: of the part.
  """
  mask = inputs.mask
  injected = mask & experience.injected[..., None]
  own = mask & ~experience.injected[..., None]
  gated = mask & experience.gate[..., None]
  gap = experience.logps - aux["logp"]
  figures = {
    "entropy": (aux["entropy"], own),
    "ratio/mean": (aux["ratio"], mask),
    "ratio/clip_frac": (aux["clipped"].astype(jnp.float32), own),
    "ratio/clip_frac_injected": (aux["clipped"].astype(jnp.float32), injected),
    "sampler/logp_gap": (jnp.abs(gap), own),
    "hint/reliance": (gap, injected),
  }
  if "divergence" in aux:
    figures["divergence/gated"] = (aux["divergence"], gated)
    figures["divergence/ungated"] = (aux["divergence"], mask & ~gated)
    figures["divergence/injected"] = (aux["divergence"], injected)
  if "kl" in aux:
    figures["kl/ref"] = (aux["kl"], own)
  return {name: losses.masked_sum(values, where) for name, (values, where) in figures.items()}


def means(figures: dict[str, Any]) -> dict[str, float]:
  """Figures of an update as numbers: (sum, count) pairs become means, left out where nothing was counted."""
  return {
    name: float(value[0] / value[1] if isinstance(value, tuple) else value)
    for name, value in figures.items()
    if not isinstance(value, tuple) or value[1]
  }


def make_update(
  config: Qwen3VLConfig,
  optimizer: optax.GradientTransformation,
  token_loss: losses.TokenLoss,
  *,
  compute_dtype: Any,
  freeze_vision: bool,
  remat: bool,
  chunk: int,
  parts: int,
) -> Callable[[TrainState, Experience, tuple[Target, ...]], tuple[TrainState, dict[str, Any]]]:
  """The update as a pure function (state, experience, targets) -> (state, figures).

  Args:
    config: of the student.
    optimizer: from `make_optimizer`.
    token_loss: from `losses.kepo_token_loss`; wants the logits of `targets`, in order.
    compute_dtype: of the student's activations and products; master weights, and the sums of gradients over
      micro-batches, are float32.
    freeze_vision: no gradient for the vision tower.
    remat: recompute layers in the backward pass.
    chunk: completion tokens whose logits exist at one time.
    parts: micro-batches.

  Returns:
    the function; its figures are float32[] ("loss", "grad_norm") and (sum, count) pairs.
  """

  def loss(params, part, inputs, others):
    if freeze_vision:
      params = params | {"visual": jax.lax.stop_gradient(params["visual"])}
    params = model.cast(params, compute_dtype)
    hidden = hidden_of(config, params, part.prompts, part.tokens, remat=remat)
    head = model.head_weight(config, params)
    value, aux = scoring.chunked_loss(token_loss, hidden, head, inputs, others, chunk=chunk)
    return value, batch_sums(inputs, jax.lax.stop_gradient(aux), part)

  def update(state, experience, targets):
    inputs = losses.token_inputs(experience.tokens, experience.mask, experience.advantages, experience.gate)
    hiddens = tuple(t.hidden for t in targets)

    def part_gradients(part):
      experience, inputs, hiddens = part
      others = tuple((hidden, t.head) for hidden, t in zip(hiddens, targets, strict=True))
      return jax.value_and_grad(loss, has_aux=True)(state.params, experience, inputs, others)

    whole = (experience, inputs, hiddens)
    if parts == 1:
      (value, sums), gradients = part_gradients(whole)
    else:
      cut = (_cut_experience(experience, parts), *micro_batches((inputs, hiddens), parts, ("prompt", "rollout")))
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part_gradients, jax.tree.map(lambda x: x[0], cut))
      )
      add = lambda total, part: (jax.tree.map(jnp.add, total, part_gradients(part)), None)  # noqa: E731
      ((value, sums), gradients), _ = jax.lax.scan(add, zeros, cut)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    figures = sums | {"loss": value, "grad_norm": optax.tree.norm(gradients)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), figures

  return update


def jit_update(update: Callable[..., Any], state: TrainState) -> Callable[..., Any]:
  """The update compiled for the shardings of `state`, which it consumes."""
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(update, out_shardings=(shardings, None), donate_argnums=0)
