"""CSV and LaTeX of rows."""

import csv
import io

from kepo_jax.reporting import table_formats

ROWS = [
  ("method", "MRI", "less a, b"),
  ("A & B_1", "61.3 [55.7, 66.7]", "-1.2 [-3.0, +0.6]"),
  ("100 %", "missing", "-"),
]


def test_intervals_become_columns():
  found = list(csv.reader(io.StringIO(table_formats.csv_table(ROWS))))
  assert found[0] == ["method", "MRI", "MRI low", "MRI high", "less a, b", "less a, b low", "less a, b high"]
  assert found[1] == ["A & B_1", "61.3", "55.7", "66.7", "-1.2", "-3.0", "+0.6"]
  assert found[2] == ["100 %", "missing", "", "", "-", "", ""]


def test_columns_without_intervals_stay():
  assert table_formats.csv_table([("a", "b"), ("x", "81.3 *")]) == "a,b\nx,81.3 *\n"


def test_latex():
  text = table_formats.latex_table(ROWS, caption="50 % of a_b", label="tab:x", notes=["{n}"])
  lines = text.splitlines()
  assert r"A \& B\_1 & 61.3 [55.7, 66.7] & $-$1.2 [$-$3.0, +0.6] \\" in lines
  assert r"100 \% & missing & - \\" in lines and r"\begin{tabular}{lrr}" in lines
  assert r"\caption{50 \% of a\_b}" in lines and r"\label{tab:x}" in lines
  assert r"\par\smallskip\footnotesize \{n\}" in lines
  order = [lines.index(rf"\{name}") for name in ("toprule", "midrule", "bottomrule")]
  assert order == sorted(order) and text.count("{") == text.count("}")


def test_a_wide_table_is_made_as_wide_as_the_text():
  text = table_formats.latex_table([tuple("abcdef")])
  assert r"\resizebox{\textwidth}{!}{%" in text and text.count("{") == text.count("}")
  assert "resizebox" not in table_formats.latex_table([tuple("abcde")])


def test_what_latex_would_read_is_escaped():
  assert table_formats.latex_text(r"a\b~c^d<e>$#") == (
    r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\textless{}e\textgreater{}\$\#"
  )
  assert table_formats.latex_text("out-of-domain gkd-1, -1") == "out-of-domain gkd-1, $-$1"
  assert table_formats.latex_text("τ = 1") == r"$\tau$ = 1"
