"""Options cut out of a question: three syntaxes, with everything in them that looks like another option."""

import contextlib
import itertools
import random
import re
import time

import pytest

from kepo_jax.data import lettering
from kepo_jax.data.cleaning import RULES, Rejected

STEMS = {
  "plain": ("What is shown?", []),
  "a letter in brackets": ("Is it hepatitis (type A)?", []),
  "a list": ("Which of A)red, B)blue is right?", ["options_ambiguous"]),
  "commas": ("Given T1, T2, and FLAIR, what is shown?", []),
  "a colon": ("Vitamin A: what is it for?", []),
  "letters": ("Compare (A) with (B), C)", []),
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
    found = lettering.cut(SYNTAXES[syntax](text, OPTIONS[options]))
    assert found == (text, OPTIONS[options], looks_like_a_row), (syntax, stem)


def test_where_a_row_may_begin():
  for begin in ("", "What?", "What:", "What."):
    assert lettering.cut(f"{begin}A)x,B)y") == (begin, ["x", "y"], []), begin
  for begin, mark in itertools.product(("\n", "\r\n", "\n \t"), (")", ":")):
    assert lettering.cut(f"What?{begin}A{mark} x{begin}B{mark} y") == ("What?", ["x", "y"], []), (begin, mark)


def test_every_notation_that_the_rule_names():
  written = re.findall(r"`([^`]+)`", RULES["options_not_found"])
  assert len(written) > 10
  for text in written:
    inline = " B" in text or "(B" in text
    row = (
      text
      if inline
      else f"{text}\n" + re.sub(r"\b[Aa]\b", lambda found: chr(ord(found[0]) + 1), text).replace("x", "y")
    )
    assert lettering.cut(f"Which?{' ' if inline else chr(10)}{row}") == ("Which?", ["x", "y"], []), text
  for row in ("\nA.x\nB.y", "\n(a) x\n(b) y", "\na. x\nb. y", "\nA） x\nB） y", "\n**A. x**\n**B. y**", " A) x; B) y",
              "\nA) x,\nB) y", " A) x or B) y", "\nA.) x\nB.) y", "\n* A: x\n* B: y"):  # fmt: skip
    assert lettering.cut("Which?" + row) == ("Which?", ["x", "y"], []), row


def test_what_no_longer_belongs_to_the_last_option():
  for after in ("\nAnswer with the option's letter from the given choices directly.", "\n\nThink it over.", "\nAnswer:",
                "\nPlease select the correct answer from the options above.", "\nThe answer is: B"):  # fmt: skip
    assert lettering.cut("Which?\nA. x\nB. y" + after) == ("Which?", ["x", "y"], ["text_after_options"]), after


def test_letters_of_their_own():
  for first, second in (
    ("A. x", "B. y"), ("A.) x", "B.) y"), ("A - x", "B - y"), ("[A] x", "[B] y"), ("1. x", "2. y"), ("(1) x", "(2) y"),
    ("**A.** x", "**B.** y"), ("**A. x**", "**B. y**"), ("Option A: x", "option B: y"), ("Ａ. x", "Ｂ. y"),
    ("（A）x", "（B）y"), ("A）x", "b）y"),
  ):  # fmt: skip
    assert lettering.own_letters([first, "", second]) == ([first, "", second], ""), first  # the second is no C
    assert lettering.own_letters([first, second, ""]) == (["x", "y", ""], "option_letters"), first
  for options in (["A. x", "C. y"], ["1.5 cm", "2.5 cm"], ["1: 10", "2: 20"], ["1 - 2", "2 - 3"], ["A.", "B."],
                  ["A", "B"], ["A-line", "B-line"], ["A. x", "y"], ["A. x"], []):  # fmt: skip
    assert lettering.own_letters(options) == (options, "")
  names = ["A. baumannii", "B. cereus"]
  assert lettering.own_letters(names) == (names, "option_letters_kept")
  assert lettering.own_letters(names, ["cereus"]) == (["baumannii", "cereus"], "option_letters")


def test_no_options():
  for text in ("", "What is shown?", "A)", "What? A)one", "Q?\nA) x\nC) y", "B)x, C)y", "aA)x, B)y"):
    with pytest.raises(Rejected) as caught:
      lettering.cut(text)
    assert caught.value.rule == "options_not_found", text


def slow_row(problem):
  """`lettering._best_row` as it is told, each row from each place where one may begin: its places; None for no row."""

  def is_marker(begin, match, inline):
    depth = 0
    for bracket in re.findall(r"[()]", problem[begin : match.start()]):
      depth = depth + 1 if bracket == "(" else max(0, depth - 1)
    return not inline or depth == 0 or re.match(r"[^\W_]", problem[match.end() : match.end() + 1])

  def row_from(first, further, inline):
    row, others = [first] if is_marker(0, first, inline) else [], []
    for match in further.finditer(problem) if row else ():
      if match.start() >= row[-1].end() and is_marker(row[-1].end(), match, inline):
        (row if match["label"].upper() == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(row)] else others).append(match)
    return row, others

  def place(match):
    return match.start("label")

  rows = [
    (place(first), -rank, *row_from(first, further, inline))
    for rank, (begin, further, inline) in enumerate(lettering._SYNTAXES)
    for first in begin.finditer(problem)
  ]
  rows = [each for each in rows if len(each[2]) > 1]
  if not rows:
    return None
  last, _, row, others = max(rows)
  strays = others + [
    match
    for _, further, inline in lettering._SYNTAXES
    for match in further.finditer(problem)
    if match.start("label") > place(row[-1]) and match["label"].upper() == chr(ord(row[-1]["label"].upper()) + 1)
    if is_marker(row[-1].end(), match, inline)
  ]
  for rank in range(len(lettering._SYNTAXES)):
    strays += max((each[:3] for each in rows if each[0] < last and each[1] == -rank), default=[[]])[-1]
  if any(place(stray) > last and place(stray) not in map(place, row) for stray in strays):
    return None
  return [match.span() for match in row], len({end for end, *_ in rows}) > 1


def row_or_none(problem):
  try:
    row, ambiguous = lettering._best_row(problem)
  except Rejected:
    return None
  return [(marker.start, marker.end) for marker in row], ambiguous


PIECES = "A: |B: |, | |, B)|, C)|? A)|\nA) |\nB) |\nA: |\nB: |(type A)|\n|\r\n|\t|A)|B)|C)|D)|Z)|(|)|x|_|É".split("|")
PIECES += " A. | B. | (A) | (B) | A: | B: |\n- A) |\n**B.** |".split("|")
PIECES += "\nA. |\nB. |\n(A) |\n(B) |\na) |\nb) ".split("|")


def test_the_same_as_row_by_row():
  draw = random.Random(0)
  for _ in range(1500):
    problem = "".join(draw.choices(PIECES, k=draw.randrange(26)))
    if draw.random() < 0.2:  # an ordinary question
      options = ["".join(draw.choices("ab ,()AB:.", k=draw.randrange(13))) for _ in range(draw.randint(2, 10))]
      problem = SYNTAXES[draw.choice([*SYNTAXES])](draw.choice([*STEMS.values()])[0], options)
    assert row_or_none(problem) == slow_row(problem), problem
  problem = "Of A) (x, B) y), B) z or A)(x, B) y"
  assert row_or_none(problem) == slow_row(problem)


ADVERSARIAL = [
  "A) " * 1600 + "(, B) " * 800,  # every B in a bracket, for every A
  "A) (" * 1250 + ", B)" * 1250,
  "(" * 5000 + " A)" * 1600,
  *((piece * lettering.LONGEST)[: lettering.LONGEST] for piece in (" A)x, B)", "\nA) ", "*", "\n", "\n*", " ", " or")),
  *((piece * lettering.LONGEST)[: lettering.LONGEST] for piece in ("please answer ", "\nA) x\nB) ")),
]


def test_repetition_takes_no_time():
  start = time.process_time()
  for text in ADVERSARIAL:
    with contextlib.suppress(Rejected):
      lettering.cut(text)
    lettering.own_letters([text, text])
  assert time.process_time() - start < 5  # 0.3 s; a quadratic one took 20


def test_long_texts_are_refused():
  with pytest.raises(Rejected, match="a question of 60000 characters"):
    lettering.cut(" A)x, B)" * 7500)
