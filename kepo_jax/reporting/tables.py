"""Accuracies and comparisons as tables, for the terminal and for documents."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Row = tuple[str, ...]

_SUMMARIES = (("in domain", "in_domain"), ("out of domain, mean", "out_of_domain"), ("all", "overall"))
_TERMINAL, _NAMES = 80, 10  # columns of a terminal, and the fewest for the first of a table
_FEW = range(2, 9)  # source data sets that are shown without being asked for


def accuracy_rows(evaluations: Mapping[str, Mapping[str, Any]]) -> list[Row]:
  """Returns rows of (name, n questions, chance, one cell per evaluation), modalities first, then types and summaries.

  Args:
    evaluations: name ("before", "after") -> result of kepo_jax.evaluation.

  Returns:
    the header and the rows; accuracies in percent with 95 % intervals. Chance has a column where it is known.
  """
  names = list(evaluations)
  first = evaluations[names[0]]
  chance = first.get("chance")
  rows: list[Row] = [("", "n", *(["chance"] if chance else []), *names)]

  def row(label: str, count: int | None, guessed: Mapping | None, cells: Sequence[str]) -> Row:
    return (label, f"{count:,}" if count else "", *([_percent(guessed)] if chance else []), *cells)

  for section in ("modalities", "question_types"):
    for name in first[section]:
      cells = [_cell(evaluations[which][section].get(name)) for which in names]
      rows.append(row(name, first[section][name]["count"], chance[section].get(name) if chance else None, cells))
  for label, key in _SUMMARIES:
    entries = [evaluations[which].get(key) for which in names]
    if any(entries):
      count = next(entry for entry in entries if entry).get("count")
      rows.append(row(label, count, chance.get(key) if chance else None, [_cell(entry) for entry in entries]))
  lenient = [evaluations[which].get("lenient", {}).get("overall") for which in names]
  if any(lenient):
    rows.append(row("all, forgiving parser", None, None, [_cell(cell) for cell in lenient]))
  for key in ("format", "unparsed", "truncated"):
    shares = [evaluations[which].get(key) for which in names]
    if any(share is not None for share in shares):
      rows.append(row(key, None, None, ["-" if share is None else f"{100 * share:.1f} %" for share in shares]))
  return rows


def evaluation_rows(result: Mapping[str, Any], *, datasets: bool | None = None) -> list[Row]:
  """Returns the rows of one evaluation: name, questions and images, chance, strict and forgiving parser side by side.

  Args:
    result: of kepo_jax.evaluation.
    datasets: whether source data sets have rows; None: if there are 2 to 8 that are not the modalities over again.

  Returns:
    the header and the rows, in percent, accuracies with 95 % intervals.
  """
  if datasets is None:
    modalities = list(result["modalities"].values())
    datasets = len(result["datasets"]) in _FEW and any(e not in modalities for e in result["datasets"].values())
  sections = ["modalities", "question_types", *(["datasets"] if datasets else [])]
  blocks = (result["images"], result["chance"], result, result["lenient"])
  rows: list[Row] = [("", "n (images)", "chance", "strict", "forgiving")]

  def row(label: str, images: int, guessed: Mapping, strict: Mapping, forgiving: Mapping) -> Row:
    return (label, _counts(strict["count"], images), _percent(guessed), _cell(strict), _cell(forgiving))

  for section in sections:
    rows += [row(name, *(block[section][name] for block in blocks)) for name in result[section]]
  return rows + [row(label, *(block[key] for block in blocks)) for label, key in _SUMMARIES if result[key]]


def rate_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns unparsed and truncated completions per modality, in percent, header first."""
  names = ("unparsed", "truncated")
  found = {**result["rates"], "all": result}
  return [("", *names), *[(label, *(f"{100 * each[name]:.1f}" for name in names)) for label, each in found.items()]]


def pass_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns pass@k of a sampled evaluation: one column per k, in percent with 95 % intervals, header first."""
  blocks = result["pass_at_k"]
  rows: list[Row] = [("", "n", *(f"pass@{k}" for k in blocks))]
  for name, entry in result["modalities"].items():
    rows.append((name, f"{entry['count']:,}", *(_cell(block["modalities"][name]) for block in blocks.values())))
  for label, key in _SUMMARIES:
    if result[key]:
      rows.append((label, f"{result[key]['count']:,}", *(_cell(block[key]) for block in blocks.values())))
  return rows


def comparison_rows(comparison: Mapping[str, Any], names: tuple[str, str] = ("A", "B")) -> list[Row]:
  """Returns a paired comparison: n, images, accuracies, difference with interval, gained and lost, p-values.

  Args:
    comparison: of kepo_jax.evaluation.compared.
    names: of the two evaluations.

  Returns:
    the header and the rows; percent, and percentage points for the difference.
  """
  tested = comparison["overall"]["p_value"] is not None
  rows: list[Row] = [("", "n (images)", *names, "difference", "gained", "lost", *(["p", "Holm"] if tested else []))]

  def row(label: str, entry: Mapping[str, Any]) -> Row:
    change = f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
    accuracies = [f"{100 * entry[which]:.1f}" for which in ("first", "second")]
    moved = [f"{entry[which]:,}" if which in entry else "" for which in ("gained", "lost")]
    p_values = [_p_value(entry.get(which)) for which in ("p_value", "p_holm")] if tested else []
    return (label, _counts(entry["count"], entry["images"]), *accuracies, change, *moved, *p_values)

  rows += [row(name, entry) for name, entry in comparison["modalities"].items()]
  # The in-domain row repeats a modality's, whose correction belongs to that row.
  summaries = [(label, comparison[key]) for label, key in _SUMMARIES]
  return rows + [row(label, {**entry, "p_holm": None}) for label, entry in summaries if entry]


def hint_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Returns how good hints are, a row per record of `evaluation.hints`: shares in percent, the rest in nats."""
  rounds = max((len(each["accept_rate"]) for each in records if each["accept_rate"]), default=0)
  shown = sorted({min(1, rounds), rounds} - {0})  # the first and the last
  accepted = [f"accepted@{b}" if i == 0 else f"@{b}" for i, b in enumerate(shown)]
  rows: list[Row] = [("", "cliffs", "positive", *accepted, "leak", "unparsed", "reliance", "gain", "letter")]

  def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"

  def nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

  def cell(value: str, interval: Sequence[float] | None, form: Callable[[float], str]) -> str:
    return f"{value} [{', '.join(map(form, interval))}]" if interval else value

  for each in records:
    rows.append(
      (
        each["modality"],
        f"{each['prompts']:,} of {each['questions']:,}",
        cell(percent(each["positive_rate"]), each["positive_rate_interval"], percent),
        *(percent(each["accept_rate"][b - 1] if each["accept_rate"] else None) for b in shown),
        percent(each["leak_rate"]),
        percent(each["parse_failure_rate"]),
        nats(each["reliance"]),
        cell(nats(each["gain"]), each["gain_interval"], nats),
        nats(each["letter_gain"]),
      )
    )
  return rows


def rich_table(rows: Sequence[Row], *, title: str = "") -> Table:
  """Formats rows, header first, for the terminal; what is too wide wraps.

  Where that is enough for a terminal of 80 columns, names wrap and figures do not.
  """
  table = Table(
    title=Text(title) if title else None,
    title_justify="left",
    box=box.SIMPLE_HEAD,
    show_edge=False,
    padding=(0, 1, 0, 0),
  )
  lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  left = _TERMINAL - sum(length + 2 for length in lengths[1:]) - 3  # for names, beside columns with their gaps
  table.add_column(
    Text(rows[0][0]), overflow="fold", min_width=_NAMES, max_width=left if _NAMES <= left < lengths[0] else None
  )
  for name in rows[0][1:]:
    table.add_column(Text(name), justify="right", overflow="fold")
  for row in rows[1:]:
    table.add_row(*map(Text, row))
  return table


def markdown_table(rows: Sequence[Row]) -> str:
  """Formats rows, header first, as a table in Markdown."""
  header, *body = [f"| {' | '.join(row)} |" for row in rows]
  rule = "|" + "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)) + "|"
  return "\n".join([header, rule, *body]) + "\n"


def center(entry: Mapping[str, float]) -> float:
  """Returns the point estimate of an entry: a share of correct answers or a mean over modalities."""
  return entry["accuracy"] if "accuracy" in entry else entry["mean"]


def _cell(entry: Mapping[str, float] | None) -> str:
  """An accuracy with its interval, in percent: "61.3 [55.7, 66.7]"."""
  if not entry:
    return "-"
  return f"{100 * center(entry):.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def _counts(questions: int, images: int) -> str:
  """Questions, and in brackets the images they are about: "300 (210)"; these are left out where there are none."""
  return f"{questions:,} ({images:,})" if images else f"{questions:,}"


def _percent(entry: Mapping[str, float] | None) -> str:
  return f"{100 * center(entry):.1f}" if entry else ""


def _p_value(value: float | None) -> str:
  """Three decimals, and a bound below them."""
  if value is None:
    return ""
  return "< 0.001" if value < 0.001 else f"{value:.3f}"
