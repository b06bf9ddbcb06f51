"""The page of a study: its question, figures, tables and questions, in one file."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from kepo_jax.reporting import pages
from kepo_jax.reporting.study_tables import Table

_SAMPLES = 150_000  # bytes of a page for questions and answers: pages of studies are kept in the repository
# Name of a figure, without the pair behind it -> what it shows, and how to read it.
CAPTIONS: Mapping[str, tuple[str, str]] = {
  "accuracy": ("Test accuracy of every method", "Means over seeds, 95 % intervals over seeds and questions."),
  "differences": ("Paired differences between methods", "Same questions, same seeds where both have them; 95 %."),
  "modalities": ("Test accuracy per modality", "95 % intervals; a modality that no model has seen is marked."),
  "question_types": ("Test accuracy per question type", "95 % intervals."),
  "validation_steps": ("Validation accuracy against steps", "Bands reach from the lowest to the highest seed."),
  "validation_seconds": (
    "Validation accuracy against seconds",
    "Seconds of the steps alone; compare only what ran at one sitting, see the table of costs.",
  ),
  "validation_tokens": (
    "Validation accuracy against tokens",
    "Tokens that both models wrote, scored or learnt.",
  ),
  "validation_modalities": ("Validation accuracy per modality", "Few questions each: single points move by percents."),
  "training": ("The student's own rollouts during training", "Means over windows of steps and over seeds."),
  "exploration": ("Prompts that no rollout solves, and hints", "Acceptance after b hints, of the prompts that asked."),
  "tau": (
    "Accuracy against the threshold of the gate",
    "One line per signal and learning rate; a point alone has no other threshold at its rate.",
  ),
  "budget": ("Accuracy and stability against rounds of hints", "Spread over seeds and over the last validations."),
  "gate": ("Accuracy by the direction of the gate", "Which rollouts the teacher corrects."),
  "hints": ("What hints are worth, per modality", "Measured on the untrained student."),
}

# Heading -> the figures, and the tables behind them.
_SECTIONS: Mapping[str, Sequence[str]] = {
  "Result": ("tau", "budget", "gate", "hints", "hint_correlations", "accuracy", "differences", "main", "paper"),
  "Modalities and question types": ("modalities", "question_types"),
  "Validation during training": (
    "validation_steps", "validation_tokens", "validation_seconds", "validation_modalities", "equal_cost_out_of_domain",
    "equal_cost_in_domain",
  ),
  "Training": ("training", "exploration", "cost", "learning_rates"),
}  # fmt: skip


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
  """The page of a study.

  Args:
    title: of the study.
    subtitle: benchmark, models, seeds.
    asks: its question, in a sentence.
    facts: key figures.
    tables: in order; those named as a figure stand below it.
    figures: name, as in CAPTIONS with a pair behind it where there are several -> figure.
    samples: questions with what models answered.
    missing: cells that have not been run; named on top.
  """
  opening: list[pages.Block] = [pages.TextBlock(asks)]
  if missing:
    opening.append(pages.TextBlock(f"Not finished, and missing below: {'; '.join(missing)}.", warning=True))
  sections = [pages.Section("Question", tuple(opening))]
  for heading, names in _SECTIONS.items():
    blocks = [*_figures({name: figures[name] for name in names if name in figures}), *_tables(tables, names)]
    sections.append(pages.Section(heading, tuple(blocks)))
  # Other pairs of student and teacher have their names behind those of the figures and tables.
  rest = {name: figure for name, figure in figures.items() if "-" in name}
  more = [table for table in tables if "-" in table.name]
  sections.append(pages.Section("Other students and teachers", (*_figures(rest), *map(_table, more))))
  if samples:
    text = "Questions with the answers of several models, and questions of a training with the rollouts of their group."
    sections.append(pages.Section("Questions and answers", (pages.BrowserBlock(tuple(samples), text, size=_SAMPLES),)))
  return pages.Page(
    title=title,
    subtitle=subtitle,
    facts=tuple(facts),
    sections=tuple(section for section in sections if section.blocks),
    footer="This file holds all that it shows and asks for nothing else. Figures and tables lie beside it as files.",
  )


def _figures(figures: Mapping[str, Figure]) -> list[pages.Block]:
  blocks: list[pages.Block] = []
  for name, figure in figures.items():
    base, _, pair = name.partition("-")
    what, reading = CAPTIONS[base]
    who = f" ({pair.replace('-', ' taught by ')})" if pair else ""
    alt, caption = f"{what}{who}; tables have the numbers.", f"{what}{who}. {reading}"
    blocks.append(pages.figure_block(figure, alt=alt, caption=caption, vectors=False))
  return blocks


def _tables(tables: Sequence[Table], names: Sequence[str]) -> list[pages.Block]:
  return [_table(table) for name in names for table in tables if table.name == name]


def _table(table: Table) -> pages.Block:
  return pages.TableBlock(
    tuple(table.rows), caption=". ".join([table.title, *(note.rstrip(".") for note in table.notes)]) + "."
  )
