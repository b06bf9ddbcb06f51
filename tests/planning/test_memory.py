import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark.step import MEDIUM
from experiments.configs import kepo, kepo_eq7, kepo_medvqa
from kepo_jax import types
from kepo_jax.models.qwen3_vl import config as model_config
from kepo_jax.models.qwen3_vl import model, side_files
from kepo_jax.planning import compile as compiler
from kepo_jax.planning import memory
from kepo_jax.training import compiling
from kepo_jax.training import optimizer as optimizer_lib
from kepo_jax.training import update as update_lib
from tests.training.runs import changed

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
TEXT = dataclasses.replace(
  MEDIUM.text, vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, head_dim=32, mrope_section=(6, 5, 5),
)  # fmt: skip
VISION = dataclasses.replace(
  MEDIUM.vision, depth=2, hidden_size=64, intermediate_size=256, out_hidden_size=128,
  num_position_embeddings=64, deepstack_visual_indexes=(0,),
)  # fmt: skip
SMALL = dataclasses.replace(MEDIUM, text=TEXT, vision=VISION)
COUNT = memory.parameters_per_device(SMALL, ONE)
LORA = model_config.LoraConfig(rank=8, alpha=16.0, targets=("q_proj", "down_proj"))
ADAPTED = dataclasses.replace(SMALL, lora=LORA)


def with_text(**changes):
  return dataclasses.replace(SMALL, text=dataclasses.replace(TEXT, **changes))


def plan(student=SMALL, teacher=SMALL, mesh=ONE, **changes):
  config = changed(kepo, **changes)
  models = {"student": student, "teacher": teacher}
  return types.RunPlan(config=config, workdir="", models=models, mesh=mesh, questions={}, programs=(), start_step=0)


def compiled_by(run, call):
  """Name -> executable of the programs that a call compiles."""
  seen = {}
  with run.in_force(), compiling.watched(lambda each: seen.setdefault(each.name, each.executable)):
    call(run)
  return seen


def updated(run):
  return run.programs.update.compile(run.state, run.experience(), run.targets(), compare=False)


def test_models_are_sizes_or_folders_and_those_of_the_run(tmp_path):
  for name in ("Qwen3-VL-2B", "Qwen/Qwen3-VL-2B-Instruct", "/models/Qwen3-VL-2B-Thinking"):
    assert memory.model_sizes(name) == model_config.SIZES["Qwen3-VL-2B"], name
  (tmp_path / "config.json").write_text(json.dumps(side_files.config_record(SMALL)))
  assert memory.model_sizes(str(tmp_path)) == SMALL
  with pytest.raises(ValueError, match="'nowhere' is neither a folder .*Qwen3-VL-2B"):
    memory.model_sizes("nowhere")
  assert set(memory.plan(changed(kepo_eq7, "medvqa")).models) == {"student", "teacher", "reference"}
  config = changed(kepo_medvqa, model__lora_rank=4)
  planned = memory.plan(config, devices=8)
  assert set(planned.models) == {"student", "teacher"} and planned.models["student"].lora.rank == 4
  assert planned.mesh == {"data": 8, "fsdp": 1, "tensor": 1}


def optimizer_of(moments):
  settings = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}
  return optimizer_lib.make_optimizer(lambda _: 1e-4, moments_dtype=moments, **settings)


def estimate(*arguments, **changes):
  return memory.estimate(plan(*arguments, **changes))


def test_one_device_holds_every_parameter_and_a_mesh_divides_what_divides():
  for size, billions in (("Qwen3-VL-2B", 2), ("Qwen3-VL-32B", 32)):
    config = model_config.SIZES[size]
    whole = memory.parameters_per_device(config, ONE)
    assert whole == sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(config, jnp.float32)))
    assert billions < whole / 1e9 < 1.1 * billions
  config = model_config.SIZES["Qwen3-VL-2B"]
  whole = memory.parameters_per_device(config, ONE)
  per_device = memory.parameters_per_device(config, ONE | {"data": 4, "fsdp": 8})
  assert whole / 8 <= per_device < 1.01 * whole / 8  # data does not divide weights; norms and biases stay whole
  # The decode layout holds weights whole over fsdp and splits all but the vision tower over tensor.
  assert memory.parameters_per_device(config, ONE | {"fsdp": 8}, "decode") == whole
  assert whole / 2 < memory.parameters_per_device(config, ONE | {"tensor": 2}, "decode") < 0.62 * whole


def test_parts_by_hand():
  parts = estimate(sampling__max_new_tokens=32, data__prompt_buckets=(16, 64), batch__prompts=8)
  assert parts["student and moments"] == 12 * COUNT  # float32 weights and two moments
  assert parts["teacher"] == 4 * COUNT
  # Keys and values, 2 layers, 8 prefixes of 64 and 64 completions of 32, 2 heads of 32, float32; three logit arrays.
  caches = 2 * 2 * (8 * 64 + 64 * 32) * 2 * 32 * 4
  assert parts["sampling"] == 4 * COUNT + caches + 3 * 64 * 1000 * 4  # beside the copy of the weights that decodes
  stays = parts["student and moments"] + parts["teacher"]
  assert parts["peak"] == stays + max(parts["sampling"], parts["scoring"], parts["update"])


def test_evaluation_by_hand():
  changes = {"eval__prompts": 64, "eval__max_new_tokens": 32, "data__prompt_buckets": (16, 64)}
  # One prefix of 64 and one completion of 32 for each of 64 questions, 2 layers, 2 heads of 32, float32; three logits.
  expected = 2 * 2 * 64 * (64 + 32) * 2 * 32 * 4 + 3 * 64 * 1000 * 4
  # 64 questions do not divide over 24 devices, but over the 8 of the data axis: three devices hold the same ones.
  for split, mesh in ((1, ONE), (8, ONE | {"data": 8}), (8, ONE | {"data": 8, "fsdp": 3})):
    copy = 4 * memory.parameters_per_device(SMALL, mesh, "decode")
    assert estimate(mesh=mesh, **changes)["evaluation"] == expected // split + copy, mesh
  parts = estimate(eval__prompts=100_000)
  assert parts["peak"] == parts["student and moments"] + parts["teacher"] + parts["evaluation"]
  assert all("evaluation" in estimate(**changes) for changes in ({"eval__every": 0}, {"eval__test": False}))
  assert "evaluation" not in estimate(eval__every=0, eval__test=False)


def test_hints_by_hand():
  changes = {"exploration__hint_tokens": 24, "data__prompt_buckets": (16, 64), "batch__prompts": 8}
  for fsdp in (1, 2):
    mesh = ONE | {"fsdp": fsdp}
    parts = estimate(teacher=with_text(num_hidden_layers=40), mesh=mesh, **changes)
    # A prefix of 64 and a hint of 24 for each of 8 prompts, which fsdp divides, in 40 layers; 3 logit arrays of all 8.
    caches = 2 * 40 * (8 // fsdp) * (64 + 24) * 2 * 32 * 4
    # The student's copy that decodes waits, and there is none of the teacher.
    copy = 4 * memory.parameters_per_device(SMALL, mesh, "decode")
    assert parts["hints"] == copy + caches + 3 * 8 * 1000 * 4, mesh
  # Two answers of 32 for each prompt.
  changes |= {"supervised__source": "teacher", "batch__on_policy_fraction": 0.5, "batch__rollouts": 4}
  parts = estimate(sampling__max_new_tokens=32, **changes)
  assert parts["hints"] == 4 * COUNT + 2 * 2 * 8 * (64 + 2 * 32) * 2 * 32 * 4 + 3 * 16 * 1000 * 4


def test_a_cache_that_grows_is_there_twice():
  whole = {length: estimate(sampling__max_new_tokens=length)["sampling"] for length in (256, 300, 1024)}
  slot = 2 * 2 * 64 * 2 * 32 * 4  # keys and values of a token of each of 64 completions
  assert whole[300] - whole[256] == slot * 300  # 256 and 300 of them instead of 256
  assert whole[1024] - whole[256] == slot * (768 + 1024 - 256)


def test_a_frozen_vision_tower_has_neither_moments_nor_gradients():
  whole, frozen = estimate(), estimate(model__freeze_vision=True)
  vision = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params(SMALL)["visual"]))
  assert whole["student and moments"] - frozen["student and moments"] == 2 * 4 * vision
  assert whole["update"] - frozen["update"] > 4 * vision and frozen["sampling"] == whole["sampling"]


def test_lora_has_gradients_and_moments_of_its_matrices_alone():
  fields = {"model__lora_rank": 8, "model__lora_targets": LORA.targets}
  half = {"model__compute_dtype": "bfloat16"}
  whole, parts = estimate(**half), estimate(student=ADAPTED, **fields, **half)
  # Two layers: queries 128 -> 128, the MLP's way down 384 -> 128.
  matrices = 2 * 8 * ((128 + 128) + (384 + 128))
  assert parts["student and moments"] == 2 * COUNT + 3 * 4 * matrices
  assert whole["student and moments"] == 3 * 4 * COUNT
  # Two sets of gradients, as the terms are compared, and the copy in the compute dtype; the tower is run forwards.
  assert whole["update"] - parts["update"] > 10 * (COUNT - matrices)
  # Merged weights are as many as any other copy.
  assert parts["sampling"] == whole["sampling"]
  assert estimate(student=ADAPTED, **fields)["sampling"] == estimate()["sampling"]


def test_a_comparison_of_gradients_holds_a_second_set():
  compared, alone = estimate(), estimate(log__gradients_every=0)
  assert compared["update"] - alone["update"] == 4 * COUNT
  grpo = {"objective__distill_weight": 0.0}
  assert estimate(**grpo) == estimate(**grpo, log__gradients_every=0)


def test_moments_are_those_that_the_optimizer_keeps():
  whole, parts = (estimate(optimizer__moments=each, model__freeze_vision=True) for each in ("float32", "bfloat16"))
  params = model.abstract_params(SMALL, jnp.float32)
  kept = jax.eval_shape(optimizer_of("bfloat16").init, optimizer_lib.trained(params, ("visual",)))
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, kept)))
  assert 0 <= held - parts["student and moments"] < 64  # counters
  saved = whole["student and moments"] - parts["student and moments"]
  assert whole["update"] == parts["update"] and whole["peak"] - parts["peak"] == saved


def test_products_that_are_kept_by_hand():
  settings = {"batch__prompts": 2, "batch__rollouts": 3, "sampling__max_new_tokens": 32}
  settings |= {"data__prompt_buckets": (64,), "data__patch_buckets": (16,)}
  none, dots, full = (estimate(**settings, model__remat=remat)["update"] for remat in ("none", "dots", "full"))
  # Per token of 2 prompts and 6 completions, in 2 layers: queries and keys, values (4 + 2 * 2 heads of 32), what
  # attention and MLP return (2 * 128), gate and up (2 * 384). Per patch, in 2 blocks: 3 + 1 + 1 widths of 64, and 256.
  text = (2 * 64 + 6 * 32) * (8 * 32 + 2 * 128 + 2 * 384)
  vision = 2 * 16 * (5 * 64 + 256)
  assert dots - full == 4 * 2 * (text + vision) and dots < none


def test_logits_and_the_layer_that_is_computed_again_take_turns():
  wide = with_text(vocab_size=20_000)

  def update(remat, chunk):
    fields = {"model__remat": remat, "objective__chunk": chunk, "sampling__max_new_tokens": 64}
    return estimate(wide, wide, **fields, log__gradients_every=0)["update"]

  logits = 4 * 8 * 20_000  # of a token: 3 float32 arrays of the student, 5 of the teacher and the divergence
  assert update("none", 2048) - update("none", 1024) == 1024 * logits
  assert update("full", 2048) - update("full", 1024) == 1024 * logits
  assert update("full", 128) == update("full", 64)  # smaller than a layer
  assert update("none", 1) == update("none", 64) < update("none", 128)  # at least a token of each of 64 rows


def test_a_teacher_in_host_memory_counts_in_its_phases():
  large = with_text(num_hidden_layers=40)
  there, away = (estimate(teacher=large, model__teacher_memory=place) for place in ("device", "host"))
  teacher = 4 * memory.parameters_per_device(large, ONE)
  assert away["teacher in host memory"] == there["teacher"] == teacher and "teacher" not in away
  assert away["scoring"] - there["scoring"] == teacher
  assert away["hints"] == teacher + max(away["sampling"], there["hints"])  # candidates are sampled beside it
  assert away["update"] == there["update"]  # the copy of its head is there in any case
  assert (away["sampling"], away["evaluation"]) == (there["sampling"], there["evaluation"])
  student = there["student and moments"]
  assert there["peak"] == student + teacher + there["update"]
  assert away["peak"] == student + max(away["scoring"], away["hints"], away["update"]) < there["peak"]


def test_what_the_optimizer_needs_is_what_is_compiled():
  shapes = {"table": (4096, 128)} | {f"stack{n}": (8, 128, 256) for n in range(4)}
  params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  counter = jax.ShapeDtypeStruct((), jnp.int32)
  optimizer = optimizer_of("float32")
  kept = jax.eval_shape(optimizer.init, params)
  first = optimizer_lib.TrainState(step=counter, params=params, opt_state=kept, skipped=counter)
  apply = jax.jit(lambda *args: update_lib.apply_gradients(optimizer, *args, steps=1), donate_argnums=0)
  compiled = apply.lower(first, params, jax.ShapeDtypeStruct((), jnp.float32)).compile().memory_analysis()
  expected = 4 * memory._OPTIMIZER_ARRAYS * sum(leaf.size for leaf in params.values())
  assert expected / 1.5 < compiled.temp_size_in_bytes < 1.5 * expected


@pytest.mark.slow
@pytest.mark.parametrize(
  ("vocabulary", "layers", "remat", "parts", "freeze", "rank"),
  [(1000, 4, "none", 1, False, 0), (1000, 4, "dots", 1, True, 0), (20_000, 2, "full", 2, False, 8)],
)
def test_the_update_needs_what_was_estimated(mesh_of, vocabulary, layers, remat, parts, freeze, rank):
  teacher = with_text(vocab_size=vocabulary, num_hidden_layers=layers)
  planned = plan(
    student=dataclasses.replace(teacher, lora=LORA) if rank else teacher, teacher=teacher,
    batch__prompts=4, batch__rollouts=4, batch__micro_batches=parts, sampling__max_new_tokens=64,
    data__prompt_buckets=(64,), data__patch_buckets=(64,), objective__chunk=32, model__remat=remat,
    model__freeze_vision=freeze, model__lora_rank=rank, model__lora_targets=LORA.targets, log__gradients_every=0,
  )  # fmt: skip
  run = compiler.AbstractRun(
    planned.config, dict.fromkeys(("student", "teacher"), teacher), mesh_of(), compiler.Lengths(64, 64, 64)
  )
  compiled = compiled_by(run, updated)["the gradients"].memory_analysis()
  ratio = memory.estimate(planned)["update"] / (compiled.temp_size_in_bytes + compiled.output_size_in_bytes)
  assert abs(math.log(ratio)) < math.log(1.5), ratio
