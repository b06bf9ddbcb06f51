"""The update: inputs of the loss, gradients over micro-batches, the optimizer, and the only jits with donation.

Everything that depends on the global batch (the weight of each token) is computed before the batch is cut, so the
number of micro-batches and devices changes nothing but rounding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kepo_jax.models import scoring
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import losses, ratios
from kepo_jax.training.compiling import Program
from kepo_jax.training.forward import ROWS, Target, hidden_of, micro_batches
from kepo_jax.training.inputs import UpdateSettings, keep_one_term, make_inputs
from kepo_jax.training.state import TrainState, trained
from kepo_jax.types import Experience


def batch_sums(
  inputs: losses.TokenInputs, aux: dict[str, jax.Array], experience: dict[str, jax.Array]
) -> dict[str, Any]:
  """(sum, count) of each logged figure over a part of the batch.

  Args:
    inputs: of the part.
    aux: float32[P, G, T] per-token values of the loss.
    experience: "logps" float32[P, G, T], "gate" and "supervised" bool[P, G] of the part.
  """
  mask = inputs.mask
  supervised = mask & experience["supervised"][..., None]
  injected = mask & inputs.injected
  own = mask & ~inputs.injected & ~supervised
  gated = mask & experience["gate"][..., None]
  learnt = inputs.policy_weight > 0  # not the rows that no term sees
  gap = experience["logps"] - aux["old_logp"]
  clipped = aux["clipped"].astype(jnp.float32)
  figures = {
    "entropy": (aux["entropy"], own),
    "ratio/mean": (aux["ratio"], learnt),
    "ratio/clip_frac": (clipped, own & learnt),
    "ratio/clip_frac_injected": (clipped, injected & learnt),
    "sampler/logp_gap": (jnp.abs(gap), own),
    "hint/reliance": (gap, injected),
    "supervised/nll": (-aux["logp"], supervised),
  }
  if "divergence" in aux:
    figures["divergence/gated"] = (aux["divergence"], gated)
    figures["divergence/ungated"] = (aux["divergence"], mask & ~gated)
    figures["divergence/injected"] = (aux["divergence"], injected)
  if "kl" in aux:
    figures["kl/ref"] = (aux["kl"], own)
  return {name: losses.masked_sum(values, where) for name, (values, where) in figures.items()}


def means(figures: dict[str, tuple[Any, Any]]) -> dict[str, float]:
  """(sum, count) pairs as means; left out where nothing was counted."""
  return {name: float(total / count) for name, (total, count) in figures.items() if count}


def make_gradients(
  config: Qwen3VLConfig, token_loss: losses.KepoTokenLoss, settings: UpdateSettings
) -> Callable[[Any, Experience, losses.TokenInputs, tuple[Target, ...]], tuple[dict[str, Any], Any]]:
  """The function (params, experience, inputs, targets) -> ((sum, count) pairs, gradients of what is trained).

  Args:
    config: of the student.
    token_loss: the objective; wants the logits of `targets`, in order.
    settings: of the update.
  """

  def batch_loss(params, prompts, inputs, others):
    hidden = hidden_of(config, params, prompts, inputs.tokens, remat=settings.remat)
    head = model.head_weight(config, params)
    if settings.sequence_ratio and inputs.old_logps is not None:
      inputs = inputs.replace(sequence_log_ratio=sequence_ratios(hidden, head, inputs))
    chunk = settings.chunk_of(inputs.tokens)
    return scoring.chunked_loss(token_loss, hidden, head, inputs, others, chunk=chunk)

  def sequence_ratios(hidden, head, inputs):
    chunk = settings.chunk_of(inputs.tokens)
    logps, _ = scoring.token_logps(
      hidden, head, inputs.tokens, token_loss.allowed, temperature=token_loss.temperature, chunk=chunk
    )
    log_ratio = ratios.sequence_log_ratio(logps - inputs.old_logps, inputs.mask)
    return jnp.broadcast_to(log_ratio[..., None], inputs.mask.shape)

  def loss(moving, fixed, part, heads):
    prompts, (inputs, logged, hiddens) = part
    params = model.cast(moving | jax.lax.stop_gradient(fixed), settings.compute_dtype)
    others = tuple(zip(hiddens, heads, strict=True))
    value, aux = batch_loss(params, prompts, inputs, others)
    return value, batch_sums(inputs, jax.lax.stop_gradient(aux), logged)

  def gradients(params, experience, inputs, targets):
    moving = trained(params, settings.frozen)
    fixed = {name: part for name, part in params.items() if name not in moving}
    logged = {name: experience[name] for name in ("logps", "gate", "supervised")}
    prompts, rows = experience.prompts, (inputs, logged, tuple(t.hidden for t in targets))
    heads = tuple(t.head for t in targets)

    def part_gradients(part):
      return jax.value_and_grad(loss, has_aux=True)(moving, fixed, part, heads)

    if settings.parts == 1:
      (value, sums), gradient = part_gradients((prompts, rows))
    else:
      cut = (micro_batches(prompts, settings.parts), micro_batches(rows, settings.parts, ROWS))
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part_gradients, jax.tree.map(lambda x: x[0], cut))
      )
      add = lambda total, part: (jax.tree.map(jnp.add, total, part_gradients(part)), None)  # noqa: E731
      ((value, sums), gradient), _ = jax.lax.scan(add, zeros, cut)
    return sums | {"loss": (value, jnp.float32(1))}, gradient

  return gradients


def apply_gradients(
  optimizer: optax.GradientTransformation, state: TrainState, gradient: Any, loss: jax.Array, *, steps: int
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after one update; where loss or gradient is not finite, parameters and moments stay as they are.

  Args:
    optimizer: from `state.make_optimizer`, or any other.
    state: before the update.
    gradient: of the trained parts of the parameters.
    loss: float32[].
    steps: added to the number of steps done.

  Returns:
    the state, and float32[] figures: the norm of the gradient before it is clipped, and whether the update was skipped.
  """
  norm = optax.tree.norm(gradient)
  finite = jnp.isfinite(norm) & jnp.isfinite(loss)
  moving = {name: state.params[name] for name in gradient}
  optimizer = optax.with_extra_args_support(optimizer)
  updates, opt_state = optimizer.update(gradient, state.opt_state, moving, step=state.step)
  moved, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (optax.apply_updates(moving, updates), opt_state),
    (moving, state.opt_state),
  )
  after = TrainState(
    step=state.step + steps,
    params=state.params | moved,
    opt_state=opt_state,
    skipped=jnp.where(finite, 0, state.skipped + 1),
  )
  return after, {"grad_norm": norm, "update/skipped": 1 - finite.astype(jnp.float32)}


def compared(first: Any, second: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Norms of two gradients and the cosine between them, float32[] each; the cosine is 0 where a norm is."""
  norms = optax.tree.norm(first), optax.tree.norm(second)
  product = norms[0] * norms[1]
  return *norms, jnp.where(product > 0, optax.tree.vdot(first, second) / jnp.where(product > 0, product, 1.0), 0.0)


class Update:
  """The updates of one batch: (state, experience, targets) -> (state, figures), compiled; the state is consumed."""

  def __init__(
    self,
    config: Qwen3VLConfig,
    optimizer: optax.GradientTransformation,
    token_loss: losses.KepoTokenLoss,
    settings: UpdateSettings,
    state: TrainState,
  ):
    """Makes the programs; they compile when they are first called.

    Args:
      config: of the student.
      optimizer: from `state.make_optimizer`.
      token_loss: the objective.
      settings: of the update.
      state: whose shardings the new state has.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    moving = trained(shardings.params, settings.frozen)
    self._updates = settings.updates
    self._inputs = Program("the inputs of the loss", make_inputs(config, token_loss, settings))
    gradients = make_gradients(config, token_loss, settings)
    self._gradients = Program("the gradients", gradients, out_shardings=(None, moving))
    apply = functools.partial(apply_gradients, optimizer)
    self._apply = Program("the optimizer", apply, out_shardings=(shardings, None), donate_argnums=0)
    self._compared = Program("the comparison of gradients", compared)

  def __call__(
    self, state: TrainState, experience: Experience, targets: tuple[Target, ...], *, compare: bool = False
  ) -> tuple[TrainState, dict[str, Any]]:
    """The new state, and (sum, count) pairs of the figures over all updates.

    Args:
      state: consumed.
      experience: the global batch, on the mesh.
      targets: what the teacher and the reference say about it, where the loss uses them.
      compare: add the norms of the gradients of the policy and the distillation term, and their cosine.
    """
    state, figures, comparison = self._updated(state, experience, targets, compare=compare)
    return state, jax.tree.map(lambda *pairs: sum(pairs), *figures) | comparison

  def rehearse(self, state: TrainState, experience: Experience, targets: tuple[Target, ...], *, compare: bool) -> None:
    """Compiles every program of a call; all arguments are shapes, as `compiling.shapes_of` makes them.

    Raises:
      ValueError: one cannot be compiled.
    """
    self._updated(state, experience, targets, compare=compare)

  def _updated(
    self, state: TrainState, experience: Experience, targets: tuple[Target, ...], *, compare: bool
  ) -> tuple[TrainState, list[dict[str, Any]], dict[str, Any]]:
    """The new state, the figures of each update, and the comparison."""
    inputs = self._inputs(state.params, state.step, experience)
    comparison = self._comparison(state.params, experience, inputs, targets) if compare else {}
    figures: list[dict[str, Any]] = []
    for update in range(self._updates):
      sums, gradient = self._gradients(state.params, experience, inputs, targets)
      state, applied = self._apply(state, gradient, sums["loss"][0], steps=int(update == self._updates - 1))
      del gradient
      figures.append(sums | {name: (value, jnp.float32(1)) for name, value in applied.items()})
    return state, figures, comparison

  def _comparison(
    self, params: Any, experience: Experience, inputs: losses.TokenInputs, targets: tuple[Target, ...]
  ) -> Any:
    terms = [
      self._gradients(params, experience, keep_one_term(inputs, weight), targets)[1]
      for weight in ("policy_weight", "distill_weight")
    ]
    names = ("grad_norm/policy", "grad_norm/distill", "grad_cosine")
    return {name: (value, jnp.float32(1)) for name, value in zip(names, self._compared(*terms), strict=True)}
