import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.models import scoring
from kepo_jax.objectives import distributions, losses

P, G, T, D, V = 8, 2, 13, 8, 24
WIDE = 124  # a width at which products outweigh what depends on how XLA fuses the rest
ALLOWED = np.arange(V) != 5


def problem(rng, dtype=jnp.float32, shape=(P, G, T), width=D):
  """Hidden states and heads of student, teacher and reference, and token inputs."""

  def normal(*size):
    return jnp.array(rng.normal(size=size), dtype)

  mask = jnp.array(np.arange(shape[2]) < rng.integers(1, shape[2] + 1, (*shape[:2], 1)))
  inputs = losses.token_inputs(
    tokens=jnp.array(rng.choice(np.flatnonzero(ALLOWED), shape)),
    mask=mask,
    advantages=jnp.array(rng.normal(size=shape[:2]), jnp.float32),
    gate=jnp.array(rng.integers(0, 2, shape[:2]), bool),
    old_logps=jnp.array(rng.normal(size=shape) - 3, jnp.float32),
  )
  others = ((normal(*shape, width + 4), normal(V, width + 4)), (normal(*shape, width), normal(V, width)))
  return normal(*shape, width), normal(V, width), inputs, others


TOKEN_LOSS = losses.KepoTokenLoss(allowed=ALLOWED, reference_coefficient=0.1)


def dense_loss(hidden, head, inputs, others):
  def logits(hidden, head):
    return jnp.einsum("pgtd,vd->pgtv", hidden, head, preferred_element_type=jnp.float32)

  return TOKEN_LOSS(logits(hidden, head), tuple(logits(*other) for other in others), inputs)


def chunked(chunk):
  def loss(hidden, head, inputs, others):
    value, aux = scoring.chunked_loss(TOKEN_LOSS, hidden, head, inputs, others, chunk=chunk)
    return 3.0 * value, aux  # a cotangent that is not 1

  return loss


def with_gradients(chunk, wanted=(0, 1)):
  """((3 loss, auxiliaries), gradients of 3 loss)."""
  return jax.jit(jax.value_and_grad(chunked(chunk), wanted, has_aux=True, allow_int=True))


def relative(actual, expected):
  """Distance in norm, relative to the expected tensor."""
  actual, expected = np.float64(actual), np.float64(expected)
  return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def dense():
  """Arguments, loss with auxiliaries and gradients of the form that holds all logits at once."""
  arguments = problem(np.random.default_rng(1))
  return arguments, *jax.jit(jax.value_and_grad(dense_loss, (0, 1), has_aux=True))(*arguments)


@pytest.mark.parametrize("chunk", [5, 128])  # T = 13: three with two tokens of padding, one
def test_chunked_equals_dense(chunk, dense):
  arguments, expected, dense_gradients = dense
  (loss, aux), (*gradients, of_inputs, of_others) = with_gradients(chunk, (0, 1, 2, 3))(*arguments)
  assert relative(loss / 3, expected[0]) < 1e-5
  for actual, wanted in zip(gradients, dense_gradients, strict=True):
    assert relative(actual / 3, wanted) < 1e-5
  chex.assert_trees_all_close(aux, expected[1], rtol=1e-5, atol=1e-6)
  # Teacher, reference and inputs have no gradient.
  assert of_inputs.tokens.dtype == of_inputs.mask.dtype == jax.dtypes.float0
  assert not any(leaf.any() for leaf in (of_inputs.policy_weight, *jax.tree.leaves(of_others)))
  # Without differentiation the plain path runs: same loss, same auxiliaries.
  plain, plain_aux = jax.jit(chunked(chunk))(*arguments)
  assert relative(plain, loss) < 1e-6
  chex.assert_trees_all_close(plain_aux, aux, rtol=1e-5, atol=1e-6)


def test_chunks_are_equal_and_hardly_padded(rng):
  def lengths(chunk):
    seen = []

    def token_loss(logits, _, inputs):
      seen.append((logits.shape[2], inputs.shape[2]))
      return logits.sum(), logits[..., 0]

    arguments = (jnp.ones((2, 2, T, D)), jnp.ones((V, D)), jnp.ones((2, 2, T)))
    jax.eval_shape(lambda *x: scoring.chunked_loss(token_loss, *x, chunk=chunk), *arguments)
    return set(seen)

  assert [lengths(chunk) for chunk in (1, 5, 12, 13, 128)] == [{(n, n)} for n in (1, 5, 7, 13, 13)]


def test_bfloat16_hidden_states_give_float32_losses(rng):
  arguments = problem(rng, jnp.bfloat16)
  (loss, _), gradients = with_gradients(4)(*arguments)
  assert loss.dtype == jnp.float32
  # The same numbers, held in float32.
  exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)
  (exact_loss, _), exact_gradients = with_gradients(4)(*exact)
  assert relative(loss, exact_loss) < 1e-5  # the products accumulate in float32
  for actual, expected in zip(gradients, exact_gradients, strict=True):
    assert actual.dtype == jnp.bfloat16
    assert relative(actual.astype(jnp.float32), expected) < 1e-2  # one rounding of the logits' gradient


def test_a_loss_may_close_over_traced_arrays(dense):
  (hidden, head, inputs, others), _, expected = dense

  @jax.jit
  def gradient(hidden, allowed, coefficient):
    def loss(hidden, part):
      token_loss = losses.KepoTokenLoss(allowed=allowed, distill_coefficient=coefficient, reference_coefficient=0.1)
      return scoring.chunked_loss(token_loss, hidden, head, part, others, chunk=4)[0]

    # Inside a scan over micro-batches, as the step does.
    return jax.lax.scan(lambda c, _: (c + jax.grad(loss)(hidden, inputs), None), jnp.zeros_like(hidden), None, 2)[0]

  actual = gradient(hidden, jnp.array(ALLOWED), jnp.float32(TOKEN_LOSS.distill_coefficient))
  assert relative(actual, 2 * expected[0]) < 1e-5


def test_token_logps(rng):
  temperature = 0.7
  hidden, head, inputs, _ = problem(rng)
  allowed = jnp.array(ALLOWED)
  logps, entropy = scoring.token_logps(hidden, head, inputs.tokens, allowed, temperature=temperature, chunk=4)
  dense = distributions.masked_log_softmax(jnp.einsum("pgtd,vd->pgtv", hidden, head), allowed, temperature)
  expected = jnp.take_along_axis(dense, inputs.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(entropy, distributions.entropy(dense), rtol=1e-5, atol=1e-5)


def compiled(rng, mesh, shape, chunk=4, width=D):
  """The compiled loss with gradients: rows sharded over the mesh, heads as in training."""
  hidden, head, inputs, others = problem(rng, shape=shape, width=width)

  def placed(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  def on_rows(tree):
    return jax.tree.map(lambda x: placed(x, sharding.batch_sharding(mesh, x.shape, ("prompt", "rollout"))), tree)

  def on_weights(x):
    return placed(x, sharding.weight_sharding(mesh, x.shape, ("vocab", "embed"), "train"))

  others = tuple((on_rows(h), on_weights(w)) for h, w in others)
  with jax.set_mesh(mesh):
    return with_gradients(chunk).lower(on_rows(hidden), on_weights(head), on_rows(inputs), others).compile()


def collectives(text, operation):
  """Element counts of the results of a collective in a compiled program."""
  found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* {operation}(?:-start)?\(", text)
  return [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in found]


def test_eight_devices_do_an_eighth_of_the_work_each(mesh_of, rng):
  one = compiled(rng, mesh_of(), (16, 2, 16), width=WIDE)
  eight = compiled(rng, mesh_of(data=2, fsdp=4), (4, 8, 16), width=WIDE)  # prompts over data, rollouts over fsdp
  # Both programs have 32 rows and hold the body of the loop once, so the counts compare. Not divided: scaling the
  # gradient of the head.
  assert 7.5 < one.cost_analysis()["flops"] / eight.cost_analysis()["flops"] < 8.5
  text = eight.as_text()
  # Nothing is gathered but the heads that fsdp shards, before the loop.
  assert all(size in (V * WIDE, V * (WIDE + 4)) for size in collectives(text, "all-gather"))
  body = text[: text.index("ENTRY")]
  assert collectives(body, "all-gather") == []
  assert max(collectives(body, "all-reduce"), default=0) <= 1  # the scalar loss; the head's gradient waits


def test_sharded_equals_unsharded(mesh_of, dense):
  arguments, (loss, aux), gradients = dense
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  rows = sharding.place(mesh, (arguments[0], arguments[2]), ("prompt", "rollout"))
  with jax.set_mesh(mesh):
    actual = with_gradients(4)(rows[0], arguments[1], rows[1], arguments[3])
  chex.assert_trees_all_close(actual, ((3 * loss, aux), tuple(3 * x for x in gradients)), rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_tokens_times_vocabulary(mesh_of, rng):
  def temporaries(length):
    return compiled(rng, mesh_of(), (1, 2, length), 16).memory_analysis().temp_size_in_bytes

  long, short = temporaries(1024), temporaries(256)
  assert long < 1024 * 2 * V * 4  # of the three models, less than the logits of one
  # Four times the tokens in chunks of the same size: what grows is of the size of hidden states, not of logits.
  assert long - short < (1024 - 256) * 2 * V * 4 / 2


@pytest.mark.parametrize(
  ("tokens", "shape", "axes", "chunk"),
  [
    (3, (8, 2), {}, 1),  # one of each row at least
    (64, (8, 2), {"data": 4}, 16),  # a device has four rows
    (64, (2, 4), {"data": 2, "fsdp": 4}, 64),  # one
  ],
)
def test_a_chunk_holds_so_many_tokens_of_a_device(tokens, shape, axes, chunk, mesh_of):
  with jax.set_mesh(mesh_of(**axes)):
    assert scoring.chunk_of(tokens, *shape) == chunk
