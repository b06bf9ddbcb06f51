"""The page of a study, its tables in Markdown and its main figures, written from the kept results."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from experiments.studies import figures, plan, results, runs, statistics, tables
from experiments.studies.tables import Table
from kepo_jax import storage
from kepo_jax.reporting import pages
from kepo_jax.reporting.progress import human_time
from kepo_jax.reporting.writers import read_records

SHOWN = ("start", "grpo", "kepo-tau1")  # methods of the main study whose answers the page shows beside each other
_FEW = 3  # methods of the other studies
_SAMPLES = 60_000  # bytes of a page for questions and answers: pages of studies are kept in the repository
_FILES = ("accuracy", "tau", "budget", "hints")  # figures that are also written as files
# Name of a figure, without the pair behind it -> what it shows, and how to read it.
_CAPTIONS: Mapping[str, tuple[str, str]] = {
  "accuracy": ("Test accuracy of every method", "Means over seeds, 95 % intervals over seeds and questions."),
  "modalities": ("Test accuracy per modality", "95 % intervals; a modality that no model has seen is marked."),
  "validation": ("Validation accuracy against tokens", "Tokens that both models wrote, scored or learnt."),
  "training": ("The student's own rollouts, and hints, during training", "Means over windows of steps and over seeds."),
  "tau": (
    "Accuracy against the threshold of the gate",
    "One line per signal and learning rate; a point alone has no other threshold at its rate.",
  ),
  "budget": ("Accuracy and stability against rounds of hints", "Spread over seeds and over the last validations."),
  "hints": ("What hints are worth, per modality", "Measured on the untrained student."),
}
# Heading -> the figures, and the tables behind them.
_SECTIONS: Mapping[str, Sequence[str]] = {
  "Result": (
    "tau", "budget", "gate", "hints", "hint_correlations", "accuracy", "main", "contrasts", "paper",
  ),
  "Modalities and question types": ("modalities", "question_types"),
  "Validation during training": (
    "validation", "equal_cost_out_of_domain", "equal_cost_in_domain",
  ),
  "Training": ("training", "cost", "learning_rates"),
}  # fmt: skip


def write(
  study: plan.Study,
  place: runs.Place,
  kept: results.Results,
  *,
  chosen_on: results.Results,
  grid: Sequence[plan.Cell],
  rates: Mapping[str, float],
  seeds: int,
  folder: epath.PathLike | None = None,
) -> str:
  """Writes index.html, tables.md and the main figures into the folder of the results; says in a line what they hold.

  Args:
    study: of the results.
    place: of the runs.
    kept: results with at least one entry.
    chosen_on: of the main study, which keeps the grids of all studies.
    grid: cells that choose learning rates.
    rates: method -> the chosen one; of those whose grid is complete.
    seeds: planned runs of each method.
    folder: where every table is also written as Markdown, CSV and LaTeX; None: nowhere.
  """
  guessed = {cell.method.name: cell.learning_rate or 0.0 for cell in grid} | dict(rates)
  cells = list(plan.finals(study, place.benchmark, seeds, guessed))
  rated = [cell for cell in cells if not cell.method.trained or (cell.method.rate_of or cell.method.name) in rates]
  known = {cell: entry for cell in rated if (entry := kept.own(cell, place.digest(cell)))}
  entries = list(known.values())
  if not entries:  # of an unfinished grid there is nothing to compare yet
    return f"{kept.folder}: no learning rate is chosen yet; {len(kept.entries)} runs of the grid are finished"
  lines, items = planned(cells), dict(kept.items or {})
  tried = {cell: entry for cell in grid if (entry := chosen_on.own(cell, place.digest(cell)))}
  summaries = {
    pair: statistics.summarised(group, items, references=study.references)
    for pair, group in statistics.pairs(entries).items()
  }
  all_tables = tables.study_tables(
    study.name, entries, items, summaries, references=study.references, grid=list(tried.values()),
    rates=place.benchmark.rates, tuned={cell.method.name: cell.method.label for cell in grid}, plan=lines,
  )  # fmt: skip
  drawn = figures.study_figures(study.name, entries, items, summaries)
  hints = {cell: kept.hints(place.digest(cell)) for cell in plan.measured(study, place.benchmark)}
  unmeasured = [f"hints of {cell.name}" for cell, records in hints.items() if not records]
  if records := [record for measured in hints.values() for record in measured]:
    all_tables += tables.hint_tables(records, unmeasured, items["unseen"])
    told = [record for record in records if record["modality"] != "all" and record["positive_rate"] is not None]
    drawn["hints"] = figures.hints_figure(told, items["train_modality"], items["unseen"])
  untried = [f"learning-rate grid of {cell.name}" for cell in grid if cell not in tried]
  missing = [*tables.missing(lines, entries), *unmeasured, *untried]
  shown = list(samples(study, place, known, items))
  page = study_page(
    study.title,
    subtitle=f"{place.benchmark.name}, {len(items['ids']):,} test questions, up to {seeds} seeds",
    asks=f"{study.asks} {study.notes}",
    facts=list(facts(kept.entries, len(cells), len(entries))),
    tables=all_tables,
    figures=drawn,
    samples=shown,
    missing=missing,
  )
  storage.write_text(kept.folder / "index.html", pages.rendered(page))
  text = "\n".join(table.markdown(level=2) for table in all_tables)
  storage.write_text(kept.folder / "tables.md", f"# {study.title}: tables\n\n{text}")
  for name in [name for name in _FILES if name in drawn]:
    figures.save(kept.folder, name, drawn[name])
  if folder:
    tables.write(folder, all_tables)
  said = f"; missing: {', '.join(missing)}" if missing else ""
  if not shown:
    said += f"; the page has no questions and answers, because the folders of the runs are not in {place.workdir}"
  return f"{kept.folder / 'index.html'}: {len(entries)} of {len(cells)} runs{said}"


def planned(cells: Sequence[plan.Cell]) -> list[dict[str, Any]]:
  """Returns the lines of the tables with the seeds that each should have; in the order of the study."""
  lines: dict[tuple[str, str, str], dict[str, Any]] = {}
  for cell in sorted(cells, key=lambda cell: cell.method.trained):  # start and teacher first
    student, teacher = cell.pair.student, cell.pair.teacher
    line = {"method": cell.method.name, "label": cell.method.label, "student": student, "teacher": teacher, "seeds": []}
    if cell.method.times > 1 and cell.method.rate_of:
      parent = plan.MAIN_METHODS[cell.method.rate_of].label
      line["note"] = f"{cell.method.label}: at the rate of {parent}, chosen at 1/{cell.method.times} of its steps."
    lines.setdefault((cell.method.name, student, teacher), line)["seeds"].append(cell.seed)
  return list(lines.values())


def facts(entries: Sequence[Mapping[str, Any]], wanted: int, finished: int) -> Iterator[pages.Fact]:
  """Yields what the study has cost; runs that stand in several lines count once."""
  once = {entry["digest"]: entry for entry in entries}.values()
  spent = [entry["cost"]["cpu_seconds"] for entry in once if entry.get("cost", {}).get("cpu_seconds")]
  mixed = any(entry.get("seed") in plan.GRID_SEEDS for entry in entries)
  where = "those of all grids included" if mixed else "those of the grid in the main study"
  # A process needs more than the steps of its run: less means that the run was resumed, and another part is unknown.
  parts = [entry for entry in once if 0 < entry.get("cost", {}).get("cpu_seconds", 0) < entry["cost"].get("seconds", 0)]
  least = "at least " if parts else ""
  yield pages.Fact("Runs", f"{finished:,} of {wanted:,}", f"{len(once):,} are kept, {where}")
  if spent:
    yield pages.Fact(
      "CPU time",
      f"{least}{human_time(sum(spent))}",
      f"of {len(spent):,} runs, {human_time(sum(spent) / len(spent))} each",
    )


def samples(
  study: plan.Study, place: runs.Place, known: Mapping[plan.Cell, Mapping[str, Any]], items: Mapping[str, Any]
) -> Iterator[pages.Sample]:
  """Yields questions and answers of seed 0 on the first pair; none where the folders of the runs are not here."""
  cells = {c.method.name: c for c in known if c.pair == place.benchmark.pairs[0] and c.seed in (0, None)}
  names = SHOWN if study.name == "main" else [name for name in cells if name != "teacher"][:_FEW]
  chosen = [cells[name] for name in names if name in cells]
  outputs = {cell: results.outputs_of(place, cell, items) for cell in chosen}
  files = {output["id"]: output["files"] for said in outputs.values() for output in said if "files" in output}
  for cell in [cell for cell in chosen if cell.method.trained][-1:]:
    path = place.folder(cell) / "samples.jsonl"
    if path.exists():
      yield from pages.training_samples(read_records(path), prefix=cell.method.label)
  answered = {
    cell.method.label: [output | {"files": files.get(output["id"], [])} for output in said]
    for cell, said in outputs.items()
    if said
  }
  if answered:
    yield from pages.evaluated_samples(answered)


def study_page(
  title: str,
  *,
  subtitle: str,
  asks: str,
  facts: Sequence[pages.Fact],
  tables: Sequence[Table],
  figures: Mapping[str, Figure],
  samples: Sequence[pages.Sample] = (),
  missing: Sequence[str] = (),
) -> pages.Page:
  """Lays out the page of a study.

  Args:
    title: of the study.
    subtitle: benchmark, models, seeds.
    asks: its question, in a sentence.
    facts: key figures.
    tables: in order; those named as a figure stand below it.
    figures: name, as in _CAPTIONS with a pair behind it where there are several -> figure.
    samples: questions with what models answered.
    missing: cells that have not been run; named on top.
  """
  opening: list[pages.Block] = [pages.TextBlock(asks)]
  if missing:
    opening.append(pages.TextBlock(f"Not finished, and missing below: {'; '.join(missing)}.", warning=True))
  sections = [pages.Section("Question", tuple(opening))]
  for heading, names in _SECTIONS.items():
    blocks = [_figure(name, figures[name]) for name in names if name in figures]
    blocks += [_table(table) for name in names for table in tables if table.name == name]
    sections.append(pages.Section(heading, tuple(blocks)))
  # Other pairs of student and teacher have their names behind those of the figures and tables.
  others = [_figure(name, figure) for name, figure in figures.items() if "-" in name]
  others += [_table(table) for table in tables if "-" in table.name]
  sections.append(pages.Section("Other students and teachers", tuple(others)))
  if samples:
    text = "Questions with the answers of several models, and questions of a training with the rollouts of their group."
    sections.append(pages.Section("Questions and answers", (pages.BrowserBlock(tuple(samples), text, size=_SAMPLES),)))
  return pages.Page(
    title=title,
    subtitle=subtitle,
    facts=tuple(facts),
    sections=tuple(section for section in sections if section.blocks),
    footer="This file holds all that it shows and asks for nothing else.",
  )


def _figure(name: str, figure: Figure) -> pages.Block:
  base, _, pair = name.partition("-")
  what, reading = _CAPTIONS[base]
  who = f" ({pair.replace('-', ' taught by ')})" if pair else ""
  alt, caption = f"{what}{who}; tables have the numbers.", f"{what}{who}. {reading}"
  return pages.figure_block(figure, alt=alt, caption=caption, vectors=False)


def _table(table: Table) -> pages.Block:
  caption = ". ".join([table.title, *(note.rstrip(".") for note in table.notes)]) + "."
  return pages.TableBlock(tuple(table.rows()), caption=caption)
