"""The plain form against a slow one, and each fused kernel against the plain form: values, gradients, pads, meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import attention, cudnn, model, splash, text
from tests.models.qwen3_vl import cases, runs


def kernel(module, **arguments):
  """The kernel of a module in a form that the CPU can run."""
  functions = (
    functools.partial(function, **arguments) for function in (module.prompts, module.completions, module.images)
  )
  return attention.Kernel(*functions, why_unsupported=lambda dtype, head_dim: "")


# XLA's implementation has the meaning of cuDNN's; the interpreter runs the very kernel of the TPU.
EMULATED = {"cudnn": kernel(cudnn, implementation="xla"), "splash": kernel(splash, interpret=True)}


@pytest.fixture
def emulate(monkeypatch):
  """`emulate("splash")`: from there on the CPU has that fused kernel."""
  return lambda name: monkeypatch.setitem(attention.KERNELS, "cpu", EMULATED[name])


def dense(query, sources):
  """Attention over concatenated keys: the slow form."""

  def joined(part):
    per_rollout = [x if x.ndim == 5 else jnp.repeat(x[:, :, None], query.shape[2], axis=2) for x in part]
    return jnp.concatenate(per_rollout, axis=3)

  keys, values, masks = zip(*sources, strict=True)
  masks = [jnp.broadcast_to(m, (*query.shape[:-1], k.shape[-2])) for k, m in zip(keys, masks, strict=True)]
  scores = jnp.einsum("pkgtjh,pkgsh->pkgtjs", query, joined(keys))
  weights = jax.nn.softmax(jnp.where(jnp.concatenate(masks, axis=-1), scores, -jnp.inf), axis=-1)
  return jnp.einsum("pkgtjs,pkgsh->pkgtjh", weights, joined(values))


@pytest.fixture
def attention_inputs(rng):
  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  prefix_mask = jnp.array([[True, True, False], [True, False, False]])[:, None, None, None, None]
  shared = (normal(2, 2, 3, 4) * 3, normal(2, 2, 3, 4), prefix_mask)
  own = (normal(2, 2, 2, 3, 4) * 3, normal(2, 2, 2, 3, 4), text.causal_mask(3))
  return normal(2, 2, 2, 3, 2, 4) * 3, [shared, own]


def test_joint_attention_equals_attention_over_concatenated_keys(attention_inputs):
  query, sources = attention_inputs

  def total(attention_fn, query, arrays):
    mixed = attention_fn(query, [(k, v, m) for (k, v), (_, _, m) in zip(arrays, sources, strict=True)])
    return (mixed**2).sum(), mixed

  arrays = [(k, v) for k, v, _ in sources]
  (actual, mixed), (expected, wanted) = (
    jax.jit(jax.grad(functools.partial(total, attention_fn), (0, 1), has_aux=True))(query, arrays)
    for attention_fn in (attention.plain_attention, dense)
  )
  np.testing.assert_allclose(mixed, wanted, atol=1e-6)
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5), actual, expected)


def test_rows_that_see_nothing_and_scores_far_from_zero_stay_finite(attention_inputs):
  query, sources = attention_inputs
  blind = [(k, v, jnp.zeros_like(m)) for k, v, m in sources]
  both = jax.jit(jax.value_and_grad(lambda q, sources: attention.plain_attention(q, sources).sum()))
  for given, seen in ((query, blind), (query * 1e4, sources)):
    value, gradient = both(given, seen)
    assert np.isfinite(value) and np.isfinite(gradient).all()


PROMPTS, ROLLOUTS, K, J, H = 4, 2, 2, 2, 64


class Uses:
  """Random inputs of the three uses, and a function of a form and them.

  Lengths are no multiples of the kernels' blocks, prompts have pads (one nothing else), patch rows two images and pads.
  """

  def __init__(self, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    before, length, patches = 21, 14, 24

    def normal(*shape):
      return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16).astype(dtype)

    self.real = jnp.arange(before)[None] < jnp.array([before, 0, 9, 1])[:, None]
    self.segments = jnp.array([[0] * 12 + [1] * 8 + [-1] * 4, [0] * 24, [0] * 4 + [-1] * 20, [-1] * 24], jnp.int32)
    # Scaled as by the model, and peaked enough that a wrong mask shows.
    scale = 3 * H**-0.5
    query = normal(PROMPTS, K, ROLLOUTS, length, J, H) * scale
    own = [normal(PROMPTS, K, ROLLOUTS, length, H) for _ in range(2)]
    prefix = [normal(PROMPTS, K, before, H) for _ in range(2)]
    self.arrays = {
      "prompts": (normal(PROMPTS, K, 1, before, J, H) * scale, *(x[:, :, None] for x in prefix)),
      "completions": (query, *prefix, *own),
      "images": (normal(PROMPTS, 2, patches, H) * scale, *(normal(PROMPTS, 2, patches, H) for _ in range(2))),
    }

  def __getitem__(self, use):
    return getattr(self, use)

  def prompts(self, form, query, key, value):
    visible = text.causal_mask(self.real.shape[1]) & self.real[:, None, None, None, None, :]
    mixed = attention.prompt_attention(query, [(key, value, visible)], real=self.real, implementation=form)
    return jnp.where(self.real[:, None, None, :, None, None], mixed, 0)  # what pads get is nobody's

  def completions(self, form, query, prefix_key, prefix_value, key, value):
    prefix = (prefix_key, prefix_value, self.real[:, None, None, None, None, :])
    own = (key, value, text.causal_mask(key.shape[3]))
    return attention.completion_attention(query, [prefix, own], real=self.real, implementation=form)

  def images(self, form, query, key, value):
    mixed = attention.image_attention(self.segments, form)(query, key, value)
    return jnp.where((self.segments >= 0)[:, :, None, None], mixed, 0)


def value_and_gradients(function, form, arrays):
  """The result, and gradients of a sum of it in which no two terms weigh the same."""

  def total(*arrays):
    mixed = function(form, *arrays)
    wide = mixed.astype(jnp.float32)
    return (wide * jnp.cos(jnp.arange(wide.size, dtype=jnp.float32)).reshape(wide.shape)).sum(), mixed

  gradients, mixed = jax.jit(jax.grad(total, tuple(range(len(arrays))), has_aux=True))(*arrays)
  return mixed, *gradients


def assert_near(actual, expected):
  """Two trees of float32 differ by 1e-5 of the largest number of each array at most."""

  def compare(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

  jax.tree.map(compare, actual, expected)


USES = ("prompts", "completions", "images")


@pytest.fixture(scope="module")
def uses():
  return Uses()


@pytest.fixture(scope="module")
def plain(uses):
  """`plain(use)`: what the plain form makes of the inputs of a use, on one device."""
  return functools.cache(lambda use: value_and_gradients(uses[use], "plain", uses.arrays[use]))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", EMULATED)
def test_a_fused_kernel_equals_the_plain_form(name, use, uses, plain, emulate):
  expected = plain(use)
  emulate(name)
  assert_near(value_and_gradients(uses[use], "fused", uses.arrays[use]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_in_bfloat16_a_fused_kernel_is_as_near_to_the_truth(use, plain, emulate):
  uses = Uses(jnp.bfloat16)
  truth, rounded = plain(use), value_and_gradients(uses[use], "plain", uses.arrays[use])
  allowed = [runs.difference_in_norm(x, wanted) for x, wanted in zip(rounded, truth, strict=True)]
  assert 1e-4 < min(allowed) and max(allowed) < 0.02
  for name in EMULATED:
    emulate(name)
    # Splash rounds gradients of scores to bfloat16, which the plain form of the tower does not.
    factor = 2 if (name, use) == ("splash", "images") else 1.5
    fused = value_and_gradients(uses[use], "fused", uses.arrays[use])
    for actual, wanted, most in zip(fused, truth, allowed, strict=True):
      assert actual.dtype == jnp.bfloat16
      assert runs.difference_in_norm(actual, wanted) < factor * most, name


@pytest.mark.parametrize(
  ("use", "shape"),
  [
    ("prompts", (2, 2, 2)),  # prompts over data and fsdp, heads over tensor
    ("images", (2, 2, 2)),
    ("completions", (2, 2, 2)),
    ("completions", (4, 2, 1)),  # rollouts over fsdp: gradients of the prompt add over devices
    ("completions", (1, 2, 4)),  # heads do not divide
  ],
)
def test_fused_on_a_mesh_equals_plain_on_one_device(use, shape, uses, plain, emulate, mesh_of):
  expected = plain(use)
  emulate("cudnn")  # what divides the work is the same for all kernels
  mesh = mesh_of(*shape)
  axes = ("prompt",) if use == "images" else ("prompt", "kv_heads", "rollout")
  axes_of = {x.ndim: axes[: 2 if x.ndim == 4 else 3] for x in uses.arrays[use]}
  arrays = [jax.device_put(x, sharding.batch_sharding(mesh, x.shape, axes_of[x.ndim])) for x in uses.arrays[use]]
  with jax.set_mesh(mesh):
    assert_near(value_and_gradients(uses[use], "fused", arrays), expected)


PARAMS = cases.redrawn(model.abstract_params(cases.SMALL), seed=5)


def hidden_and_gradient(form, params, prompts, tokens):
  config = dataclasses.replace(cases.SMALL, attention=form)

  def total(params):
    prefix = model.prefill(config, params, prompts, remat="full")
    hidden = model.completion_hidden(config, params, prefix, tokens, remat="full")
    return jnp.sin(hidden * 3).sum(), hidden

  gradient, hidden = jax.grad(total, has_aux=True)(params)
  return hidden, gradient


@pytest.mark.slow
def test_the_model_computes_the_same_with_a_fused_kernel(emulate, mesh_of):
  prompts = cases.make_prompts(cases.SMALL, cases.SMALL_PROMPTS)[0]
  tokens = np.random.RandomState(1).randint(1, 90, (len(cases.SMALL_PROMPTS), 2, 5)).astype(np.int32)
  expected = jax.jit(functools.partial(hidden_and_gradient, "plain"))(PARAMS, prompts, tokens)
  for name in EMULATED:
    emulate(name)
    with jax.set_mesh(mesh_of(2, 1, 2)):
      assert_near(jax.jit(functools.partial(hidden_and_gradient, "fused"))(PARAMS, prompts, tokens), expected)


def test_no_score_per_query_and_key_is_held_by_a_fused_kernel(emulate):
  tokens = np.zeros((len(cases.SMALL_PROMPTS), 2, 51), np.int32)
  prompts = cases.make_prompts(cases.SMALL, cases.SMALL_PROMPTS, extra=(40, 24))[0]
  width, rows = prompts.tokens.shape[1], prompts.vision.patches.shape[1]
  scores = rf"tensor<\d+x\d+(?:x\d+)*x(?:{width}|50|{rows})x(?:\d+x)?(?:{width}|50|{rows})xf32>"

  def lowered(form):
    return jax.jit(functools.partial(hidden_and_gradient, form)).lower(PARAMS, prompts, tokens).as_text()

  assert len({width, rows, 50, 2, 16}) == 5
  assert len(re.findall(scores, lowered("plain"))) > 10
  emulate("splash")
  assert re.findall(scores, lowered("fused")) == []


def test_the_cpu_has_the_plain_form():
  assert attention.kernel_for("auto", jnp.bfloat16, 128) is None
  with pytest.raises(ValueError, match="model.attention=fused: .* for platform cpu; use auto or plain"):
    attention.kernel_for("fused", jnp.bfloat16, 128)


def test_the_mesh_in_force_says_the_platform(monkeypatch, mesh_of):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert sharding.platform() == "tpu"
  assert attention.kernel_for("auto", jnp.dtype("bfloat16"), 128) is attention.KERNELS["tpu"]
  with jax.set_mesh(mesh_of(2)):
    assert sharding.platform() == "cpu"


class Gpu:
  device_kind = "a GPU"

  def __init__(self, compute_capability="9.0", platform_version="PJRT C API\ncuda 13000"):
    self.client, self.compute_capability, self.platform_version = self, compute_capability, platform_version


@pytest.mark.parametrize(
  ("device", "dtype", "head_dim", "why_unsupported"),
  [
    (None, "bfloat16", 64, ""),
    (None, "float16", 128, "not in float16"),
    (None, "bfloat16", 16, "these have 16"),
    (Gpu(), "bfloat16", 128, ""),
    (Gpu(), "float32", 128, "not in float32"),
    (Gpu(), "bfloat16", 136, "these have 136"),
    (Gpu(platform_version="PJRT C API\nrocm 60300"), "bfloat16", 128, "NVIDIA's GPUs, this is a GPU"),
    (Gpu("7.5"), "bfloat16", 128, "needs compute capability 8.0, a GPU has 7.5"),
  ],
)
def test_what_the_kernels_of_tpu_and_gpu_serve(device, dtype, head_dim, why_unsupported, monkeypatch):
  platform = "gpu" if device else "tpu"
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  kernel = attention.kernel_for("auto", jnp.dtype(dtype), head_dim)
  assert kernel is (None if why_unsupported else attention.KERNELS[platform])
  if why_unsupported:
    with pytest.raises(ValueError, match=why_unsupported):
      attention.kernel_for("fused", jnp.dtype(dtype), head_dim)


@pytest.mark.parametrize("use", USES)
def test_a_program_for_nvidia_calls_cudnn(use, monkeypatch, mesh_of):
  # JAX asks for the library's version while it traces, and says that there is none on a host without CUDA.
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
  monkeypatch.setattr(attention, "kernel_for", lambda *_: attention.KERNELS["gpu"])
  uses = Uses(jnp.bfloat16)
  arrays = uses.arrays[use]

  def both(*arrays):
    return jax.grad(lambda *x: uses[use]("auto", *x).astype(jnp.float32).sum(), tuple(range(len(arrays))))(*arrays)

  with jax.set_mesh(mesh_of(2, 2, 2)):
    program = jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  bias = "ScaleBias" if use == "images" else ""
  (forward,) = re.findall(rf"__cudnn\$fmha{bias}Softmax\(.*", program.replace("\\22", ""))
  assert program.count(f"__cudnn$fmha{bias}SoftmaxBackward(") == 1
  # A device's part alone: two heads, of four where they are split, and one prompt of four; and no score.
  rows = ROLLOUTS if use == "completions" else 1
  assert f"intermediate_tensor_shape: {{element_type: BF16, dimensions: [{rows}, 2, " in forward
  assert re.findall(r"tensor<(?:\d+x)*(?:14|21|22|24|35|36)x(?:14|21|22|24|35|36)xf32>", program) == []


@pytest.mark.tpu
def test_a_program_for_tpu_compiles(monkeypatch):
  pytest.importorskip("libtpu")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test processes at a time
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no question to a cloud about a chip that is not there
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
  uses, mesh = Uses(jnp.bfloat16), sharding.make_mesh(2, 2, 2, devices=list(devices))

  def total(use, *arrays):
    return jnp.sin(uses[use]("fused", *arrays).astype(jnp.float32)).sum()

  for use, arrays in uses.arrays.items():
    places = [sharding.batch_sharding(mesh, x.shape) for x in arrays]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x, place in zip(arrays, places, strict=True)]
    gradients = jax.grad(functools.partial(total, use), tuple(range(len(arrays))))
    # The suite asks for float32 products everywhere, which Mosaic refuses for operands in bfloat16.
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
      program = jax.jit(gradients).lower(*shapes).compile().as_text()
    # Forward, keys and values, queries.
    assert program.count('custom_call_target="tpu_custom_call"') == 3, use
