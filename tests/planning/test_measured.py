from kepo_jax.planning import hlo, measured, pods


def test_a_phase_is_projected_by_the_functions_of_the_plan(mesh_of):
  first, *_ = others = [measured.Rates({"wide": 4e9 * n, "narrow": 1e9}, 1e9 * n, 5e8) for n in (1, 3, 2)]
  assert measured.median(others) == measured.Rates({"wide": 8e9, "narrow": 1e9}, 2e9, 5e8)
  cost = hlo.Cost(8e9, 1e9, (hlo.Collective("all-gather", 2e9, group=2),))  # 2 s of arithmetic, 1 s of memory
  compute = pods.ProgramPlan("update", "the gradients", 2.0, 1, 0, 0, 0, 0, 0, cost)
  memory = pods.ProgramPlan("update", "the optimizer", 1.0, 1, 0, 0, 0, 0, 0, hlo.Cost(0.0, 3e9))
  place = measured.topology(mesh_of(fsdp=2), first)
  found = measured.Comparison("update", (compute, memory), place, counted=1.5e10, measured=8.0)
  assert found.floors() == {"flops": 2 * 2.0, "hbm": 2 * 1.0 + 3.0, "link": 2 * 2.0}
  assert (found.flops, found.projected, found.error) == (1.6e10, 2 * (2.0 + 2.0) + 3.0, 11 / 8 - 1)
  both = measured.step([found, found])
  assert (both.projected, both.measured, both.counted, both.flops) == (22.0, 16.0, 3e10, 3.2e10)
