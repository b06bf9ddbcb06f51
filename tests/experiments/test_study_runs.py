"""What a finished run leaves in runs.json, what is found again, and processes side by side."""

import dataclasses
import json
import os
import signal
import time
import types as pytypes

import pytest

from experiments import studies, study_runs
from kepo_jax import types
from kepo_jax.evaluation.studies import unpacked
from tests.evaluation import scripted

PHANTOM = studies.phantom()
PAIR = PHANTOM.pairs[0]


def cell(method="grpo", rate=1e-4, seed=0, pair=PAIR):
  return studies.Cell(studies.MAIN_METHODS[method], pair, rate, seed)


@pytest.fixture
def place(tmp_path):
  return study_runs.Place(PHANTOM, tmp_path / "runs")


def output(number, correct=True):
  shown = {"modality": ("MRI", "CT")[number % 2], "images": [f"{number // 2}"], "tokens": 2 + number}
  return scripted.output(f"q{number}", correct=correct, **shown)


def write_run(folder, correct=(True, False, True, True)):
  """A finished run of four steps as `kepo_medvqa` leaves it, with the files that are read."""
  for name in ("outputs", "model"):
    (folder / name).mkdir(parents=True)
  (folder / "outputs" / "after.jsonl").write_text(
    scripted.json_lines(output(n, right) for n, right in enumerate(correct))
  )
  accuracies = {"in_domain": {"accuracy": 1.0}, "out_of_domain": {"mean": 0.5}, "overall": {"accuracy": 0.75}}
  accuracies |= {"modalities": {"MRI": {"accuracy": 1.0}, "CT": {"accuracy": 0.5}}}
  after = accuracies | {"format": 1.0, "unparsed": 0.0, "truncated": 0.0}
  validation = [accuracies | {"step": step} for step in (2, 4)]
  (folder / "evaluation.json").write_text(json.dumps({"after": after, "validation": validation}))
  figures = {"lr": 1.0, "tokens/sampled": 10, "tokens/trained": 5, "tokens/scored": 7}
  lines = [{"step": step, "entropy": step, **figures} for step in range(1, 5)]
  lines[0] |= {"hint/accept_rate@10": 0.5, "hint/accept_rate@2": 0.25}
  lines += [{"step": step, "validation/overall": 0.75} for step in (2, 4)]
  (folder / "metrics.jsonl").write_text(scripted.json_lines(lines))
  timing = [{"step": step, "seconds/step": 9.0, "seconds/processor": 0.5} for step in range(1, 5)]
  (folder / "timing.jsonl").write_text(scripted.json_lines(timing))
  (folder / "model" / "config.json").write_text("{}")
  (folder / "config.json").write_text(json.dumps({"eval": {"prompt": "evaluation"}}))


def test_a_run_becomes_an_entry(place):
  assert study_runs.outputs_of(place, cell()) == []
  write_run(place.folder(cell()))
  outputs = study_runs.outputs_of(place, cell())
  entry = json.loads(json.dumps(study_runs.entry_of(place, cell(), outputs)))
  assert unpacked(entry["test"]["correct"], 4).tolist() == [True, False, True, True]
  assert entry["test"]["tokens"] == 3.5 and entry["test"]["out_of_domain"] == 0.5
  assert (entry["method"], entry["student"], entry["learning_rate"], entry["steps"]) == ("grpo", "confused", 1e-4, 4)
  cost = {"student_tokens": 30, "teacher_tokens": 14, "seconds": 1.0}  # of the processor, not of the clock
  assert [each["step"] for each in entry["validation"]] == [2, 4] and entry["validation"][0]["cost"] == cost
  assert entry["cost"].items() >= {"student_tokens": 60, "teacher_tokens": 28, "sampled": 40, "seconds": 2.0}.items()
  assert entry["curves"]["entropy"] == [1, 2, 3, 4]
  assert entry["curves"]["hint/accept_rate@2"] == [0.25, None, None, None]
  items = study_runs.items_of(outputs, PHANTOM)
  assert items["image"] == [0, 0, 1, 1] and items["modality"] == [0, 1, 0, 1] and items["chance"] == [0.5] * 4


def test_a_digest_names_what_is_computed(place, monkeypatch):
  same = place.digest(cell())
  assert place.digest(cell(pair=PHANTOM.pairs[1])) == same  # GRPO asks no teacher
  assert place.digest(cell("kepo-tau1")) != place.digest(cell("kepo-tau1", pair=PHANTOM.pairs[1]))
  others = [cell(seed=1), cell(rate=2e-4), cell("rloo"), cell(pair=PHANTOM.pairs[2])]
  assert len({same, *map(place.digest, others)}) == 5
  kept = studies.phantom({"checkpoint.keep": 7})
  assert study_runs.Place(kept, place.workdir).digest(cell()) == same
  shorter = studies.phantom({"train.steps": 7})
  assert study_runs.Place(shorter, place.workdir).digest(cell()) != same
  monkeypatch.setattr(studies, "REVISION", studies.REVISION + 1)
  assert place.digest(cell()) != same


def test_a_command_is_what_a_user_would_type(place):
  (command,) = place.commands(cell("gkd-0"))
  assert command[:2] == ["experiments.kepo_medvqa", "--config=experiments/configs/gkd.py:phantom"]
  assert {"--config.batch.on_policy_fraction=0.0", "--config.seed=0", "--auto_resume"} <= set(command)
  test, validation = place.commands(studies.Cell(studies.START, PHANTOM.pairs[1]))
  assert "--model=experiments/assets/phantom/confused" in test and "--split=validation" in validation
  (command,) = place.commands(studies.Cell(studies.TEACHER, PHANTOM.pairs[1]))
  assert "--model=experiments/assets/phantom/strong" in command and "--split=test" in command


def entry(place, given):
  write_run(place.folder(given))
  return study_runs.entry_of(place, given, study_runs.outputs_of(place, given))


def test_results_are_kept_and_found_again(place, tmp_path):
  items = {"ids": ["a", "b"]}
  results = study_runs.Results(tmp_path / "results" / "main", "main", PHANTOM)
  results.add(entry(place, cell()), items)
  again = study_runs.Results(tmp_path / "results" / "main", "main", PHANTOM)
  assert again.entries == results.entries and again.items == items
  seed = studies.GRID_SEEDS[0]
  again.add(entry(place, cell(seed=seed)))
  again = study_runs.Results(tmp_path / "results" / "main", "main", PHANTOM)
  assert again.entry(cell(seed=seed), place.digest(cell(seed=seed)))["seed"] == seed
  assert again.entry(cell(), place.digest(cell()))["seed"] == 0
  assert again.entry(cell(), "another") is None  # the same line of another version of the data
  # Another line, and another study, that compute the same.
  other = cell(pair=PHANTOM.pairs[1])
  assert again.entry(other, place.digest(other))["teacher"] == "strong" and len(again.entries) == 3
  sibling = study_runs.Results(tmp_path / "results" / "tau", "tau", PHANTOM)
  assert sibling.find(cell(), place.digest(cell())) and not sibling.folder.exists()  # looking writes nothing
  assert sibling.entry(cell(), place.digest(cell()))["method"] == "grpo"
  assert study_runs.Results(tmp_path / "results" / "tau", "tau", PHANTOM).items == items
  with pytest.raises(study_runs.OtherQuestions, match="other test questions than grpo; use .* and --workdir"):
    sibling.add(entry(place, cell(seed=1)), {"ids": ["b", "a"]})


def test_results_of_something_else_are_refused(place, tmp_path):
  study_runs.Results(tmp_path / "main", "main", PHANTOM).add(entry(place, cell()), {"ids": []})
  with pytest.raises(ValueError, match="of another study or benchmark"):
    study_runs.Results(tmp_path / "main", "main", studies.omnimedvqa("S", "T", "D"))
  with pytest.raises(ValueError, match="or of other fields of --set"):
    study_runs.Results(tmp_path / "main", "main", studies.phantom({"train.steps": 2}))
  (tmp_path / "main" / "runs.json").write_text('{"study": ')
  with pytest.raises(ValueError, match=r"runs\.json is not JSON"):
    study_runs.Results(tmp_path / "main", "main", PHANTOM)


def test_other_data_or_weights_under_the_same_paths_are_other_runs(monkeypatch, tmp_path):
  for name in ("student", "teacher"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"1")
    (tmp_path / name / "config.json").write_text("{}")
  benchmark = studies.omnimedvqa(str(tmp_path / "student"), str(tmp_path / "teacher"), str(tmp_path))

  def identified(question):
    example = types.Example(id="q", question=question, options=("x", "y"), answer="A", images=(), modality="MRI")
    monkeypatch.setattr(study_runs.splits, "load", lambda data: {"train": [], "test": [example]})
    found = dataclasses.replace(benchmark, identity=study_runs.identity_of(benchmark))
    return found, study_runs.Place(found, tmp_path / "runs")

  first, place = identified("?")
  given = studies.Cell(studies.MAIN_METHODS["grpo"], first.pairs[0], 1e-4, 0)
  study_runs.Results(tmp_path / "out", "main", first).add(entry(place, given), {"ids": []})
  again, same = identified("?")
  assert study_runs.Results(tmp_path / "out", "main", again).own(given, same.digest(given))
  (tmp_path / "teacher" / "model.safetensors").write_bytes(b"2")
  other, another = identified("!")
  assert another.digest(given) != place.digest(given)
  with pytest.raises(ValueError, match="others than these: model teacher, test questions; use another --output"):
    study_runs.Results(tmp_path / "out", "main", other)


def commands(folder, statements):
  """A place whose cells run timeit with one statement each."""
  return pytypes.SimpleNamespace(
    folder=lambda given: folder / str(given.seed),
    commands=lambda given: [["timeit", "-n", "1", "-r", "1", statements[given.seed]]],
  )


def test_processes_run_side_by_side_and_faults_are_told(tmp_path):
  cores = sorted(os.sched_getaffinity(0))
  statements = ["import os; assert len(os.sched_getaffinity(0)) == 1", "1/0", "sum(range(3_000_000))"]
  found = {}
  (tmp_path / "0").mkdir()  # goes on from an earlier process, whose seconds nobody has
  workers = study_runs.Workers([{"core": cores[0]}, {"core": cores[-1]}])
  workers.run(
    [cell(seed=seed) for seed in range(3)],
    commands(tmp_path, statements),
    lambda given, seconds, cpu, fault: found.update({given.seed: (cpu, fault)}),
  )
  assert found[0][1] == found[2][1] == ""
  assert found[1][1].startswith("exit code 1") and found[1][1].endswith("ZeroDivisionError: division by zero")
  assert found[2][0] > 0 == found[0][0]  # CPU seconds
  assert len(os.sched_getaffinity(0)) == len(cores)  # this thread's own cores are untouched


def test_interruptions_stop_the_processes_and_are_passed_on(tmp_path):
  # It plays the user as well, and ends by the second signal only: the first one is what a run saves upon.
  statement = f"""
import os, pathlib, signal, time
def heard(number, frame):
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  pathlib.Path({str(tmp_path / "once")!r}).touch()
  os.kill({os.getpid()}, signal.SIGINT)
signal.signal(signal.SIGTERM, heard)
os.kill({os.getpid()}, signal.SIGINT)
time.sleep(120)
"""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  start = time.monotonic()
  try:
    with pytest.raises(KeyboardInterrupt):
      study_runs.Workers([{}]).run([cell(seed=0), cell(seed=0)], commands(tmp_path, [statement]), lambda *_: None)
  finally:
    signal.signal(signal.SIGINT, before)
  assert (tmp_path / "once").exists() and time.monotonic() - start < 120
