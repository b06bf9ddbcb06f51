"""The plan of a run needs no models: sizes come from their names, and every option has a row."""

import pytest
from absl import flags

from experiments import plan_memory
from experiments.configs import kepo_eq7, kepo_medvqa
from kepo_jax.planning import memory
from tests.conftest import ROOT


def test_the_models_are_those_of_the_run():
  assert set(memory.plan(kepo_medvqa.get_config()).models) == {"student", "teacher"}
  assert set(memory.plan(kepo_eq7.get_config("medvqa")).models) == {"student", "teacher", "reference"}
  config = kepo_medvqa.get_config()
  config.model.lora_rank = 4
  assert memory.plan(config).models["student"].lora.rank == 4
  assert memory.plan(kepo_medvqa.get_config()).mesh == {"data": 1, "fsdp": 1, "tensor": 1}


def test_every_option_changes_its_own_fields_alone():
  config = kepo_medvqa.get_config()
  config.batch.micro_batches = 8
  before = config.to_json()
  found = plan_memory.rows(config, compare=True)
  assert config.to_json() == before
  assert list(found) == ["as configured", *plan_memory.OPTIONS]
  assert found["as configured"] == memory.estimate(memory.plan(config))
  peak = {name: parts["peak"] for name, parts in found.items()}
  whole = peak["as configured"]
  assert whole > peak["moments bfloat16"] > peak["moments float8"] > peak["float8 and host"]
  assert peak["remat none"] > peak["remat dots"] > peak["remat dots_offloaded"] == whole
  assert list(plan_memory.rows(config, compare=False)) == ["as configured"]


def test_the_program(program, capsys):
  entry = program("experiments.plan_memory")
  with pytest.raises(entry.app.UsageError, match="unexpected arguments: more"):
    entry.main(["plan_memory", "more"])
  assert capsys.readouterr().out == ""
  flags.FLAGS(["plan_memory", f"--config={ROOT}/experiments/configs/grpo_medvqa.py", "--compare"])
  entry.main(["plan_memory"])
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3 + len(plan_memory.OPTIONS)
  assert all(line.count("|") == 2 + len(plan_memory.COLUMNS) for line in lines)
