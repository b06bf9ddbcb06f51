"""Our objective against TRL 1.16.0: stored answers in `make test`, live ones in `make parity`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.objectives import distributions, divergences, losses
from tests.objectives import trl_oracle

ALLOWED = np.ones(trl_oracle.V, bool)


@functools.cache
def golden():
  return json.loads(trl_oracle.GOLDEN.read_text())


@functools.partial(jax.jit, static_argnames="weight")
def jsd_and_gradient(student, teacher, mask, temperature, *, weight):
  weights = losses.gated_token_weights(mask[None], jnp.ones((1, trl_oracle.N), bool))[0]

  def loss(student):
    logps = [distributions.masked_log_softmax(x, ALLOWED, temperature) for x in (teacher, student)]
    return (weights * divergences.generalised_jsd(*logps, weight=weight)).sum()

  return jax.value_and_grad(loss)(student)


def our_jsd(values, case):
  mask = np.array(trl_oracle.MASKS[case["mask"]], bool)
  return jsd_and_gradient(values["student"], values["teacher"], mask, case["temperature"], weight=case["weight"])


@functools.partial(jax.jit, static_argnames="beta")
def grpo_and_gradient(student, reference, inputs, clip, *, beta):
  token_loss = losses.kepo_token_loss(
    allowed=ALLOWED, clip_low=clip[0], clip_high=clip[1], distill_coefficient=0, reference_coefficient=beta
  )
  frozen = (reference[None],) if beta else ()
  return jax.value_and_grad(lambda student: token_loss(student[None], frozen, inputs)[0])(student)


def our_grpo(values, case):
  inputs = losses.token_inputs(
    values["tokens"][None],
    np.array(trl_oracle.MASKS["ragged"], bool)[None],
    values["advantages"][None],
    np.zeros((1, trl_oracle.N), bool),
    values["old_logps"][None] if case["off_policy"] else None,
  )
  # Any logits that give the stored token its stored log-probability under the reference.
  others = np.log1p(-np.exp(values["reference_logps"])) - np.log(trl_oracle.V - 1)
  reference = np.repeat(others[..., None], trl_oracle.V, -1)
  np.put_along_axis(reference, values["tokens"][..., None], values["reference_logps"][..., None], -1)
  return grpo_and_gradient(values["student"], reference, inputs, tuple(case["clip"]), beta=case["beta"])


OURS = {"jsd": our_jsd, "grpo": our_grpo}


def named(case):
  return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("objective", OURS)
def test_stored_answers(objective):
  values = {name: np.array(x, np.float32) for name, x in golden()["inputs"].items()}
  values["tokens"] = values["tokens"].astype(np.int32)
  assert len(golden()[objective]) == len(trl_oracle.ORACLES[objective][1])
  for case in golden()[objective]:
    loss, gradient = OURS[objective](values, case)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-5, atol=1e-7, err_msg=named(case))
    along, norm = (gradient * values["teacher"]).sum(), np.linalg.norm(gradient)
    scale = max(case["gradient_norm"], 1e-6)
    np.testing.assert_allclose(norm, case["gradient_norm"], rtol=1e-5, atol=1e-7, err_msg=named(case))
    np.testing.assert_allclose(along, case["gradient_along_teacher"], atol=1e-4 * scale, err_msg=named(case))


@pytest.mark.parity
@pytest.mark.parametrize("seed", [7, 8, 9])
@pytest.mark.parametrize("objective", OURS)
def test_live_answers(objective, seed):
  pytest.importorskip("torch")
  pytest.importorskip("trl")
  values = trl_oracle.arrays(seed)
  oracle, cases = trl_oracle.ORACLES[objective]
  for case in cases:
    expected, expected_gradient = oracle(values, case)
    loss, gradient = OURS[objective](values, case)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7, err_msg=named(case))
    distance = np.linalg.norm(gradient - expected_gradient)
    assert distance <= 1e-5 * max(np.linalg.norm(expected_gradient), 1e-3), named(case)
