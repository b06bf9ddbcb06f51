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
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from tests.models.qwen3_vl import cases, runs


def kernel(module, **arguments):
  """The kernel of a module in a form that the CPU can run."""
  functions = (
    functools.partial(function, **arguments) for function in (module.prompts, module.completions, module.images)
  )
  return attention.Kernel(*functions, refusal=lambda dtype, head_dim: "")


# XLA's implementation has the meaning of cuDNN's; the interpreter runs the very kernel of the TPU.
EMULATED = {"cudnn": kernel(cudnn, implementation="xla"), "splash": kernel(splash, interpret=True)}


@pytest.fixture
def emulate(monkeypatch):
  """`emulate("splash")`: from there on the CPU has that fused kernel."""
  return lambda name: monkeypatch.setitem(attention.KERNELS, "cpu", EMULATED[name])


# ---- the plain form ----


def dense(query, sources):
  """Attention over concatenated keys: the slow form."""
  groups = query.shape[2]

  def per_rollout(x):
    return x if x.ndim == 5 else jnp.repeat(x[:, :, None], groups, axis=2)

  keys = jnp.concatenate([per_rollout(k) for k, _, _ in sources], axis=3)
  values = jnp.concatenate([per_rollout(v) for _, v, _ in sources], axis=3)
  shape = query.shape[:-1]
  masks = [jnp.broadcast_to(m, (*shape, k.shape[-2])) for k, _, m in sources]
  scores = jnp.einsum("pkgtjh,pkgsh->pkgtjs", query, keys)
  weights = jax.nn.softmax(jnp.where(jnp.concatenate(masks, axis=-1), scores, -jnp.inf), axis=-1)
  return jnp.einsum("pkgtjs,pkgsh->pkgtjh", weights, values)


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
  np.testing.assert_allclose(attention.joint_attention(query, sources), dense(query, sources), atol=1e-6)


def test_gradient_of_joint_attention(attention_inputs):
  query, sources = attention_inputs

  def total(attend, query, arrays):
    given = [(k, v, m) for (k, v), (_, _, m) in zip(arrays, sources, strict=True)]
    return (attend(query, given) ** 2).sum()

  arrays = [(k, v) for k, v, _ in sources]
  actual, expected = (jax.grad(total, (1, 2))(f, query, arrays) for f in (attention.joint_attention, dense))
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5), actual, expected)


def test_a_row_that_sees_nothing_stays_finite(attention_inputs):
  query, sources = attention_inputs
  blind = [(k, v, jnp.zeros_like(m)) for k, v, m in sources]
  assert np.isfinite(attention.joint_attention(query, blind)).all()
  value, gradient = jax.value_and_grad(lambda q: attention.joint_attention(q, blind).sum())(query)
  assert np.isfinite(value) and np.isfinite(gradient).all()


def test_scores_far_from_zero_stay_finite(attention_inputs):
  query, sources = attention_inputs
  assert np.isfinite(attention.joint_attention(query * 1e4, sources)).all()


# ---- fused kernels against it ----

K, J, H = 2, 2, 64


class Uses:
  """Random inputs of the three uses: `arrays[use]`, a function of them and a form, and where its result has a meaning.

  Lengths are no multiples of the kernels' blocks, prompts have pads (one of them nothing else), and patch rows two
  images and pads.
  """

  def __init__(self, rng, *, prompts=3, rollouts=2, dtype=jnp.float32):
    before, length, patches = 21, 14, 24

    def normal(*shape):
      return jnp.asarray(rng.standard_normal(shape), dtype)

    lengths = np.resize([before, 1, 9], prompts)
    self.real = jnp.arange(before)[None] < lengths[:, None]
    segments = np.resize([[0] * 12 + [1] * 8 + [-1] * 4, [0] * 24, [0] * 4 + [-1] * 20], (prompts, patches))
    self.segments = jnp.asarray(segments, jnp.int32)
    # Scaled as by the model, and peaked enough that a wrong mask shows.
    scale = 3 * H**-0.5
    query = normal(prompts, K, rollouts, length, J, H) * scale
    own = [normal(prompts, K, rollouts, length, H) for _ in range(2)]
    prefix = [normal(prompts, K, before, H) for _ in range(2)]
    self.arrays = {
      "prompts": (normal(prompts, K, 1, before, J, H) * scale, *(x[:, :, None] for x in prefix)),
      "completions": (query, *prefix, *own),
      "images": (normal(prompts, 2, patches, H) * scale, *(normal(prompts, 2, patches, H) for _ in range(2))),
    }

  def __getitem__(self, use):
    return functools.partial(getattr(self, use), self.real, self.segments)

  @staticmethod
  def prompts(real, segments, form, query, key, value):
    del segments
    seen = real[:, None, None, None, None, :]
    visible = text.causal_mask(real.shape[1]) & seen
    mixed = attention.over_prompts(query, [(key, value, visible)], real=real, form=form)
    return jnp.where(real[:, None, None, :, None, None], mixed, 0)  # what pads get is nobody's

  @staticmethod
  def completions(real, segments, form, query, prefix_key, prefix_value, key, value):
    del segments
    prefix = (prefix_key, prefix_value, real[:, None, None, None, None, :])
    own = (key, value, text.causal_mask(key.shape[3]))
    return attention.over_completions(query, [prefix, own], real=real, form=form)

  @staticmethod
  def images(real, segments, form, query, key, value):
    del real
    mixed = attention.inside_images(segments, form)(query, key, value)
    return jnp.where((segments >= 0)[:, :, None, None], mixed, 0)


def value_and_gradients(function, form, arrays):
  """The result, and gradients of a sum of it in which no two terms weigh the same."""

  @jax.jit
  def both(*arrays):
    def total(*arrays):
      mixed = function(form, *arrays)
      wide = mixed.astype(jnp.float32)
      return (wide * jnp.cos(jnp.arange(wide.size, dtype=jnp.float32)).reshape(wide.shape)).sum(), mixed

    gradients, mixed = jax.grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)
    return mixed, *gradients

  return both(*arrays)


def assert_near(actual, expected):
  """Two trees of float32 differ by 1e-5 of the largest number of each array at most."""

  def compare(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

  jax.tree.map(compare, actual, expected)


USES = ("prompts", "completions", "images")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", EMULATED)
def test_a_fused_kernel_equals_the_plain_form(name, use, emulate, rng):
  uses = Uses(rng)
  expected = value_and_gradients(uses[use], "plain", uses.arrays[use])
  emulate(name)
  assert_near(value_and_gradients(uses[use], "fused", uses.arrays[use]), expected)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", EMULATED)
def test_in_bfloat16_a_fused_kernel_is_as_near_to_the_truth(name, use, emulate, rng):
  uses = Uses(rng, dtype=jnp.bfloat16)
  arrays = uses.arrays[use]
  truth = value_and_gradients(uses[use], "plain", [x.astype(jnp.float32) for x in arrays])
  plain = value_and_gradients(uses[use], "plain", arrays)
  emulate(name)
  fused = value_and_gradients(uses[use], "fused", arrays)
  # Splash rounds gradients of scores to bfloat16, which the plain form of the tower does not.
  factor = 2 if (name, use) == ("splash", "images") else 1.5
  for rounded, actual, wanted in zip(plain, fused, truth, strict=True):
    assert actual.dtype == jnp.bfloat16
    allowed = runs.difference_in_norm(rounded, wanted)
    assert 1e-4 < allowed < 0.02
    assert runs.difference_in_norm(actual, wanted) < factor * allowed


@pytest.mark.parametrize("name", EMULATED)
def test_gradients_of_a_prompt_add_over_its_rollouts(name, emulate, rng):
  uses = Uses(rng, rollouts=3)
  query, prefix_key, prefix_value, key, value = uses.arrays["completions"]
  emulate(name)
  whole = value_and_gradients(uses["completions"], "fused", uses.arrays["completions"])

  def one(rollout):
    """Gradients of the prompt's keys and values from one rollout."""

    def alone(form, prefix_key, prefix_value):
      mixed = uses["completions"](form, query, prefix_key, prefix_value, key, value)
      return jnp.where((jnp.arange(3) == rollout)[None, None, :, None, None, None], mixed, 0)

    return value_and_gradients(alone, "fused", (prefix_key, prefix_value))[1:]

  parts = [one(rollout) for rollout in range(3)]
  assert np.abs(parts[0][0]).max() > 1e-2
  for position, total in enumerate(whole[2:4]):
    assert_near(total, sum(part[position] for part in parts))


@pytest.mark.parametrize("name", EMULATED)
def test_a_prompt_of_pads_alone_stays_finite(name, emulate, rng):
  uses = Uses(rng)
  uses.real = uses.real.at[1].set(False)
  emulate(name)
  for use in ("prompts", "completions"):
    results = value_and_gradients(uses[use], "fused", uses.arrays[use])
    assert all(np.isfinite(x).all() for x in results)
  # Its completions see themselves.
  fused, plain = (uses["completions"](form, *uses.arrays["completions"]) for form in ("fused", "plain"))
  assert_near(fused, plain)


# ---- meshes ----


@pytest.mark.parametrize(
  ("shape", "prompts"),
  [
    ((2, 2, 2), 4),  # prompts over data and fsdp, heads over tensor
    ((2, 4, 1), 2),  # prompts over data, rollouts over fsdp: gradients of the prompt add over devices
    ((1, 2, 4), 3),  # neither prompts nor heads divide
  ],
)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", EMULATED)
def test_fused_on_a_mesh_equals_plain_on_one_device(name, use, shape, prompts, emulate, mesh_of, rng):
  uses = Uses(rng, prompts=prompts, rollouts=4)
  expected = value_and_gradients(uses[use], "plain", uses.arrays[use])
  emulate(name)
  mesh = mesh_of(*shape)
  axes = {6: ("prompt", "kv_heads", "rollout"), 5: ("prompt", "kv_heads", "rollout"), 4: ("prompt",)}
  arrays = [jax.device_put(x, sharding.batch_sharding(mesh, x.shape, axes[x.ndim])) for x in uses.arrays[use]]
  with jax.set_mesh(mesh):
    actual = value_and_gradients(uses[use], "fused", arrays)
  assert_near(actual, expected)


def test_a_device_computes_its_part_alone(emulate, mesh_of, rng):
  uses = Uses(rng, prompts=4, rollouts=4)
  emulate("cudnn")
  flops = {}
  for shape in ((1, 1, 1), (2, 2, 2), (1, 8, 1)):
    with jax.set_mesh(mesh_of(*shape)):
      program = jax.jit(functools.partial(uses["completions"], "fused")).lower(*uses.arrays["completions"]).compile()
    flops[shape] = program.cost_analysis()["flops"]
  assert flops[2, 2, 2] < 1.1 / 8 * flops[1, 1, 1]
  assert flops[1, 8, 1] > 0.9 * flops[1, 1, 1]  # neither four prompts nor four rollouts divide over eight


# ---- the whole model ----

CONFIG = Qwen3VLConfig.from_dict(
  cases.config_record(
    text={"num_hidden_layers": 2, "num_key_value_heads": 2},
    vision={"depth": 2, "deepstack_visual_indexes": [0, 1]},
  )
)
PARAMS = cases.redrawn(model.abstract_params(CONFIG), seed=5)
LAYOUTS = [(3, (4, 4), 2), (2, (4, 2), 1, (2, 4), 1), (6,), (1, (2, 6), 1)]
TOKENS = np.random.RandomState(1).randint(1, 90, (len(LAYOUTS), 2, 5)).astype(np.int32)


def hidden_and_gradient(form, params, prompts, tokens):
  config = dataclasses.replace(CONFIG, attention=form)

  def total(params):
    prefix = model.prefill(config, params, prompts, remat="full")
    hidden = model.completion_hidden(config, params, prefix, tokens, remat="full")
    return jnp.sin(hidden * 3).sum(), hidden

  gradient, hidden = jax.grad(total, has_aux=True)(params)
  return hidden, gradient


@pytest.mark.parametrize("name", EMULATED)
def test_the_model_computes_the_same_with_a_fused_kernel(name, emulate, mesh_of):
  prompts = cases.make_prompts(CONFIG, LAYOUTS)[0]
  expected = runs.fast_jit(functools.partial(hidden_and_gradient, "plain"))(PARAMS, prompts, TOKENS)
  emulate(name)
  with jax.set_mesh(mesh_of(2, 1, 2)):
    assert_near(runs.fast_jit(functools.partial(hidden_and_gradient, "fused"))(PARAMS, prompts, TOKENS), expected)


def test_no_score_per_query_and_key_is_held_by_a_fused_kernel(emulate):
  tokens = np.zeros((len(LAYOUTS), 2, 51), np.int32)
  prompts = cases.make_prompts(CONFIG, LAYOUTS, extra=(40, 24))[0]
  width, rows = prompts.tokens.shape[1], prompts.vision.patches.shape[1]
  scores = rf"tensor<\d+x\d+(?:x\d+)*x(?:{width}|50|{rows})x(?:\d+x)?(?:{width}|50|{rows})xf32>"

  def lowered(form):
    return runs.fast_jit(functools.partial(hidden_and_gradient, form)).lower(PARAMS, prompts, tokens).as_text()

  assert len({width, rows, 50, 2, 16}) == 5
  assert len(re.findall(scores, lowered("plain"))) > 10
  emulate("splash")
  assert re.findall(scores, lowered("fused")) == []


# ---- the choice ----


def test_the_cpu_has_the_plain_form():
  for dtype in (jnp.float32, jnp.bfloat16):
    assert attention.kernel_for("auto", dtype, 128) is None
    assert attention.kernel_for("plain", dtype, 128) is None
  with pytest.raises(
    ValueError, match=r"model.attention=fused: there is no fused attention for platform cpu; use auto"
  ):
    attention.kernel_for("fused", jnp.bfloat16, 128)


def test_the_mesh_in_force_says_the_platform(monkeypatch, mesh_of):
  assert sharding.platform() == "cpu"
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert sharding.platform() == "tpu"
  assert attention.kernel_for("auto", jnp.dtype("bfloat16"), 128) is attention.KERNELS["tpu"]
  with jax.set_mesh(mesh_of(2)):
    assert sharding.platform() == "cpu"


@pytest.mark.parametrize(
  ("dtype", "head_dim", "refusal"),
  [
    ("bfloat16", 128, ""),
    ("float32", 72, ""),
    ("bfloat16", 64, ""),
    ("float16", 128, "not in float16"),
    ("bfloat16", 16, "these have 16"),
  ],
)
def test_what_splash_attention_serves(dtype, head_dim, refusal, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  kernel = attention.kernel_for("auto", jnp.dtype(dtype), head_dim)
  assert kernel is (None if refusal else attention.KERNELS["tpu"])
  if refusal:
    with pytest.raises(ValueError, match=refusal):
      attention.kernel_for("fused", jnp.dtype(dtype), head_dim)


@dataclasses.dataclass
class Gpu:
  """What the choice asks of a device."""

  platform_version: str = "PJRT C API\ncuda 13000"
  compute_capability: str = "9.0"
  device_kind: str = "a GPU"

  @property
  def client(self):
    return self


@pytest.mark.parametrize(
  ("dtype", "head_dim", "device", "refusal"),
  [
    ("bfloat16", 128, Gpu(), ""),
    ("float16", 72, Gpu(), ""),
    ("float32", 128, Gpu(), "not in float32"),
    ("bfloat16", 136, Gpu(), "these have 136"),
    ("bfloat16", 12, Gpu(), "these have 12"),
    ("bfloat16", 128, Gpu(platform_version="PJRT C API\nrocm 60300"), "NVIDIA's GPUs, this is a GPU"),
    ("bfloat16", 128, Gpu(compute_capability="7.5"), "needs compute capability 8.0, a GPU has 7.5"),
    ("bfloat16", 128, Gpu(compute_capability="12.0"), ""),
  ],
)
def test_what_cudnn_serves(dtype, head_dim, device, refusal, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  kernel = attention.kernel_for("auto", jnp.dtype(dtype), head_dim)
  assert kernel is (None if refusal else attention.KERNELS["gpu"])
  if refusal:
    with pytest.raises(ValueError, match=refusal):
      attention.kernel_for("fused", jnp.dtype(dtype), head_dim)


# ---- programs for devices that are not here ----


@pytest.mark.parametrize("use", USES)
def test_a_program_for_nvidia_calls_cudnn(use, monkeypatch, mesh_of, rng):
  # JAX asks for the library's version while it traces, and says that there is none on a host without CUDA.
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
  monkeypatch.setitem(attention.KERNELS, "cpu", attention.KERNELS["gpu"])
  monkeypatch.setattr(attention, "kernel_for", lambda *_: attention.KERNELS["gpu"])
  uses = Uses(rng, prompts=4, rollouts=4, dtype=jnp.bfloat16)
  arrays = uses.arrays[use]

  def both(*arrays):
    return jax.grad(lambda *x: uses[use]("auto", *x).astype(jnp.float32).sum(), tuple(range(len(arrays))))(*arrays)

  with jax.set_mesh(mesh_of(2, 2, 2)):
    program = jax.jit(both).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  bias = "ScaleBias" if use == "images" else ""
  assert program.count(f"__cudnn$fmha{bias}Softmax(") == 1
  assert program.count(f"__cudnn$fmha{bias}SoftmaxBackward(") == 1
  # Local shapes: two heads of four, one prompt of four; and no score.
  assert re.findall(r"tensor<(?:\d+x)*(?:14|21|22|24|35|36)x(?:14|21|22|24|35|36)xf32>", program) == []


@pytest.mark.parametrize("use", USES)
def test_a_program_for_tpu_compiles(use, monkeypatch, rng):
  pytest.importorskip("libtpu", reason="pip install libtpu compiles for a TPU without one")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test processes at a time
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no question to a cloud about a chip that is not there
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
  uses = Uses(rng, prompts=4, rollouts=4, dtype=jnp.bfloat16)
  mesh = sharding.make_mesh(2, 2, 2, devices=list(devices))
  shapes = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh, x.shape)) for x in uses.arrays[use]
  ]

  def gradients(*arrays):
    total = lambda *x: jnp.sin(uses[use]("fused", *x).astype(jnp.float32)).sum()  # noqa: E731
    return jax.grad(total, tuple(range(len(arrays))))(*arrays)

  # The suite asks for float32 products everywhere, which Mosaic refuses for operands in bfloat16.
  with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
    program = jax.jit(gradients).lower(*shapes).compile().as_text()
  assert program.count('custom_call_target="tpu_custom_call"') == 3  # forward, keys and values, queries
