"""Tables, figures and page of a study: from runs.json, and questions with answers from the folders of its runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import studies, study_runs
from kepo_jax import storage
from kepo_jax.reporting import pages, study_checks, study_files, study_page, study_tables
from kepo_jax.reporting.panels import human_time
from kepo_jax.reporting.sinks import read_records

SHOWN = ("start", "grpo", "kepo-tau1")  # whose answers stand beside each other in the main study
_FEW = 3  # in the others


def write(
  study: studies.Study,
  place: study_runs.Place,
  results: study_runs.Results,
  *,
  chosen_on: study_runs.Results,
  grid: Sequence[studies.Cell],
  rates: Mapping[str, float],
  seeds: int,
) -> str:
  """Writes what there is, into the folder of the results; says in a line what it was.

  Args:
    study: of the results.
    place: of the runs.
    results: with at least one entry.
    chosen_on: of the main study, which keeps the grids of all studies.
    grid: cells that choose learning rates.
    rates: method -> the chosen one; of those whose grid is complete.
    seeds: planned runs of each method.
  """
  guessed = {cell.method.name: cell.learning_rate or 0.0 for cell in grid} | dict(rates)
  cells = list(studies.finals(study, place.benchmark, seeds, guessed))
  known = [(cell, results.own(cell, place.digest(cell))) for cell in cells if _rated(cell, rates)]
  entries = [entry for _, entry in known if entry]
  if not entries:  # of an unfinished grid there is nothing to compare yet
    return f"{results.folder}: no learning rate is chosen yet; {len(results.entries)} runs of the grid are finished"
  expected = planned(cells)
  tried = {cell: entry for cell in grid if (entry := chosen_on.own(cell, place.digest(cell)))}
  items = dict(results.items or {})
  found = study_files.summaries(study.name, entries, items)
  tables = study_files.study_tables_of(
    study.name,
    entries,
    items,
    found,
    grid=list(tried.values()),
    rates=place.benchmark.rates,
    tuned={cell.method.name: cell.method.label for cell in grid},
    expected=expected,
  )
  figures = study_files.study_figures_of(study.name, entries, items, found)
  measured = list(studies.measured(study, place.benchmark))
  records = [record for cell in measured for record in results.hints(place.digest(cell))]
  unmeasured = [f"hints of {cell.name}" for cell in measured if not results.hints(place.digest(cell))]
  if records:
    tables += study_files.hint_tables(records, unmeasured, items["unseen"])
    told = [record for record in records if record["modality"] != "all" and record["positive_rate"] is not None]
    figures["hints"] = study_checks.hints_figure(told, items["train_modality"], items["unseen"])
  study_files.write_tables(results.folder, tables)
  study_files.write_figures(results.folder, figures)
  untried = [f"learning-rate grid of {cell.name}" for cell in grid if cell not in tried]
  missing = [*study_tables.missing_cells(expected, entries), *unmeasured, *untried]
  shown = list(samples(study, place, known, items))
  page = study_page.study_page(
    study.title,
    subtitle=f"{place.benchmark.name}, {len(items['ids']):,} test questions, up to {seeds} seeds",
    asks=f"{study.asks} {study.notes}",
    facts=list(facts(results.entries, len(cells), len(entries))),
    tables=tables,
    figures=figures,
    samples=shown,
    missing=missing,
  )
  storage.write_text(results.folder / "index.html", pages.rendered(page))
  said = f"; missing: {', '.join(missing)}" if missing else ""
  if not shown:
    said += f"; the page is without questions and answers, because the folders of the runs are not in {place.workdir}"
  return f"{results.folder / 'index.html'}: {len(entries)} of {len(cells)} runs{said}"


def _rated(cell: studies.Cell, rates: Mapping[str, float]) -> bool:
  return not cell.method.trained or (cell.method.rate_of or cell.method.name) in rates


def planned(cells: Sequence[studies.Cell]) -> list[dict[str, Any]]:
  """The lines of the tables with the seeds that each should have; in the order of the study."""
  lines: dict[tuple[str, str, str], dict[str, Any]] = {}
  for cell in sorted(cells, key=lambda cell: cell.method.trained):  # start and teacher first
    student, teacher = cell.pair.student, cell.pair.teacher
    line = {"method": cell.method.name, "label": cell.method.label, "student": student, "teacher": teacher, "seeds": []}
    if cell.method.times > 1 and cell.method.rate_of:
      parent = studies.MAIN_METHODS[cell.method.rate_of].label
      line["note"] = f"{cell.method.label}: at the rate of {parent}, chosen at 1/{cell.method.times} of its steps."
    lines.setdefault((cell.method.name, student, teacher), line)["seeds"].append(cell.seed)
  return list(lines.values())


def facts(entries: Sequence[Mapping[str, Any]], wanted: int, found: int) -> Iterator[pages.Fact]:
  """What the study has cost; runs that stand in several lines count once."""
  once = {entry["digest"]: entry for entry in entries}.values()
  spent = [entry["cost"]["cpu_seconds"] for entry in once if entry.get("cost", {}).get("cpu_seconds")]
  mixed = any(entry.get("seed") in studies.GRID_SEEDS for entry in entries)
  where = "those of all grids included" if mixed else "those of the grid in the main study"
  # A process cannot have taken less than the steps of its run: what went on after an interruption has another part.
  parts = [entry for entry in once if 0 < entry.get("cost", {}).get("cpu_seconds", 0) < entry["cost"].get("seconds", 0)]
  least = "at least " if parts else ""
  yield pages.Fact("Runs", f"{found:,} of {wanted:,}", f"{len(once):,} are kept, {where}")
  if spent:
    yield pages.Fact(
      "CPU time",
      f"{least}{human_time(sum(spent))}",
      f"of {len(spent):,} runs, {human_time(sum(spent) / len(spent))} each",
    )


def samples(
  study: studies.Study,
  place: study_runs.Place,
  known: Sequence[tuple[studies.Cell, Mapping[str, Any] | None]],
  items: Mapping[str, Any],
) -> Iterator[pages.Sample]:
  """Questions and answers of seed 0 on the first pair; none where the folders of the runs are not here."""
  first = place.benchmark.pairs[0]
  cells = {c.method.name: c for c, entry in known if entry and c.pair == first and c.seed in (0, None)}
  names = SHOWN if study.name == "main" else [name for name in cells if name != "teacher"][:_FEW]
  said = {name: study_runs.outputs_of(place, cells[name], items) for name in names if name in cells}
  files = {output["id"]: output["files"] for outputs in said.values() for output in outputs if "files" in output}
  answered = {
    cells[name].method.label: [output | {"files": files.get(output["id"], [])} for output in outputs]
    for name, outputs in said.items()
    if outputs
  }
  trained = [cells[name] for name in names if name in cells and cells[name].method.trained]
  for cell in trained[-1:]:
    path = place.folder(cell) / "samples.jsonl"
    if path.exists():
      yield from pages.training_samples(read_records(path), prefix=cell.method.label)
  if answered:
    yield from pages.evaluated_samples(answered)
