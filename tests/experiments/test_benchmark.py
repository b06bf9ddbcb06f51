import json
import sys

import pytest
from absl import flags

from experiments.configs import kepo
from kepo_jax.planning import benchmark

SMALL = ("--image_tokens=4", "--text_tokens=6", "--new_tokens=2", "--repeats=1")


@pytest.fixture
def run(program, tmp_path, capsys):
  """`run(*flags)`: what the entry point prints, and the record that it writes."""

  def call(*more):
    entry = program("experiments.benchmark")
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    flags.FLAGS(["benchmark", *SMALL, f"--json={file}", *more])
    entry._CONFIG.value.update({"batch": {"prompts": 4}, "mesh": {"data": 1}})
    entry.main([])
    return capsys.readouterr().out, json.loads(file.read_text()), file

  return call


@pytest.mark.slow
def test_a_step_beside_its_floors_and_an_earlier_one(run, tmp_path):
  earlier = tmp_path / "earlier.json"
  earlier.write_text(json.dumps({"phases": {"update": {"seconds": 1000.0}}}))
  printed, record, _ = run(f"--before={earlier}", "--steps=7")
  assert list(record["phases"]) == ["decode weights", "sampling", "hints", "candidates", "scoring", "update"]
  step = sum(phase["seconds"] for phase in record["phases"].values())
  assert record["step_seconds"] == pytest.approx(step)
  assert record["step_tokens_per_second"] == pytest.approx(4 * 8 * 2 / step)
  assert record["projected"] == {"steps": 7, "seconds": pytest.approx(7 * step)}
  assert "4 prompts x 8 rollouts; 4 image, 6 text and 2 new tokens; float32" in printed.replace("\n", " ")
  row = next(line for line in printed.splitlines() if "update" in line and "1000.000" in line)
  assert f"{record['phases']['update']['floor_seconds']:.3f}" in row


def test_torch_is_asked_for_by_name(run, monkeypatch):
  monkeypatch.setitem(sys.modules, "experiments.benchmark_torch", None)
  monkeypatch.setattr(benchmark, "Benchmark", lambda *_: None)
  with pytest.raises(ValueError, match="--against=trl needs torch: pip install -r requirements-oracle.txt"):
    run("--against=trl")


@pytest.mark.parity
@pytest.mark.parametrize("against", ["transformers", "trl"])
def test_the_same_step_in_torch(run, against):
  printed, record, _ = run(f"--against={against}")
  rival = record["against"]
  assert rival["name"].startswith(against) and rival["name"].split(" ")[0] in printed
  assert list(rival["phases"]) == ["sampling", "scoring", "update", "scoring and update", "step"]
  for row in rival["phases"].values():
    assert row["ratio"] == pytest.approx(row["torch"] / row["ours"]) and row["torch"] > 0
  step = rival["phases"]["step"]
  assert step["torch"] == pytest.approx(
    sum(rival["phases"][name]["torch"] for name in ("sampling", "scoring", "update"))
  )
  assert all(rate > 0 for rates in rival["products"].values() for rate in rates.values())


@pytest.mark.parity
@pytest.mark.parametrize(
  ("field", "value", "way_out"),
  [
    ("model.lora_rank", 4, "0"),
    ("objective.reference_weight", 0.1, "0"),
    ("batch.updates", 2, "1"),
  ],
)
def test_a_step_that_torch_does_not_make_is_not_compared(field, value, way_out):
  from experiments import benchmark_torch

  config = kepo.get_config()
  benchmark_torch.check_comparable(config)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=f"{field}={value} in torch; pass --config.{field}={way_out}"):
    benchmark_torch.check_comparable(config)


@pytest.mark.parity
def test_a_frozen_tower_is_frozen_in_torch_too(program):
  program("experiments.benchmark")
  from experiments import benchmark_torch

  config = kepo.get_config()
  config.model.freeze_vision, config.mesh.data = True, 1
  config.batch.prompts, config.batch.rollouts, config.sampling.max_new_tokens = 2, 2, 2
  config.objective.distill_weight = config.exploration.rounds = config.exploration.replacements = 0
  student = benchmark.model_config(config.model.student)
  ours = benchmark.Benchmark(config, student, student, benchmark.Sizes(4, 6, 2))
  rival = benchmark_torch.Rival(ours)
  frozen = {name for name, weight in rival._student.named_parameters() if not weight.requires_grad}
  assert frozen and all(name.startswith("model.visual.") for name in frozen)
  rival.turn(timed=True)
  assert rival.seconds["update"]
