"""The results that are kept with the code: answers can be read, give the numbers of the tables, and are found again."""

import csv
import json
import pathlib

import numpy as np
import pytest

from experiments import studies, study_runs
from kepo_jax.evaluation import seeds
from kepo_jax.evaluation import studies as study_statistics
from tests.conftest import ROOT

RESULTS = ROOT / "docs" / "results"
STUDIES = ("budget", "gate", "hints", "main", "tau")


def kept(study, file="runs.json"):
  return json.loads((RESULTS / study / file).read_text())


@pytest.mark.parametrize("study", STUDIES)
def test_kept_answers_give_the_kept_figures(study):
  items = kept(study, "items.json")
  plan, methods = seeds.design(items), {}
  for entry in kept(study)["runs"]:
    answers = study_statistics.unpacked(entry["test"]["correct"], len(items["ids"]))
    found = dict(zip(plan.names, seeds.points(answers[None], plan)[0], strict=True))
    for name in ("in_domain", "out_of_domain", "overall"):
      assert found[name] == pytest.approx(entry["test"][name], abs=2e-5), (entry["method"], entry["seed"], name)
    if (entry["student"], entry["teacher"]) == ("confused", "weak"):
      methods.setdefault(entry["label"], []).append(found["out_of_domain"])
  header, *rows = csv.reader((RESULTS / study / "main.csv").read_text().splitlines())
  column = next(place for place, name in enumerate(header) if name.startswith("out of domain, mean of"))
  # The last digit is that of a sum of floats, which another processor may round otherwise.
  shown = {row[0]: float(row[column]) for row in rows}
  assert shown == pytest.approx({name: 100 * np.mean(values) for name, values in methods.items()}, abs=0.11)


def test_kept_runs_are_those_that_the_code_would_make():
  benchmark = studies.phantom()
  place = study_runs.Place(benchmark, pathlib.Path("absent"))
  main = study_runs.Results(RESULTS / "main", "main", benchmark)
  for study in STUDIES:
    planned = 5 if study == "main" else 3
    own, cells = study_runs.Results(RESULTS / study, study, benchmark), {}
    for cell in studies.grid(studies.STUDIES[study], benchmark, planned):
      cells[cell.name] = main.own(cell, place.digest(cell))
    assert [name for name, entry in cells.items() if not entry] == []
    rates = study_statistics.chosen_rates(list(cells.values()))
    finals = list(studies.finals(studies.STUDIES[study], benchmark, planned, rates))
    assert [cell.name for cell in finals if not own.own(cell, place.digest(cell))] == [] and len(finals) >= 13
