"""The results that are kept with the code: small files, tables that follow from the runs, and pages that quote them."""

import json
import pathlib
import re
import shutil

import pytest

from experiments import studies, study_report, study_runs
from kepo_jax.evaluation import equal_cost
from kepo_jax.evaluation import studies as study_statistics
from kepo_jax.reporting import study_checks, study_files
from tests.conftest import ROOT

RESULTS = ROOT / "docs" / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/runs.json"))
SEEDS = {"main": 5}  # planned runs of each method; of the other studies 3
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
# Tables of docs/results.md that no study makes, by the first cells of their headers.
_OWN = {"study": "what varies", "a run": "projected minutes"}
_QUOTED = 13


def table_lines(path):
  """The tables of a page in Markdown, each a list of its lines."""
  tables, lines = [], [*path.read_text("utf-8").splitlines(), ""]
  for before, line in zip(["", *lines], lines, strict=False):
    if line.startswith("|"):
      tables += [] if before.startswith("|") else [[]]
      tables[-1].append(line)
  return tables


def entries_of(study, file="runs.json"):
  path = RESULTS / study / file
  return json.loads(path.read_text())["runs"] if path.exists() else []


def test_every_study_is_kept():
  assert STUDIES == ["budget", "gate", "hints", "main", "tau"]


def test_files_are_small():
  sizes = {path: path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()}
  assert sizes and not {path: size for path, size in sizes.items() if size >= 1_000_000}


def test_what_docs_quote_stands_in_the_tables():
  kept = [table for path in RESULTS.rglob("*.md") for table in table_lines(path)]
  found = {"quoted": 0, "own": 0}
  for table in table_lines(ROOT / "docs" / "results.md"):
    first, second = table[0].strip("| ").split(" | ")[:2]
    if _OWN.get(first) == second:
      found["own"] += 1
      continue
    # All lines stand in one table, under the same header, in the same order.
    whole = [lines for lines in kept if lines[0] == table[0] and set(table) <= set(lines)]
    assert whole, table[0]
    assert [line for line in whole[0] if line in table] == table
    found["quoted"] += 1
  assert found == {"quoted": _QUOTED, "own": len(_OWN)}


def planned(study):
  """Cells of a kept study that count, those of its grid, and the results of both."""
  benchmark, seeds = studies.phantom(), SEEDS.get(study, 3)
  place = study_runs.Place(benchmark, pathlib.Path("absent"))
  grid = list(studies.grid(studies.STUDIES[study], benchmark, seeds))
  main = study_runs.Results(RESULTS / "main", "main", benchmark)
  tried = [main.own(cell, place.digest(cell)) for cell in grid]
  rates = study_statistics.chosen_rates([entry for entry in tried if entry])
  finals = list(studies.finals(studies.STUDIES[study], benchmark, seeds, rates))
  return place, finals, grid, main, rates


@pytest.mark.parametrize("study", STUDIES)
def test_kept_runs_are_those_that_the_code_would_make(study):
  place, finals, grid, main, _ = planned(study)
  own = study_runs.Results(RESULTS / study, study, place.benchmark)
  assert [cell.name for cell in grid if not main.own(cell, place.digest(cell))] == []
  assert [cell.name for cell in finals if not own.own(cell, place.digest(cell))] == [] and len(finals) >= 13


def test_seconds_of_identical_trainings_differ_as_told():
  trained = [entry for study in STUDIES for entry in entries_of(study) if entry["seed"] is not None]
  same = {}
  for entry in trained:
    told = json.dumps([entry["curves"], entry["test"], entry["seed"], entry["student"], entry["teacher"]])
    same.setdefault(told, set()).add(entry["cost"]["seconds"])
  ratios = [max(seconds) / min(seconds) - 1 for seconds in same.values() if len(seconds) > 1]
  assert len(ratios) == 3
  assert (round(min(ratios), 2), round(max(ratios), 2)) == equal_cost.SITTINGS


@pytest.mark.parametrize("study", STUDIES)
def test_tables_follow_from_the_runs(study, monkeypatch, tmp_path):
  for path in RESULTS.glob("*/*.json"):
    (tmp_path / path.parent.name).mkdir(exist_ok=True)
    shutil.copy(path, tmp_path / path.parent.name)
  monkeypatch.setattr(study_files, "study_figures_of", lambda *given: {})
  monkeypatch.setattr(study_checks, "hints_figure", lambda *given: None)
  monkeypatch.setattr(study_files, "write_figures", lambda *given: [])
  monkeypatch.setattr(study_report.study_page, "study_page", lambda *given, **options: None)
  monkeypatch.setattr(study_report.pages, "rendered", lambda page: "")
  place, _, grid, _, rates = planned(study)
  results, main = (study_runs.Results(tmp_path / name, name, place.benchmark) for name in (study, "main"))
  study_report.write(studies.STUDIES[study], place, results, chosen_on=main, grid=grid, rates=rates,
                     seeds=SEEDS.get(study, 3))  # fmt: skip
  for ending in ("md", "csv", "tex"):
    kept, made = ({path.name: path.read_text("utf-8") for path in (folder / study).glob(f"*.{ending}")}
                  for folder in (RESULTS, tmp_path))  # fmt: skip
    assert set(kept) == set(made) and len(made) >= 7
    for name, text in made.items():
      # What stands between the numbers is the same to the letter.
      assert _NUMBER.sub("0", text) == _NUMBER.sub("0", kept[name]), name
      numbers = [[float(number.replace(",", "")) for number in _NUMBER.findall(each)] for each in (text, kept[name])]
      # The last digit of a bound is that of sums of floats, which another processor may round otherwise.
      assert numbers[0] == pytest.approx(numbers[1], abs=0.11), name
