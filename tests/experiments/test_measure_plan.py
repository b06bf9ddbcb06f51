import io
import json
import time

import pytest
from absl import flags
from rich.console import Console

from kepo_jax.planning import chips, hlo, measured, pods


@pytest.fixture
def measure(program):
  return program("experiments.measure_plan")


def comparisons(mesh):
  place = measured.topology(mesh, measured.Rates({"a product": 4e9}, 1e9, 5e8))
  cost = hlo.Cost(8e9, 1e9, (hlo.Collective("all-gather", 2e9, group=2),))
  gradients = pods.ProgramPlan("update", "the gradients", 1.0, 1, 0, 0, 0, 0, 0, cost)
  sampler = pods.ProgramPlan("sampling", "the student's sampler", 1.0, 1, 0, 0, 0, 0, 0, hlo.Cost(0.0, 2e9))
  return [
    measured.Comparison("sampling", (sampler,), place, counted=0.0, measured=4.0),
    measured.Comparison("update", (gradients,), place, counted=8e9, measured=4.0),
  ]


def test_from_flags_to_the_table_and_the_error(measure, mesh_of, tmp_path, monkeypatch, capsys):
  seen = []

  def compare(bench, repeats, compiled):
    seen.append((bench, repeats))
    compiled("a program", 1.0)
    return comparisons(mesh_of(fsdp=2)), measured.Rates({"a product": 4e9}, 1e9, 5e8)

  monkeypatch.setattr(measured, "compare", compare)
  monkeypatch.setattr(chips, "clock", chips.clock)
  monkeypatch.setattr(measure.benchmark, "Benchmark", lambda *settings: settings)
  file = tmp_path / "figures.json"
  flags.FLAGS(
    [
      "measure_plan",
      "--student=medium",
      "--teacher=medium",
      "--new_tokens=7",
      "--repeats=3",
      "--clock=processor",
      f"--json={file}",
    ]
  )
  measure.main([])
  (((config, student, teacher, sizes), repeats),) = seen
  assert student == teacher == measure.benchmark.MEDIUM and repeats == 3
  assert config.sampling.max_new_tokens == sizes.new_tokens == 7
  assert chips.clock is time.process_time
  result = json.loads(file.read_text())
  assert result["phases"]["step"]["error"] == pytest.approx(-0.25)
  console = Console(width=200, file=io.StringIO())
  console.print(measure.table(result))
  lines = console.file.getvalue().splitlines()
  update, step = (
    [cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "update" in line or "step" in line
  )
  # 2 s of arithmetic over 1 s of memory, and 1 GB sent at 0.5 GB/s.
  assert update == ["update", "8", "8", "1", "1", "2.000", "1.000", "2.000", "4.000", "4.000", "1.00"]
  assert step == ["step", "8", "8", "3", "1", "2.000", "3.000", "2.000", "6.000", "8.000", "0.75"]
  said = " ".join(capsys.readouterr().out.split())
  assert "a product 4, the fastest counts; memory 1.0 GB/s; collectives 0.50 GB/s sent" in said
  assert "the step: projected 6.00 s, measured 8.00 s: -25 %" in said
