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
def run_main(monkeypatch):
  monkeypatch.setattr("experiments.environment.prepare", lambda: None)
  monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # for this process as well

  def run(module, *arguments):
    with flagsaver.flagsaver():
      flags.FLAGS.unparse_flags()
      flags.FLAGS([module.__name__, *arguments])
      module.main([])

  return run


def gradients(total=1e10, name="the gradients", code=0.0):
  # 3 GB gathered in rings of 4; 8 GB reduced in rings of 2, 4 GB of it between slices.
  collectives = (
    hlo.Collective("all-gather", 4e9, group=4, groups=((0, 1, 2, 3),)),
    hlo.Collective("all-reduce", 8e9, group=4, slices=2, groups=((0, 8, 16, 24),)),
  )
  cost = hlo.Cost(1.97e14, 8.19e10, collectives)
  return pods.ProgramPlan("update", name, 1.0, 1, 61.0, 2e9, 1e9, 3e9, total - 4e9, cost, code)


def plan_of(*programs, **failures):
  return pods.PodPlan(PLACE, {"data": 2, "fsdp": 2, "tensor": 8}, programs, failures)


def record_of(plan):
  return pods.record(kepo_medvqa.get_config(), plan)


def test_the_verdict_says_what_does_not_fit(plan_pod):
  big = gradients(15e9, "the optimizer")
  for plan, expected in [
    (plan_of(gradients()), "fits: at most 10.0 GB per chip, within 85% of the 16.0 GB"),
    (plan_of(gradients(), big), "does not fit: the optimizer needs 15.0 GB per chip (11.0 GB that is there, 3.0 GB"),
    # Code alone may be what is too much.
    (plan_of(gradients(13.5e9, code=5e8)), "does not fit: the gradients needs 14.0 GB per chip (9.5 GB"),
    (plan_of(hints="compiling failed:\n  out of memory"), "does not compile: hints: compiling failed: out of memory"),
  ]:
    assert plan_pod.verdict(plan)[0].startswith(expected)


def test_a_record_is_json_with_everything_in_it():
  record = json.loads(json.dumps(record_of(plan_of(gradients()))))
  assert record["fits"] and record["peak_bytes"] == 1e10 and record["step_seconds"] == pytest.approx(2.5)
  (each,) = record["programs"]
  assert each["sent"] == {"all-gather": 3e9, "all-reduce": 8e9} and each["crossed"] == {"all-reduce": 4e9}
  refused = record_of(plan_of(hints="out of memory"))
  assert refused["peak_bytes"] is None and not refused["fits"]


def test_a_suggestion_is_compiled_before_it_is_made(plan_pod, monkeypatch):
  config = kepo_medvqa.get_config()
  config.mesh.data = 32
  for now, later, expected in [
    (14e9, [15e9, 9e9], "fits with --config."),
    (14e9, [15e9, 15e9, 15e9], "none of the 3 changes that were tried is enough; take more chips"),
    (1e15, [], "no change should be enough by estimate; take more chips"),
  ]:
    left, console = list(later), Console(width=200, file=io.StringIO())
    monkeypatch.setattr(plan_pod, "planned", lambda changed, place, console, left=left: plan_of(gradients(left.pop(0))))
    found = plan_pod.suggested(config, plan_of(gradients(now)), console)
    said = console.file.getvalue()
    assert not left and said.count("trying --config.") == len(later) and expected in said
    assert (found or {"fits": False})["fits"] == (9e9 in later)


def test_the_figures_are_kept_before_a_change_is_looked_for(plan_pod, run_main, monkeypatch, tmp_path):
  file, seen = tmp_path / "plan.json", []

  def kept():
    return json.loads(file.read_text())

  def suggested(config, plan, console):
    seen.append(kept()["peak_bytes"])
    return {"fields": {}}

  monkeypatch.setattr(plan_pod.topologies, "topology", lambda name, slices: PLACE)
  monkeypatch.setattr(plan_pod, "planned", lambda config, place, console: plan_of(gradients(total)))
  monkeypatch.setattr(plan_pod, "suggested", suggested)
  total = 1e10
  run_main(plan_pod, f"--json={file}")
  assert kept()["fits"] and "suggestion" not in kept() and seen == []
  total = 15e9
  with pytest.raises(SystemExit, match="3"):
    run_main(plan_pod, f"--json={file}")
  assert not kept()["fits"] and kept()["suggestion"] == {"fields": {}} and seen == [total]


def test_a_kept_plan_is_made_again_if_what_it_depends_on_has_changed(program, run_main, monkeypatch, tmp_path):
  plan_pods, versions, made = program("experiments.plan_pods"), {"jax": "1"}, []
  monkeypatch.setattr(plan_pods.importlib.metadata, "version", versions.get)
  monkeypatch.setattr(plan_pods, "planned", lambda name, *_: made.append(name) or record_of(plan_of(gradients())))
  for libtpu, parts, again, plans in [("2", 4, 0, 1), ("2", 4, 0, 1), ("3", 4, 0, 2), ("3", 2, 0, 3), ("3", 2, 1, 4)]:
    versions["libtpu"] = libtpu
    monkeypatch.setattr(plan_pods, "PLANS", {"2 x v5e:4x4": {"batch.micro_batches": parts}})
    run_main(plan_pods, f"--output={tmp_path}", f"--again={again}")
    assert len(made) == plans, (libtpu, parts, again)


def test_every_plan_of_the_table_is_a_run(program):
  for name, fields in program("experiments.plan_pods").PLANS.items():
    config = kepo_medvqa.get_config()
    config.update_from_flattened_dict(fields)
    checks.check_config(config)
    assert config.batch.prompts % config.batch.micro_batches == 0, name
