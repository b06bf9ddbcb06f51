"""Rows of tables as CSV and as LaTeX; Markdown is in kepo_jax.reporting.tables."""

import csv
import io
import re
from collections.abc import Sequence

from kepo_jax.reporting.tables import Row

# "61.3 [55.7, 66.7]", signs included, and what may follow it.
_INTERVAL = re.compile(r"([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\](.*)")
_LATEX = {
  "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
  "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "τ": r"$\tau$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def csv_table(rows: Sequence[Row]) -> str:
  """Rows, header first, as CSV; a column of figures with intervals becomes three: the figure, `low` and `high`."""
  columns = [_split(column) for column in zip(*rows, strict=True)]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  for cells in zip(*columns, strict=True):
    writer.writerow([value for cell in cells for value in cell])
  return text.getvalue()


def _split(column: Sequence[str]) -> list[tuple[str, ...]]:
  header, *cells = column
  found = [_INTERVAL.fullmatch(cell) for cell in cells]
  if not any(found):
    return [(cell,) for cell in column]
  parts = [(m[1] + m[4], m[2], m[3]) if m else (cell, "", "") for m, cell in zip(found, cells, strict=True)]
  return [(header, f"{header} low", f"{header} high"), *parts]


def latex_table(rows: Sequence[Row], *, caption: str = "", label: str = "", notes: Sequence[str] = ()) -> str:
  """Rows, header first, as a table in LaTeX for the packages booktabs and graphicx, as wide as the text if it is wide.

  Args:
    rows: plain text; characters that mean something to LaTeX are escaped.
    caption: plain text.
    label: for references.
    notes: plain text below the table.
  """
  wide = len(rows[0]) > 5
  header, *body = [" & ".join(map(latex_text, row)) + r" \\" for row in rows]
  return "\n".join([
    r"\begin{table}",
    r"\centering",
    *([rf"\caption{{{latex_text(caption)}}}"] if caption else []),
    *([rf"\label{{{label}}}"] if label else []),
    *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
    rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}",
    r"\toprule", header, r"\midrule", *body, r"\bottomrule",
    r"\end{tabular}" + "}" * wide,
    *(rf"\par\smallskip\footnotesize {latex_text(note)}" for note in notes),
    r"\end{table}",
  ]) + "\n"  # fmt: skip


def latex_text(text: str) -> str:
  """Plain text for LaTeX, with a true minus before numbers."""
  escaped = "".join(_LATEX.get(letter, letter) for letter in text)
  return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)
