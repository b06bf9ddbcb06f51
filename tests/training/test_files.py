"""The working directory: claimed once, resumed only by the same config."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from kepo_jax import sharding
from kepo_jax.data.rules import Summary
from kepo_jax.training.files import RunFiles
from kepo_jax.training.state import TrainState
from kepo_jax.types import Example


def config(learning_rate=1e-3):
  return ml_collections.ConfigDict(
    {
      "optimizer": {"learning_rate": learning_rate},
      "checkpoint": {"every": 2, "minutes": 0.0, "keep": 2, "best": "out_of_domain"},
      "data": {"split_seed": 0},
      "seed": 0,
    }
  )


@pytest.fixture
def state():
  fresh = TrainState(step=jnp.int32(0), params={"w": jnp.arange(4.0)}, opt_state=())
  return jax.device_put(fresh, sharding.replicated(sharding.make_mesh(data=8)))


def test_a_used_folder_is_refused(tmp_path):
  with RunFiles(tmp_path / "run", config(), resume=False):
    pass
  assert json.loads((tmp_path / "run" / "config.json").read_text())["checkpoint"]["keep"] == 2
  with pytest.raises(ValueError, match="not empty; pass --resume"):
    RunFiles(tmp_path / "run", config(), resume=False)


def test_resume_needs_a_run(tmp_path):
  with pytest.raises(ValueError, match="no run to resume"):
    RunFiles(tmp_path, config(), resume=True)
  with pytest.raises(ValueError, match="needs a workdir"):
    RunFiles("", config(), resume=True)


def test_resume_refuses_another_config_by_field(tmp_path):
  with RunFiles(tmp_path / "run", config(), resume=False):
    pass
  with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.001 -> 0.002"):
    RunFiles(tmp_path / "run", config(0.002), resume=True)


def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with RunFiles("", config(), resume=False) as files:
    files.record("before", {"overall": 1})
    files.save(2, {}, last=True)
    files.export(lambda path: pytest.fail(f"exported to {path}"))
  assert not list(tmp_path.iterdir())
  assert files.evaluations == {"before": {"overall": 1}}


def question(name):
  return Example(id=name, question="?", options=("a", "b"), answer="A", images=(), modality="MRI")


def test_the_questions_of_a_run_are_on_record(tmp_path):
  asked = {"train": [question("b"), question("a")], "test": [question("c")]}
  with RunFiles(tmp_path / "run", config(), resume=False) as files:
    files.begin(asked, rule="by hand")
  record = json.loads((tmp_path / "run" / "questions.json").read_text())
  assert record["ids"] == {"train": ["a", "b"], "validation": [], "test": ["c"]}
  assert record["rule"] == "by hand" and len(record["sha256"]) == 64
  with RunFiles(tmp_path / "run", config(), resume=True) as files:
    files.begin(asked, rule="by hand")
    with pytest.raises(ValueError, match="questions.json: exists and holds another split"):
      files.begin(asked | {"test": [question("d")]}, rule="by hand")


def test_a_question_that_has_changed_since_is_named_on_resume(tmp_path):
  asked = {"train": [question("b"), question("a")], "test": [question("c")]}
  with RunFiles(tmp_path / "run", config(), resume=False) as files:
    files.begin(asked, rule="by hand")
  changed = asked | {"train": [question("b"), dataclasses.replace(question("a"), answer="B")]}
  with RunFiles(tmp_path / "run", config(), resume=True) as files:
    with pytest.raises(ValueError, match=r"questions.json: exists and 1 of its 3 questions have changed \('a'\)"):
      files.begin(changed, rule="by hand")
    files.begin(asked, rule="by hand")


def test_what_was_repaired_and_dropped_is_on_record(tmp_path, monkeypatch):
  summary = Summary(root="folder", records=3, kept=2)
  summary.count("null_option", "file, record 1")
  summary.count("answer_unmatched", "file, record 2")
  with RunFiles(tmp_path / "run", config(), resume=False) as files:
    files.record_summaries({"reading": [summary], "checking": []})
  record = json.loads((tmp_path / "run" / "data_summary.json").read_text())
  (found,) = record["reading"]
  assert record["checking"] == [] and found["rules"] == {"null_option": 1, "answer_unmatched": 1}
  assert found["first"]["answer_unmatched"] == "file, record 2" and found["dropped"] == 1
  monkeypatch.chdir(tmp_path)
  with RunFiles("", config(), resume=False) as files:
    files.record_summaries({"reading": [summary], "checking": []})
  assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_checkpoints_fall_on_their_steps_and_on_the_last(tmp_path, state):
  with RunFiles(tmp_path / "run", config(), resume=False) as files:
    for step in (1, 2, 3, 4, 5):
      files.save(step, state, last=step == 5)
  kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
  assert kept == [4, 5]


def test_restore_brings_back_the_newest_state_and_forgets_later_evaluations(tmp_path, state):
  with RunFiles(tmp_path / "run", config(), resume=False) as files:
    files.record("before", {"step": 0})
    files.save(2, state.replace(step=state.step + 2, params={"w": state.params["w"] + 1}), last=False)
    files.record("validation", {"step": 2})
    files.record("validation", {"step": 3})
    files.record("after", {"step": 3})
  with RunFiles(tmp_path / "run", config(), resume=True) as files:
    restored = files.restore(state)
  assert int(restored.step) == 2
  assert restored.params["w"].tolist() == [1, 2, 3, 4]
  assert state.params["w"].is_deleted()  # a resumed run does not hold the untrained state beside its own
  assert restored.params["w"].sharding == state.params["w"].sharding
  assert files.evaluations == {"before": {"step": 0}, "validation": [{"step": 2}]}


def test_restore_without_a_checkpoint_starts_over(tmp_path, state):
  with RunFiles(tmp_path / "run", config(), resume=False) as files:
    files.record("before", {"step": 0})
  with RunFiles(tmp_path / "run", config(), resume=True) as files:
    assert files.restore(state) is state
  assert "before" not in files.evaluations
