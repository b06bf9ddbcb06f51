import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax.models.qwen3_vl import layers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [(6,), (2, 3), (2, 3, 4)])
def test_gradients_of_a_widening_product(rows, dtype, rng):
  x, weight, cotangent = (jnp.array(rng.normal(size=size), dtype) for size in ((*rows, 5), (9, 5), (*rows, 9)))
  actual, pullback = jax.vjp(layers.widened, x, weight)
  expected, plain = jax.vjp(lambda x, weight: jnp.einsum("...i,oi->...o", x, weight), x, weight)
  np.testing.assert_array_equal(actual, expected)
  tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
  for mine, autodiff in zip(pullback(cotangent), plain(cotangent), strict=True):
    assert mine.dtype == dtype and mine.shape == autodiff.shape
    difference = np.float64(mine) - np.float64(autodiff)
    assert np.linalg.norm(difference) < tolerance * np.linalg.norm(np.float64(autodiff))


@pytest.mark.parametrize(("inputs", "outputs", "widens"), [(4, 8, True), (8, 4, False), (4, 4, False)])
def test_only_what_widens_turns_its_input(inputs, outputs, widens):
  axes = (None, None)
  shapes = layers.definition(layers.Linear, inputs, outputs, axes, False).shapes
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)

  def loss(params, x):
    return layers.bind(params, layers.Linear, inputs, outputs, axes, False)(x).sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(params, jnp.ones((3, inputs))))
  assert ("optimization_barrier" in text) == widens


def test_the_gradient_of_a_bias_adds_up_in_float32(rng):
  definition = layers.definition(layers.Linear, 4, 4, (None, None))
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.bfloat16), definition.shapes)
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
