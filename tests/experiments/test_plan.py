import io
import json

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from experiments.configs import kepo_medvqa
from kepo_jax.planning import chips, hlo, memory
from kepo_jax.planning import compile as compiler
from tests.conftest import ROOT
from tests.training.runs import changed

PLACE = compiler.Topology("v5e:4x4", 2, tuple(range(32)), chips.CHIPS["TPU v5e"])


@pytest.fixture
def run_main(plan, monkeypatch):
  monkeypatch.setattr("experiments.environment.prepare", lambda: None)
  monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # for this process as well
  monkeypatch.setattr(plan.compiler, "topology", lambda name, slices=1: PLACE)

  def run(*arguments):
    with flagsaver.flagsaver():
      flags.FLAGS.unparse_flags()
      flags.FLAGS(["plan", f"--config={ROOT}/experiments/configs/kepo_medvqa.py", *arguments])
      plan.main([])

  return run


def program_of(total=1e10, name="the gradients", code=0.0):
  collective = hlo.Collective("all-gather", 4e9, group=4, groups=((0, 1, 2, 3),))
  cost = hlo.Cost(1.97e14, 8.19e10, (collective,))
  return compiler.ProgramPlan("update", name, 2.0, 61.0, 2e9, 1e9, 3e9, total - 4e9, code, cost, hlo.Cost())


def plan_of(*programs, **failures):
  return compiler.Plan(PLACE, {"data": 2, "fsdp": 2, "tensor": 8}, programs, failures)


def test_without_a_topology_the_estimate_of_every_option_is_printed(run_main, plan, capsys):
  config = changed(kepo_medvqa)
  run_main("--compare")
  header, _, *rows = (line.split(" | ") for line in capsys.readouterr().out.strip().splitlines())
  assert [row[0].strip("| ") for row in rows] == ["as configured", *plan.OPTIONS]
  peaks = {row[0].strip("| "): float(row[-1].strip("| ")) for row in rows}
  assert header[-1].strip(" |") == "peak" and {len(row) for row in rows} == {len(header)}
  assert peaks["as configured"] == round(memory.estimate(memory.plan(config))["peak"] / 1e9, 1)
  assert peaks["moments bfloat16"] < peaks["as configured"] < peaks["remat dots"] < peaks["remat none"]


def test_the_verdict_says_what_does_not_fit(plan):
  for made, expected in [
    (plan_of(program_of()), "fits: at most 10.0 GB per chip, within 85% of the 16.0 GB"),
    (
      plan_of(program_of(), program_of(15e9, "the optimizer")),
      "does not fit: the optimizer needs 15.0 GB per chip (11",
    ),
    # Code alone may be what is too much.
    (plan_of(program_of(13.5e9, code=5e8)), "does not fit: the gradients needs 14.0 GB per chip (9.5 GB"),
    (plan_of(hints="compiling failed:\n  out of memory"), "does not compile: hints: compiling failed: out of memory"),
  ]:
    assert plan.verdict(made)[0].startswith(expected)


def test_a_suggestion_is_compiled_before_it_is_made(plan, monkeypatch):
  config = changed(kepo_medvqa, mesh__data=32)
  for now, later, expected in [
    (14e9, [15e9, 9e9], "fits with --config."),
    (14e9, [15e9, 15e9, 15e9], "none of the 3 changes that were tried is enough; take more chips"),
    (1e15, [], "no change should be enough by estimate; take more chips"),
  ]:
    left, console = list(later), Console(width=200, file=io.StringIO())
    monkeypatch.setattr(plan, "compiled", lambda config, place, console, left=left: plan_of(program_of(left.pop(0))))
    suggestion = plan.suggested(config, plan_of(program_of(now)), console)
    said = console.file.getvalue()
    assert not left and said.count("trying --config.") == len(later) and expected in said
    assert (suggestion or {"fits": False})["fits"] == (9e9 in later)


def test_the_first_suggestion_is_the_smallest_change_that_should_fit(plan, monkeypatch):
  config = changed(kepo_medvqa).replace({"mesh.data": 32})
  monkeypatch.setattr(plan.memory, "estimate", lambda run: {"peak": 4e9 / run.config.batch.micro_batches})
  # The compiler needs 10 times the estimate; 85 % of 16 GB are 13.6.
  suggestions = plan.should_fit(config, plan_of(program_of(4e10)))
  assert [fields for fields, _ in suggestions][:2] == [{"batch.micro_batches": 4}, {"batch.micro_batches": 8}]
  assert config.batch.micro_batches == 1


def test_changes_keep_the_number_of_devices_and_leave_each_slice_its_share_of_data(plan):
  config = changed(kepo_medvqa).replace({"mesh.data": 8})
  for slices in (1, 2):
    meshes = []
    for fields in plan.smaller_fields(config, 8, slices):
      mesh = config.replace(fields).mesh
      assert mesh.data * mesh.fsdp * mesh.tensor == 8, fields
      meshes += [mesh.data] if "mesh.data" in fields else []
    assert min(meshes) == slices and all(data % slices == 0 for data in meshes)


def test_the_figures_are_kept_before_a_change_is_looked_for(plan, run_main, monkeypatch, tmp_path):
  file, seen = tmp_path / "plan.json", []

  def kept():
    return json.loads(file.read_text())

  monkeypatch.setattr(plan, "compiled", lambda config, place, console: plan_of(program_of(total)))
  monkeypatch.setattr(plan, "suggested", lambda *_: seen.append(kept()["peak_bytes"]) or {"fields": {}})
  total = 1e10
  run_main("--topology=v5e:4x4", f"--json={file}")
  assert kept()["fits"] and "suggestion" not in kept() and seen == []
  total = 15e9
  with pytest.raises(SystemExit, match="3"):
    run_main("--topology=v5e:4x4", f"--json={file}")
  assert not kept()["fits"] and kept()["suggestion"] == {"fields": {}} and seen == [total]


def test_a_kept_plan_is_made_again_if_what_it_depends_on_has_changed(plan, run_main, monkeypatch, tmp_path, capsys):
  versions, made = {"jax": "1"}, []
  monkeypatch.setattr(plan.importlib.metadata, "version", versions.get)
  monkeypatch.setattr(plan, "compiled", lambda config, *_: made.append(config) or plan_of(program_of()))
  for libtpu, parts, again, plans in [("2", 4, 0, 1), ("2", 4, 0, 1), ("3", 4, 0, 2), ("3", 2, 0, 3), ("3", 2, 1, 4)]:
    versions["libtpu"] = libtpu
    monkeypatch.setattr(plan, "PLANS", {"2 x v5e:4x4": {"batch.micro_batches": parts}})
    run_main("--table", f"--output={tmp_path}", f"--again={again}")
    assert len(made) == plans, (libtpu, parts, again)
  *_, row = capsys.readouterr().out.strip().splitlines()
  # Two calls: 394 TFLOP, 164 GB of HBM, 6 GB over tensor; two floors of a second.
  assert row.split(" | ")[6:] == ["394", "164", "6.00", "0.00", "0.00", "0.00", "2.0", "yes |"]


def test_every_plan_of_the_table_is_a_run(plan):
  for name, fields in plan.PLANS.items():
    config = changed(kepo_medvqa).replace(fields)
    config.validate()
    assert config.batch.prompts % config.batch.micro_batches == 0, name
