"""Accuracy before and after training as tables, for the terminal and for documents."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = tuple[str, ...]


def accuracy_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Row]:
  """Rows of (name, n questions, one cell per evaluation), modalities first, then question types and summaries.

  Args:
    evaluations: name ("before", "after") -> result of kepo_jax.evaluation.

  Returns:
    the header and the rows; accuracies in percent with 95 % intervals.
  """
  names = list(evaluations)
  first = evaluations[names[0]]
  rows: list[Row] = [("", "n", *names)]
  for section in ("modalities", "question_types"):
    for name in first[section]:
      cells = [evaluations[which][section].get(name) for which in names]
      rows.append((name, f"{first[section][name]['count']:,}", *[_cell(cell) for cell in cells]))
  for label, key in (("in domain", "in_domain"), ("out of domain, mean", "out_of_domain"), ("all", "overall")):
    cells = [evaluations[which].get(key) for which in names]
    if any(cells):
      count = next(cell for cell in cells if cell).get("count")
      rows.append((label, f"{count:,}" if count else "", *[_cell(cell) for cell in cells]))
  lenient = [evaluations[which].get("lenient", {}).get("overall") for which in names]
  if any(lenient):
    rows.append(("all, forgiving parser", "", *[_cell(cell) for cell in lenient]))
  for key in ("format", "unparsed", "truncated"):
    shares = [evaluations[which].get(key) for which in names]
    if any(share is not None for share in shares):
      rows.append((key, "", *["-" if share is None else f"{100 * share:.1f} %" for share in shares]))
  return rows


def rich_table(rows: Sequence[Row], *, title: str = "") -> Table:
  """Rows, header first, for the terminal."""
  table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
  for i, name in enumerate(rows[0]):
    table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
  for row in rows[1:]:
    table.add_row(*row)
  return table


def markdown_table(rows: Sequence[Row]) -> str:
  """Rows, header first, as a table in Markdown."""
  header, *body = [f"| {' | '.join(row)} |" for row in rows]
  rule = "|" + "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)) + "|"
  return "\n".join([header, rule, *body]) + "\n"


def center(entry: Mapping[str, float]) -> float:
  """The point estimate of an entry: a share of correct answers or a mean over modalities."""
  return entry["accuracy"] if "accuracy" in entry else entry["mean"]


def _cell(entry: Mapping[str, float] | None) -> str:
  """An accuracy with its interval, in percent: "61.3 [55.7, 66.7]"."""
  if not entry:
    return "-"
  return f"{100 * center(entry):.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
