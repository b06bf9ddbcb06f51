import functools

import jax
import jax.numpy as jnp
import pytest

from kepo_jax.models.qwen3_vl import model
from kepo_jax.planning import flops
from tests.models.qwen3_vl import cases, runs

X, W = jnp.ones((6, 5)), jnp.ones((5, 7))
ONE = 2 * 6 * 5 * 7


def product(x, w):
  return x @ w


def scanned(x, w):
  return jax.lax.scan(lambda total, _: (total + x @ w, None), jnp.zeros((6, 7)), length=4)[0]


def unused(x, w):
  """Of two products that a loop adds up, the one that is returned."""
  blank = (jnp.zeros((6, 7)), jnp.zeros((7, 6)))
  return jax.lax.scan(lambda sums, _: ((sums[0] + x @ w, sums[1] + (x @ w).T), None), blank, length=4)[0][0]


def branched(x, w):
  return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w + x @ w)


@pytest.mark.parametrize(
  ("function", "products"),
  [
    (product, 1),
    (lambda x, w: jnp.einsum("ab,cb->ca", x, w.T), 1),
    (lambda x, w: jnp.broadcast_to(x, (3, 6, 5)) @ w, 3),
    (scanned, 4),
    (unused, 4),
    (branched, 2),  # the longer way
    (jax.value_and_grad(lambda x, w: (x @ w).sum(), (0, 1)), 3),
    (jax.grad(lambda x, w: (x @ w).sum(), (0, 1)), 2),  # nobody asks for the sum
    # The product is computed again for the sine behind it, and each of its two gradients is one more.
    (jax.value_and_grad(jax.checkpoint(lambda x, w: jnp.sin(x @ w).sum()), (0, 1)), 4),
  ],
)
def test_products_are_counted(function, products):
  assert flops.count(function, X, W) == products * ONE


def test_a_loop_without_an_end_is_refused():
  with pytest.raises(ValueError, match="while"):
    flops.count(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w @ w.T, x), X, W)


def test_a_model_has_the_flops_that_xla_counts():
  # Wide enough for products to be most of the work.
  record = cases.config_record(text={"hidden_size": 128, "intermediate_size": 256}, vision={"out_hidden_size": 128})
  config = runs.Qwen3VLConfig.from_dict(record)
  # XLA counts the body of a scan once; with layers side by side there is none.
  params = jax.eval_shape(lambda: model.separated(model.init_params(config, jax.random.key(0))))
  prompts, _, _ = cases.make_prompts(config, [(40,), (33,)])
  prefill = functools.partial(model.prefill, config)
  compiled = jax.jit(prefill).lower(params, prompts).compile()
  counted = flops.count(prefill, model.abstract_params(config), prompts)
  # The rest is elementwise: norms, softmax, rotation.
  assert 0.85 < counted / compiled.cost_analysis()["flops"] <= 1
  assert counted == flops.count(prefill, params, prompts)
