import csv
import itertools
import json
import os
import shutil
import types

import pytest
from absl.testing import flagsaver

from experiments.studies import page, plan, runs
from kepo_jax.training import lock
from tests.conftest import ROOT
from tests.evaluation.scripted import json_lines
from tests.experiments.studies.test_results import output, write_run


@pytest.fixture
def module(program):
  return program("experiments.reproduce")


@pytest.fixture
def reproduce(module, monkeypatch, tmp_path):
  monkeypatch.setattr(runs, "worker_slots", lambda count, devices: [{}])
  monkeypatch.setattr(page, "write", lambda *given, **options: "")  # figures take seconds; see the last test
  with flagsaver.flagsaver(output=str(tmp_path / "results"), workdir=str(tmp_path / "runs"), seeds=2):
    yield module


@pytest.fixture
def made(monkeypatch):
  """Names of the cells that were run, by workers that leave finished runs at once; those of `failing` methods fail."""
  names = []

  def run(cells, place, finished):
    for cell in cells:
      names.append(cell.name)
      folder, fails = place.folder(cell), cell.method.name in made.failing
      if not fails and cell.method.trained:
        write_run(folder, correct=(True, cell.learning_rate == 3e-4, True, True))
        stored = json.loads((folder / "evaluation.json").read_text())
        # The second rate is the best on validation; the test, which prefers the third one, must not be asked.
        stored["validation"][-1]["overall"] = {"accuracy": {1e-4: 0.5, 2e-4: 0.75}.get(cell.learning_rate, 0.7)}
        (folder / "evaluation.json").write_text(json.dumps(stored))
      elif not fails:
        evaluated(folder, cell)
      finished(cell, 1.0, 5.0, "exit code 1" if fails else "")

  made = types.SimpleNamespace(names=names, failing=())
  monkeypatch.setattr(runs, "Workers", lambda slots: types.SimpleNamespace(run=run))
  return made


def evaluated(folder, cell):
  """What evaluate_medvqa leaves; it was asked one question more than training."""
  for split in ("test", "validation") if cell.method == plan.START else ("test",):
    (folder / split).mkdir(parents=True)
    (folder / split / "outputs.jsonl").write_text(json_lines(map(output, range(5))))
    figures = {"in_domain": {"accuracy": 1.0}, "out_of_domain": {"mean": 0.5}, "overall": {"accuracy": 0.7}}
    (folder / split / "evaluation.json").write_text(json.dumps(figures | {"modalities": {}}))


def place_of(tmp_path):
  return runs.Place(plan.phantom(), tmp_path / "runs" / "phantom")


def entries(tmp_path, study, file="runs.json"):
  return json.loads((tmp_path / "results" / study / file).read_text())["runs"]


def test_a_study_is_run_once_and_shares_its_runs(reproduce, made, tmp_path):
  with flagsaver.flagsaver(study="tau", methods=["start", "accuracy-0", "accuracy-1"]):
    reproduce.main([])
    ran = len(made.names)
    # The grids of its parents are the main study's: 4 rates of 2 seeds each.
    assert ran == 2 * 8 + 2 * 2 + 1 and len(entries(tmp_path, "main", "grid.json")) == 16
    assert not (tmp_path / "results" / "main" / "runs.json").exists()
    found = {(each["method"], each["seed"]): each for each in entries(tmp_path, "tau")}
    assert found.keys() == {("start", None), *itertools.product(("accuracy-0", "accuracy-1"), (0, 1))}
    assert {each["learning_rate"] for each in found.values()} == {2e-4, None}
    reproduce.main([])
    assert len(made.names) == ran
    # Finished runs whose results are lost are read again, and not run.
    shutil.rmtree(tmp_path / "results")
    reproduce.main([])
    assert len(made.names) == ran and len(entries(tmp_path, "tau")) == 5
  with flagsaver.flagsaver(study="main", methods=["kepo-tau1"]):
    reproduce.main([])
    assert len(made.names) == ran + 2 * 3  # the other three pairs alone: on the first one accuracy-1 is KEPO itself
  assert json.loads((tmp_path / "results" / "items.json").read_text())["ids"] == ["q0", "q1", "q2", "q3"]


def test_faults_are_told_and_the_rest_goes_on(reproduce, made, tmp_path):
  cell, *_ = plan.grid(plan.STUDIES["main"].only(["grpo"]), plan.phantom(), 2)
  folder = place_of(tmp_path).folder(cell)
  write_run(folder)
  made.failing = ("rloo",)
  (folder / "evaluation.json").write_text("{")
  with flagsaver.flagsaver(methods=["grpo", "rloo"]), pytest.raises(SystemExit, match="cannot be read: ") as e:
    reproduce.main([])
  assert "error: rloo (confused, weak) rate 0.0001 seed 100: exit code 1" in str(e.value)
  assert cell.name not in made.names
  # The rate has one seed too few; the others are there, and so are the runs at the best of them.
  assert {(each["method"], each["seed"]) for each in entries(tmp_path, "main")} == {("grpo", 0), ("grpo", 1)}
  assert len(entries(tmp_path, "main", "grid.json")) == 7
  made.failing = ()
  shutil.rmtree(folder)
  with flagsaver.flagsaver(methods=["grpo", "rloo"]):
    reproduce.main([])
  assert {each["method"] for each in entries(tmp_path, "main")} == {"grpo", "rloo"}


def test_fields_have_the_types_of_the_config(reproduce):
  for text in ("train.steps", "train.step=2", "train.steps=two", "eval.test=1"):
    with pytest.raises(ValueError, match=rf"--set={text} is no SECTION\.FIELD=VALUE"):
      reproduce.fields([text])
  given = ["train.steps=2", "eval.test=False", "data.prompt_buckets=56,128", "optimizer.eps=1e-6"]
  found = {"train.steps": 2, "eval.test": False, "data.prompt_buckets": (56, 128), "optimizer.eps": 1e-6}
  assert reproduce.fields(given) == found


def test_what_cannot_be_run_is_refused(reproduce, made, tmp_path):
  for flag, message in (
    ({"methods": ["grpo", "dpo"]}, "--methods=dpo: .* main has start"),
    ({"benchmark": "omnimedvqa"}, "needs --data=DIR"),
    ({"set": ["optimizer.learning_rate=1e-3"]}, "is what the study main varies itself"),
  ):
    with flagsaver.flagsaver(**flag), pytest.raises(ValueError, match=message):
      reproduce.main([])
  (tmp_path / "results").mkdir()
  with lock.WorkdirLock(tmp_path / "results"), flagsaver.flagsaver(methods=["start"]):
    with pytest.raises(ValueError, match="is in use by process .* pass another --output"):
      reproduce.main([])
  assert made.names == []


def test_a_run_made_again_is_compared(reproduce, made, tmp_path, monkeypatch):
  with flagsaver.flagsaver(study="main", methods=["grpo"]):
    reproduce.main([])
  with flagsaver.flagsaver(study="main", verify="grpo:1"):
    assert "the same, to the last digit" in reproduce.verified(reproduce.chosen_study(), place_of(tmp_path))
  file = tmp_path / "results" / "main" / "runs.json"
  changed = json.loads(file.read_text())
  for entry in changed["runs"]:
    entry["curves"]["entropy"][0] += 1e-3
  file.write_text(json.dumps(changed))
  with flagsaver.flagsaver(study="main", verify="grpo:1"), pytest.raises(ValueError, match="otherwise: curves differ"):
    reproduce.verified(reproduce.chosen_study(), place_of(tmp_path))
  with flagsaver.flagsaver(study="main", verify="grpo:7"), pytest.raises(ValueError, match="has no such run"):
    reproduce.verified(reproduce.chosen_study(), place_of(tmp_path))
  # In a fresh clone nothing was made yet, and the shipped run is made again.
  monkeypatch.setattr(reproduce, "SHIPPED", tmp_path / "shipped")
  (tmp_path / "results").rename(tmp_path / "shipped")
  with flagsaver.flagsaver(study="main", verify="grpo:1"), pytest.raises(ValueError, match="otherwise: curves differ"):
    reproduce.verified(reproduce.chosen_study(), place_of(tmp_path))


def test_a_reproduction_is_compared_with_what_is_shipped(reproduce, made, tmp_path, monkeypatch, capsys):
  with flagsaver.flagsaver(study="main", methods=["start", "grpo"]):
    reproduce.main([])
    assert "0 of 4 runs that are also in docs/results" in capsys.readouterr().out  # others than shipped: start
    monkeypatch.setattr(reproduce, "SHIPPED", shutil.copytree(tmp_path / "results", tmp_path / "shipped"))
    reproduce.main([])
    assert "12 of 12 runs" in (said := capsys.readouterr().out) and "others" not in said
    shipped = tmp_path / "shipped" / "main" / "runs.json"
    changed = json.loads(shipped.read_text())
    changed["runs"][0]["curves"]["entropy"][0] += 1e-3
    shipped.write_text(json.dumps(changed))
    reproduce.main([])
  assert "11 of 12 runs" in (said := capsys.readouterr().out) and "others than shipped: " in said


@pytest.mark.slow
def test_from_raw_data_to_tables(module, shared_directory, tmp_path, monkeypatch, capsys):
  fields = [
    "train.steps=2", "eval.every=2", "batch.prompts=4", "eval.prompts=8", "data.train_items=8",
    "data.validation_items=2", "data.test_items=3", "data.templates=brief", "data.resize=native",
    "data.prompt_buckets=56,128,256", "data.patch_buckets=64,256,1024", "sampling.max_new_tokens=24",
    "eval.max_new_tokens=24", "exploration.hint_tokens=24", "model.compute_dtype=float32",
    "model.teacher_dtype=float32", "model.remat=none",
  ]  # fmt: skip
  monkeypatch.setattr(plan.Benchmark, "rates", (1e-4,))  # one run chooses the rate, one counts
  monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1")
  models = ROOT / "experiments" / "assets" / "phantom"
  paths = {
    "data": shared_directory / "omnimedvqa-mini", "student": models / "confused", "teacher": models / "weak",
    "output": tmp_path / "results", "workdir": tmp_path / "runs", "tables": tmp_path / "tables",
  }  # fmt: skip
  given = {"benchmark": "omnimedvqa", "seeds": 1, "methods": ["start", "kepo-tau1"], "set": fields}
  with flagsaver.flagsaver(**given, **{name: str(path) for name, path in paths.items()}):
    module.main([])
  printed = capsys.readouterr().out
  folder = tmp_path / "results" / "omnimedvqa-main"
  assert f"{folder / 'index.html'}: 2 of 2 runs" in printed and "missing" not in printed
  assert "model teacher" in json.loads((folder / "runs.json").read_text())["identity"]
  start, kepo = csv.DictReader((tmp_path / "tables" / "main.csv").read_text().splitlines())
  assert all(0 <= float(row["out of domain, mean of 7"]) <= 100 for row in (start, kepo))
  assert "data:image/jpeg;base64" in (folder / "index.html").read_text()  # questions; figures are PNG
