import contextlib
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kepo_jax import sharding
from kepo_jax.config import Config
from kepo_jax.training import run_record
from kepo_jax.training.checkpoints import steps_in
from kepo_jax.training.optimizer import TrainState
from kepo_jax.training.workdir import RunFiles
from kepo_jax.types import Example


def config(learning_rate=1e-3, lora_rank=0, best="out_of_domain"):
  fields = {"model.lora_rank": lora_rank, "optimizer.learning_rate": learning_rate, "checkpoint.best": best}
  return Config().replace(fields | {"checkpoint.every": 2, "checkpoint.minutes": 0.0})


def opened(tmp_path, settings=None, **how):
  return RunFiles(tmp_path / "run", settings or config(), **how)


@contextlib.contextmanager
def begun(tmp_path, settings=None, questions=None, models=None, **how):
  """A run that has written what it is."""
  with opened(tmp_path, settings, **how) as files:
    files.begin(questions or ASKED, rule="none", models=models)
    yield files


def question(name):
  return Example(id=name, question="?", options=("a", "b"), answer="A", images=(), modality="MRI")


ASKED = {"train": [question("b"), question("a")], "test": [question("c")]}
CHANGED = ASKED | {"train": [question("b"), dataclasses.replace(question("a"), answer="B")]}


@pytest.fixture
def state():
  fresh = TrainState(step=jnp.int32(0), params={"w": jnp.arange(4.0)}, opt_state=(), skipped=jnp.int32(0))
  return jax.device_put(fresh, sharding.replicated(sharding.make_mesh(data=8)))


def moved(state, steps):
  return state.replace(step=state.step + steps, params={"w": state.params["w"] + 1})


def saved(tmp_path, state, settings=None, **how):
  with begun(tmp_path, settings, **how) as files:
    files.save(2, moved(state, 2), now=True)


def refused(match, error=ValueError, **how):
  with pytest.raises(error, match=match), opened(**how):
    pass


def test_only_a_new_folder_is_begun_and_only_a_run_is_resumed(tmp_path):
  refused("no run to resume", tmp_path=tmp_path, resume=True)
  assert not (tmp_path / "run").exists()
  with begun(tmp_path):
    # The one that is refused must not unlock it.
    refused("is in use by process", tmp_path=tmp_path, resume=True)
    assert (tmp_path / "run" / "lock.json").exists()
  assert json.loads((tmp_path / "run" / "config.json").read_text())["checkpoint"]["keep"] == 2
  refused("not empty; pass --resume", tmp_path=tmp_path)
  with pytest.raises(RuntimeError), begun(tmp_path / "failed"):  # as where a tracker is missing
    (tmp_path / "failed" / "run" / "metrics.jsonl").write_text("")
    raise RuntimeError
  assert not (tmp_path / "failed" / "run").exists()
  for name in ("metrics.jsonl", "evaluation.json"):  # a step, and what may come before the first
    with pytest.raises(RuntimeError), begun(tmp_path / name):
      (tmp_path / name / "run" / name).write_text("{}\n")
      raise RuntimeError
    with begun(tmp_path / name, resume=True) as files:
      assert files.resumes
  for name in ("config.json", "samples.jsonl", "tensorboard/other/events", "checkpoints/epoch=9.ckpt"):
    path = tmp_path / "others" / name.partition("/")[0] / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("")
    refused("not empty; pass --resume", tmp_path=path.parents[len(pathlib.Path(name).parts)])
    assert path.exists()
  with pytest.raises(ValueError, match="needs a workdir"), RunFiles("", config(), resume=True):
    pass
  (tmp_path / "file").write_text("")
  refused(r"workdir .*file/run cannot be written", OSError, tmp_path=tmp_path / "file")
  with pytest.raises(RuntimeError), opened(tmp_path / "new"):
    raise RuntimeError
  assert not (tmp_path / "new" / "run").exists()  # it died before it began


def test_another_config_is_refused_by_field_or_taken_where_that_is_allowed(tmp_path, state):
  with begun(tmp_path):
    pass
  assert run_record.changes({"log": {"samples": 1}, "seed": 0}, {"log": {"samples": 2}, "seed": 0}) == ""
  message = r"optimizer.learning_rate: 0.001 -> 0.002.*--allow_config_change"
  refused(message, tmp_path=tmp_path, settings=config(0.002), resume=True)
  stored = lambda name: json.loads((tmp_path / "run" / name).read_text())["optimizer"]["learning_rate"]  # noqa: E731
  with begun(tmp_path, config(0.002), resume=True, allow_config_change=True) as files:
    assert stored("config.json") == 0.001  # until it is known that the run goes on with it
    files.restored(state)
  assert (stored("config.json"), stored("config-before-1.json")) == (0.002, 0.001)


def test_what_a_run_leaves_that_was_killed_before_it_began_is_no_run(tmp_path):
  for place, resume in (("first", {}), ("second", {"auto_resume": True})):
    root = tmp_path / place / "run"
    (root / "stalls").mkdir(parents=True)
    (root / "stalls" / "after-the-start-0.txt").write_text("thread MainThread")
    for name in (".lock.json.77.partial", ".config.json.77.partial"):
      (root / name).write_text("{")
    with begun(tmp_path / place, **resume) as files:
      assert not files.resumes


def test_a_run_that_is_killed_while_it_begins_can_be_resumed(tmp_path, monkeypatch):
  def killed(*_, **__):
    raise OSError("killed")

  with monkeypatch.context() as other:
    other.setattr("kepo_jax.data.id_files.write", killed)
    with pytest.raises(OSError, match="killed"), begun(tmp_path):
      pass
  with begun(tmp_path, auto_resume=True) as files:
    assert files.resumes
  assert (tmp_path / "run" / "questions.json").exists()


def test_a_run_without_an_intact_checkpoint_starts_over_only_where_that_is_asked_for(tmp_path, state):
  saved(tmp_path, state)
  path = tmp_path / "run" / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
  path.write_bytes(path.read_bytes()[:-1])
  for _ in range(2):  # what was refused once is refused again
    with begun(tmp_path, resume=True) as files:
      with pytest.raises(ValueError, match="no checkpoint of .* is intact; the damaged ones are in broken/"):
        files.restored(state)
  with begun(tmp_path, auto_resume=True) as files:
    assert files.restored(state) is state


def test_a_run_whose_lock_was_taken_saves_nothing_more(tmp_path, state, monkeypatch):
  with opened(tmp_path) as files:
    files.save(2, state, now=False)
    files.save(4, state, now=False)
    monkeypatch.setattr(files._lock, "_lost", "lock.json was taken by process 7")
    with pytest.raises(ValueError, match="taken by process 7"):
      files.save(6, state, now=False)
  assert steps_in(tmp_path / "run" / "checkpoints") == [2, 4]


def test_what_was_said_to_each_test_question_and_broken_batches_are_kept(tmp_path):
  with opened(tmp_path) as files:
    files.record_outputs("after", [{"id": "a", "correct": True}, {"id": "b", "correct": False}])
    files.record_outputs("after", [{"id": "a", "correct": False}])  # made again after an interruption
    folder = files.dump("not_finite/step-3", {".tokens": np.arange(6).reshape(2, 3)}, [{"id": "q"}])
  assert (tmp_path / "run" / "outputs" / "after.jsonl").read_text() == '{"id": "a", "correct": false}\n'
  assert folder == str(tmp_path / "run" / "not_finite" / "step-3")
  with np.load(f"{folder}/batch.npz") as packed:
    np.testing.assert_array_equal(packed[".tokens"], [[0, 1, 2], [3, 4, 5]])
  assert json.loads((tmp_path / "run" / "not_finite" / "step-3" / "samples.jsonl").read_text()) == {"id": "q"}


def test_the_questions_of_a_run_are_on_record_and_must_stay(tmp_path):
  with begun(tmp_path):
    pass
  record = json.loads((tmp_path / "run" / "questions.json").read_text())
  assert record["ids"] == {"train": ["a", "b"], "validation": [], "test": ["c"]}
  assert record["rule"] == "none" and len(record["sha256"]) == 64
  with begun(tmp_path, resume=True) as files:
    for others, message in (
      (ASKED | {"test": [question("d")]}, "questions.json: exists and holds another split"),
      (CHANGED, r"questions.json: exists and 1 of its 3 questions have changed \('a'\)"),
    ):
      with pytest.raises(ValueError, match=message):
        files.begin(others, rule="none")


def validation(step, accuracy):
  return {"step": step, "out_of_domain": {"mean": accuracy}, "in_domain": {"accuracy": 1 - accuracy}}


@pytest.mark.parametrize(("figure", "kept"), [("out_of_domain", [2, 5, 6]), ("in_domain", [3, 5, 6]), ("none", [5, 6])])
def test_the_checkpoint_of_the_best_validation_stays(tmp_path, state, figure, kept):
  with opened(tmp_path, config(best=figure)) as files:
    for step, accuracy in enumerate((0.5, 0.7, 0.4, 0.7, 0.6, 0.5), 1):
      files.record("validation", validation(step, accuracy))
      files.save(step, state, now=step > 3)
  assert steps_in(tmp_path / "run" / "checkpoints") == kept


def test_the_newest_state_comes_back_and_what_came_after_it_is_forgotten(tmp_path, state):
  with begun(tmp_path) as files:
    files.record("before", {"step": 0})
    files.record("validation", validation(2, 0.5))
    files.save(2, moved(state, 2), now=False, positions=lambda: {"metrics.jsonl": 123})
    files.record("validation", validation(3, 0.6))
    files.record("after", {"step": 3})
  with begun(tmp_path, resume=True) as files:
    restored = files.restored(state)
    assert files.saved == str(tmp_path / "run" / "checkpoints" / "2")  # need not be saved again
  assert int(restored.step) == 2 and restored.params["w"].tolist() == [1, 2, 3, 4]
  assert state.params["w"].is_deleted()  # a resumed run does not hold the untrained state beside its own
  assert restored.params["w"].sharding == state.params["w"].sharding
  assert files.evaluations == {"before": {"step": 0}, "validation": [validation(2, 0.5)]}
  assert files.positions == {"metrics.jsonl": 123} and not files.owes_validation


def test_a_validation_that_was_not_done_at_the_checkpoint_is_owed(tmp_path, state):
  with begun(tmp_path) as files:
    files.save(2, moved(state, 2), now=True, validated=False)
    files.record("validation", validation(2, 0.5))  # it was made after all, and then the process was killed
  with begun(tmp_path, resume=True) as files:
    files.restored(state)
  assert files.owes_validation and files.evaluations["validation"] == []


def test_other_models_or_random_numbers_are_refused(tmp_path, state, monkeypatch):
  folder = tmp_path / "teacher"
  folder.mkdir()
  (folder / "config.json").write_text("1")
  saved(tmp_path, state, models={"teacher": folder})
  bits = jax.random.bits

  def others(message):
    with begun(tmp_path, models={"teacher": folder}, resume=True) as files:
      with pytest.raises(ValueError, match=message):
        files.restored(jax.tree.map(jnp.copy, state))

  with monkeypatch.context() as other:
    other.setattr("jax.random.bits", lambda *arguments: bits(*arguments) + 1)
    others("was made with other random numbers")
  (folder / "config.json").write_text("2")
  others("was made with other models")


def test_changed_questions_are_taken_only_where_that_is_allowed(tmp_path, state, said):
  saved(tmp_path, state)
  with begun(tmp_path, questions=CHANGED, resume=True, allow_config_change=True) as files:
    assert not (tmp_path / "run" / "questions-before-1.json").exists()
    assert int(files.restored(state).step) == 2
  assert "Going on with the questions as they are now" in said.text
  assert (tmp_path / "run" / "questions-before-1.json").exists()
