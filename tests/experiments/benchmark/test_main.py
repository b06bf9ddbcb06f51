import json
import sys

import jax
import pytest
from absl import flags

from experiments.benchmark import floors, step
from experiments.configs import kepo, kepo_eq7
from tests.training.runs import changed

SMALL = ("--image_tokens=4", "--text_tokens=6", "--new_tokens=2", "--repeats=1")


@pytest.fixture
def run(program, tmp_path, capsys):
  """`run(*flags, **fields of the models)`: what the entry point prints, and the record that it writes."""

  def call(*more, **model):
    entry, file = program("experiments.benchmark.__main__"), tmp_path / "figures.json"
    flags.FLAGS(["benchmark", *SMALL, f"--json={file}", *more])
    entry._CONFIG.value.update({"batch": {"prompts": 4}, "mesh": {"data": 1}, "model": model})
    entry.main([])
    return capsys.readouterr().out, json.loads(file.read_text())

  return call


@pytest.mark.slow
def test_a_step_beside_its_floors_and_an_earlier_one(run, tmp_path):
  earlier = tmp_path / "earlier.json"
  earlier.write_text(json.dumps({"phases": {"update": {"seconds": 1000.0}}}))
  config = changed(kepo_eq7)  # three models, here of one size
  options = {"teacher": config.model.student, "lora_rank": 2, "teacher_memory": "host", "remat": "full"}
  printed, record = run(f"--config={kepo_eq7.__file__}", f"--before={earlier}", "--steps=7", **options)
  phases, seconds = record["phases"], record["step_seconds"]
  assert list(phases) == ["decode weights", "sampling", "hints", "candidates", "scoring", "update"]
  assert seconds == pytest.approx(sum(phase["seconds"] for phase in phases.values()))
  assert record["step_tokens_per_second"] == pytest.approx(4 * 8 * 2 / seconds)
  assert record["run"] == {"steps": 7, "seconds": pytest.approx(7 * seconds)}
  for phase in phases.values():
    assert phase["floor_seconds"] > 0
    assert phase["flops_utilisation"] == pytest.approx(phase["flops"] / record["device"]["flops"] / phase["seconds"])
  explored = config.exploration
  # A quarter of the prompts is asked for hints.
  tokens = {"sampling": 4 * 8 * 2, "hints": 1 * explored.hint_tokens, "candidates": 1 * explored.replacements * 2}
  assert {name: phases[name]["tokens"] for name in tokens} == tokens
  student = step.model_sizes(config.model.student)
  prompts = step.made_up_prompts(student, 4, step.Sizes(4, 6, 2))
  one = floors.scoring(student, "float32", prompts, jax.ShapeDtypeStruct((4, 8, 2), "int32"))
  assert phases["scoring"]["flops"] == 2 * one.flops  # a teacher and a reference
  assert any("1000.000" in line for line in printed.splitlines() if "update" in line)


def test_torch_is_asked_for_by_name(run, monkeypatch):
  monkeypatch.setitem(sys.modules, "experiments.benchmark.torch", None)
  monkeypatch.setattr(step, "Benchmark", lambda *_: None)
  with pytest.raises(ValueError, match=r'--against=trl needs torch: pip install -e ".\[oracle]"'):
    run("--against=trl")


@pytest.mark.parity
@pytest.mark.parametrize("against", ["transformers", "trl"])
def test_the_same_step_in_torch(run, against):
  printed, record = run(f"--against={against}")
  rival = record["against"]
  assert rival["name"].startswith(against) and rival["name"].split(" ")[0] in printed
  assert list(rival["phases"]) == ["sampling", "scoring", "update", "scoring and update", "step"]
  for row in rival["phases"].values():
    assert row["ratio"] == pytest.approx(row["torch"] / row["ours"]) and row["torch"] > 0
  parts = sum(rival["phases"][name]["torch"] for name in ("sampling", "scoring", "update"))
  assert rival["phases"]["step"]["torch"] == pytest.approx(parts)


@pytest.mark.parity
def test_what_torch_does_not_make_is_not_compared_and_a_frozen_tower_is_frozen_there_too(program):
  program("experiments.benchmark.__main__")
  from experiments.benchmark import torch

  for field, value, way_out in [("model.lora_rank", 4, 0), ("objective.reference_weight", 0.1, 0.0)]:
    with pytest.raises(ValueError, match=f"{field}={value} in torch; pass --config.{field}={way_out:g}"):
      torch.check_comparable(changed(kepo).replace({field: value}))
  sizes = {"batch__prompts": 2, "batch__rollouts": 2, "sampling__max_new_tokens": 2, "mesh__data": 1}
  alone = {"objective__distill_weight": 0.0, "exploration__rounds": 0, "exploration__replacements": 0}
  config = changed(kepo, model__freeze_vision=True, **sizes, **alone)
  student = step.model_sizes(config.model.student)
  rival = torch.Rival(step.Benchmark(config, student, student, step.Sizes(4, 6, 2)))
  frozen = {name for name, weight in rival._student.named_parameters() if not weight.requires_grad}
  assert frozen and all(name.startswith("model.visual.") for name in frozen)
