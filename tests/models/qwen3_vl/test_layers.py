import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import layers


def test_norms_by_hand(rng):
  # So small that epsilon decides; the reference has 1e-6 in the tower, and what the config says in the decoder.
  x = 1e-3 * rng.normal(size=(3, 8))
  weight, bias = rng.normal(size=8), rng.normal(size=8)
  params = jax.tree.map(jnp.float32, {"weight": weight, "bias": bias})
  centred = x - x.mean(axis=1, keepdims=True)
  expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6) * weight + bias
  np.testing.assert_allclose(layers.bind(params, layers.LayerNorm, 8)(jnp.float32(x)), expected, rtol=1e-5, atol=1e-6)
  del params["bias"]
  for epsilon in (1e-6, 1e-5):
    expected = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + epsilon) * weight
    actual = layers.bind(params, layers.RMSNorm, 8, epsilon)(jnp.float32(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=str(epsilon))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_widening_product(dtype, rng):
  for rows in ((6,), (2, 3, 4)):
    x, weight, cotangent = (jnp.array(rng.normal(size=size), dtype) for size in ((*rows, 5), (9, 5), (*rows, 9)))
    actual, pullback = jax.vjp(layers.wide_matmul, x, weight)
    expected, plain = jax.vjp(lambda x, weight: jnp.einsum("...i,oi->...o", x, weight), x, weight)
    np.testing.assert_array_equal(actual, expected)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    for mine, autodiff in zip(pullback(cotangent), plain(cotangent), strict=True):
      assert mine.dtype == dtype and mine.shape == autodiff.shape
      difference = np.float64(mine) - np.float64(autodiff)
      assert np.linalg.norm(difference) < tolerance * np.linalg.norm(np.float64(autodiff)), rows


def test_only_what_widens_turns_its_input():
  for inputs, outputs in ((4, 8), (8, 4), (4, 4)):
    params = {"weight": jnp.ones((outputs, inputs))}

    def loss(params, x, sizes=(inputs, outputs)):
      return layers.bind(params, layers.Linear, *sizes, (None, None), False)(x).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params, jnp.ones((3, inputs))))
    assert ("optimization_barrier" in text) == (outputs > inputs), (inputs, outputs)


def test_the_gradient_of_a_bias_adds_up_in_float32(rng):
  params = {name: jnp.asarray(rng.normal(size=size), jnp.bfloat16) for name, size in (("weight", (4, 4)), ("bias", 4))}
  x, weights = (jnp.asarray(rng.normal(size=(8, 2304, 4)) + 0.05, jnp.bfloat16) for _ in range(2))

  def loss(params):
    return (layers.bind(params, layers.Linear, 4, 4, (None, None))(x).astype(jnp.float32) * weights).sum()

  gradient = jax.jit(jax.grad(loss))(params)["bias"]
  expected = np.float64(weights).sum((0, 1))
  assert gradient.dtype == jnp.bfloat16
  # One rounding at the end; a sum in bfloat16 is 1 % off even where XLA adds up blocks, as on a CPU.
  assert np.linalg.norm(np.float64(gradient) - expected) < 2**-8 * np.linalg.norm(expected)
  program = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
  sums = [line for line in program.splitlines() if "stablehlo.reduce(" in line and "2304" in line]
  assert sums and all("2304x4xf32" in line for line in sums)
