import json
import time

from absl import flags

from kepo_jax.planning import chips, hlo, measured, pods

RATES = measured.Rates({"wide": 4e9, "narrow": 1e9}, 1e9, 5e8)


def comparison(mesh):
  cost = hlo.Cost(8e9, 1e9, (hlo.Collective("all-gather", 2e9, group=2),))  # 2 s of arithmetic, 1 s of memory
  compute = pods.ProgramPlan("update", "the gradients", 2.0, 1, 0, 0, 0, 0, 0, cost)
  memory = pods.ProgramPlan("update", "the optimizer", 1.0, 1, 0, 0, 0, 0, 0, hlo.Cost(0.0, 3e9))
  place = measured.topology(mesh, RATES)
  return measured.Comparison("update", (compute, memory), place, counted=1.5e10, measured=8.0)


def test_a_phase_is_projected_by_the_functions_of_the_plan(mesh_of):
  found = comparison(mesh_of(fsdp=2))
  assert found.floors() == {"flops": 2 * 2.0, "hbm": 2 * 1.0 + 3.0, "link": 2 * 2.0}
  assert (found.flops, found.projected, found.error) == (1.6e10, 2 * (2.0 + 2.0) + 3.0, 11 / 8 - 1)
  both = measured.step([found, found])
  assert (both.projected, both.measured, both.counted, both.flops) == (22.0, 16.0, 3e10, 3.2e10)
  others = [measured.Rates({"wide": 4e9 * n, "narrow": 9e9 / n}, 1e9 * n, 5e8 / n) for n in (3, 1, 2)]
  assert measured.median(others) == measured.Rates({"wide": 8e9, "narrow": 4.5e9}, 2e9, 2.5e8)


def test_the_entry_point_states_the_error(program, mesh_of, monkeypatch, tmp_path, capsys):
  measure = program("experiments.measure_plan")
  monkeypatch.setattr(chips, "clock", chips.clock)
  monkeypatch.setattr(measured, "compare", lambda *_, **__: ([comparison(mesh_of(fsdp=2))], RATES))
  monkeypatch.setattr(measure.benchmark, "Benchmark", lambda *settings: settings)
  flags.FLAGS(["measure_plan", "--student=medium", "--clock=processor", f"--json={tmp_path}/figures.json"])
  measure.main([])
  assert chips.clock is time.process_time
  assert json.loads((tmp_path / "figures.json").read_text())["phases"]["step"]["error"] == 11 / 8 - 1
  assert "the step: projected 11.00 s, measured 8.00 s: +38 %" in " ".join(capsys.readouterr().out.split())
