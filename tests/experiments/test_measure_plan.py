import json
import time

import pytest
from absl import flags

from kepo_jax.planning import chips, hlo, measured, pods


def test_from_flags_to_the_table_and_the_error(program, mesh_of, tmp_path, monkeypatch, capsys):
  measure, seen = program("experiments.measure_plan"), []
  rates = measured.Rates({"a product": 4e9}, 1e9, 5e8)
  # 2 s of arithmetic over 1 s of memory, and 1 GB sent at 0.5 GB/s.
  cost = hlo.Cost(8e9, 1e9, (hlo.Collective("all-gather", 2e9, group=2),))
  gradients = pods.ProgramPlan("update", "the gradients", 1.0, 1, 0, 0, 0, 0, 0, cost)

  def compare(bench, repeats, compiled):
    seen.append((bench, repeats))
    place = measured.topology(mesh_of(fsdp=2), rates)
    return [measured.Comparison("update", (gradients,), place, counted=8e9, measured=5.0)], rates

  monkeypatch.setattr(measured, "compare", compare)
  monkeypatch.setattr(chips, "clock", chips.clock)
  monkeypatch.setattr(measure.benchmark, "Benchmark", lambda *settings: settings)
  file = tmp_path / "figures.json"
  chosen = ["--student=medium", "--teacher=medium", "--new_tokens=7", "--repeats=3", "--clock=processor"]
  flags.FLAGS(["measure_plan", *chosen, f"--json={file}"])
  measure.main([])
  (((config, student, teacher, sizes), repeats),) = seen
  assert student == teacher == measure.benchmark.MEDIUM and repeats == 3
  assert config.sampling.max_new_tokens == sizes.new_tokens == 7
  assert chips.clock is time.process_time
  assert json.loads(file.read_text())["phases"]["step"]["error"] == pytest.approx(-0.2)
  said = " ".join(capsys.readouterr().out.split())
  assert "the step: projected 4.00 s, measured 5.00 s: -20 %" in said
