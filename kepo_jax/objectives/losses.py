"""From per-token values to the loss of a batch, with the weights of `weights`; the loss of a part is a plain sum."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from kepo_jax.objectives import distributions, divergences, ratios, weights


@chex.dataclass(frozen=True)
class TokenInputs:
  """What the loss of a token needs besides logits; made from the global batch by `token_inputs`."""

  tokens: jax.Array  # int32[P, G, T]
  mask: jax.Array  # bool[P, G, T], true up to and including the end token
  advantages: jax.Array  # float32[P, G, T], one value per rollout
  injected: jax.Array  # bool[P, G, T], tokens that were sampled under a hint
  policy_weight: jax.Array  # float32[P, G, T], weight of the policy term; 0 off the mask
  reference_weight: jax.Array  # float32[P, G, T], weight of the KL to the reference
  distill_weight: jax.Array  # float32[P, G, T], weight of the divergence; 0 where the gate is closed
  supervised_weight: jax.Array  # float32[P, G, T], weight of the likelihood of supervised rows
  old_logps: jax.Array | None = None  # float32[P, G, T], log pi_old; None: the policy's own, with stop_gradient
  sampler_logps: jax.Array | None = None  # float32[P, G, T], the sampler's, for the truncated importance weight
  shaping_logps: jax.Array | None = None  # float32[P, G, T], log (gamma mu): injected tokens get a shaped ratio
  sequence_log_ratio: jax.Array | None = None  # float32[P, G, T], that of the row (GSPO), repeated


WEIGHTS = ("policy_weight", "reference_weight", "distill_weight", "supervised_weight")


def masked_sum(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (sum, count) as float32[] of values float32[...] where mask bool[...]; pairs add across micro-batches."""
  chex.assert_equal_shape((values, mask))
  # `where`, not a product: a nan in padding stays out.
  return jnp.where(mask, values, 0.0).sum(dtype=jnp.float32), mask.sum(dtype=jnp.float32)


def token_inputs(
  tokens: jax.Array,
  mask: jax.Array,
  advantages: jax.Array,
  gate: jax.Array,
  old_logps: jax.Array | None = None,
  *,
  kept: jax.Array | None = None,
  injected: jax.Array | None = None,
  supervised: jax.Array | None = None,
  aggregation: str = "sequence_mean",
  normaliser: str = "gated_tokens",
  max_tokens: int | None = None,
) -> TokenInputs:
  """Returns inputs of the loss for the global batch; split this result, not the arguments, into micro-batches.

  Args:
    tokens: int32[P, G, T].
    mask: bool[P, G, T], true up to and including the end token.
    advantages: float32[P, G].
    gate: bool[P, G], rollouts that are distilled.
    old_logps: float32[P, G, T], log pi_old; None when the batch is used for one update, so that pi_old is the
      policy itself.
    kept: bool[P, G], false for rollouts that no term of the loss sees; None keeps all.
    injected: bool[P, G], rollouts that were sampled under a hint; None: none.
    supervised: bool[P, G], rows that somebody else wrote: in the likelihood and the divergence, not in the policy term
      and the reference KL; None: none.
    aggregation: of the policy term, the reference KL and the likelihood, one of `weights.AGGREGATIONS`.
    normaliser: of the divergence, one of `weights.NORMALISERS`.
    max_tokens: length of `constant_length`, T by default.
  """
  chex.assert_equal_shape((tokens, mask))
  chex.assert_shape((advantages, gate), mask.shape[:2])
  rows = mask.shape[:2]
  kept = jnp.ones(rows, bool) if kept is None else kept
  injected = jnp.zeros(rows, bool) if injected is None else injected
  supervised = jnp.zeros(rows, bool) if supervised is None else supervised
  chex.assert_shape((kept, injected, supervised), rows)
  counted = mask & kept[..., None]

  def means(part):
    length = mask.shape[-1] if max_tokens is None else max_tokens
    return weights.aggregation_weights(part, aggregation=aggregation, length=length)

  own = means(counted & ~supervised[..., None])
  return TokenInputs(
    tokens=tokens,
    mask=mask,
    advantages=jnp.broadcast_to(advantages[..., None], mask.shape),
    injected=jnp.broadcast_to(injected[..., None], mask.shape),
    policy_weight=own,
    reference_weight=own,
    distill_weight=weights.distill_weights(counted, gate, normaliser=normaliser),
    supervised_weight=means(counted & supervised[..., None]),
    old_logps=old_logps,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class KepoTokenLoss:
  """The objective L_PG + lambda L_KD + beta L_ref of KEPO as a `token_loss` for `scoring.chunked_loss`.

  Called with (logits float32[P, G, C, V], other_logits, inputs: TokenInputs) it returns (loss float32[], aux).
  `other_logits` holds the teacher's (unless lambda = 0), then the reference's (unless beta = 0). aux, float32[P, G, C]
  each and 0 off the mask: `logp`, `old_logp`, `entropy` (nats), `ratio`, `clipped` (bool), and `divergence` and `kl`
  where computed.

  A coefficient that is a Python 0 leaves its term, and the model that it needs, out of the program: with lambda = 0
  what remains is GRPO.
  """

  allowed: jax.Array  # bool[V], ids that may be sampled
  temperature: float = 1.0  # of the policy and the reference, the one that sampled
  policy_coefficient: float = 1.0  # 0 leaves distillation or supervision alone
  clip_low: float = 0.2  # the ratio is not rewarded below 1 - clip_low
  clip_high: float = 0.2  # nor above 1 + clip_high
  # Largest truncated importance weight against the sampler, for which `sampler_logps` are wanted; 0: none. Tokens of
  # injected rollouts have weight 1: their sampler saw another prompt.
  importance_cap: float = 0.0
  distill_coefficient: float | jax.Array = 1.0  # lambda
  divergence: str = "jsd"  # kind of `divergences.token_divergence`
  jsd_weight: float = 0.5  # b of `divergences.generalised_jsd`
  top_k: int = 0  # of `divergences.top_k_jsd`; 0 for the whole vocabulary
  distill_temperature: float = 1.0  # of teacher and student inside the divergence
  reference_coefficient: float = 0.0  # beta
  reference_estimator: str = "k3"  # of the KL to the reference, a key of `ratios.KL_ESTIMATORS`
  supervised_coefficient: float = 0.0  # of the negative log-likelihood of supervised rows

  @property
  def distils(self) -> bool:
    """Whether the teacher's logits are wanted."""
    return not (isinstance(self.distill_coefficient, int | float) and self.distill_coefficient == 0)

  def __call__(
    self, logits: jax.Array, other_logits: tuple[jax.Array, ...], inputs: TokenInputs
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See the class.

    Raises:
      ValueError: another number of `other_logits` than the coefficients ask for.
    """
    wanted = self.distils + (self.reference_coefficient != 0)
    if len(other_logits) != wanted:
      raise ValueError(f"the loss needs {wanted} other logits (teacher, reference), got {len(other_logits)}.")
    distribution = distributions.masked_log_softmax(logits, self.allowed, self.temperature)
    logps = _selected(distribution, inputs)
    loss, aux = self._policy_term(logps, inputs)
    aux["entropy"] = jnp.where(inputs.mask, distributions.entropy(distribution), 0.0)
    if self.distils:
      aux["divergence"] = self._divergence(logits, distribution, other_logits[0], inputs)
      loss += self.distill_coefficient * (inputs.distill_weight * aux["divergence"]).sum()
    if self.reference_coefficient:
      reference = distributions.masked_log_softmax(other_logits[-1], self.allowed, self.temperature)
      aux["kl"] = ratios.KL_ESTIMATORS[self.reference_estimator](logps, _selected(reference, inputs))
      loss += self.reference_coefficient * (inputs.reference_weight * aux["kl"]).sum()
    if self.supervised_coefficient:
      loss -= self.supervised_coefficient * (inputs.supervised_weight * logps).sum()
    return loss, aux

  def _policy_term(self, logps: jax.Array, inputs: TokenInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the weighted policy term, and its per-token parts."""
    mask, clips = inputs.mask, {"clip_low": self.clip_low, "clip_high": self.clip_high}
    detached = jax.lax.stop_gradient(logps)
    old_logps = detached if inputs.old_logps is None else jnp.where(mask, inputs.old_logps, 0.0)
    log_ratio = logps - old_logps
    if inputs.sequence_log_ratio is not None:
      # The value of the sequence's ratio, the gradient of the token's: GSPO-token (arXiv:2507.18071, section 4.3). Its
      # gradient is that of GSPO, and it needs nothing from the other chunks of the sequence.
      log_ratio = logps - detached + inputs.sequence_log_ratio
    surrogate = ratios.clipped_surrogate(log_ratio, inputs.advantages, **clips)
    clipped = mask & ratios.clip_active(log_ratio, inputs.advantages, **clips)
    if self.importance_cap:
      if inputs.sampler_logps is None:
        raise ValueError("importance_cap wants the sampler's log-probabilities: inputs.replace(sampler_logps=...).")
      weight = ratios.importance_weight(old_logps, inputs.sampler_logps, cap=self.importance_cap)
      surrogate *= jnp.where(mask & ~inputs.injected, weight, 1.0)
    if inputs.shaping_logps is not None:
      shaped = ratios.shaped_surrogate(logps, inputs.advantages, log_gamma=inputs.shaping_logps)
      surrogate = jnp.where(mask & inputs.injected, shaped, surrogate)
      clipped &= ~inputs.injected
    loss = jnp.float32(0)
    if self.policy_coefficient:
      loss = -self.policy_coefficient * (inputs.policy_weight * surrogate).sum()
    ratio = jnp.where(mask, jnp.exp(log_ratio), 0.0)
    return loss, {"logp": logps, "old_logp": old_logps, "ratio": ratio, "clipped": clipped}

  def _divergence(
    self, logits: jax.Array, distribution: jax.Array, teacher_logits: jax.Array, inputs: TokenInputs
  ) -> jax.Array:
    """Returns float32[P, G, C], the divergence from the teacher; 0 off the mask."""
    student = distribution
    if self.distill_temperature != self.temperature:
      student = distributions.masked_log_softmax(logits, self.allowed, self.distill_temperature)
    teacher = distributions.masked_log_softmax(teacher_logits, self.allowed, self.distill_temperature)
    # A pad token may be banned: where the divergence looks at the token, it gets one that is not.
    tokens = jnp.where(inputs.mask, inputs.tokens, jnp.argmax(self.allowed).astype(inputs.tokens.dtype))
    values = divergences.token_divergence(
      teacher, student, tokens, kind=self.divergence, weight=self.jsd_weight, top_k=self.top_k
    )
    return jnp.where(inputs.mask, values, 0.0)


def _selected(distribution: jax.Array, inputs: TokenInputs) -> jax.Array:
  """Returns the log-probability of each token, 0 off the mask."""
  # A pad token may be banned: its -inf must not reach a subtraction.
  return jnp.where(inputs.mask, distributions.select_token(distribution, inputs.tokens), 0.0)
