"""What needs the compiler of a TPU, libtpu, is marked tpu: `make test-tpu` installs it and runs these."""

import dataclasses
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import floors
from experiments.benchmark.step import MEDIUM
from experiments.configs import kepo, kepo_medvqa
from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import SIZES
from kepo_jax.planning import chips, hlo
from kepo_jax.planning import compile as compiler
from kepo_jax.training import compile_ahead, compiling, setup
from tests.planning.test_memory import compiled_by, updated, with_text
from tests.test_torus import busiest_link
from tests.training.runs import changed

AXES = sharding.MESH_AXES
LENGTHS = compiler.Lengths(prompt_tokens=64, hinted_tokens=128, patches=64)
CHIP = chips.Chip("a chip", 1e12, 1e11, 1e9, ici=1e9, network=1e8)
EVEN = with_text(vocab_size=1024)  # whose dimensions divide over every mesh here
LARGE = 64 * 2**20  # bytes from which on an array should not lie whole on every device


def config_of(**changes):
  return changed(kepo, **{"sampling__max_new_tokens": 32, "exploration__hint_tokens": 8} | changes)


def run_of(mesh, **changes):
  return compiler.AbstractRun(config_of(**changes), {"student": EVEN, "teacher": EVEN}, mesh, LENGTHS)


def plan_of(run, slices=1):
  place = compiler.Topology("v0:2x4", slices, tuple(run.mesh.devices.flat), CHIP)
  return run.plan(place, compiled=lambda name, seconds: None)


def program_of(cost=hlo.Cost(), runs=1.0, **sizes):  # noqa: B008, it is frozen
  sizes = dict.fromkeys(("arguments", "results", "temporaries", "resident", "code"), 0.0) | sizes
  return compiler.ProgramPlan("update", "a program", runs, 1.0, cost=cost, token=hlo.Cost(), **sizes)


@pytest.fixture(scope="module")
def run(mesh_of):
  return run_of(mesh_of(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def plan(run):
  return plan_of(run, slices=2)


def program_named(plan, phase, name):
  (program,) = (program for program in plan.programs if (program.phase, program.name) == (phase, name))
  return program


@pytest.mark.slow
def test_every_program_of_a_step_compiles(plan):
  assert plan.failures == {} and plan.fits
  assert [(each.phase, each.name, each.runs) for each in plan.programs if each.phase != "decode weights"] == [
    ("sampling", "the student's sampler", 1),
    ("hints", "the teacher's sampler", 1),
    ("candidates", "the student's sampler", 1),
    ("scoring", "scoring by a frozen model", 1),
    ("update", "the inputs of the loss", 1),
    # Every 20th step computes the gradients of two terms as well, and compares them.
    ("update", "the gradients", 1.1),
    ("update", "the comparison of gradients", 0.05),
    ("update", "the optimizer", 1),
  ]
  # The student decodes from a copy, made layer by layer. The teacher's weights are cut over fsdp as well, and stay.
  assert program_named(plan, "decode weights", "the decode weights of a layer").runs == 2


@pytest.mark.slow
def test_memory_while_a_program_runs(run, plan):
  weights, moments = (compiler.bytes_per_device(each) for each in (run.state.params, run.state.opt_state))
  teacher = compiler.bytes_per_device(run.models["teacher"].params)
  shapes = model.abstract_params(EVEN, jnp.float32)
  places = sharding.weight_shardings(run.mesh, shapes, model.logical_axes(EVEN), "decode")
  pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
  copy = sum(4 * math.prod(place.shard_shape(x.shape)) for x, place in pairs)
  for phase, name in (("sampling", "the student's sampler"), ("hints", "the teacher's sampler")):
    assert program_named(plan, phase, name).resident == pytest.approx(weights + moments + teacher + copy, abs=32)
  gradients, optimizer, comparison = (
    program_named(plan, "update", f"the {name}") for name in ("gradients", "optimizer", "comparison of gradients")
  )
  assert gradients.results == pytest.approx(weights, rel=0.01)  # and metrics
  # The gradients of one term wait for those of the other.
  assert optimizer.resident == gradients.resident == comparison.resident - weights
  alone = run_of(run.mesh, log__gradients_every=0)
  with alone.in_force():
    assert alone.resident("update", "the gradients") == gradients.resident - weights
  for program in plan.programs:
    assert 0 < program.arguments < 1.05 * program.resident
    assert program.total == program.resident + program.temporaries + program.results


def test_a_teacher_on_the_hosts_is_there_for_all_rounds_of_exploration(run):
  comes = run_of(run.mesh, model__teacher_memory="host")
  teacher = compiler.bytes_per_device(run.models["teacher"].params)
  for phase in ("hints", "candidates", "answers", "scoring"):
    assert comes.resident(phase, "") == run.resident(phase, "")
  assert comes.resident("sampling", "") == run.resident("sampling", "") - teacher


@pytest.mark.slow
def test_compiled_programs_have_the_products_of_the_traced_ones(run, plan):
  # On a device an eighth, and of vision towers, which tensor does not cut, a quarter.
  settings, where = setup.update_settings(run.config), {"chip": CHIP, "devices": 8}
  token_loss = setup.token_loss(run.config, compiler.special_tokens(EVEN))
  samples, tokens = run.config.batch.rollouts, run.config.sampling.max_new_tokens
  with run.in_force():
    batch, targets = run.experience(), run.targets()
    sampled = floors.sampling(EVEN, jnp.float32, run.prompts(8, 64), samples=samples, new_tokens=tokens, **where)
    scored = floors.scoring(EVEN, jnp.float32, batch.prompts, batch.tokens)
    learned = floors.update(EVEN, token_loss, settings, run.state, batch, targets, **where)
  for phase, name, work in [
    ("sampling", "the student's sampler", sampled),
    ("scoring", "scoring by a frozen model", scored),
    ("update", "the gradients", learned),
  ]:
    assert 1 / 8 < program_named(plan, phase, name).cost.flops / work.flops < 1.15 / 8, phase


def test_floors_and_peak_by_hand():
  cost = hlo.Cost(2e12, 3e11, (hlo.Collective("all-reduce", 1e9, group=8, slices=2),))
  first, second = program_of(cost, runs=3.0, resident=5.0, code=1.0), program_of(runs=1.0, resident=4.0, results=3.0)
  # 3/4 of the array twice in the slice of 4; a quarter of it crosses.
  assert first.floors(CHIP) == {"flops": 2.0, "hbm": 3.0, "ici": 1.5, "network": 2.5}
  plan = compiler.Plan(compiler.Topology("v0:4", 2, (), CHIP), {}, (first, second), {})
  assert plan.floor == 3 * 3.0 and plan.peak == 4 + 3 + 1
  record = json.loads(json.dumps(compiler.record(config_of(), dataclasses.replace(plan, mesh=dict.fromkeys(AXES, 2)))))
  assert record["fits"] and record["peak_bytes"] == 8 and record["floor_seconds"] == 9.0
  assert record["programs"][0]["crossed"] == {"all-reduce": 2.5e8} and record["programs"][1]["total"] == 7.0


def test_traffic_by_kind_and_axes():
  rows = ((0, 1), (2, 3), (4, 5), (6, 7))
  collectives = (
    hlo.Collective("all-gather", 1e9, 2, groups=((0, 2), (1, 3), (4, 6), (5, 7))),
    hlo.Collective("all-reduce", 2e9, 2, groups=rows), hlo.Collective("all-reduce", 1e9, 2, groups=rows),
    hlo.Collective("all-reduce", 1e9, 8, 2, groups=(tuple(range(8)),)), hlo.Collective("one-to-one", 1e7, 2, 2),
  )  # fmt: skip
  rows = compiler.traffic(hlo.Cost(0, 0, collectives), dict.fromkeys(AXES, 2))
  assert [(row["kind"], row["over"], row["sent"], row["crossed"]) for row in rows] == [
    ("all-reduce", ("tensor",), 3e9, 0), ("all-reduce", AXES, 1.5e9, 2.5e8), ("all-gather", ("fsdp",), 5e8, 0),
    ("one-to-one", (), 0, 1e7),
  ]  # fmt: skip


CACHE = (8, 2, 8, 32, 32)  # P, heads, G, T, width of keys and of values


def test_no_weight_and_no_cache_is_gathered_for_a_token_of_the_student(run):
  run = run_of(run.mesh)  # what has compiled once is not seen again
  programs = compiled_by(run, lambda run: run.programs.rollout(run.actor(), run.prompts(8, 64), run.key))
  text, tokens = programs["the student's sampler"].as_text(), compiler.token_turns(32)
  layer = sum(4 * x.size for x in jax.tree.leaves(model.abstract_params(EVEN)["language_model"]["layers"])) / 2
  gathered = hlo.cost(text, turns=tokens).sent.get("all-gather", 0.0)
  assert gathered < layer / 10  # in 31 turns together
  assert gathered / sum(tokens) < 4 * math.prod(CACHE) / 8
  # Caches are cut over the mesh: prompts over data and fsdp, heads over tensor.
  carried = {array.shape for array in hlo.Program(text).carried()}
  assert CACHE not in carried and (2, 1, *CACHE[2:]) in carried


def teacher_sampler_of(mesh, prompts):
  programs = compiled_by(
    run_of(mesh), lambda run: run.programs.hint(run.prompts(prompts, 64), compile_ahead.key_shapes(mesh, 1, 1))
  )
  assert list(programs) == ["the teacher's sampler"]  # and nothing that would copy its weights
  return programs["the teacher's sampler"].as_text()


def assert_only_sums_are_sent(text, tensor):
  """For a token of a hint, after what prompts take."""
  turns = compiler.token_turns(8)
  total, prompts = (hlo.cost(text, turns=each).sent for each in (turns, (0,) * len(turns)))
  sent = {kind: (size - prompts.get(kind, 0.0)) / sum(turns) for kind, size in total.items()}
  smallest = 4 * 64 * 128 / tensor  # matrix of a layer
  assert sent.get("all-gather", 0.0) < smallest / 4
  # Sums over fsdp 4 of what eight rows have of logits, and of queries, keys, values, gate and up in both layers.
  sums = 2 * 3 / 4 * 4 * 8 * (1024 + 2 * (128 + 2 * 64 + 2 * 384)) / tensor
  assert 0 < sum(sent.values()) < 1.2 * sums  # and some of rows of the width


def test_no_weight_of_a_teacher_is_gathered_for_a_token(mesh_of):
  assert_only_sums_are_sent(teacher_sampler_of(mesh_of(fsdp=4, tensor=2), 8), tensor=2)


@pytest.mark.slow
def test_prompts_that_do_not_divide_gather_no_weight_and_are_not_repeated(mesh_of):
  split, alone = (teacher_sampler_of(mesh_of(**axes), 2) for axes in ({"fsdp": 4}, {}))
  assert_only_sums_are_sent(split, tensor=1)
  # Each device has a share of their products, since it has a share of each weight.
  split, alone = (hlo.cost(text, turns=(0,) * len(compiler.token_turns(8))).flops for text in (split, alone))
  assert split < 0.35 * alone


def paper_run(mesh, prompts):
  config = changed(kepo_medvqa, batch__prompts=prompts)
  models = {"student": SIZES["Qwen3-VL-2B"], "teacher": SIZES["Qwen3-VL-32B"]}
  return compiler.AbstractRun(config, models, mesh, LENGTHS)


@pytest.mark.slow
def test_no_program_of_the_paper_makes_anything_large_whole(mesh_of):
  prompts = 6  # a size that nothing else has
  run = paper_run(mesh_of(fsdp=2, tensor=4), prompts)
  executables = compiled_by(run, updated)
  assert set(executables) == {"scoring by a frozen model", "the inputs of the loss", "the gradients", "the optimizer"}
  weights = [x for each in run.models.values() for x in jax.tree.leaves(each.params) if len(x.shape) > 1]
  # A weight is cut if any of its dimensions is; a share of one weight may have the shape of another.
  uncut = {tuple(sorted(x.shape)) for x in weights}
  uncut -= {tuple(sorted(x.sharding.shard_shape(x.shape))) for x in weights if not x.sharding.is_fully_replicated}
  for name, executable in executables.items():
    program = hlo.Program(executable.as_text())
    for array in [*program.carried(), *program.results()]:
      cut = prompts not in array.shape and tuple(sorted(array.shape)) not in uncut
      assert cut or array.size < LARGE, (name, array.shape)


def excess(tree, cut, tower):
  """Bytes of a tree on a device over those of a tree that is cut over so many; what has one axis is not cut."""
  large = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree) if x.ndim > 1]
  least = sum(x.size * x.dtype.itemsize / (tower if "visual" in path else cut) for path, x in large)
  return compiler.bytes_per_device([x for _, x in large]) / least


def test_what_the_paper_holds_is_cut_as_far_as_the_table_says(mesh_of):
  for data, fsdp, tensor in ((1, 8, 1), (2, 2, 2), (1, 2, 4)):
    run = paper_run(mesh_of(data, fsdp, tensor), 16)
    with run.in_force():
      # Weights and moments over fsdp and tensor, a vision tower over fsdp alone; rows over data and fsdp.
      held = [(run.experience(), data * fsdp, data * fsdp)]
      held += [((run.state.params, run.state.opt_state), fsdp * tensor, fsdp)]
      held += [(run.models["teacher"].params, fsdp * tensor, fsdp)]
    for tree, *share in held:
      assert excess(tree, *share) < 1.01, run.mesh


def test_copies_and_scores_are_cut_as_far_as_the_table_says(run):
  with run.in_force():
    assert excess(run.actor(), 2, 1) < 1.01  # decodes over tensor alone, its vision tower not cut
    assert excess([target.hidden for target in run.targets()], 4, 4) < 1.01


def test_lengths_and_turns_of_a_run():
  assert [compiler.token_turns(tokens) for tokens in (24, 256, 1024)] == [(23,), (255,), (255, 256, 256, 256)]
  assert compiler.usual_lengths(changed(kepo_medvqa)) == compiler.Lengths(512, 1024, 576)
  assert compiler.usual_lengths(config_of(data__prompt_buckets=(64,))) == compiler.Lengths(64, 64, 64)
  special = compiler.special_tokens(EVEN)
  assert not special.allowed[[*special.end_ids, 5, 6, 7, 8]].any() and special.allowed.sum() == 1024 - 5


def test_a_plan_keeps_what_the_compiler_refuses(mesh_of, monkeypatch):
  run = run_of(mesh_of(fsdp=2))

  def refused(*arguments):
    raise compiling.CompilationError("out of memory")

  refusing = dict.fromkeys(("rollout", "hint", "candidate", "targets"), refused)
  monkeypatch.setattr(run, "programs", dataclasses.replace(run.programs, **refusing))
  plan = plan_of(run)
  assert not plan.fits and plan.peak == math.inf
  # Without scores nothing is known of an update.
  assert plan.failures == dict.fromkeys(("sampling", "hints", "candidates", "scoring"), "out of memory")
  assert {program.phase for program in plan.programs} == {"decode weights"}


def test_names_of_topologies_that_are_refused(monkeypatch):
  for name in ("v5e", "v5e:", "v5e:4", "8x8", "v5e-16"):
    with pytest.raises(ValueError, match=r"--topology=.* is not of the form v5e:8x8; for example v5e:4x4"):
      compiler.topology(name)
  with pytest.raises(ValueError, match=r"--topology='2 x v5e:4x4' and --slices=3 contradict each other"):
    compiler.topology("2 x v5e:4x4", 3)
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(ValueError, match=r"pip install jax\[tpu\], or `make plan`"):
    compiler.topology("v5e:4x4")


def test_a_core_has_its_share():
  def peaks(kind, cores):
    return compiler.device_peaks(types.SimpleNamespace(device_kind=kind, platform="tpu"), cores)

  chip, core = (peaks("TPU v4", cores) for cores in (1, 2))
  assert chip == chips.CHIPS["TPU v4"]
  assert (core.flops, core.memory, core.ici) == (chip.flops / 2, chip.memory / 2, chip.ici / 2)
  assert peaks("TPU7x", 2) is chips.CHIPS["TPU7"]  # the data sheet is that of a core
  with pytest.raises(ValueError, match=r"nothing is known about TPU v99; kepo_jax/planning/chips.py has \["):
    peaks("TPU v99", 1)


def test_a_mesh_takes_all_chips_as_a_pod_does():
  place = compiler.Topology("v5e:2x4", 1, tuple(jax.devices()), CHIP)
  assert place.mesh(-1, 2, 2).size == len(jax.devices()) == 8
  with pytest.raises(ValueError, match=r"leaves 4 of the 8 chips of v5e:2x4 idle; set mesh.data=-1"):
    place.mesh(1, 2, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "devices"), [("h200", 1), ("H100:8", 8)])
def test_a_step_compiles_for_gpus(name, devices):
  place = compiler.topology(name)
  assert len(place.devices) == devices and place.chip.name.startswith(f"NVIDIA {name[:4].upper()}")
  plan = run_of(place.mesh(devices, 1, 1)).plan(place, compiled=lambda name, seconds: None)
  assert not plan.failures
  for program in plan.programs:
    assert (program.token.kernels > 0) == program.name.endswith("sampler"), program.name


@pytest.mark.tpu
def test_known_topologies():
  for name, devices, chip in [
    ("v5e:4x4", 16, "TPU v5e"), ("2 x v5e:16x16", 512, "TPU v5e"), ("v5p:4x4x4", 64, "TPU v5p"),
    ("v6e:4x4", 16, "TPU v6e"), ("tpu7x:4x4x4", 128, "TPU7x, one core"), ("v4:4x4x4", 64, "TPU v4"),
  ]:  # fmt: skip
    place = compiler.topology(name)
    assert (len(place.devices), place.chip.name) == (devices, chip), name
  with pytest.raises(ValueError, match="--topology=v5e:3x5: "):
    compiler.topology("v5e:3x5")


@pytest.mark.tpu
def test_only_the_data_axis_spans_slices():
  place = compiler.topology("v5e:2x2", 2)
  mesh = place.mesh(2, 2, 2)
  assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
  with pytest.raises(ValueError, match="mesh.data=1 does not divide over 2 slices"):
    place.mesh(1, 4, 2)


@pytest.mark.tpu
def test_groups_of_a_slice_share_no_links_that_they_need_not():
  grid = compiler.topology("v5e:16x16").mesh(4, 8, 8).devices
  assert (busiest_link(grid, 1, 16), busiest_link(grid, 2, 16)) == (7 / 8, 7 / 16)


@pytest.mark.tpu
def test_a_step_compiles_for_tpus():
  place = compiler.topology("v5e:2x2", 2)
  fields = {f"mesh__{axis}": 2 for axis in AXES} | {"log__gradients_every": 0}
  fields |= {"model__compute_dtype": "bfloat16", "model__teacher_dtype": "bfloat16", "model__remat": "full"}
  config = changed(kepo, **fields)
  text = dataclasses.replace(MEDIUM.text, num_hidden_layers=2, vocab_size=2048)
  vision = dataclasses.replace(MEDIUM.vision, depth=2, deepstack_visual_indexes=(0,))
  small = dataclasses.replace(MEDIUM, text=text, vision=vision)
  models, lengths = dict.fromkeys(("student", "teacher"), small), compiler.Lengths(128, 256, 64)
  run = compiler.AbstractRun(config, models, place.mesh(2, 2, 2), lengths)
  with jax.default_matmul_precision("default"):  # which products of bfloat16 in a kernel of its own ask for
    plan = run.plan(place, compiled=lambda name, seconds: print(f"{name}: {seconds:.0f} s"))
  assert plan.failures == {} and plan.fits
  programs = {program.name: program for program in plan.programs if program.phase != "candidates"}
  gradients, scoring = programs["the gradients"], programs["scoring by a frozen model"]
  # Three products for one of the forward pass, and another one for what is computed again; the losses on top.
  assert 3 < gradients.cost.flops / scoring.cost.flops < 6
  weights = compiler.bytes_per_device(run.state.params) * jnp.bfloat16.dtype.itemsize / 4
  assert sum(gradients.cost.sent.values()) > weights  # gathered, and their gradients reduced
  assert sum(gradients.cost.crossed.values()) > 0
  # A token of each row in every turn but the first; prompts on top. Weights so small may stay in the chip's own memory.
  rows, decoder = 8 * 8 / 4, model.abstract_params(small)["language_model"]
  turns = 23 * 2 * rows * sum(x.size for x in jax.tree.leaves(decoder)) / 2
  assert turns < programs["the student's sampler"].cost.flops < 3 * turns
