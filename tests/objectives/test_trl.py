"""Our objective against TRL 1.16.0: stored answers in `make test`, live ones in `make parity`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.objectives import distributions, divergences, losses, ratios, weights
from tests.objectives import trl_oracle

ALLOWED = np.ones(trl_oracle.V, bool)


@functools.partial(jax.jit, static_argnames="weight")
def jsd_and_gradient(student, teacher, mask, temperature, *, weight):
  token_weights = weights.gated_token_weights(mask[None], jnp.ones((1, trl_oracle.N), bool))[0]

  def loss(student):
    logps = [distributions.masked_log_softmax(x, ALLOWED, temperature) for x in (teacher, student)]
    return (token_weights * divergences.generalised_jsd(*logps, weight=weight)).sum()

  return jax.value_and_grad(loss)(student)


def our_jsd(values, case):
  mask = np.array(trl_oracle.MASKS[case["mask"]], bool)
  return jsd_and_gradient(values["student"], values["teacher"], mask, case["temperature"], weight=case["weight"])


@functools.partial(jax.jit, static_argnames=("weight", "top_k"))
def top_k_and_gradient(student, teacher, *, weight, top_k):
  def loss(student):
    logps = [distributions.masked_log_softmax(x, ALLOWED) for x in (teacher, student)]
    return divergences.top_k_jsd(*logps, weight=weight, top_k=top_k).sum()

  return jax.value_and_grad(loss)(student)


def our_top_k(values, case):
  return top_k_and_gradient(values["student"], values["teacher"], **case)


# What a program is made of; masks, clips, ratios and aggregations are numbers in it.
@functools.partial(jax.jit, static_argnames=("beta", "cap"))
def grpo_and_gradient(student, reference, inputs, clip, *, beta, cap):
  token_loss = losses.KepoTokenLoss(
    allowed=ALLOWED,
    clip_low=clip[0],
    clip_high=clip[1],
    importance_cap=cap,
    distill_coefficient=0,
    reference_coefficient=beta,
  )
  frozen = (reference[None],) if beta else ()
  return jax.value_and_grad(lambda student: token_loss(student[None], frozen, inputs)[0])(student)


@functools.partial(jax.jit, static_argnames=("sequence", "aggregation"))
def grpo_inputs(values, mask, old_logps, sampler_logps, *, sequence, aggregation):
  inputs = losses.token_inputs(
    values["tokens"][None],
    mask,
    values["advantages"][None],
    jnp.zeros((1, trl_oracle.N), bool),
    old_logps,
    aggregation=aggregation,
    max_tokens=trl_oracle.MOST,
  ).replace(sampler_logps=sampler_logps)
  if not sequence:
    return inputs
  logps = distributions.select_token(distributions.masked_log_softmax(values["student"][None], ALLOWED), inputs.tokens)
  row = ratios.sequence_log_ratio(logps - (logps if old_logps is None else old_logps), mask)
  return inputs.replace(sequence_log_ratio=jnp.broadcast_to(row[..., None], mask.shape))


def our_grpo(values, case):
  inputs = grpo_inputs(
    values,
    np.array(trl_oracle.MASKS[case["mask"]], bool)[None],
    values["old_logps"][None] if case["old"] == "different" else None,
    values["sampler_logps"][None] if case["sampler"] == "on" else None,
    sequence=case["level"] == "sequence",
    aggregation=trl_oracle.LOSS_TYPES[case["loss_type"]],
  )
  # Any logits that give the stored token its stored log-probability under the reference.
  others = np.log1p(-np.exp(values["reference_logps"])) - np.log(trl_oracle.V - 1)
  reference = np.repeat(others[..., None], trl_oracle.V, -1)
  np.put_along_axis(reference, values["tokens"][..., None], values["reference_logps"][..., None], -1)
  cap = trl_oracle.CAP if case["sampler"] == "on" else 0.0
  return grpo_and_gradient(values["student"], reference, inputs, tuple(case["clip"]), beta=case["beta"], cap=cap)


OURS = {"jsd": our_jsd, "top_k": our_top_k, "grpo": our_grpo}


@pytest.mark.parametrize("objective", OURS)
def test_stored_answers(objective):
  golden = json.loads(trl_oracle.GOLDEN.read_text())
  values = {name: np.array(x, np.float32) for name, x in golden["inputs"].items()}
  values["tokens"] = values["tokens"].astype(np.int32)
  stored, cases = golden[objective], trl_oracle.ORACLES[objective][1]
  assert list(stored) == [trl_oracle.named(case) for case in cases]
  for case in cases:
    expected = np.array(stored[trl_oracle.named(case)])
    actual = trl_oracle.answer(values, *OURS[objective](values, case))
    message = trl_oracle.named(case)
    np.testing.assert_allclose(actual[:2], expected[:2], rtol=1e-5, atol=1e-7, err_msg=message)
    # A gradient may be nearly orthogonal to the teacher: relative to what its norm allows.
    scale = max(expected[1] * np.linalg.norm(values["teacher"]), 1e-6)
    np.testing.assert_allclose(actual[2], expected[2], atol=1e-5 * scale, rtol=0, err_msg=message)


@pytest.mark.parity
def test_live_answers():
  # One test, so that one process imports torch.
  pytest.importorskip("torch")
  pytest.importorskip("trl")
  for seed in (7, 8, 9):
    values = trl_oracle.arrays(seed)
    for objective, (oracle, cases) in trl_oracle.ORACLES.items():
      for case in cases:
        expected, expected_gradient = oracle(values, case)
        loss, gradient = OURS[objective](values, case)
        message = f"seed {seed}, {objective}: {trl_oracle.named(case)}"
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7, err_msg=message)
        distance = np.linalg.norm(np.float64(gradient) - expected_gradient)
        assert distance <= 1e-5 * max(np.linalg.norm(expected_gradient), 1e-3), message
