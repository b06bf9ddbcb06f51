import dataclasses
import json
import pathlib

import pytest

from experiments.studies import plan, results, runs, statistics
from kepo_jax import types
from tests.evaluation import scripted
from tests.experiments.studies import cases
from tests.experiments.studies.test_runs import PHANTOM, cell


@pytest.fixture
def place(tmp_path):
  return runs.Place(PHANTOM, tmp_path / "runs")


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
  assert results.outputs_of(place, cell()) == []
  write_run(place.folder(cell()))
  outputs = results.outputs_of(place, cell())
  entry = json.loads(json.dumps(results.entry_of(place, cell(), outputs)))
  assert statistics.unpacked(entry["test"]["correct"], 4).tolist() == [True, False, True, True]
  assert entry["test"]["tokens"] == 3.5 and entry["test"]["out_of_domain"] == 0.5
  assert (entry["method"], entry["student"], entry["learning_rate"], entry["steps"]) == ("grpo", "confused", 1e-4, 4)
  cost = {"student_tokens": 30, "teacher_tokens": 14, "seconds": 1.0}  # of the processor, not of the clock
  assert [each["step"] for each in entry["validation"]] == [2, 4] and entry["validation"][0]["cost"] == cost
  assert entry["cost"].items() >= {"student_tokens": 60, "teacher_tokens": 28, "sampled": 40, "seconds": 2.0}.items()
  assert entry["curves"]["entropy"] == [1, 2, 3, 4]
  assert entry["curves"]["hint/accept_rate@2"] == [0.25, None, None, None]
  items = results.items_of(outputs, PHANTOM)
  assert items["image"] == [0, 0, 1, 1] and items["modality"] == [0, 1, 0, 1] and items["chance"] == [0.5] * 4


def entry(place, given):
  write_run(place.folder(given))
  return results.entry_of(place, given, results.outputs_of(place, given))


def test_results_are_kept_and_found_again(place, tmp_path):
  items = {"ids": ["a", "b"]}
  kept = results.Results(tmp_path / "results" / "main", "main", PHANTOM)
  kept.add(entry(place, cell()), items)
  again = results.Results(tmp_path / "results" / "main", "main", PHANTOM)
  assert again.entries == kept.entries and again.items == items
  seed = plan.GRID_SEEDS[0]
  again.add(entry(place, cell(seed=seed)))
  again = results.Results(tmp_path / "results" / "main", "main", PHANTOM)
  assert again.entry(cell(seed=seed), place.digest(cell(seed=seed)))["seed"] == seed
  assert again.entry(cell(), place.digest(cell()))["seed"] == 0
  assert again.entry(cell(), "another") is None  # the same line of another version of the data
  # Another line, and another study, that compute the same.
  other = cell(pair=PHANTOM.pairs[1])
  assert again.entry(other, place.digest(other))["teacher"] == "strong" and len(again.entries) == 3
  sibling = results.Results(tmp_path / "results" / "tau", "tau", PHANTOM)
  assert sibling.find(cell(), place.digest(cell())) and not sibling.folder.exists()  # looking writes nothing
  assert sibling.entry(cell(), place.digest(cell()))["method"] == "grpo"
  assert results.Results(tmp_path / "results" / "tau", "tau", PHANTOM).items == items
  with pytest.raises(results.OtherQuestions, match="other test questions than grpo; use .* and --workdir"):
    sibling.add(entry(place, cell(seed=1)), {"ids": ["b", "a"]})


def test_results_of_something_else_are_refused(place, tmp_path):
  results.Results(tmp_path / "main", "main", PHANTOM).add(entry(place, cell()), {"ids": []})
  with pytest.raises(ValueError, match="of another study or benchmark"):
    results.Results(tmp_path / "main", "main", plan.omnimedvqa("S", "T", "D"))
  with pytest.raises(ValueError, match="or of other fields of --set"):
    results.Results(tmp_path / "main", "main", plan.phantom({"train.steps": 2}))
  (tmp_path / "main" / "runs.json").write_text('{"study": ')
  with pytest.raises(ValueError, match=r"runs\.json is not JSON"):
    results.Results(tmp_path / "main", "main", PHANTOM)


def test_other_data_or_weights_under_the_same_paths_are_other_runs(monkeypatch, tmp_path):
  for name in ("student", "teacher"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"1")
    (tmp_path / name / "config.json").write_text("{}")
  benchmark = plan.omnimedvqa(str(tmp_path / "student"), str(tmp_path / "teacher"), str(tmp_path))

  def identified(question):
    example = types.Example(id="q", question=question, options=("x", "y"), answer="A", images=(), modality="MRI")
    monkeypatch.setattr(runs.splits, "load", lambda data: {"train": [], "test": [example]})
    found = dataclasses.replace(benchmark, identity=runs.identity_of(benchmark))
    return found, runs.Place(found, tmp_path / "runs")

  first, place = identified("?")
  given = plan.Cell(plan.MAIN_METHODS["grpo"], first.pairs[0], 1e-4, 0)
  results.Results(tmp_path / "out", "main", first).add(entry(place, given), {"ids": []})
  again, same = identified("?")
  assert results.Results(tmp_path / "out", "main", again).own(given, same.digest(given))
  (tmp_path / "teacher" / "model.safetensors").write_bytes(b"2")
  other, another = identified("!")
  assert another.digest(given) != place.digest(given)
  with pytest.raises(ValueError, match="others than these: model teacher, test questions; use another --output"):
    results.Results(tmp_path / "out", "main", other)


def test_kept_runs_are_those_that_the_code_would_make():
  place = runs.Place(PHANTOM, pathlib.Path("absent"))
  main = results.Results(cases.RESULTS / "main", "main", PHANTOM)
  for name, study in plan.STUDIES.items():
    seeds = 5 if name == "main" else 3
    own, grid = results.Results(cases.RESULTS / name, name, PHANTOM), list(plan.grid(study, PHANTOM, seeds))
    assert [cell.name for cell in grid if not main.own(cell, place.digest(cell))] == []
    finals = list(plan.finals(study, PHANTOM, seeds, results.chosen_rates(grid, place, main)))
    assert [cell.name for cell in finals if not own.own(cell, place.digest(cell))] == [] and len(finals) >= 13
