import dataclasses
import functools

import jax
import jax.numpy as jnp

from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import LoraConfig, Qwen3VLConfig
from kepo_jax.objectives import losses
from kepo_jax.planning import floors, flops
from kepo_jax.planning.chips import Chip
from kepo_jax.training import inputs, state
from kepo_jax.training.forward import Target
from kepo_jax.types import Experience
from tests.models.qwen3_vl import cases
from tests.planning.test_memory import optimizer_of

CONFIG = Qwen3VLConfig.from_dict(cases.config_record())
PROMPTS = cases.make_prompts(CONFIG, [((4, 4), 5), (3, (4, 8), 2)])[0]
P, G, T = 2, 3, 6
CHIP = Chip("a chip", flops=1e3, bandwidth=1e2, memory=0)


def numbers(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_slower_of_both_is_the_floor():
  assert floors.Work(flops=4e3, moved=1e2).on(CHIP, 2).floor == 2
  assert floors.Work(flops=1e3, moved=8e2).on(CHIP, 2).floor == 4
  whole = floors.total([floors.Work(1, 2, 3), floors.Work(10, 20, 30)])
  assert whole == floors.Work(11, 22, 33)


def test_the_decode_copy_reads_what_a_run_keeps_and_writes_its_own_dtype():
  whole = numbers(model.abstract_params(CONFIG))
  assert floors.copying(CONFIG, model.abstract_params(CONFIG), jnp.bfloat16).moved == (4 + 2) * whole
  adapted = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, alpha=4.0, targets=("q_proj",)))
  kept = model.abstract_params(adapted, jnp.bfloat16)
  assert floors.copying(adapted, kept, jnp.bfloat16).moved == (2 + 2) * whole + 4 * numbers(kept["lora"])


def sampling(new_tokens):
  return floors.sampling(CONFIG, jnp.float32, PROMPTS, samples=G, new_tokens=new_tokens, chip=CHIP, devices=1)


def test_tokens_read_weights_and_caches():
  params = model.abstract_params(CONFIG)["language_model"]
  decoder, text = numbers(params["layers"]) + numbers(params["embed_tokens"]), CONFIG.text
  slot = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # keys and values of a token
  shared = slot * P * PROMPTS.tokens.shape[1]
  own = slot * P * G * T / 2  # half full in the mean
  assert sampling(T).moved == 4 * (T * (decoder + shared) + (T - 1) * own)


def test_a_token_costs_two_flops_per_weight_and_row():
  one, two = (sampling(new_tokens).flops for new_tokens in (1, 2))
  params, text = model.abstract_params(CONFIG), CONFIG.text
  first = flops.count(functools.partial(model.prefill, CONFIG), params, PROMPTS)
  head = text.vocab_size * text.hidden_size
  assert one == first + 2 * P * head  # a group shares its first logits
  matrices = numbers([leaf for leaf in jax.tree.leaves(params["language_model"]["layers"]) if leaf.ndim == 3])
  products = 2 * P * G * (matrices + head)
  attention = 2 * 2 * text.num_hidden_layers * P * G * text.num_attention_heads * text.head_dim
  seen = PROMPTS.tokens.shape[1] + 1  # the prompt and the token itself; and half of two tokens
  assert two - one == products + attention * (seen + 1)


@functools.cache
def update_work(**settings):
  params = model.abstract_params(CONFIG)
  counter = jax.ShapeDtypeStruct((), jnp.int32)
  kept = jax.eval_shape(optimizer_of("float32").init, params)
  now = state.TrainState(step=counter, params=params, opt_state=kept, skipped=counter)
  flags = {name: jnp.ones((P, G), bool) for name in ("gate", "injected", "supervised", "kept")}
  experience = Experience(
    prompts=PROMPTS, tokens=jnp.ones((P, G, T), jnp.int32), mask=jnp.ones((P, G, T), bool),
    logps=jnp.zeros((P, G, T)), advantages=jnp.zeros((P, G)), **flags,
  )  # fmt: skip
  targets = (Target(hidden=jnp.zeros((P, G, T, 32)), head=jnp.zeros((96, 32))),)
  token_loss = losses.KepoTokenLoss(allowed=jnp.ones(96, bool))
  whole = inputs.UpdateSettings(compute_dtype=jnp.float32, chunk=8, **settings)
  make = functools.partial(floors.update, CONFIG, token_loss, whole, now, experience, targets)
  return make(chip=CHIP, devices=1), numbers(params)


def test_an_update_reads_and_writes_weights_moments_and_gradients():
  work, count = update_work()
  counters = 2 * 4  # Adam counts, read and written
  assert work.moved == 4 * count + 2 * 4 * count + 2 * (4 + 8) * count + counters
  again, _ = update_work(remat="full", parts=2)
  assert again == work  # what is computed again is no work


def test_every_update_of_a_batch_counts_and_pi_old_once():
  (once, count), (twice, _) = update_work(), update_work(updates=2)
  score = functools.partial(floors.forward.target, CONFIG, parts=1)
  hidden = flops.count(score, model.abstract_params(CONFIG), PROMPTS, jax.ShapeDtypeStruct((P, G, T), jnp.int32))
  logits = 2 * P * G * T * CONFIG.text.vocab_size * CONFIG.text.hidden_size
  assert twice.flops == 2 * once.flops + hidden + logits
  assert twice.moved == 2 * once.moved + 4 * count
