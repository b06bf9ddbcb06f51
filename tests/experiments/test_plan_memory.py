from absl import flags

from experiments import plan_memory
from experiments.configs import kepo_eq7, kepo_medvqa
from kepo_jax.planning import memory
from tests.conftest import ROOT


def test_the_models_are_those_of_the_run():
  assert set(memory.plan(kepo_eq7.get_config("medvqa")).models) == {"student", "teacher", "reference"}
  config = kepo_medvqa.get_config()
  config.model.lora_rank = 4
  found = memory.plan(config)
  assert set(found.models) == {"student", "teacher"} and found.models["student"].lora.rank == 4
  assert found.mesh == {"data": 1, "fsdp": 1, "tensor": 1}


def test_every_option_changes_its_own_fields_alone():
  config = kepo_medvqa.get_config()
  config.batch.micro_batches = 8
  before = config.to_json()
  found = plan_memory.rows(config, compare=True)
  assert config.to_json() == before
  assert list(found) == ["as configured", *plan_memory.OPTIONS]
  assert found["as configured"] == memory.estimate(memory.plan(config))
  peak = {name: parts["peak"] for name, parts in found.items()}
  assert peak["as configured"] > peak["moments bfloat16"]
  assert peak["remat none"] > peak["remat dots"] > peak["as configured"]


def test_the_program_prints_a_row_for_each(program, capsys):
  entry = program("experiments.plan_memory")
  flags.FLAGS(["plan_memory", f"--config={ROOT}/experiments/configs/grpo_medvqa.py", "--compare"])
  entry.main(["plan_memory"])
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3 + len(plan_memory.OPTIONS)
  assert all(line.count("|") == 2 + len(plan_memory.COLUMNS) for line in lines)
