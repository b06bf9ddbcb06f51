"""Options cut out of a question: three syntaxes, with everything in them that looks like another option."""

import itertools
import random
import re
import sys

import pytest

from kepo_jax.data import records
from kepo_jax.data.rules import Rejected

STEMS = {
  "plain": ("What is shown?", False),
  "a letter in brackets": ("Is it hepatitis (type A)?", False),
  "a list": ("Which of A)red, B)blue is right?", True),
  "commas": ("Given T1, T2, and FLAIR, what is shown?", False),
  "a colon": ("Vitamin A: what is it for?", False),
  "letters": ("Compare (A) with (B), C)", False),
}
OPTIONS = {
  "plain": ["Brain", "Chest", "Knee", "Hand"],
  "two": ["Yes", "No"],
  "commas": ["No, It's normal.", "Left, right, or both", "Yes"],
  "brackets": ["Retinal Detachment (RD)", "Magnetic resonance imaging (MRI)", "CT (64)"],
  "letters in brackets": ["Hepatitis (type A)", "Types (A, B)", "Types (A, B, C), both", "Other (see A)"],
  "an open bracket": ["OCT (Optical Coherence Tomography", "MRI", "CT"],
  "later letters": ["Grade D)", "Grade, D", "Vitamin C: high", "x"],
  "ten": [f"stage {number}" for number in range(10)],
  "an empty one": ["Brain", "", "Knee"],
}
SYNTAXES = {
  "one line": lambda stem, row: f"{stem} " + ", ".join(f"{'ABCDEFGHIJ'[i]}){text}" for i, text in enumerate(row)),
  "bracket": lambda stem, row: stem + "".join(f"\n{'ABCDEFGHIJ'[i]}) {text}" for i, text in enumerate(row)),
  "period": lambda stem, row: stem + "".join(f"\n{'ABCDEFGHIJ'[i]}. {text}" for i, text in enumerate(row)),
  "brackets": lambda stem, row: stem + "".join(f"\n({'ABCDEFGHIJ'[i]}) {text}" for i, text in enumerate(row)),
  "small letter": lambda stem, row: stem + "".join(f"\n{'abcdefghij'[i]}) {text}" for i, text in enumerate(row)),
  "colon": lambda stem, row: stem + "".join(f"\n{'ABCDEFGHIJ'[i]}: {text}" for i, text in enumerate(row)),
  "carriage return": lambda stem, row: stem + "".join(f"\r\n{'ABCDEFGHIJ'[i]}) {t}" for i, t in enumerate(row)),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_stem_and_options_come_apart(options):
  for syntax, (stem, (text, looks_like_a_row)) in itertools.product(SYNTAXES, STEMS.items()):
    found = records.cut(SYNTAXES[syntax](text, OPTIONS[options]))
    assert found == (text, OPTIONS[options], looks_like_a_row), (syntax, stem)


def test_where_a_row_may_begin():
  for begin in ("", "What?", "What:", "What."):
    assert records.cut(f"{begin}A)x,B)y") == (begin, ["x", "y"], False), begin
  for begin, mark in itertools.product(("\n", "\r\n", "\n \t"), (")", ":")):
    assert records.cut(f"What?{begin}A{mark} x{begin}B{mark} y") == ("What?", ["x", "y"], False), (begin, mark)


def test_no_options():
  for text in ("", "What is shown?", "A)", "What? A)one", "Q?\nA) x\nC) y", "B)x, C)y", "aA)x, B)y"):
    with pytest.raises(Rejected) as caught:
      records.cut(text)
    assert caught.value.rule == "options_not_found", text


def slow_cut(problem):
  """`records.cut` as its docstring says it, each row from each place where one may begin; None for no options."""

  def is_marker(begin, match, inline):
    depth = 0
    for bracket in re.findall(r"[()]", problem[begin : match.start()]):
      depth = depth + 1 if bracket == "(" else max(0, depth - 1)
    return not inline or depth == 0 or re.match(r"[^\W_]", problem[match.end() : match.end() + 1])

  def row_from(first, further, inline):
    row = [first] if is_marker(0, first, inline) else []
    for letter in "BCDEFGHIJKLMNOPQRSTUVWXYZ" if row else "":
      begin = row[-1].end()
      matches = [match for match in further.finditer(problem, begin) if match[1].upper() == letter]
      row += [match for match in matches if is_marker(begin, match, inline)][:1]
      if row[-1].end() == begin:
        break
    return row

  rows = [
    (first.end(), -rank, row)
    for rank, (begin, further, inline) in enumerate(records._SYNTAXES)
    for first in begin.finditer(problem)
    if len(row := row_from(first, further, inline)) > 1
  ]
  if not rows:
    return None
  row = max(rows)[2]
  ends = [match.start() for match in row[1:]] + [len(problem)]
  options = [problem[match.end() : end].strip() for match, end in zip(row, ends, strict=True)]
  return problem[: row[0].start()].strip(), options, len({end for end, *_ in rows}) > 1


def cut_or_none(problem):
  try:
    return records.cut(problem)
  except Rejected:
    return None


PIECES = "A: |B: |, | |, B)|, C)|? A)|\nA) |\nB) |\nA: |\nB: |(type A)|\n|\r\n|\t|A)|B)|C)|D)|Z)|(|)|x|_|É".split("|")
PIECES += "\nA. |\nB. |\n(A) |\n(B) |\na) |\nb) ".split("|")


def test_the_same_as_row_by_row():
  draw = random.Random(0)
  for _ in range(1500):
    problem = "".join(draw.choices(PIECES, k=draw.randrange(26)))
    if draw.random() < 0.2:  # an ordinary question
      options = ["".join(draw.choices("ab ,()AB:.", k=draw.randrange(13))) for _ in range(draw.randint(2, 10))]
      problem = SYNTAXES[draw.choice([*SYNTAXES])](draw.choice([*STEMS.values()])[0], options)
    assert cut_or_none(problem) == slow_cut(problem), problem
  problem = "Of A) (x, B) y), B) z or A)(x, B) y"
  assert cut_or_none(problem) == slow_cut(problem)


def lines_run(problem):
  """Lines of Python that a cut runs; regular expressions count as one, and each looks at the whole text once."""
  count = 0

  def trace(frame, event, _):
    nonlocal count
    count += event == "line"
    return trace

  before = sys.gettrace()
  sys.settrace(trace)
  try:
    cut_or_none(problem)
  finally:
    sys.settrace(before)
  return count


def test_the_work_grows_as_the_text_does():
  for name, text in {
    "every B in a bracket, for every A": lambda n: "A) " * (n // 6) + "(, B) " * (n // 12),
    "rows": lambda n: " A)x, B)" * (n // 8),
    "open brackets": lambda n: "A) (" * (n // 8) + ", B)" * (n // 8),
    "lines": lambda n: "\nA) " * (n // 5),
    "brackets first": lambda n: "(" * (n // 2) + " A)" * (n // 6),
  }.items():
    half, whole = lines_run(text(records.LONGEST // 2)), lines_run(text(records.LONGEST))
    assert whole < 2.2 * half and whole < 20 * records.LONGEST, name


def test_long_texts_are_refused():
  with pytest.raises(Rejected, match="a question of 60000 characters"):
    records.cut(" A)x, B)" * 7500)
