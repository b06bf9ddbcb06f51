import math

import jax
import jax.numpy as jnp
import pytest

from experiments.configs import kepo
from kepo_jax.planning import benchmark, chips, floors, hlo, measured, pods
from kepo_jax.training import compiling
from tests.planning.test_benchmark import STUDENT

RATES = measured.Rates({"wide": 4e9, "narrow": 1e9}, 1e9, 5e8)


def test_each_rate_has_its_own_median():
  others = [measured.Rates({"wide": 1e9 * n, "narrow": 9e9 / n}, n, -n) for n in (3, 1, 2)]
  assert measured.median(others) == measured.Rates({"wide": 2e9, "narrow": 4.5e9}, 2, -2)


def test_the_chip_is_the_fastest_product(mesh_of):
  place = measured.topology(mesh_of(fsdp=2, tensor=4), RATES)
  assert (place.chip.flops, place.chip.bandwidth, place.chip.link) == (4e9, 1e9, 5e8)
  assert place.name == "cpu:8" and len(place.devices) == 8 and place.chip.measured


@pytest.mark.parametrize("axes", [{}, {"fsdp": 4}])
def test_rates_are_work_over_time(mesh_of, monkeypatch, axes):
  monkeypatch.setattr(measured, "_WORK", 2.0**20)
  monkeypatch.setattr(measured, "_SWEPT", 2**12)
  monkeypatch.setattr(measured, "_SENT", 2**12)
  monkeypatch.setattr(chips, "seconds", lambda function, *arguments: 2.0 if function(*arguments) else 0.0)
  found = measured.Probes(mesh_of(**axes), {"a product": (16, 32, 64)}, jnp.float32).rates()
  # 16 products of 2 * 16 * 32 * 64 FLOP, 8 sweeps that read and write 4 KiB; 8 times 4 KiB gathered and reduced.
  assert found.products == {"a product": 2**20 / 2} and found.bandwidth == 8 * 2 * 2**12 / 2
  sent = 2**12 * 3 / 4 + 2 * 2**12 * 3 / 4
  assert found.link == (8 * sent / 2 if axes else math.inf)


def test_a_phase_is_projected_by_the_functions_of_the_plan(mesh_of):
  place = measured.topology(mesh_of(fsdp=2), RATES)
  cost = hlo.Cost(8e9, 1e9, (hlo.Collective("all-gather", 2e9, group=2),))  # 2 s of arithmetic, 1 s of memory
  compute = pods.ProgramPlan("update", "the gradients", 2.0, 1, 0, 0, 0, 0, 0, cost)
  memory = pods.ProgramPlan("update", "the optimizer", 1.0, 1, 0, 0, 0, 0, 0, hlo.Cost(0.0, 3e9))
  found = measured.Comparison("update", (compute, memory), place, counted=1.5e10, measured=8.0)
  assert found.floors() == {"flops": 2 * 2.0, "hbm": 2 * 1.0 + 3.0, "link": 2 * 2.0}
  assert found.flops == 1.6e10
  assert found.projected == 2 * (2.0 + 2.0) + 3.0 and found.error == 11 / 8 - 1
  both = measured.step([found, found])
  assert (both.projected, both.measured, both.counted, both.flops) == (22.0, 16.0, 3e10, 3.2e10)


def made():
  config = kepo.get_config()
  config.batch.prompts, config.batch.rollouts, config.sampling.max_new_tokens = 8, 4, 3
  config.mesh.data, config.mesh.fsdp = 1, 2
  config.exploration.hint_tokens = 2
  return benchmark.Benchmark(config, STUDENT, STUDENT, benchmark.Sizes(4, 5, 3))


@pytest.fixture(scope="module")
def bench():
  return made()


def test_products_of_a_device(bench):
  text = STUDENT.text
  found = measured.product_shapes(bench.config, bench)
  assert found["into the MLP"] == (8 * 4 * 3 // 2, text.hidden_size, text.intermediate_size)
  assert found["logits"] == (48, text.hidden_size, text.vocab_size)


def test_a_plan_is_made_of_the_programs_and_shapes_of_the_benchmark(bench):
  run, seen = measured.RunHere(bench), []
  with run._in_force(), compiling.watched(seen.append):
    run.targets()
  (scoring,) = seen
  tokens = jax.ShapeDtypeStruct((8, 4, 3), jnp.int32)
  work = floors.scoring(STUDENT, jnp.float32, jax.eval_shape(lambda prompts: prompts, bench.prompts), tokens)
  # Over 2 devices; 4 image and 5 other tokens of 8 prompts.
  assert hlo.cost(scoring.executable.as_text()).flops == pytest.approx(work.flops / 2, rel=0.02)
  assert run.prompts(8, 9).tokens.sharding == bench.prompts.tokens.sharding
  # The config compares gradients from time to time; a turn does not.
  assert bench.config.log.gradients_every and run._runs("the gradients") == 1


@pytest.mark.slow
def test_what_is_planned_is_what_runs(monkeypatch):
  monkeypatch.setattr(measured.Probes, "rates", lambda probes: RATES)
  names = []
  found, rates = measured.compare(made(), 1, lambda name, seconds: names.append(name))
  assert rates == RATES
  assert [each.name for each in found] == ["decode weights", "sampling", "hints", "candidates", "scoring", "update"]
  for each in found:
    assert each.programs and each.measured > 0
    # Products of the compiled programs on each device, and those of the traced ones over both.
    assert each.flops == pytest.approx(each.counted, rel=0.05), each.name
  assert sum(found[-1].floors().values()) > 0
