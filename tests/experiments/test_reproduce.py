"""The command: what is run, in which order, what is not run again, and what is told of faults."""

import json

import pytest
from absl.testing import flagsaver

from experiments import studies, study_runs
from tests.experiments.test_study_runs import output, write_run


@pytest.fixture
def module(program):
  return program("experiments.reproduce")


@pytest.fixture
def reproduce(module, monkeypatch, tmp_path):
  monkeypatch.setattr(module, "worker_slots", lambda count: [{}])
  with flagsaver.flagsaver(output=str(tmp_path / "results"), workdir=str(tmp_path / "runs"), seeds=2):
    yield module


@pytest.fixture
def made(monkeypatch):
  """Names of the cells that were run, by workers that leave finished runs at once; those of `failing` methods fail."""
  names = []

  class Workers:
    def __init__(self, slots):
      assert slots

    def run(self, cells, place, finished):
      for cell in cells:
        names.append(cell.name)
        folder = place.folder(cell)
        if cell.method.name in made.failing:
          finished(cell, 1.0, 0.0, "exit code 1")
        elif cell.method.trained:
          write_run(folder, correct=(True, cell.learning_rate == 2e-4, True, True))
          stored = json.loads((folder / "evaluation.json").read_text())
          # The middle rate is the best on validation; the test, which prefers the same, must not be asked.
          stored["validation"][-1]["overall"] = {"accuracy": {1e-4: 0.5, 2e-4: 0.75, 3e-4: 0.7}[cell.learning_rate]}
          (folder / "evaluation.json").write_text(json.dumps(stored))
          finished(cell, 1.0, 30.0, "")
        else:
          evaluated(folder, cell)
          finished(cell, 1.0, 5.0, "")

  def made():
    return names

  made.failing = ()
  monkeypatch.setattr(study_runs, "Workers", Workers)
  return made


def evaluated(folder, cell):
  """What evaluate_medvqa leaves; it was asked one question more than training."""
  for split in ("test", "validation") if cell.method == studies.START else ("test",):
    (folder / split).mkdir(parents=True)
    (folder / split / "outputs.jsonl").write_text("".join(json.dumps(output(n)) + "\n" for n in range(5)))
    figures = {"in_domain": {"accuracy": 1.0}, "out_of_domain": {"mean": 0.5}, "overall": {"accuracy": 0.7}}
    (folder / split / "evaluation.json").write_text(json.dumps(figures | {"modalities": {}}))


def entries(tmp_path, study):
  return json.loads((tmp_path / "results" / study / "runs.json").read_text())["runs"]


def test_a_study_is_run_once_and_shares_its_runs(reproduce, made, tmp_path):
  with flagsaver.flagsaver(study="tau", methods=["start", "accuracy-0", "accuracy-1"]):
    reproduce.main([])
    ran = len(made())
    # The grid of its parent is the main study's: 3 rates of 2 seeds. Of its own, accuracy-1 is KEPO itself.
    assert ran == 6 + 2 + 1 and len(entries(tmp_path, "main")) == 6
    found = {(each["method"], each["seed"]): each for each in entries(tmp_path, "tau")}
    assert set(found) == {("accuracy-0", 0), ("accuracy-0", 1), ("accuracy-1", 0), ("accuracy-1", 1), ("start", None)}
    assert {each["learning_rate"] for each in found.values()} == {2e-4, None}
    assert found["accuracy-0", 0]["cost"]["cpu_seconds"] == 30.0
    reproduce.main([])
    assert len(made()) == ran
  with flagsaver.flagsaver(study="main", methods=["kepo-tau1"]):
    reproduce.main([])
    assert len(made()) == ran + 2 * 3  # the other three pairs alone: the first pair's are those of the grid
  assert json.loads((tmp_path / "results" / "tau" / "items.json").read_text())["ids"] == ["q0", "q1", "q2", "q3"]


def test_a_fault_is_told_and_the_rest_goes_on(reproduce, made, tmp_path):
  made.failing = ("rloo",)
  with flagsaver.flagsaver(study="main", methods=["grpo", "rloo"]), pytest.raises(SystemExit) as error:
    reproduce.main([])
  assert "error: rloo (confused, weak) rate 0.0001 seed 0: exit code 1" in str(error.value)
  assert {each["method"] for each in entries(tmp_path, "main")} == {"grpo"}
  made.failing = ()
  with flagsaver.flagsaver(study="main", methods=["grpo", "rloo"]):
    reproduce.main([])
  assert {each["method"] for each in entries(tmp_path, "main")} == {"grpo", "rloo"}


def test_a_finished_run_that_nobody_had_read_is_not_run_again(reproduce, made, tmp_path):
  benchmark = studies.phantom()
  place = study_runs.Place(benchmark, tmp_path / "runs" / "phantom")
  for cell in studies.grid(studies.STUDIES["main"].only(["grpo"]), benchmark, 2):
    write_run(place.folder(cell))
  with flagsaver.flagsaver(study="main", methods=["grpo"]):
    reproduce.main([])
  assert not any("(confused" in name for name in made())
  assert "cpu_seconds" not in entries(tmp_path, "main")[0]["cost"]  # nobody measured them


def test_fields_have_the_types_of_the_config(reproduce):
  given = ["train.steps=2", "eval.test=False", "data.prompt_buckets=56,128", "optimizer.eps=1e-6", "data.resize=native"]
  assert reproduce.fields(given) == {
    "train.steps": 2, "eval.test": False, "data.prompt_buckets": (56, 128), "optimizer.eps": 1e-6,
    "data.resize": "native",
  }  # fmt: skip


@pytest.mark.parametrize("text", ["train.steps", "train.step=2", "steps=2", "train.steps=two", "eval.test=1", "x.y=1"])
def test_a_field_that_is_none_is_refused(reproduce, text):
  with pytest.raises(ValueError, match=rf"--set={text} is no SECTION\.FIELD=VALUE"):
    reproduce.fields([text])


def test_what_cannot_be_run_is_refused(reproduce):
  with (
    flagsaver.flagsaver(methods=["grpo", "dpo"]),
    pytest.raises(ValueError, match="--methods=dpo: .* main has start"),
  ):
    reproduce.chosen_study()
  with flagsaver.flagsaver(benchmark="omnimedvqa"), pytest.raises(ValueError, match="needs --data=DIR"):
    reproduce.chosen_benchmark()


def test_a_core_for_each_process(module):
  slots = module.worker_slots(0)
  assert slots and all(slot.keys() == {"core"} for slot in slots)
