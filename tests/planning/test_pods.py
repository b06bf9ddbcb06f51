import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import kepo_medvqa
from kepo_jax import sharding
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import SIZES
from kepo_jax.planning import benchmark, chips, floors, hlo, memory, pods, topologies
from kepo_jax.training import assembly, compiling
from tests.planning import test_memory
from tests.planning.test_memory import compiled_by, updated, with_text

AXES = sharding.MESH_AXES
LENGTHS = pods.Sizes(prompt_tokens=64, hinted_tokens=128, patches=64)
CHIP = chips.Chip("a chip", 1e12, 1e11, 1e9, link=1e9, network=1e8)
EVEN = with_text(vocab_size=1024)  # whose dimensions divide over every mesh here


def config_of(**changes):
  return test_memory.changed(**{"sampling__max_new_tokens": 32, "exploration__hint_tokens": 8} | changes)


def run_of(mesh, **changes):
  return pods.PodRun(config_of(**changes), {"student": EVEN, "teacher": EVEN}, mesh, LENGTHS)


def topology_of(devices=tuple(range(8)), slices=1, chip=CHIP):
  return topologies.Topology("v0:2x4", slices, tuple(devices), chip)


def plan_of(run, slices=1, **settings):
  return run.plan(topology_of(run.mesh.devices.flat, slices), compiled=lambda name, seconds: None, **settings)


def program_of(cost=hlo.Cost(), runs=1, calls=1, resident=0.0):  # noqa: B008, it is frozen
  return pods.ProgramPlan("update", "a program", runs, calls, 0, 0, 0, 0, resident, cost)


@pytest.fixture(scope="module")
def run(mesh_of):
  return run_of(mesh_of(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def plan(run):
  return plan_of(run, slices=2, hint_rounds=2)


def found(plan, phase, name):
  (program,) = (each for each in plan.programs if (each.phase, each.name) == (phase, name))
  return program


@pytest.mark.slow
def test_every_program_of_a_step_compiles(plan):
  assert plan.failures == {} and plan.fits
  assert [(each.phase, each.name, each.runs) for each in plan.programs if "decode weights" not in each.name] == [
    ("sampling", "the student's sampler", 1),
    ("hints", "the teacher's sampler", 2),
    ("candidates", "the student's sampler", 2),
    ("scoring", "scoring by a frozen model", 1),
    ("update", "the inputs of the loss", 1),
    # Every 20th step computes the gradients of two terms as well, and compares them.
    ("update", "the gradients", 1.1),
    ("update", "the comparison of gradients", 0.05),
    ("update", "the optimizer", 1),
  ]
  # The student decodes from a copy, since its own weights are cut over fsdp. The teacher's are as well, and stay.
  layers = [each for each in plan.programs if each.name == "the decode weights of a layer"]
  assert [(each.phase, each.calls) for each in layers] == [("decode weights", 2)]


def test_a_teacher_on_the_hosts_is_there_for_all_rounds_of_exploration(mesh_of):
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  stays, comes = (run_of(mesh, model__teacher_memory=place) for place in ("device", "host"))
  teacher = pods.bytes_per_device(stays.models["teacher"].params)
  for phase in ("hints", "candidates", "answers", "scoring"):
    assert comes._resident(phase, "") == stays._resident(phase, "")
  assert comes._resident("sampling", "") == stays._resident("sampling", "") - teacher


@pytest.mark.slow
def test_what_is_there_while_a_program_runs(run, plan):
  weights, moments = pods.bytes_per_device(run.state.params), pods.bytes_per_device(run.state.opt_state)
  teacher = pods.bytes_per_device(run.models["teacher"].params)
  shapes = model.abstract_params(EVEN, jnp.float32)
  places = sharding.weight_shardings(run.mesh, shapes, model.logical_axes(EVEN), "decode")
  pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True)
  copy = sum(4 * math.prod(place.shard_shape(x.shape)) for x, place in pairs)
  stays = weights + moments + teacher + 2 * 4  # two counters
  assert found(plan, "sampling", "the student's sampler").resident == pytest.approx(stays + copy, abs=16)
  assert found(plan, "hints", "the teacher's sampler").resident == pytest.approx(stays + copy, abs=16)
  gradients, optimizer, comparison = (
    found(plan, "update", f"the {name}") for name in ("gradients", "optimizer", "comparison of gradients")
  )
  assert gradients.results == pytest.approx(weights, rel=0.01)  # and figures
  # The gradients of one term wait for those of the other.
  assert optimizer.resident == gradients.resident == comparison.resident - weights
  alone = run_of(run.mesh, log__gradients_every=0)
  with alone._in_force():
    assert alone._resident("update", "the gradients") == gradients.resident - weights
  for each in plan.programs:
    assert each.processor_seconds > 0
    assert 0 < each.arguments < 1.05 * each.resident
    assert each.total == each.resident + each.temporaries + each.results
  coded = dataclasses.replace(plan, programs=(dataclasses.replace(gradients, code=5.0), optimizer))
  assert coded.peak == max(gradients.total, optimizer.total) + 5 + optimizer.code


@pytest.mark.slow
def test_compiled_programs_have_the_products_of_the_traced_ones(run, plan):
  # On a device an eighth, and of vision towers, which tensor does not cut, a quarter.
  settings, where = assembly.update_settings(run.config), {"chip": CHIP, "devices": 8}
  token_loss = assembly.token_loss(run.config, benchmark.special_tokens(EVEN))
  samples, tokens = run.config.batch.rollouts, run.config.sampling.max_new_tokens
  with run._in_force():
    batch, targets = run.experience(), run.targets()
    sampled = floors.sampling(EVEN, jnp.float32, run.prompts(8, 64), samples=samples, new_tokens=tokens, **where)
    scored = floors.scoring(EVEN, jnp.float32, batch.prompts, batch.tokens)
    learned = floors.update(EVEN, token_loss, settings, run.state, batch, targets, **where)
  for phase, name, work in [
    ("sampling", "the student's sampler", sampled),
    ("scoring", "scoring by a frozen model", scored),
    ("update", "the gradients", learned),
  ]:
    assert 1 / 8 < found(plan, phase, name).cost.flops / work.flops < 1.15 / 8, phase


def test_projected_seconds_by_hand():
  program = hlo.Cost(2e12, 3e11, (hlo.Collective("all-reduce", 1e9, group=8, slices=2),))
  each, place = program_of(program, runs=3.0, calls=2), topology_of(slices=2)
  # A ring of 4 in the slice, at the rate of a link. A quarter crosses.
  assert each.floors(place) == {"flops": 2.0, "hbm": 3.0, "link": 1.5, "network": 2.5}
  assert pods.PodPlan(place, {}, (each,), {}).step_seconds == 3 * 2 * (3.0 + 1.5 + 2.5)


def test_traffic_by_kind_and_axes():
  rows = ((0, 1), (2, 3), (4, 5), (6, 7))
  collectives = (
    hlo.Collective("all-gather", 1e9, 2, groups=((0, 2), (1, 3), (4, 6), (5, 7))),
    hlo.Collective("all-reduce", 2e9, 2, groups=rows),
    hlo.Collective("all-reduce", 1e9, 2, groups=rows),
    hlo.Collective("all-reduce", 1e9, 8, 2, groups=(tuple(range(8)),)),
    hlo.Collective("one-to-one", 1e7, 2, 2),
  )
  found = pods.traffic(program_of(hlo.Cost(0, 0, collectives)), topology_of(slices=2), dict.fromkeys(AXES, 2))
  assert [(row.kind, row.over, row.sent, row.crossed) for row in found] == [
    ("all-reduce", AXES, 1.5e9, 2.5e8),
    ("all-reduce", ("tensor",), 3e9, 0),
    ("all-gather", ("fsdp",), 5e8, 0),
    ("one-to-one", (), 0, 1e7),
  ]


CACHE = (8, 2, 8, 32, 32)  # P, heads, G, T, width of keys and of values


def test_no_weight_and_no_cache_is_gathered_for_a_token_of_the_student(run):
  run = run_of(run.mesh)  # what has compiled once is not seen again
  programs = compiled_by(run, lambda run: run.programs.rollout(run.actor(), run.prompts(8, 64), run._key))
  text, tokens = programs["the student's sampler"].as_text(), pods.token_turns(32)
  layer = sum(4 * x.size for x in jax.tree.leaves(model.abstract_params(EVEN)["language_model"]["layers"])) / 2
  gathered = hlo.cost(text, turns=tokens).sent.get("all-gather", 0.0)
  assert gathered < layer / 10  # in 31 turns together
  assert gathered / sum(tokens) < 4 * math.prod(CACHE) / 8
  # Caches are cut over the mesh: prompts over data and fsdp, heads over tensor.
  carried = {array.shape for array in hlo.Program(text).carried()}
  assert CACHE not in carried and (2, 1, *CACHE[2:]) in carried


def teacher_sampler_of(mesh, prompts):
  found = compiled_by(run_of(mesh), lambda run: run.programs.hint(run.prompts(prompts, 64), run._key))
  assert list(found) == ["the teacher's sampler"]  # and nothing that would copy its weights
  return found["the teacher's sampler"].as_text()


def assert_only_sums_are_sent(text, tensor):
  """For a token of a hint, after what prompts take."""
  turns = pods.token_turns(8)
  whole, prompts = (hlo.cost(text, turns=each).sent for each in (turns, (0,) * len(turns)))
  sent = {kind: (size - prompts.get(kind, 0.0)) / sum(turns) for kind, size in whole.items()}
  smallest = 4 * 64 * 128 / tensor  # matrix of a layer
  assert sent.get("all-gather", 0.0) < smallest / 4
  # Sums over fsdp 4 of what eight rows have of logits, and of queries, keys, values, gate and up in both layers.
  sums = 2 * 3 / 4 * 4 * 8 * (1024 + 2 * (128 + 2 * 64 + 2 * 384)) / tensor
  assert 0 < sum(sent.values()) < 1.2 * sums  # and some of rows of the width


def test_no_weight_of_a_teacher_is_gathered_for_a_token(mesh_of):
  assert_only_sums_are_sent(teacher_sampler_of(mesh_of(fsdp=4, tensor=2), 8), tensor=2)


@pytest.mark.slow
def test_prompts_that_do_not_divide_gather_no_weight_and_are_not_repeated(mesh_of):
  split, whole = (teacher_sampler_of(mesh_of(**axes), 2) for axes in ({"fsdp": 4}, {}))
  assert_only_sums_are_sent(split, tensor=1)
  # Each device has a share of their products, and not all of them, since it has a share of each weight, and the
  # compiler does not gather for rows that every device has.
  split, whole = (hlo.cost(text, turns=(0,) * len(pods.token_turns(8))).flops for text in (split, whole))
  assert split < 0.35 * whole


def paper_run(mesh, prompts):
  config = kepo_medvqa.get_config()
  config.batch.prompts = prompts
  return pods.PodRun(config, {"student": SIZES["Qwen3-VL-2B"], "teacher": SIZES["Qwen3-VL-32B"]}, mesh, LENGTHS)


@pytest.mark.slow
def test_no_program_of_the_paper_makes_anything_large_whole(mesh_of):
  prompts = 6  # a size that nothing else has
  run = paper_run(mesh_of(fsdp=2, tensor=4), prompts)
  executables = compiled_by(run, updated)
  assert set(executables) == {"scoring by a frozen model", "the inputs of the loss", "the gradients", "the optimizer"}
  weights = [x for each in run.models.values() for x in jax.tree.leaves(each.params) if len(x.shape) > 1]
  # A weight is cut if any of its dimensions is; a share of one weight may have the shape of another.
  whole = {tuple(sorted(x.shape)) for x in weights}
  whole -= {tuple(sorted(x.sharding.shard_shape(x.shape))) for x in weights if not x.sharding.is_fully_replicated}
  for name, executable in executables.items():
    program = hlo.Program(executable.as_text())
    for array in [*program.carried(), *program.results()]:
      cut = prompts not in array.shape and tuple(sorted(array.shape)) not in whole
      assert cut or array.size < pods.LARGE, (name, array.shape)


def excess(tree, cut, tower):
  """Bytes of a tree on a device over those of a tree that is cut over so many; what has one axis is not cut."""
  large = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(tree) if x.ndim > 1]
  least = sum(x.size * x.dtype.itemsize / (tower if "visual" in path else cut) for path, x in large)
  return pods.bytes_per_device([x for _, x in large]) / least


def test_what_the_paper_holds_is_cut_as_far_as_the_table_says(mesh_of):
  for data, fsdp, tensor in ((1, 8, 1), (2, 2, 2), (1, 2, 4)):
    run = paper_run(mesh_of(data, fsdp, tensor), 16)
    with run._in_force():
      # Weights and moments over fsdp and tensor, a vision tower over fsdp alone; rows over data and fsdp.
      held = [(run.experience(), data * fsdp, data * fsdp)]
      held += [((run.state.params, run.state.opt_state), fsdp * tensor, fsdp)]
      held += [(run.models["teacher"].params, fsdp * tensor, fsdp)]
    for tree, *share in held:
      assert excess(tree, *share) < 1.01 and pods.replicated(tree) == {}, run.mesh


def test_copies_and_scores_are_cut_as_far_as_the_table_says(run):
  with run._in_force():
    assert excess(run.actor(), 2, 1) < 1.01  # decodes over tensor alone, its vision tower whole
    assert excess([each.hidden for each in run.targets()], 4, 4) < 1.01


def test_sizes_and_turns_of_a_run():
  assert [pods.token_turns(tokens) for tokens in (24, 256, 1024)] == [(23,), (255,), (255, 256, 256, 256)]
  assert pods.bucket_sizes(kepo_medvqa.get_config()) == pods.Sizes(512, 1024, 576)
  assert pods.bucket_sizes(config_of(data__prompt_buckets=(64,))) == pods.Sizes(64, 64, 64)


def test_what_does_not_compile_is_told(mesh_of, monkeypatch):
  run = run_of(mesh_of(fsdp=2))

  def refused(*arguments):
    raise compiling.CompilationError("out of memory")

  refusing = dict.fromkeys(("rollout", "hint", "candidate", "targets"), refused)
  monkeypatch.setattr(run, "programs", dataclasses.replace(run.programs, **refusing))
  plan = plan_of(run)
  assert not plan.fits and plan.peak == math.inf
  # Without scores nothing is known of an update.
  assert plan.failures == dict.fromkeys(("sampling", "hints", "candidates", "scoring"), "out of memory")
  assert {each.phase for each in plan.programs} == {"decode weights"}


def test_the_first_suggestion_is_the_smallest_change_that_should_fit():
  def estimated(config):
    return dataclasses.replace(test_memory.plan(EVEN, EVEN, dict(config.mesh)), config=config)

  config, half = (config_of(batch__micro_batches=parts, mesh__data=8) for parts in (1, 2))
  now, few = (memory.estimate(estimated(each))["peak"] for each in (config, half))
  assert few < now
  # A limit that two micro-batches reach; the compiled peak equals the estimate here.
  place = topology_of(chip=dataclasses.replace(CHIP, memory=(few + 1) / pods.LIMIT))
  stuck = pods.PodPlan(place, {}, (program_of(resident=now),), {})
  assert not stuck.fits
  fields, changed = next(pods.suggestion(config, estimated, stuck))
  assert fields == {"batch.micro_batches": 2} and changed.batch.micro_batches == 2


def test_changes_keep_the_number_of_devices_and_leave_each_slice_its_share_of_data():
  for slices in (1, 2):
    meshes = []
    for fields, changed in pods.smaller(config_of(batch__micro_batches=1, mesh__data=8), 8, slices):
      assert changed.mesh.data * changed.mesh.fsdp * changed.mesh.tensor == 8, fields
      assert changed.batch.prompts % changed.batch.micro_batches == 0, fields
      meshes += [changed.mesh] if "mesh.data" in fields else []
    assert min(mesh.data for mesh in meshes) == slices and all(mesh.data % slices == 0 for mesh in meshes)
