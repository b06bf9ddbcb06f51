"""From hidden states to a per-token loss and its gradient, in chunks along T.

The vocabulary never materialises: logits exist for one chunk of T at a time. The loss makes the gradients of the
hidden states and of the head while the logits of the chunk are at hand, as a fused linear cross-entropy does, so
nothing is recomputed and a teacher's head is applied once. Rows [P, G] stay sharded inside every chunk.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from kepo_jax import sharding
from kepo_jax.objectives import distributions

TokenLoss = Callable[[jax.Array, tuple[jax.Array, ...], Any], tuple[jax.Array, Any]]
Scored = tuple[jax.Array, jax.Array]  # hidden states [P, G, T, D] and head [V, D] of one model


def chunked_loss(
  token_loss: TokenLoss,
  hidden: jax.Array,
  head: jax.Array,
  inputs: Any,
  others: Sequence[Scored] = (),
  *,
  chunk: int = 128,
) -> tuple[jax.Array, Any]:
  """Sums a per-token loss; the gradients of hidden and head are computed in the forward pass.

  Args:
    token_loss: (logits float32[P, G, C, V], other_logits: one such array per model of `others`, inputs of the
      chunk) -> (loss float32[], weighted and summed, aux: pytree of [P, G, C] arrays).
    hidden: float[P, G, T, D] of the student; hidden[..., t, :] predicts token t.
    head: float[V, D], in the compute dtype of hidden.
    inputs: pytree of [P, G, T, ...] arrays. No gradient.
    others: (hidden [P, G, T, D'], head [V, D']) of teacher or reference. No gradient.
    chunk: most tokens per row that have logits at the same time. T is padded to whole chunks of equal length with
      zeros, so a mask in inputs must be false, and a weight zero, where padding is to be ignored.

  Returns:
    (loss float32[], aux with [P, G, T] arrays). No gradient flows through aux.
  """
  chex.assert_rank((hidden, head), (4, 2))
  chex.assert_tree_shape_prefix(inputs, hidden.shape[:3])
  return _chunked_loss(token_loss, chunk, hidden, head, inputs, tuple(others))


def token_logps(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  allowed: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int = 128,
) -> tuple[jax.Array, jax.Array]:
  """Returns log-probabilities of given tokens, without gradient.

  Args:
    hidden: float[P, G, T, D]; hidden[..., t, :] predicts token t.
    head: float[V, D].
    tokens: int32[P, G, T].
    allowed: bool[V], ids that may be sampled.
    temperature: divides the logits.
    chunk: most tokens per row that have logits at the same time.

  Returns:
    (logps float32[P, G, T], entropy float32[P, G, T]), nats; logps is -inf where the token is banned.
  """

  def evaluate(logits, _, tokens):
    logps = distributions.masked_log_softmax(logits, allowed, temperature)
    return jnp.float32(0), (distributions.select_token(logps, tokens), distributions.entropy(logps))

  hidden, head = jax.lax.stop_gradient((hidden, head))
  chex.assert_shape(tokens, hidden.shape[:3])
  return chunked_loss(evaluate, hidden, head, tokens, chunk=chunk)[1]


def chunk_of(tokens: int, prompts: int, rollouts: int) -> int:
  """Returns the chunk of T with which a device holds logits of about `tokens` tokens; at least 1."""
  a, b = sharding.row_shards(prompts, rollouts)
  return max(1, tokens * a * b // (prompts * rollouts))


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  logits = jnp.einsum("pgcd,vd->pgcv", hidden, head, preferred_element_type=jnp.float32)
  return sharding.constrain(logits, "prompt", "rollout", None, "vocab")


def _chunks(length: int, chunk: int) -> tuple[int, int]:
  """Returns (number, length) of chunks of equal length that cover T with the least padding."""
  number = max(1, math.ceil(length / chunk))
  return number, math.ceil(length / number)


def _padded(tree: Any, length: int) -> Any:
  """Pads axis 2 of every leaf with zeros to `length`."""

  def pad(x):
    missing = length - x.shape[2]
    return jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3)) if missing else x

  return jax.tree.map(pad, tree)


def _joined(tree: Any, length: int) -> Any:
  """Joins stacked chunks, [n, P, G, C, ...] -> [P, G, length, ...]."""

  def join(x):
    x = jnp.moveaxis(x, 0, 2)
    x = x.reshape(x.shape[:2] + (x.shape[2] * x.shape[3],) + x.shape[4:])[:, :, :length]
    return sharding.constrain(x, "prompt", "rollout", *(None,) * (x.ndim - 2))

  return jax.tree.map(join, tree)


def _scan_chunks(body: Callable, carry: Any, operands: Any, chunk: int) -> tuple[Any, Any]:
  """Scans body(carry, chunk of operands) over all chunks of T; joins its outputs along T."""
  length = jax.tree.leaves(operands)[0].shape[2]
  number, size = _chunks(length, chunk)
  operands = _padded(operands, number * size)

  def step(carry, index):
    return body(carry, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=2), operands))

  carry, outputs = jax.lax.scan(step, carry, jnp.arange(number))
  return carry, _joined(outputs, length)


def _gathered(heads: Sequence[jax.Array]) -> list[jax.Array]:
  """Gathers heads over fsdp, once before the loop instead of in every chunk."""
  return [sharding.constrain(head, "vocab", None) for head in heads]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_loss(token_loss, chunk, hidden, head, inputs, others):
  head, *other_heads = _gathered([head, *(head for _, head in others)])

  def body(loss, operands):
    hidden, other_hiddens, inputs = operands
    other_logits = tuple(map(_logits, other_hiddens, other_heads))
    part, aux = token_loss(_logits(hidden, head), other_logits, inputs)
    return loss + part, aux

  return _scan_chunks(body, jnp.float32(0), (hidden, tuple(hidden for hidden, _ in others), inputs), chunk)


def _head_gradient(d_logits: jax.Array, hidden: jax.Array, shards: tuple[int, int]) -> jax.Array:
  """Returns float32[a, b, D, V], one partial sum per shard of the rows: the loop needs no collective.

  With V last, a product that wants one operand transposed (on CPU) turns the hidden states and not the logits.
  """
  (rows_a, rows_b), (prompts, rollouts) = shards, hidden.shape[:2]

  def split(x):
    return x.reshape((rows_a, prompts // rows_a, rows_b, rollouts // rows_b) + x.shape[2:])

  partial = jnp.einsum("apbgcd,apbgcv->abdv", split(hidden), split(d_logits), preferred_element_type=jnp.float32)
  return sharding.constrain(partial, "prompt", "rollout", None, "vocab")


def _forward(token_loss, chunk, hidden, head, inputs, others):
  """Returns the loss, and the gradients of hidden and head as residuals."""
  full_head, *other_heads = _gathered([head, *(head for _, head in others)])
  shards = sharding.row_shards(*hidden.shape[:2])

  def body(carry, operands):
    loss, d_head = carry
    hidden, other_hiddens, inputs = operands
    other_logits = tuple(map(_logits, other_hiddens, other_heads))
    logits = _logits(hidden, full_head)
    (part, aux), d_logits = jax.value_and_grad(token_loss, has_aux=True)(logits, other_logits, inputs)
    # Back in the compute dtype, so that both products run at its speed; they accumulate in float32.
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum("pgcv,vd->pgcd", d_logits, full_head, preferred_element_type=jnp.float32)
    d_hidden = d_hidden.astype(hidden.dtype)
    return (loss + part, d_head + _head_gradient(d_logits, hidden, shards)), (aux, d_hidden)

  start = (jnp.float32(0), jnp.zeros((*shards, *head.shape[::-1]), jnp.float32))
  operands = (hidden, tuple(hidden for hidden, _ in others), inputs)
  (loss, d_head), (aux, d_hidden) = _scan_chunks(body, start, operands, chunk)
  return (loss, aux), (d_hidden, d_head.sum((0, 1)).T.astype(head.dtype))


def _backward(token_loss, chunk, gradients, cotangents):
  del token_loss, chunk
  scale = cotangents[0]
  d_hidden, d_head = jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)
  return d_hidden, d_head, None, None


_chunked_loss.defvjp(_forward, _backward)
