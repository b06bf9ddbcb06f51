import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import kepo
from kepo_jax import sharding, types
from kepo_jax.models.qwen3_vl import config as model_config
from kepo_jax.models.qwen3_vl import model
from kepo_jax.objectives import losses
from kepo_jax.planning import memory
from kepo_jax.training import assembly, forward, inputs, state, step

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
SMALL = model_config.Qwen3VLConfig(
  text=model_config.TextConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    mrope_section=(6, 5, 5),
  ),
  vision=model_config.VisionConfig(
    depth=2,
    hidden_size=64,
    intermediate_size=256,
    num_heads=4,
    out_hidden_size=128,
    num_position_embeddings=64,
    deepstack_visual_indexes=(0,),
  ),
  tie_word_embeddings=True,
)


def plan(student=SMALL, teacher=SMALL, mesh=ONE, **changes):
  config = kepo.get_config()
  for name, value in changes.items():
    section, field = name.split("__")
    config[section][field] = value
  models = {"student": student} | ({"teacher": teacher} if teacher else {})
  return types.RunPlan(
    config=config, workdir="", models=models, mesh=mesh, questions={}, programs=(), start_step=0
  )  # fmt: skip


@pytest.mark.parametrize("size", ["Qwen3-VL-2B", "Qwen3-VL-32B"])
def test_one_device_holds_every_parameter(size):
  config = model_config.SIZES[size]
  count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(config, jnp.float32)))
  assert memory.parameters_per_device(config, ONE) == count
  billions = float(size.split("-")[-1].rstrip("B"))
  assert billions < count / 1e9 < 1.1 * billions


def test_a_mesh_divides_what_divides():
  config = model_config.SIZES["Qwen3-VL-2B"]
  whole = memory.parameters_per_device(config, ONE)
  per_device = memory.parameters_per_device(config, {"data": 4, "fsdp": 8, "tensor": 1})
  assert whole / 8 <= per_device < 1.01 * whole / 8  # data does not divide weights; norms and biases stay whole
  # The decode layout holds weights whole over fsdp and splits all but the vision tower over tensor.
  assert memory.parameters_per_device(config, {"data": 1, "fsdp": 8, "tensor": 1}, "decode") == whole
  halves = memory.parameters_per_device(config, {"data": 1, "fsdp": 1, "tensor": 2}, "decode")
  assert whole / 2 < halves < 0.62 * whole


def test_parts_by_hand():
  parts = memory.estimate(plan(sampling__max_new_tokens=32, data__prompt_buckets=(16, 64), batch__prompts=8))
  count = memory.parameters_per_device(SMALL, ONE)
  assert parts["student and moments"] == 12 * count  # float32 weights and two moments
  assert parts["teacher"] == 4 * count
  # Keys and values, 2 layers, 8 prefixes of 64 and 64 completions of 32, 2 heads of 32, float32; three logit arrays.
  caches = 2 * 2 * (8 * 64 + 64 * 32) * 2 * 32 * 4
  assert parts["sampling"] == 4 * count + caches + 3 * 64 * 1000 * 4  # beside the copy of the weights that decodes
  stays = parts["student and moments"] + parts["teacher"]
  assert parts["peak"] == stays + max(parts["sampling"], parts["scoring"], parts["update"])


OPTIMIZER = state.make_optimizer(lambda _: 1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0)


def test_evaluation_by_hand():
  changes = {"eval__prompts": 64, "eval__max_new_tokens": 32, "data__prompt_buckets": (16, 64)}
  parts = memory.estimate(plan(**changes))
  # One prefix of 64 and one completion of 32 for each of 64 questions, 2 layers, 2 heads of 32, float32; three logits.
  expected = 2 * 2 * 64 * (64 + 32) * 2 * 32 * 4 + 3 * 64 * 1000 * 4
  copy = 4 * memory.parameters_per_device(SMALL, ONE)
  assert parts["evaluation"] == expected + copy
  eight = memory.estimate(plan(mesh={"data": 8, "fsdp": 1, "tensor": 1}, **changes))
  assert eight["evaluation"] == expected // 8 + copy
  # 64 questions do not divide over 24 devices, but over the 8 of the data axis: three devices hold the same ones.
  mesh = {"data": 8, "fsdp": 3, "tensor": 1}
  copy = 4 * memory.parameters_per_device(SMALL, mesh, "decode")
  assert memory.estimate(plan(mesh=mesh, **changes))["evaluation"] == expected // 8 + copy


@pytest.mark.parametrize("fsdp", [1, 2])
def test_hints_by_hand(fsdp):
  mesh = {"data": 1, "fsdp": fsdp, "tensor": 1}
  large = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, num_hidden_layers=40))
  changes = {"exploration__hint_tokens": 24, "data__prompt_buckets": (16, 64), "batch__prompts": 8}
  parts = memory.estimate(plan(teacher=large, mesh=mesh, **changes))
  # A prefix of 64 and a hint of 24 for each of 8 prompts, which fsdp divides, in 40 layers; 3 logit arrays of all 8.
  caches = 2 * 40 * (8 // fsdp) * (64 + 24) * 2 * 32 * 4
  # The student's copy that decodes waits, and there is none of the teacher.
  copy = 4 * memory.parameters_per_device(SMALL, mesh, "decode")
  assert parts["hints"] == copy + caches + 3 * 8 * 1000 * 4


def test_answers_of_the_teacher_by_hand():
  changes = {"supervised__source": "teacher", "batch__on_policy_fraction": 0.5, "batch__rollouts": 4}
  changes |= {"sampling__max_new_tokens": 32, "exploration__hint_tokens": 24, "data__prompt_buckets": (16, 64)}
  parts = memory.estimate(plan(batch__prompts=8, **changes))
  caches = 2 * 2 * 8 * (64 + 2 * 32) * 2 * 32 * 4  # two answers for each of 8 prompts
  assert parts["hints"] == 4 * memory.parameters_per_device(SMALL, ONE) + caches + 3 * 16 * 1000 * 4


def test_a_cache_that_grows_is_there_twice():
  whole = {length: memory.estimate(plan(sampling__max_new_tokens=length))["sampling"] for length in (256, 300, 1024)}
  slot = 2 * 2 * 64 * 2 * 32 * 4  # keys and values of a token of each of 64 completions
  assert whole[300] - whole[256] == slot * 300  # 256 and 300 of them instead of 256
  assert whole[1024] - whole[256] == slot * (768 + 1024 - 256)


def test_a_large_evaluation_sets_the_peak():
  parts = memory.estimate(plan(eval__prompts=100_000))
  stays = parts["student and moments"] + parts["teacher"]
  assert parts["peak"] == stays + parts["evaluation"] > stays + parts["update"]
  assert "evaluation" in memory.estimate(plan(eval__every=0)) and "evaluation" in memory.estimate(
    plan(eval__test=False)
  )
  assert "evaluation" not in memory.estimate(plan(eval__every=0, eval__test=False))


def test_a_frozen_vision_tower_has_neither_moments_nor_gradients():
  whole, frozen = memory.estimate(plan()), memory.estimate(plan(model__freeze_vision=True))
  vision = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(SMALL, jnp.float32)["visual"]))
  assert whole["student and moments"] - frozen["student and moments"] == 2 * 4 * vision
  assert whole["update"] - frozen["update"] > 4 * vision
  assert frozen["sampling"] == whole["sampling"]
  # What the optimizer holds, its counters apart.
  params = model.abstract_params(SMALL, jnp.float32)
  moments = jax.eval_shape(OPTIMIZER.init, state.trained(params, ("visual",)))
  held = sum(4 * leaf.size for leaf in jax.tree.leaves((params, moments)))
  assert 0 <= held - frozen["student and moments"] < 64


def with_lora(config):
  return dataclasses.replace(config, lora=model_config.LoraConfig(rank=8, alpha=16.0, targets=("q_proj", "down_proj")))


def test_lora_has_gradients_and_moments_of_its_matrices_alone():
  lora = {"model__lora_rank": 8, "model__lora_targets": ("q_proj", "down_proj")}
  student, half = with_lora(SMALL), {"model__compute_dtype": "bfloat16"}
  whole = memory.estimate(plan(**half))
  parts = memory.estimate(plan(student=student, **lora, **half))
  count = memory.parameters_per_device(SMALL, ONE)
  # Two layers: queries 128 -> 128, the MLP's way down 384 -> 128.
  matrices = 2 * 8 * ((128 + 128) + (384 + 128))
  assert parts["student and moments"] == 2 * count + 3 * 4 * matrices
  assert whole["student and moments"] == 3 * 4 * count
  # Two sets of gradients, as the terms are compared, and the copy in the compute dtype; the tower is run forwards.
  assert whole["update"] - parts["update"] > 10 * (count - matrices)
  # Merged weights are as many as any other copy.
  assert parts["sampling"] == whole["sampling"]
  assert memory.estimate(plan(student=student, **lora))["sampling"] == memory.estimate(plan())["sampling"]
  # What the optimizer holds, its counters apart.
  params = model.abstract_params(student, jnp.bfloat16)
  moments = jax.eval_shape(OPTIMIZER.init, {"lora": params["lora"]})
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, moments)))
  assert 0 <= held - parts["student and moments"] < 64


def test_a_comparison_of_gradients_holds_a_second_set():
  compared, alone = memory.estimate(plan()), memory.estimate(plan(log__gradients_every=0))
  assert compared["update"] - alone["update"] == 4 * memory.parameters_per_device(SMALL, ONE)
  grpo = {"objective__distill_weight": 0.0}
  assert memory.estimate(plan(**grpo)) == memory.estimate(plan(**grpo, log__gradients_every=0))


def test_the_student_decodes_from_a_copy_and_the_teacher_from_the_weights_that_it_has():
  count = memory.parameters_per_device(SMALL, ONE)
  large = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, intermediate_size=384 * 100))
  # A hundred times the MLP is no longer cache.
  hints = memory.estimate(plan())["hints"]
  assert hints == memory.estimate(plan(teacher=large))["hints"]
  assert hints - memory.estimate(plan(model__compute_dtype="bfloat16"))["hints"] == 2 * count
  # Whole over fsdp, where prompts are cut: the copy of the student, and no other.
  cut = memory.estimate(plan(teacher=large, mesh={"data": 1, "fsdp": 4, "tensor": 1}))["hints"]
  assert 4 * count < cut < hints
  assert "hints" not in memory.estimate(plan(exploration__rounds=0))


def test_what_a_user_turns_down_costs_less():
  whole = memory.estimate(plan())["update"]
  for change in ({"batch__micro_batches": 4}, {"model__remat": "full"}, {"objective__chunk": 8}):
    assert memory.estimate(plan(**change))["update"] < whole
  assert memory.estimate(plan(mesh={"data": 8, "fsdp": 1, "tensor": 1}))["update"] < whole / 2
  assert "scoring" not in memory.estimate(plan(teacher=None))


def arguments(config, prompts, rollouts, prompt_tokens, new_tokens, patches):
  """Shapes of what the update takes: experience and the teacher's target."""

  def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  vision = types.VisionInputs(
    patches=shaped(prompts, patches, config.vision.patch_width),
    segments=shaped(prompts, patches, dtype=jnp.int32),
    coordinates=shaped(prompts, patches, 2, dtype=jnp.int32),
    table_index=shaped(prompts, patches, 4, dtype=jnp.int32),
    table_weight=shaped(prompts, patches, 4),
  )
  batch = types.Prompts(
    tokens=shaped(prompts, prompt_tokens, dtype=jnp.int32),
    mask=shaped(prompts, prompt_tokens, dtype=bool),
    positions=shaped(prompts, 3, prompt_tokens, dtype=jnp.int32),
    next_position=shaped(prompts, dtype=jnp.int32),
    image_slot=shaped(prompts, prompt_tokens, dtype=jnp.int32),
    row=shaped(prompts, dtype=jnp.uint32),
    vision=vision,
  )
  rows = (prompts, rollouts, new_tokens)
  experience = types.Experience(
    prompts=batch,
    tokens=shaped(*rows, dtype=jnp.int32),
    mask=shaped(*rows, dtype=bool),
    logps=shaped(*rows),
    advantages=shaped(prompts, rollouts),
    gate=shaped(prompts, rollouts, dtype=bool),
    injected=shaped(prompts, rollouts, dtype=bool),
    supervised=shaped(prompts, rollouts, dtype=bool),
    kept=shaped(prompts, rollouts, dtype=bool),
  )
  target = forward.Target(
    hidden=shaped(*rows, config.text.hidden_size), head=shaped(config.text.vocab_size, config.text.hidden_size)
  )
  return experience, (target,)


@pytest.mark.parametrize("moments", ["bfloat16", "float8"])
@pytest.mark.parametrize("freeze", [False, True])
def test_moments_in_fewer_bits(moments, freeze):
  parts = memory.estimate(plan(optimizer__moments=moments, model__freeze_vision=freeze))
  params = model.abstract_params(SMALL, jnp.float32)
  optimizer = state.make_optimizer(
    lambda _: 1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0, moments_dtype=moments
  )
  kept = jax.eval_shape(optimizer.init, state.trained(params, ("visual",) if freeze else ()))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, kept)))
  assert 0 <= held - parts["student and moments"] < 64  # counters
  whole = memory.estimate(plan(model__freeze_vision=freeze))
  assert whole["update"] == parts["update"] and whole["peak"] - parts["peak"] == (
    whole["student and moments"] - parts["student and moments"]
  )


def test_scales_are_cut_as_the_rows_of_their_parameters():
  mesh = {"data": 1, "fsdp": 2, "tensor": 2}
  count = memory.parameters_per_device(SMALL, mesh)
  scales = memory.estimate(plan(mesh=mesh, optimizer__moments="float8"))["student and moments"] - 6 * count
  placed = sharding.weight_shardings(
    jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)),
    model.abstract_params(SMALL),
    model.logical_axes(SMALL),
  )
  rows = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)[:-1]), model.abstract_params(SMALL), placed)
  assert scales == 2 * 4 * sum(jax.tree.leaves(rows))


def test_products_that_are_kept_by_hand():
  settings = {
    "batch__prompts": 2,
    "batch__rollouts": 3,
    "sampling__max_new_tokens": 32,
    "data__prompt_buckets": (64,),
    "data__patch_buckets": (16,),
  }
  none, dots, offloaded, full = (
    memory.estimate(plan(**settings, model__remat=remat))["update"]
    for remat in ("none", "dots", "dots_offloaded", "full")
  )
  # Per token of 2 prompts and 6 completions, in 2 layers: queries and keys, values (4 + 2 * 2 heads of 32), what
  # attention and MLP return (2 * 128), gate and up (2 * 384). Per patch, in 2 blocks: 3 + 1 + 1 widths of 64, and 256.
  text = (2 * 64 + 6 * 32) * (8 * 32 + 2 * 128 + 2 * 384)
  vision = 2 * 16 * (5 * 64 + 256)
  assert dots - full == 4 * 2 * (text + vision)
  assert offloaded == full < dots < none


def test_logits_and_the_layer_that_is_computed_again_take_turns():
  wide = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, vocab_size=20_000))

  def update(remat, chunk):
    changes = {"model__remat": remat, "objective__chunk": chunk, "sampling__max_new_tokens": 64}
    return memory.estimate(plan(wide, wide, **changes, log__gradients_every=0))["update"]

  logits = 4 * 8 * 20_000  # of a token: 3 float32 arrays of the student, 5 of the teacher and the divergence
  assert update("none", 2048) - update("none", 1024) == 1024 * logits
  assert update("full", 2048) - update("full", 1024) == 1024 * logits
  assert update("full", 128) == update("full", 64)  # smaller than a layer


def test_a_teacher_in_host_memory_counts_in_its_phases():
  large = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, num_hidden_layers=40))
  changes = {"teacher": large, "optimizer__learning_rate": 0.1}
  there, away = (memory.estimate(plan(**changes, model__teacher_memory=place)) for place in ("device", "host"))
  teacher = 4 * memory.parameters_per_device(large, ONE)
  assert away["teacher in host memory"] == there["teacher"] == teacher and "teacher" not in away
  assert away["scoring"] - there["scoring"] == teacher
  assert away["hints"] == teacher + max(away["sampling"], there["hints"])  # candidates are sampled beside it
  assert away["update"] - there["update"] == 4 * 1000 * 128  # its head
  assert (away["sampling"], away["evaluation"]) == (there["sampling"], there["evaluation"])
  student = there["student and moments"]
  assert there["peak"] == student + teacher + there["update"]
  assert away["peak"] == student + max(away["scoring"], away["hints"], away["update"]) < there["peak"]


def test_what_the_optimizer_needs_is_what_is_compiled():
  shapes = {"table": (4096, 128)} | {f"stack{n}": (8, 128, 256) for n in range(4)}
  params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  counter = jax.ShapeDtypeStruct((), jnp.int32)
  first = state.TrainState(
    step=counter, params=params, opt_state=jax.eval_shape(OPTIMIZER.init, params), skipped=counter
  )
  apply = jax.jit(lambda *args: step.apply_gradients(OPTIMIZER, *args, steps=1), donate_argnums=0)
  compiled = apply.lower(first, params, jax.ShapeDtypeStruct((), jnp.float32)).compile().memory_analysis()
  expected = 4 * memory._OPTIMIZER_ARRAYS * sum(leaf.size for leaf in params.values())
  assert expected / 1.5 < compiled.temp_size_in_bytes < 1.5 * expected


@pytest.mark.slow
@pytest.mark.parametrize(
  ("vocabulary", "layers", "remat", "parts", "freeze", "rank"),
  [
    (1000, 4, "none", 1, False, 0),
    (1000, 4, "none", 1, True, 0),
    (1000, 4, "dots", 1, False, 0),
    (1000, 4, "full", 2, False, 0),
    (20_000, 2, "full", 1, False, 0),
    (1000, 4, "none", 1, False, 8),
    (20_000, 2, "full", 2, False, 8),
  ],
)
def test_the_update_needs_what_was_estimated(vocabulary, layers, remat, parts, freeze, rank):
  text = dataclasses.replace(SMALL.text, vocab_size=vocabulary, num_hidden_layers=layers)
  teacher = dataclasses.replace(SMALL, text=text)
  config = with_lora(teacher) if rank else teacher
  planned = plan(
    student=config, teacher=teacher, batch__prompts=4, batch__rollouts=4, batch__micro_batches=parts,
    sampling__max_new_tokens=64, data__prompt_buckets=(64,), data__patch_buckets=(64,), objective__chunk=32,
    model__remat=remat, model__freeze_vision=freeze, model__lora_rank=rank, log__gradients_every=0,
  )  # fmt: skip
  estimate = memory.estimate(planned)["update"]
  params = model.abstract_params(config, jnp.float32)
  token_loss = losses.KepoTokenLoss(allowed=jnp.ones(vocabulary, bool))
  settings = inputs.UpdateSettings(
    compute_dtype=jnp.float32, chunk=32, parts=parts, remat=remat, frozen=assembly.frozen_parts(planned.config)
  )
  experience, targets = arguments(config, 4, 4, 64, 64, 64)
  steps = jax.ShapeDtypeStruct((), jnp.int32)
  weighted = jax.eval_shape(inputs.make_inputs(config, token_loss, settings), params, steps, experience)
  gradients = jax.jit(step.make_gradients(config, token_loss, settings))
  compiled = gradients.lower(params, experience, weighted, targets).compile().memory_analysis()
  ratio = estimate / (compiled.temp_size_in_bytes + compiled.output_size_in_bytes)
  assert abs(math.log(ratio)) < math.log(1.5), ratio
