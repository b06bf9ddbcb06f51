"""Option combinations of the objective, and batches for them, that several tests share."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kepo_jax.objectives import distributions, losses, ratios

P, G, T, V = 4, 5, 6, 11
ALLOWED = np.arange(V) != 7
BANNED = 7
LOGITS = ("student", "teacher", "reference")
ARGUMENTS = ("old_logps", "kept", "injected", "supervised")  # optional arguments of `token_inputs`
INPUTS = ("aggregation", "normaliser", "max_tokens")  # options of `token_inputs`
COLUMNS = ("sampler_logps", "shaping_logps")  # optional fields that are set afterwards


@dataclasses.dataclass(frozen=True)
class Setting:
  """One combination of options; hashable, so that it can be a static argument."""

  loss: tuple[tuple[str, Any], ...]  # arguments of KepoTokenLoss
  inputs: tuple[tuple[str, Any], ...]  # arguments of token_inputs
  arrays: tuple[str, ...]  # which of ARGUMENTS and COLUMNS there are
  sequence: bool  # one ratio per rollout

  @property
  def token_loss(self) -> losses.KepoTokenLoss:
    return losses.KepoTokenLoss(allowed=ALLOWED, **dict(self.loss))

  def others(self, values: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The logits that the loss wants besides the student's."""
    loss = self.token_loss
    return (values["teacher"],) * loss.distils + (values["reference"],) * (loss.reference_coefficient != 0)


def setting(arrays: str = "", *, sequence: bool = False, **options) -> Setting:
  """A combination; arrays by the first part of their names."""
  names = tuple(name for name in ARGUMENTS + COLUMNS if name.split("_")[0] in arrays.split())
  assert len(names) == len(arrays.split()), arrays
  inputs = tuple((name, options.pop(name)) for name in INPUTS if name in options)
  return Setting(tuple(options.items()), inputs, names, sequence)


# Every option and every kind at least once, and those that meet in one term together. With `old` the clip cuts some
# tokens and not others.
SETTINGS = {
  "kepo": setting(),
  "kepo off-policy": setting("old", distill_coefficient=0.3, jsd_weight=0.1),
  "grpo": setting("old", distill_coefficient=0, reference_coefficient=0.2, clip_low=0.1, clip_high=0.4),
  "grpo on-policy": setting(distill_coefficient=0),
  "token mean, k1": setting("old kept", aggregation="token_mean", reference_coefficient=0.2, reference_estimator="k1"),
  "constant length, k2": setting(
    "old kept supervised",
    aggregation="constant_length",
    max_tokens=9,
    reference_coefficient=0.3,
    reference_estimator="k2",
    supervised_coefficient=0.7,
  ),
  "group mean, forward": setting("kept", normaliser="group_mean", divergence="forward_kl"),
  "reverse, token mean": setting("old", aggregation="token_mean", divergence="reverse_kl", distill_coefficient=2.0),
  "top-k": setting("kept", top_k=3, temperature=0.7, distill_temperature=2.0),
  "top-1 reverse": setting(normaliser="group_mean", divergence="reverse_kl", top_k=1),
  "sampled k2": setting("old kept injected", divergence="sampled_k2", distill_coefficient=0.5),
  "gspo": setting("old", sequence=True, distill_coefficient=0),
  "gspo on-policy": setting(sequence=True, distill_coefficient=0),
  "gspo, token mean": setting(
    "old kept", sequence=True, aggregation="token_mean", jsd_weight=0.9, reference_coefficient=0.1
  ),
  "importance": setting("old injected sampler", importance_cap=1.3, distill_coefficient=0),
  "importance on-policy": setting("sampler kept", importance_cap=1.1, distill_coefficient=0.2),
  "gspo, importance": setting("old sampler", sequence=True, importance_cap=1.3, distill_coefficient=0),
  "shaped": setting("old injected shaping", distill_coefficient=0),
  "gspo, shaped": setting("old injected shaping", sequence=True, distill_coefficient=0),
  "distillation alone": setting("kept supervised", policy_coefficient=0, distill_coefficient=1.5),
  "supervised": setting("kept supervised", aggregation="token_mean", supervised_coefficient=0.5, distill_coefficient=0),
  "everything": setting(
    "old kept injected supervised sampler shaping",
    sequence=True,
    aggregation="token_mean",
    normaliser="group_mean",
    temperature=0.8,
    policy_coefficient=0.6,
    importance_cap=1.2,
    divergence="forward_kl",
    top_k=4,
    reference_coefficient=0.1,
    supervised_coefficient=0.4,
  ),
}


def batch(rng: np.random.Generator) -> dict[str, jax.Array]:
  """Random values of everything that a setting may ask for; rows are ragged and may be empty."""
  shape, rows = (P, G, T), (P, G)

  def near(spread):
    # Log-probabilities that a policy over 10 ids could have, some far from the student's.
    return jnp.array(rng.normal(size=shape) * spread - 2.3, jnp.float32)

  def bits(share):
    return jnp.array(rng.random(rows) < share)

  return {
    **{name: jnp.array(rng.normal(size=(*shape, V)), jnp.float32) for name in LOGITS},
    "tokens": jnp.array(rng.choice(np.flatnonzero(ALLOWED), shape)),
    "mask": jnp.array(np.arange(shape[2]) < rng.integers(0, shape[2] + 1, (*rows, 1))),
    "advantages": jnp.array(rng.normal(size=rows), jnp.float32),
    "gate": bits(0.5),
    "old_logps": near(0.5),
    "kept": bits(0.85),
    "injected": bits(0.5),
    "supervised": bits(0.3),
    "sampler_logps": near(0.6),
    "shaping_logps": near(1.0),
  }


def inputs_of(values: Mapping[str, jax.Array], case: Setting) -> losses.TokenInputs:
  """The inputs of the loss of a batch under a setting."""
  inputs = losses.token_inputs(
    *(values[name] for name in ("tokens", "mask", "advantages", "gate")),
    **{name: values[name] for name in ARGUMENTS if name in case.arrays},
    **dict(case.inputs),
  )
  inputs = inputs.replace(**{name: values[name] for name in COLUMNS if name in case.arrays})
  if not case.sequence:
    return inputs
  distribution = distributions.masked_log_softmax(values["student"], ALLOWED, case.token_loss.temperature)
  logps = jnp.where(inputs.mask, distributions.select_token(distribution, inputs.tokens), 0.0)
  old_logps = logps if inputs.old_logps is None else inputs.old_logps
  row = ratios.sequence_log_ratio(logps - old_logps, inputs.mask)
  return inputs.replace(sequence_log_ratio=jnp.broadcast_to(row[..., None], inputs.mask.shape))


@functools.partial(jax.jit, static_argnames="case")
def value_and_gradient(values: Mapping[str, jax.Array], case: Setting) -> tuple[tuple[jax.Array, Any], jax.Array]:
  """((loss, aux), gradient of the student's logits)."""
  inputs = jax.lax.stop_gradient(inputs_of(values, case))
  return jax.value_and_grad(lambda student: case.token_loss(student, case.others(values), inputs), has_aux=True)(
    values["student"]
  )
