"""The update: scoring of rollouts, inputs of the loss, gradients over micro-batches, and the optimizer.

Weights of tokens depend on the global batch. They are computed before the batch is split, so the number of
micro-batches and devices changes nothing but rounding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kepo_jax import sharding
from kepo_jax.models import scoring
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import losses, ratios
from kepo_jax.training.compiling import Program
from kepo_jax.training.optimizer import TrainState, trained
from kepo_jax.types import Experience, Prompts

ROWS = ("prompt", "rollout")


@chex.dataclass(frozen=True)
class Target:
  """What a frozen model predicts for the rollouts of a batch."""

  hidden: jax.Array  # [P, G, T, D], predicts the token at its own index
  head: jax.Array  # [V, D]


def hidden_of(config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, *, remat: str) -> jax.Array:
  """Computes hidden states [P, G, T, D] that predict tokens int32[P, G, T]; image and prompt are run once per group."""
  prefix = model.prefill(config, params, prompts, remat=remat)
  return model.completion_hidden(config, params, prefix, tokens, remat=remat)


def logps_of(
  config: Qwen3VLConfig,
  params: Any,
  prompts: Prompts,
  tokens: jax.Array,
  allowed: jax.Array,
  *,
  temperature: float,
  chunk: int,
) -> jax.Array:
  """Computes log-probabilities float32[P, G, T], nats, of given completions; those of padding mean nothing.

  Args:
    config: of the model.
    params: its weights; their dtype is that of the computation.
    prompts: [P, S].
    tokens: int32[P, G, T].
    allowed: bool[V], ids that may be sampled.
    temperature: divides the logits.
    chunk: completion tokens of a device whose logits exist at one time.
  """
  hidden = hidden_of(config, params, prompts, tokens, remat="none")
  most = scoring.chunk_of(chunk, *tokens.shape[:2])
  head = model.head_weight(config, params)
  return scoring.token_logps(hidden, head, tokens, allowed, temperature=temperature, chunk=most)[0]


def micro_batches(batch: Any, count: int, axes: tuple[str, ...] = ("prompt",)) -> Any:
  """Splits [P, ...] leaves to [count, P / count, ...], every device giving each part the same number of rows.

  Args:
    batch: tree of arrays that lead with `axes`.
    count: parts.
    axes: ("prompt",) or ("prompt", "rollout").
  """

  def split(x):
    rows = x.reshape((x.shape[0] // count, count) + x.shape[1:])
    return sharding.constrain(jnp.moveaxis(rows, 1, 0), None, *axes, *[None] * (x.ndim - len(axes)))

  return jax.tree.map(split, batch)


def in_parts(function: Callable[..., jax.Array], prompts: Prompts, tokens: jax.Array, parts: int) -> jax.Array:
  """Computes function(prompts, tokens) -> [P, G, T, ...] on one micro-batch after the other."""
  values = jax.lax.map(
    lambda part: function(*part), (micro_batches(prompts, parts), micro_batches(tokens, parts, ROWS))
  )
  values = jnp.moveaxis(values, 0, 1).reshape(*tokens.shape, *values.shape[4:])
  return sharding.constrain(values, *ROWS, *[None] * (values.ndim - 2))


def target(config: Qwen3VLConfig, params: Any, prompts: Prompts, tokens: jax.Array, *, parts: int) -> Target:
  """Computes hidden states [P, G, T, D] and head [V, D] of a frozen model on the rollouts, without gradient.

  Args:
    config: of the frozen model.
    params: its weights.
    prompts: of the global batch.
    tokens: int32[P, G, T], its rollouts.
    parts: micro-batches, one after the other: the attention scores of a large teacher on a whole batch are tens of GB.
  """

  def hidden(prompts, tokens):
    return hidden_of(config, params, prompts, tokens, remat="none")

  states = in_parts(hidden, prompts, tokens, parts)
  return jax.lax.stop_gradient(Target(hidden=states, head=model.head_weight(config, params)))


# The policies of the importance ratio of an injected rollout, sampled under a hint; see `UpdateSettings`.
OFF_CONTEXT = ("drop_on_policy", "drop_behaviour_shaped", "drop_unit_shaped")
UNIT_GAMMA = 0.1  # LUFFY
BEHAVIOUR_QUANTILE = 0.9  # Guide


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
  """How a batch becomes updates.

  `off_context` says what becomes of rollouts that were sampled under a hint:
    `drop_on_policy`: the hint is dropped from both policies of the ratio, which is 1 in the first update.
    `drop_behaviour_shaped`: pi_theta without the hint against the sampler with it, rho / (rho + gamma) without a clip;
      gamma is the 0.9-quantile of rho over the injected tokens of the batch, before its first update (Guide,
      arXiv:2506.13923).
    `drop_unit_shaped`: p / (p + 0.1) with p = pi_theta without the hint (LUFFY, arXiv:2504.14945).
  """

  compute_dtype: Any  # of the student's activations and products; gradients and master weights are float32
  chunk: int  # completion tokens of a device whose logits exist at one time
  parts: int = 1  # micro-batches
  updates: int = 1  # per batch; with more than one, pi_old comes from a scoring pass before the first
  frozen: tuple[str, ...] = ()  # top-level parts of the parameters that stay
  remat: str = "none"  # of layers.REMAT: what the backward pass computes again
  aggregation: str = "sequence_mean"  # of weights.AGGREGATIONS
  normaliser: str = "gated_tokens"  # of weights.NORMALISERS
  max_tokens: int | None = None  # length of the aggregation "constant_length"
  sequence_ratio: bool = False  # one ratio per rollout (GSPO) instead of one per token
  off_context: str = "drop_on_policy"
  distill_factor: optax.Schedule = lambda step: 1.0  # factor of lambda at a step

  def chunk_of(self, tokens: jax.Array) -> int:
    """Returns `chunk` as tokens of each row of int32[P, G, T]."""
    return scoring.chunk_of(self.chunk, *tokens.shape[:2])


def keep_one_term(inputs: Any, weight: str) -> Any:
  """Zeroes every loss term except the one with this weight; the same program then gives that term's gradient."""
  others = [name for name in losses.WEIGHTS if name != weight]
  return inputs.replace(**{name: _zeros_like(getattr(inputs, name)) for name in others})


def _zeros_like(x: Any) -> Any:
  """Returns zeros on the devices of an array; a shape stays. `jnp.zeros_like` would compile a program of its own."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  zeros = np.zeros(x.shape, x.dtype)
  return jax.make_array_from_callback(x.shape, x.sharding, lambda index: zeros[index])


def make_inputs(
  config: Qwen3VLConfig, token_loss: losses.KepoTokenLoss, settings: UpdateSettings
) -> Callable[[Any, jax.Array, Experience], losses.TokenInputs]:
  """Returns (params, step, experience) -> inputs weighted over the batch, with pi_old scored where the loss needs it.

  Args:
    config: of the student.
    token_loss: the objective.
    settings: of the update.
  """
  behaviour = settings.off_context == "drop_behaviour_shaped"

  def scored(params: Any, prompts: Prompts, tokens: jax.Array) -> jax.Array:
    """log pi_old of tokens int32[P, G, T]."""
    params = model.cast(params, settings.compute_dtype)
    allowed, temperature = token_loss.allowed, token_loss.temperature

    def part(prompts, tokens):
      return logps_of(config, params, prompts, tokens, allowed, temperature=temperature, chunk=settings.chunk)

    return in_parts(part, prompts, tokens, settings.parts)

  def inputs(params: Any, step: jax.Array, experience: Experience) -> losses.TokenInputs:
    old_logps: Any = None
    if settings.updates > 1 or behaviour:
      old_logps = scored(params, experience.prompts, experience.tokens)
    rows: Any = losses.token_inputs(
      experience.tokens,
      experience.mask,
      experience.advantages,
      experience.gate,
      old_logps if settings.updates > 1 else None,
      kept=experience.kept,
      injected=experience.injected,
      supervised=experience.supervised,
      aggregation=settings.aggregation,
      normaliser=settings.normaliser,
      max_tokens=settings.max_tokens,
    )
    rows = rows.replace(distill_weight=rows.distill_weight * settings.distill_factor(step))
    if token_loss.importance_cap:
      rows = rows.replace(sampler_logps=experience.logps)
    if behaviour:
      rows = rows.replace(shaping_logps=experience.logps + _log_gamma(old_logps - experience.logps, rows))
    elif settings.off_context == "drop_unit_shaped":
      rows = rows.replace(shaping_logps=jnp.full(rows.mask.shape, jnp.log(UNIT_GAMMA)))
    return rows

  return inputs


def _log_gamma(log_ratio: jax.Array, rows: losses.TokenInputs) -> jax.Array:
  """Computes float32[], log of the 0.9-quantile of rho over injected tokens; 0 without any."""
  injected = rows.mask & rows.injected
  top = jnp.where(injected, log_ratio, -jnp.inf).max()  # taken out, so that no rho overflows
  rho = jnp.exp(jnp.where(injected, log_ratio - top, jnp.nan))
  return jnp.where(injected.any(), top + jnp.log(jnp.nanquantile(rho, BEHAVIOUR_QUANTILE)), 0.0)


def batch_sums(
  inputs: losses.TokenInputs, aux: dict[str, jax.Array], experience: dict[str, jax.Array]
) -> dict[str, Any]:
  """Computes (sum, count) of each metric over a part of the batch.

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
  metrics = {
    "entropy": (aux["entropy"], own),
    "ratio/mean": (aux["ratio"], learnt),
    "ratio/clip_frac": (clipped, own & learnt),
    "ratio/clip_frac_injected": (clipped, injected & learnt),
    "sampler/logp_gap": (jnp.abs(gap), own),
    "hint/reliance": (gap, injected),
    "supervised/nll": (-aux["logp"], supervised),
  }
  if "divergence" in aux:
    metrics["divergence/gated"] = (aux["divergence"], gated)
    metrics["divergence/ungated"] = (aux["divergence"], mask & ~gated)
    metrics["divergence/injected"] = (aux["divergence"], injected)
  if "kl" in aux:
    metrics["kl/ref"] = (aux["kl"], own)
  return {name: losses.masked_sum(values, where) for name, (values, where) in metrics.items()}


def means(metrics: dict[str, tuple[Any, Any]]) -> dict[str, float]:
  """Turns (sum, count) pairs into means; leaves out those without a count."""
  return {name: float(total / count) for name, (total, count) in metrics.items() if count}


def make_gradients(
  config: Qwen3VLConfig, token_loss: losses.KepoTokenLoss, settings: UpdateSettings
) -> Callable[[Any, Experience, losses.TokenInputs, tuple[Target, ...]], tuple[dict[str, Any], Any]]:
  """Returns (params, experience, inputs, targets) -> ((sum, count) pairs, gradients of the trained parts).

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
      parts = (micro_batches(prompts, settings.parts), micro_batches(rows, settings.parts, ROWS))
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part_gradients, jax.tree.map(lambda x: x[0], parts))
      )
      add = lambda total, part: (jax.tree.map(jnp.add, total, part_gradients(part)), None)  # noqa: E731
      ((value, sums), gradient), _ = jax.lax.scan(add, zeros, parts)
    return sums | {"loss": (value, jnp.float32(1))}, gradient

  return gradients


def apply_gradients(
  optimizer: optax.GradientTransformation, state: TrainState, gradient: Any, loss: jax.Array, *, steps: int
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Applies one update; where loss or gradient is not finite, parameters and moments stay as they are.

  Args:
    optimizer: from `optimizer.make_optimizer`, or any other.
    state: before the update.
    gradient: of the trained parts of the parameters.
    loss: float32[].
    steps: added to the number of steps done.

  Returns:
    the state, and float32[] metrics: the norm of the gradient before it is clipped, and whether the update was skipped.
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
  """Computes the norms of two gradients and their cosine, float32[] each; the cosine is 0 where a norm is."""
  norms = optax.tree.norm(first), optax.tree.norm(second)
  product = norms[0] * norms[1]
  return *norms, jnp.where(product > 0, optax.tree.vdot(first, second) / jnp.where(product > 0, product, 1.0), 0.0)


class Update:
  """The updates of one batch: (state, experience, targets) -> (state, metrics), compiled; the state is consumed."""

  def __init__(
    self,
    config: Qwen3VLConfig,
    optimizer: optax.GradientTransformation,
    token_loss: losses.KepoTokenLoss,
    settings: UpdateSettings,
    state: TrainState,
  ):
    """Creates the programs; they compile when they are first called.

    Args:
      config: of the student.
      optimizer: from `optimizer.make_optimizer`.
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
    """Returns the new state, and (sum, count) pairs of the metrics over all updates.

    Args:
      state: consumed.
      experience: the global batch, on the mesh.
      targets: of the teacher and the reference, where the loss uses them.
      compare: add the norms of the gradients of the policy and the distillation term, and their cosine.
    """
    state, metrics, comparison = self._run(state, experience, targets, compare=compare)
    return state, jax.tree.map(lambda *pairs: sum(pairs), *metrics) | comparison

  def compile(self, state: TrainState, experience: Experience, targets: tuple[Target, ...], *, compare: bool) -> None:
    """Compiles every program of a call; all arguments are shapes, as `compiling.shapes_of` makes them.

    Raises:
      ValueError: one cannot be compiled.
    """
    self._run(state, experience, targets, compare=compare)

  def _run(
    self, state: TrainState, experience: Experience, targets: tuple[Target, ...], *, compare: bool
  ) -> tuple[TrainState, list[dict[str, Any]], dict[str, Any]]:
    """Returns the new state, the metrics of each update, and the comparison."""
    inputs = self._inputs(state.params, state.step, experience)
    comparison = self._comparison(state.params, experience, inputs, targets) if compare else {}
    metrics: list[dict[str, Any]] = []
    for update in range(self._updates):
      sums, gradient = self._gradients(state.params, experience, inputs, targets)
      state, applied = self._apply(state, gradient, sums["loss"][0], steps=int(update == self._updates - 1))
      del gradient
      metrics.append(sums | {name: (value, jnp.float32(1)) for name, value in applied.items()})
    return state, metrics, comparison

  def _comparison(
    self, params: Any, experience: Experience, inputs: losses.TokenInputs, targets: tuple[Target, ...]
  ) -> Any:
    terms = [
      self._gradients(params, experience, keep_one_term(inputs, weight), targets)[1]
      for weight in ("policy_weight", "distill_weight")
    ]
    names = ("grad_norm/policy", "grad_norm/distill", "grad_cosine")
    return {name: (value, jnp.float32(1)) for name, value in zip(names, self._compared(*terms), strict=True)}
