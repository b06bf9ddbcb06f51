"""The tables and figures of a study, and the files that they are written to."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from kepo_jax.evaluation import studies
from kepo_jax.evaluation.studies import Entry
from kepo_jax.reporting import (
  check_tables,
  cost_tables,
  study_bars,
  study_checks,
  study_curves,
  study_style,
  study_tables,
  table_formats,
)
from kepo_jax.reporting.study_tables import Table
from kepo_jax.reporting.tables import markdown_table

_SWAPPED = "-swapped"  # ends the names of methods with the learning rate of the other threshold
Summaries = Mapping[tuple[str, str], Mapping[str, Any]]
# Study -> methods that its others are compared with.
REFERENCES: dict[str, tuple[str, ...]] = {
  "main": (*studies.REFERENCES, "kepo-tau1"),
  "tau": ("accuracy-1",), "budget": ("rounds-5",), "hints": ("hint_and_answer",),
  "gate": ("positive", "positive-unhinted"),
}  # fmt: skip


def references_of(study: str) -> tuple[str, ...]:
  """Methods that the others of a study are compared with; GRPO and uniform distillation where nothing else is said."""
  return REFERENCES.get(study, studies.REFERENCES)


def summaries(
  study: str, entries: Sequence[Entry], items: Mapping[str, Any], *, references: Sequence[str] | None = None
) -> dict[tuple[str, str], dict[str, Any]]:
  """Pair of student and teacher -> `studies.summarised` of its entries; the slow part of a study, to be done once."""
  against = references_of(study) if references is None else references
  found = studies.pairs(entries)
  return {pair: studies.summarised(mine, items, references=against) for pair, mine in found.items()}


def varied(study: str, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
  """Heading -> method -> value of what a study varies, for the methods of KEPO."""
  mine = [entry for entry in entries if study_style.config_of(entry["method"], entry) in ("kepo", "kepo_ke")]
  tau = studies.settings(mine, "objective.gate_threshold", 1.0)
  if study == "tau":
    signal = studies.settings(mine, "objective.gate_signal", "accuracy")
    signal |= {name: f"{signal[name]}, rates swapped" for name in signal if name.endswith(_SWAPPED)}
    return {"tau": tau, "gate signal": signal}
  rounds = studies.settings(mine, "exploration.rounds", 5)
  rounds |= {entry["method"]: 0 for entry in mine if study_style.config_of(entry["method"], entry) == "kepo_ke"}
  if study == "budget":
    return {"B": rounds}
  mode = studies.settings(mine, "objective.gate_mode", "positive")
  # A threshold that everything reaches opens the gate for all, in whichever direction it is written.
  all_of = {name: value == "none" or (value == "positive" and tau[name] <= 0) for name, value in mode.items()}
  direction = {name: "all" if all_of[name] else value for name, value in mode.items()}
  return {"gate": direction, "B": rounds} if study == "gate" else {}


def study_tables_of(
  study: str,
  entries: Sequence[Entry],
  items: Mapping[str, Any],
  found: Summaries,
  *,
  grid: Sequence[Entry] = (),
  rates: Sequence[float] = (),
  tuned: Mapping[str, str] | None = None,
  expected: Sequence[Mapping[str, Any]] = (),
  references: Sequence[str] | None = None,
) -> list[Table]:
  """All tables of a study with trainings; those of the first pair first, the other pairs have two each.

  Args:
    study: "main", "tau", "budget", "hints" or "gate".
    entries: those that count, of all pairs.
    items: the record of items.json.
    found: of `summaries`.
    grid: entries of the learning-rate grid, for its table.
    rates: planned learning rates of the grid.
    tuned: method -> label, of those that have a grid of their own.
    expected: planned cells of all pairs, see `study_tables.missing_cells`.
    references: methods that all others are compared with; None: `references_of`.
  """
  against = references_of(study) if references is None else references
  tables: list[Table] = []
  for number, (pair, mine) in enumerate(studies.pairs(entries).items()):
    plan = [cell for cell in expected if (cell["student"], cell["teacher"]) == pair]
    tables += _pair_tables(pair, mine, found[pair], plan, against, rates, full=number == 0)
    if number == 0:
      tables += _check_tables(study, pair, mine, items, found[pair], plan)
  if grid:
    rows = cost_tables.grid_rows(grid, train_modality=items["train_modality"], rates=rates, labels=tuned)
    who = f"{grid[0]['student']} taught by {grid[0]['teacher']}"
    title = f"Validation accuracy per learning rate, percent, mean over the seeds of the grid, {who}"
    tables.append(Table("learning_rates", title, rows, (cost_tables.GRID,)))
  if study == "main":
    tables.append(Table("paper", "What the paper reports", study_tables.paper_rows(), (study_tables.PAPER_SOURCE,)))
  return tables


def _pair_tables(
  pair: tuple[str, str], mine: Sequence[Entry], summary: Mapping[str, Any], plan: Sequence[Mapping[str, Any]],
  references: Sequence[str], rates: Sequence[float], *, full: bool,
) -> list[Table]:  # fmt: skip
  suffix, who = ("" if full else "-" + "-".join(pair)), f"{pair[0]} taught by {pair[1]}"
  lost = study_tables.missing_cells(plan, mine) if plan else []
  told = dict.fromkeys(cell["note"] for cell in plan if cell.get("note"))
  notes = (study_tables.INTERVALS, *told, *([f"Missing: {'; '.join(lost)}."] if lost else []))

  def section(name: str) -> list[tuple[str, ...]]:
    return study_tables.section_rows(summary, name, expected=plan)

  rows = study_tables.main_rows(summary, expected=plan, references=references, rates=rates)
  ended = [study_tables.END] if any("†" in row[2] for row in rows) else []
  tables = [
    Table(f"main{suffix}", f"Test accuracy, percent, {who}", rows, (*notes, *ended)),
    Table(f"modalities{suffix}", f"Test accuracy per modality, percent, {who}", section("modalities"), notes),
  ]  # fmt: skip
  if not full:
    return tables
  tables.append(
    Table("question_types", f"Test accuracy per question type, percent, {who}", section("question_types"), notes)
  )
  tables.append(Table("cost", f"Cost of a training, mean over seeds, {who}", cost_tables.cost_rows(mine, expected=plan),
                      (cost_tables.SECONDS, *notes[1:])))  # fmt: skip
  for figure, name in (("out_of_domain", "out of domain"), ("in_domain", summary["train_modality"])):
    rows = cost_tables.equal_cost_rows(mine, figure, expected=plan, references=references)
    title = f"Validation accuracy, {name}, at equal steps and at equal cost, percent, {who}"
    tables.append(Table(f"equal_cost_{figure}", title, rows, (cost_tables.RANGES, *notes[1:])))
  return tables


def _check_tables(
  study: str, pair: tuple[str, str], mine: Sequence[Entry], items: Mapping[str, Any], summary: Mapping[str, Any],
  plan: Sequence[Mapping[str, Any]],
) -> list[Table]:  # fmt: skip
  values = varied(study, mine)
  if not values:
    return []
  spread = studies.stability(mine, items)
  rows = check_tables.check_rows(summary, values, stability=spread, expected=plan)
  title = f"What was varied, and what came of it, test accuracy in percent, {pair[0]} taught by {pair[1]}"
  return [Table(study, title, rows, (study_tables.INTERVALS, check_tables.STABILITY))]


def study_figures_of(
  study: str, entries: Sequence[Entry], items: Mapping[str, Any], found: Summaries
) -> dict[str, Figure]:
  """Name -> figure, of a study with trainings; those of the first pair first, the other pairs have two each."""
  looks = study_style.styles(study_style.described(entries))
  figures: dict[str, Figure] = {}
  for number, (pair, mine) in enumerate(studies.pairs(entries).items()):
    suffix, summary = ("" if number == 0 else "-" + "-".join(pair)), found[pair]
    title = f"Test accuracy, {pair[0]} taught by {pair[1]}"
    paper = study == "main" and number == 0
    figures[f"accuracy{suffix}"] = study_bars.overview_figure(summary, title=title, paper=paper, looks=looks)
    if any(summary["differences"].values()):
      figures[f"differences{suffix}"] = study_bars.forest_figure(summary, looks=looks)
    if number == 0:
      figures |= _pair_figures(mine, items, summary, looks) | _check_figures(study, mine, items, summary, looks)
  return figures


def _pair_figures(
  mine: Sequence[Entry], items: Mapping[str, Any], summary: Mapping[str, Any], looks: Mapping[str, study_style.Style]
) -> dict[str, Figure]:
  figures = {name: study_bars.section_figure(summary, name, looks=looks) for name in ("modalities", "question_types")}
  if not any(entry["method"] not in studies.UNTRAINED for entry in mine):
    return figures
  trained = summary["train_modality"]
  return figures | {
    "validation_steps": study_curves.learning_figure(mine, trained, looks=looks),
    "validation_seconds": study_curves.learning_figure(mine, trained, quantity="seconds", looks=looks),
    "validation_tokens": study_curves.learning_figure(mine, trained, quantity="tokens", looks=looks),
    "validation_modalities": study_curves.modality_figure(mine, items, looks=looks),
    "training": study_curves.dynamics_figure(mine, looks=looks),
    "exploration": study_curves.exploration_figure(mine, looks=looks),
  }


def _check_figures(
  study: str, mine: Sequence[Entry], items: Mapping[str, Any], summary: Mapping[str, Any],
  looks: Mapping[str, study_style.Style],
) -> dict[str, Figure]:  # fmt: skip
  values = varied(study, mine)
  if study == "tau" and values["tau"]:
    signal = studies.settings(mine, "objective.gate_signal", "accuracy")
    rate = {entry["method"]: f"{entry['learning_rate']:g}" for entry in mine if entry["learning_rate"]}
    points = {name: (tau, f"{signal[name]}, rate {rate[name]}") for name, tau in values["tau"].items()}
    return {"tau": study_checks.tau_figure(summary, points)}
  if study == "budget" and values["B"]:
    return {"budget": study_checks.budget_figure(summary, values["B"], studies.stability(mine, items))}
  return {"gate": study_checks.gate_figure(summary, looks=looks)} if study == "gate" else {}


def hint_tables(
  records: Sequence[Mapping[str, Any]], missing: Sequence[str] = (), unseen: Sequence[str] = ()
) -> list[Table]:
  """The tables of the study of hints.

  Args:
    records: as `check_tables.hint_rows` takes them.
    missing: measurements that have not been made.
    unseen: modalities that no model has seen.
  """
  notes = (f"Missing: {'; '.join(missing)}.",) if missing else ()
  quality, related = check_tables.hint_rows(records), check_tables.correlation_rows(records, unseen)
  return [
    Table("hints", "Quality of hints per modality; rates in percent", quality, (check_tables.HINTS, *notes)),
    Table("hint_correlations", "What goes with reward-positive candidates, over modalities", related,
          (check_tables.CORRELATIONS, *notes)),
  ]  # fmt: skip


def write_tables(folder: epath.PathLike, tables: Sequence[Table]) -> list[str]:
  """Writes each table as NAME.md, NAME.csv and NAME.tex; touches nothing else, returns the names of the files."""
  names = []
  for table in tables:
    said = "".join(f"\n{note}\n" for note in table.notes)
    texts = {
      "md": f"# {table.title}\n\n{markdown_table(table.rows)}{said}",
      "csv": table_formats.csv_table(table.rows),
      "tex": table_formats.latex_table(table.rows, caption=table.title, label=f"tab:{table.name}", notes=table.notes),
    }
    for ending, text in texts.items():
      (epath.Path(folder) / f"{table.name}.{ending}").write_text(text)
      names.append(f"{table.name}.{ending}")
  return names


def write_figures(folder: epath.PathLike, figures: Mapping[str, Figure]) -> list[str]:
  """Writes each figure as NAME.png and NAME.svg; touches nothing else, returns the names of the files."""
  return [name for title, figure in figures.items() for name in study_style.save(figure, folder, title)]
