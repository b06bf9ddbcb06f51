import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import floors
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import LoraConfig, Qwen3VLConfig
from kepo_jax.objectives import losses
from kepo_jax.planning.chips import Chip
from kepo_jax.training import optimizer, update
from kepo_jax.training.update import Target
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
  first = floors.count_flops(functools.partial(model.prefill, CONFIG), params, PROMPTS)
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
  now = optimizer.TrainState(step=counter, params=params, opt_state=kept, skipped=counter)
  flags = {name: jnp.ones((P, G), bool) for name in ("gate", "injected", "supervised", "kept")}
  experience = Experience(
    prompts=PROMPTS, tokens=jnp.ones((P, G, T), jnp.int32), mask=jnp.ones((P, G, T), bool),
    logps=jnp.zeros((P, G, T)), advantages=jnp.zeros((P, G)), **flags,
  )  # fmt: skip
  targets = (Target(hidden=jnp.zeros((P, G, T, 32)), head=jnp.zeros((96, 32))),)
  token_loss = losses.KepoTokenLoss(allowed=jnp.ones(96, bool))
  whole = update.UpdateSettings(compute_dtype=jnp.float32, chunk=8, **settings)
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
  score = functools.partial(update.target, CONFIG, parts=1)
  hidden = floors.count_flops(score, model.abstract_params(CONFIG), PROMPTS, jax.ShapeDtypeStruct((P, G, T), jnp.int32))
  logits = 2 * P * G * T * CONFIG.text.vocab_size * CONFIG.text.hidden_size
  assert twice.flops == 2 * once.flops + hidden + logits and twice.moved == 2 * once.moved + 4 * count


X, W = jnp.ones((6, 5)), jnp.ones((5, 7))


def scanned(x, w):
  """Of two products that a loop adds up, the one that is returned."""
  blank = (jnp.zeros((6, 7)), jnp.zeros((7, 6)))
  return jax.lax.scan(lambda sums, _: ((sums[0] + x @ w, sums[1] + (x @ w).T), None), blank, length=4)[0][0]


@pytest.mark.parametrize(("function", "products"), [
  (lambda x, w: jnp.einsum("ab,cb->ca", x, w.T), 1),
  (lambda x, w: jnp.broadcast_to(x, (3, 6, 5)) @ w, 3),
  (scanned, 4),
  (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w + x @ w), 2),  # the longer way
  (jax.value_and_grad(lambda x, w: (x @ w).sum(), (0, 1)), 3),
  (jax.grad(lambda x, w: (x @ w).sum(), (0, 1)), 2),  # nobody asks for the sum
  # The product is computed again for the sine behind it, and each of its two gradients is one more.
  (jax.value_and_grad(jax.checkpoint(lambda x, w: jnp.sin(x @ w).sum()), (0, 1)), 4),
])  # fmt: skip
def test_products_of_a_jaxpr(function, products):
  assert floors.count_flops(function, X, W) == products * 2 * 6 * 5 * 7


def test_a_loop_without_a_known_end_is_refused():
  with pytest.raises(ValueError, match="while"):
    floors.count_flops(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w @ w.T, x), X, W)


def test_a_model_has_the_flops_that_xla_counts():
  # Wide enough for products to be most of the work.
  record = cases.config_record(text={"hidden_size": 128, "intermediate_size": 256}, vision={"out_hidden_size": 128})
  config = Qwen3VLConfig.from_dict(record)
  # XLA counts the body of a scan once; with layers side by side there is none.
  params = jax.eval_shape(lambda: model.unstack_layers(model.init_params(config, jax.random.key(0))))
  prompts, _, _ = cases.make_prompts(config, [(40,), (33,)])
  prefill = functools.partial(model.prefill, config)
  counted = floors.count_flops(prefill, model.abstract_params(config), prompts)
  # The rest is elementwise: norms, softmax, rotation.
  assert 0.85 < counted / jax.jit(prefill).lower(params, prompts).compile().cost_analysis()["flops"] <= 1
