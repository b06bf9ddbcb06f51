from kepo_jax.planning import hlo, measured, pods

RATES = measured.Rates({"wide": 4e9, "narrow": 1e9}, 1e9, 5e8)


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


def test_each_rate_has_its_own_median():
  others = [measured.Rates({"wide": 1e9 * n, "narrow": 9e9 / n}, n, -n) for n in (3, 1, 2)]
  assert measured.median(others) == measured.Rates({"wide": 2e9, "narrow": 4.5e9}, 2, -2)
