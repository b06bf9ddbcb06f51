"""The results that are kept with the code: small files, tables that follow from the runs, and pages that quote them."""

import csv
import json
import re

import pytest

from kepo_jax.evaluation import studies
from kepo_jax.reporting import study_files, study_tables
from tests.conftest import ROOT

RESULTS = ROOT / "docs" / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/runs.json"))
_NUMBER = re.compile(r"[-+]?\d+\.\d+")


def table_lines(path):
  """The tables of a page in Markdown, each a list of its lines."""
  tables, lines = [], [*path.read_text("utf-8").splitlines(), ""]
  for before, line in zip(["", *lines], lines, strict=False):
    if line.startswith("|"):
      tables += [] if before.startswith("|") else [[]]
      tables[-1].append(line)
  return tables


def test_every_study_is_kept():
  assert STUDIES == ["budget", "gate", "hints", "main", "tau"]


def test_files_are_small():
  sizes = {path: path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()}
  assert sizes and not {path: size for path, size in sizes.items() if size >= 1_000_000}


def test_what_docs_quote_stands_in_the_tables():
  kept = {table[0]: table for path in RESULTS.rglob("*.md") for table in table_lines(path)}
  quoted = [table for table in table_lines(ROOT / "docs" / "results.md") if table[0] in kept]
  assert len(quoted) >= len(STUDIES)
  rows = {line for path in RESULTS.rglob("*.md") for table in table_lines(path) for line in table}
  assert [line for table in quoted for line in table if line not in rows] == []


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_tables_follow_from_the_runs(study):
  items = json.loads((RESULTS / study / "items.json").read_text())
  entries = json.loads((RESULTS / study / "runs.json").read_text())["runs"]
  pair = ("confused", "weak")  # the first one, whose tables have no pair in their names
  mine = studies.pairs(entries)[pair]
  references = study_files.references_of(study)
  summary = study_files.summaries(study, mine, items)[pair]
  expected = study_tables.main_rows(summary, references=references)
  with (RESULTS / study / "main.csv").open(newline="", encoding="utf-8") as file:
    written = {row[0]: row for row in csv.reader(file)}
  assert len(expected) > 2 and set(written) == {row[0] for row in expected}
  for row in expected[1:]:
    found, made = (list(map(float, _NUMBER.findall(" ".join(cells[3:])))) for cells in (written[row[0]], row))
    # The last digit of a bound is that of sums of floats, which another processor may round otherwise.
    assert found == pytest.approx(made, abs=0.11), row[0]
