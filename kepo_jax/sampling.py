"""One jitted loop: prompts in, G completions per prompt out."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.objectives import distributions
from kepo_jax.types import Prompts, Rollouts

SEGMENT = 256  # tokens by which the cache grows


@chex.dataclass(frozen=True)
class _State:
  """The state of the loop; `step` tokens of every row are written."""

  step: jax.Array  # int32[]
  token: jax.Array  # int32[P, G], the last one written; pad id in rows that have ended
  ended: jax.Array  # bool[P, G]
  rollouts: Rollouts
  cache: model.Cache


def sample(
  config: Qwen3VLConfig,
  params: Any,
  prompts: Prompts,
  key: jax.Array,
  *,
  samples: int,
  max_new_tokens: int,
  end_ids: tuple[int, ...],
  pad_id: int,
  allowed: jax.Array,
  temperature: float = 1.0,
  top_p: float = 1.0,
  top_k: int = 0,
  weight_stationary: bool = False,
) -> Rollouts:
  """Samples completions of every prompt; image and prompt are run once per group.

  Token t of completion g is drawn with fold_in(fold_in(fold_in(key, row of the prompt), g), t): padding, other prompts
  and the mesh do not change the draw. The loop stops when every row has ended.

  Args:
    config: of the model.
    params: its parameters, best in the `decode` layout with `model.unstack_layers`: sharded weights are gathered, and
      stacked ones sliced, for every token. For the `train` layout, see `weight_stationary`.
    prompts: [P, S], right-padded.
    key: of this call, derived from step and purpose; or keys [P, 1], one per prompt; or keys [1, G], one per
      completion: completion g is then completion 0 of a call with its key.
    samples: G, completions per prompt.
    max_new_tokens: T, the budget of a completion, its end token included.
    end_ids: ids that end a completion.
    pad_id: fills the tokens after the end.
    allowed: bool[V], ids that may be sampled.
    temperature: divides the logits; 0 takes the most likely token.
    top_p: keep the most likely tokens that hold this much probability, after top_k; 1 keeps all.
    top_k: keep this many of the most likely tokens; 0 keeps all. Ties with the last one kept are kept.
    weight_stationary: decode from the `train` layout without gathering weights (`sharding.weight_stationary`), for a
      model too large for a copy in the `decode` layout, or for few rows.

  Returns:
    Rollouts [P, G, T]; log-probabilities at the temperature (1 when greedy), before top_k and top_p.

  Raises:
    ValueError: temperature, top_p, top_k or a size outside its range.
  """
  _check(temperature, top_p, top_k, samples, max_new_tokens)
  rows = (prompts.tokens.shape[0], samples)
  prefix, head = model.prefill(config, params, prompts), model.head_weight(config, params)
  row_keys = _row_keys(key, prompts.row, samples)

  def append_token(state: _State, hidden: jax.Array, cache: model.Cache) -> _State:
    """Chooses the next token from hidden float[P, G or 1, D] and writes it to the state."""
    hidden = sharding.align_with_weight(hidden, "embed")
    logits = jnp.einsum("pgd,vd->pgv", hidden, head, preferred_element_type=jnp.float32)
    logits = sharding.constrain(jnp.broadcast_to(logits, (*rows, logits.shape[-1])), "prompt", "rollout", "vocab")
    keys = jax.vmap(jax.vmap(lambda row: jax.random.fold_in(row, state.step)))(row_keys)
    token, logp = choose_tokens(logits, keys, allowed, temperature=temperature, top_p=top_p, top_k=top_k)
    token = jnp.where(state.ended, pad_id, token)
    written = Rollouts(tokens=token, logps=jnp.where(state.ended, 0.0, logp), mask=~state.ended)
    return _State(
      step=state.step + 1,
      token=token,
      ended=state.ended | (token[..., None] == jnp.array([[end_ids]], jnp.int32)).any(-1),
      rollouts=jax.tree.map(lambda values, new: _put(values, new, state.step), state.rollouts, written),
      cache=cache,
    )

  def advance(state: _State) -> _State:
    return append_token(state, *model.decode_step(config, params, prefix, state.cache, state.token))

  first, *longer = cache_lengths(max_new_tokens)
  cache = model.empty_cache(prefix, samples, first)
  # Only the token loop: for the many tokens of prompts, gathering one layer at a time is cheaper.
  with sharding.weight_stationary(weight_stationary):
    # The prompt itself predicts the first token: a group shares its logits.
    state: Any = append_token(_initial_state(cache, rows, max_new_tokens, pad_id), prefix.last_hidden[:, None], cache)
    state = _decode_until(first, advance, state)
    for length in longer:
      state = _decode_until(length, advance, state.replace(cache=model.grow_cache(state.cache, length)))
  return state.rollouts


def cache_lengths(max_new_tokens: int) -> tuple[int, ...]:
  """Returns the lengths through which the cache of completions grows; the last one is max_new_tokens.

  A step reads the whole cache, written or not. Growing by SEGMENT wastes at most SEGMENT / 2 tokens per row on average.
  One full-length cache would waste half of it. Each length is one more loop to compile.
  """
  return (*range(SEGMENT, max_new_tokens, SEGMENT), max_new_tokens)


def _decode_until(length: int, advance: Callable[[_State], _State], state: _State) -> _State:
  """Decodes until a cache of `length` is full or every row has ended."""
  return jax.lax.while_loop(lambda state: (state.step < length) & ~state.ended.all(), advance, state)


def _initial_state(cache: model.Cache, rows: tuple[int, int], length: int, pad_id: int) -> _State:
  """Returns the state without a token."""

  def filled(shape, value):
    return sharding.constrain(jnp.full(shape, value), "prompt", "rollout", *(None,) * (len(shape) - 2))

  blank = Rollouts(
    tokens=filled((*rows, length), jnp.int32(pad_id)),
    logps=filled((*rows, length), jnp.float32(0)),
    mask=filled((*rows, length), False),
  )
  token, ended = filled(rows, jnp.int32(pad_id)), filled(rows, False)
  return _State(step=jnp.int32(0), token=token, ended=ended, rollouts=blank, cache=cache)


def choose_tokens(
  logits: jax.Array, keys: jax.Array, allowed: jax.Array, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row; returns it with its log-probability before top_k and top_p.

  Args:
    logits: float32[P, G, V].
    keys: one random key per row, [P, G].
    allowed: bool[V].
    temperature: divides the logits; 0 takes the most likely token.
    top_p: see `sample`.
    top_k: see `sample`.

  Returns:
    (int32[P, G], float32[P, G] nats).
  """
  logps = distributions.masked_log_softmax(logits, allowed, temperature or 1.0)
  token = _draw(_truncate(logps, top_p, top_k), keys) if temperature else logps.argmax(-1).astype(jnp.int32)
  return token, distributions.select_token(logps, token)


def _draw(logps: jax.Array, keys: jax.Array) -> jax.Array:
  """Draws tokens int32[P, G] from log-probabilities float32[P, G, V], which need not be normalised.

  Adds Gumbel noise and takes the argmax: first over columns of ids, then inside that column. This needs m + n
  numbers instead of m n; random bits for a whole vocabulary would cost more than all else here. Exact, because the
  probability of an id is that of its column times its share.
  """
  size = logps.shape[-1]
  rows = math.gcd(size, 128)  # n; contiguous runs of ids, so that a sharded vocabulary stays where it is
  table = logps.reshape(*logps.shape[:-1], rows, size // rows)
  noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (size // rows + rows,))))(keys)
  column = (jnp.log(jnp.exp(table).sum(-2)) + noise[..., : size // rows]).argmax(-1)
  inside = jax.lax.broadcasted_iota(column.dtype, table.shape, table.ndim - 1) == column[..., None, None]
  row = (jnp.where(inside, table, -jnp.inf).max(-1) + noise[..., size // rows :]).argmax(-1)
  return (row * (size // rows) + column).astype(jnp.int32)


def _truncate(logps: jax.Array, top_p: float, top_k: int) -> jax.Array:
  """Applies top_k and then top_p: what they remove becomes -inf."""
  if top_k:
    logps = jnp.where(~distributions.top_ids(logps, top_k), -jnp.inf, logps)
  if top_p < 1:
    probabilities = jax.nn.softmax(logps)
    logps = jnp.where(distributions.tail_ids(logps, probabilities, top_p), -jnp.inf, logps)
  return logps


def _row_keys(key: jax.Array, row: jax.Array, samples: int) -> jax.Array:
  """Derives keys [P, G], one per completion, from the identity of its prompt uint32[P]; `key` as for `sample`."""
  keys = key if key.ndim else key[None, None]
  place = jnp.arange(samples) if keys.shape[1] == 1 else jnp.zeros(samples, int)
  keys = jnp.broadcast_to(keys, (*row.shape, samples))
  fold = jax.vmap(
    jax.vmap(lambda key, row, g: jax.random.fold_in(jax.random.fold_in(key, row), g), (0, None, 0)), (0, 0, None)
  )
  return fold(keys, row, place)


def _put(values: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
  """Writes new [P, G] into values [P, G, T] at `step`, in place inside the loop."""
  return jax.lax.dynamic_update_slice_in_dim(values, new[..., None], step, axis=2)


def _check(temperature: float, top_p: float, top_k: int, samples: int, max_new_tokens: int) -> None:
  ranges = {
    "temperature": (temperature, temperature >= 0, "0 (greedy) or more"),
    "top_p": (top_p, 0 < top_p <= 1, "above 0, at most 1"),
    "top_k": (top_k, top_k >= 0, "0 (off) or more"),
    "samples": (samples, samples >= 1, "1 or more"),
    "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "1 or more"),
  }
  for name, (value, fits, wanted) in ranges.items():
    if not fits:
      raise ValueError(f"sampling with {name}={value} is impossible; it must be {wanted}.")
