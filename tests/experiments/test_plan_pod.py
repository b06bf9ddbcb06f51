import dataclasses
import io
import json

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from experiments.configs import kepo_medvqa
from kepo_jax.planning import chips, hlo, pods, topologies
from kepo_jax.training import checks

PLACE = topologies.Topology("v5e:4x4", 2, tuple(range(32)), chips.CHIPS["TPU v5e"])


@pytest.fixture
def plan_pod(program):
  return program("experiments.plan_pod")


@pytest.fixture
def plan_pods(program):
  return program("experiments.plan_pods")


@pytest.fixture
def run_main(monkeypatch):
  """Calls the main of a program with arguments."""
  monkeypatch.setattr("experiments.environment.prepare", lambda: None)
  cached = jax.config.jax_enable_compilation_cache

  def run(module, arguments):
    with flagsaver.flagsaver():
      flags.FLAGS.unparse_flags()
      flags.FLAGS([module.__name__, *arguments])
      module.main([])

  yield run
  jax.config.update("jax_enable_compilation_cache", cached)


def gradients(total=1e10, name="the gradients"):
  # 3 GB gathered in rings of 4; 8 GB reduced in rings of 2, 4 GB of it between slices.
  collectives = (
    hlo.Collective("all-gather", 4e9, group=4, groups=((0, 1, 2, 3),)),
    hlo.Collective("all-reduce", 8e9, group=4, slices=2, groups=((0, 8, 16, 24),)),
  )
  cost = hlo.Cost(1.97e14, 8.19e10, collectives)
  return pods.ProgramPlan("update", name, 1.0, 1, 61.0, 2e9, 1e9, 3e9, total - 4e9, cost, processor_seconds=59.0)


def plan_of(*programs, **failures):
  return pods.PodPlan(PLACE, {"data": 2, "fsdp": 2, "tensor": 8}, programs, failures)


def test_the_verdict_says_what_does_not_fit(plan_pod):
  assert plan_pod.verdict(plan_of(gradients()))[0].startswith(
    "fits: at most 10.0 GB per chip, within 85% of the 16.0 GB"
  )
  reason, *_ = plan_pod.verdict(plan_of(gradients(), gradients(15e9, "the optimizer")))
  assert reason.startswith(
    "does not fit: the optimizer needs 15.0 GB per chip (11.0 GB that is there, 3.0 GB of its own, 1.0 GB of results"
  )
  # Code alone may be what is too much.
  coded = dataclasses.replace(gradients(13.5e9), code=5e8)
  assert plan_pod.verdict(plan_of(coded))[0].startswith("does not fit: the gradients needs 14.0 GB per chip (9.5 GB")
  assert "0.5 GB of code of all programs), more than 85% of the 16.0 GB" in plan_pod.verdict(plan_of(coded))[0]
  (refused,) = plan_pod.verdict(plan_of(gradients(), hints="compiling failed:\n  out of memory"))
  assert refused == "does not compile: hints: compiling failed: out of memory"


def test_a_record_is_json_with_everything_in_it_and_the_tables_show_it(plan_pod, plan_pods):
  record = json.loads(json.dumps(pods.record(kepo_medvqa.get_config(), plan_of(gradients()))))
  assert record["fits"] and record["peak_bytes"] == 1e10 and record["step_seconds"] == pytest.approx(2.5)
  (each,) = record["programs"]
  assert each["sent"] == {"all-gather": 3e9, "all-reduce": 8e9} and each["crossed"] == {"all-reduce": 4e9}
  refused = pods.record(kepo_medvqa.get_config(), plan_of(hints="out of memory"))
  assert refused["peak_bytes"] is None and not refused["fits"]
  console = Console(width=200, file=io.StringIO())
  console.print(plan_pod.memory_table(plan_of(gradients())))
  table = console.file.getvalue()
  assert "2 x v5e:4x4, 32 x TPU v5e; data 2 x fsdp 2 x tensor 8" in table
  row = next(line for line in table.splitlines() if "gradients" in line)
  assert [cell.strip() for cell in row.split("│")[2:-1]] == ["61", "2.00", "3.00", "1.00", "0.00", "10.00", "62"]
  *_, first, second = plan_pods.table([record, refused]).splitlines()
  assert first.startswith("| 2 x v5e:4x4 | 2, 2, 8 | 8 | 1 | 10.0 | 62 | 15 | 4.00 | 59 |")
  assert second.startswith("| 2 x v5e:4x4 | 2, 2, 8 | 8 | 1 | does not compile |")


def test_a_suggestion_is_compiled_before_it_is_made(plan_pod, monkeypatch):
  config = kepo_medvqa.get_config()
  config.mesh.data = 32

  def suggested(now, *later):
    """What is suggested for a plan of `now` bytes if changes compile to `later`, and what is said of it."""
    left, console = list(later), Console(width=200, file=io.StringIO())
    monkeypatch.setattr(plan_pod, "planned", lambda changed, place, console: plan_of(gradients(left.pop(0))))
    found = plan_pod.suggested(config, plan_of(gradients(now)), console)
    assert not left
    return found, console.file.getvalue()

  found, said = suggested(14e9, 15e9, 9e9)
  assert found["fits"] and said.count("trying --config.") == 2 and "fits with --config." in said
  found, said = suggested(14e9, 15e9, 15e9, 15e9)
  assert found is None and "none of the 3 changes that were tried is enough; take more chips" in said
  found, said = suggested(1e15)
  assert found is None and "no change should be enough by estimate; take more chips" in said


def test_the_figures_are_kept_before_a_change_is_looked_for(plan_pod, run_main, monkeypatch, tmp_path):
  found, total, seen = tmp_path / "plan.json", 1e10, []
  monkeypatch.setattr(plan_pod.topologies, "topology", lambda name, slices: PLACE)
  monkeypatch.setattr(plan_pod, "planned", lambda config, place, console: plan_of(gradients(total)))

  def suggested(config, plan, console):
    seen.append(json.loads(found.read_text()))
    return {"fields": {}}

  monkeypatch.setattr(plan_pod, "suggested", suggested)
  run_main(plan_pod, [f"--json={found}"])
  record = json.loads(found.read_text())
  assert record["fits"] and "suggestion" not in record and seen == []
  total = 15e9
  with pytest.raises(SystemExit, match="3"):
    run_main(plan_pod, [f"--json={found}"])
  record = json.loads(found.read_text())
  assert not record["fits"] and record["suggestion"] == {"fields": {}}
  assert [each["peak_bytes"] for each in seen] == [total]


def test_a_kept_plan_is_made_again_if_what_it_depends_on_has_changed(plan_pods, run_main, monkeypatch, tmp_path):
  monkeypatch.setattr(plan_pods, "PLANS", {"2 x v5e:4x4": {"batch.micro_batches": 4}})
  monkeypatch.setattr(plan_pods.importlib.metadata, "version", lambda name: versions[name])
  versions, made = {"jax": "1", "libtpu": "2"}, []

  def planned(name, config, console):
    made.append(config.batch.micro_batches)
    return pods.record(config, plan_of(gradients()))

  monkeypatch.setattr(plan_pods, "planned", planned)

  def plan(*more):
    run_main(plan_pods, [f"--output={tmp_path}", *more])
    return json.loads((tmp_path / "2xv5e_4x4.json").read_text())["made_with"]

  first = plan()
  assert plan() == first and made == [4] and (first["jax"], first["libtpu"]) == ("1", "2")
  versions["libtpu"] = "3"
  assert plan() == first | {"libtpu": "3"} and made == [4, 4]
  monkeypatch.setitem(plan_pods.PLANS, "2 x v5e:4x4", {"batch.micro_batches": 2})
  assert plan()["config"] != first["config"] and made == [4, 4, 2]
  plan("--again")
  assert made == [4, 4, 2, 2]


def test_every_plan_of_the_table_is_a_run(plan_pods):
  for name, fields in plan_pods.PLANS.items():
    config = kepo_medvqa.get_config()
    config.update_from_flattened_dict(fields)
    checks.check_config(config)
    assert config.batch.prompts % config.batch.micro_batches == 0, name
