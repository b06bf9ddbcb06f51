"""Options cut out of a question: three syntaxes, with everything in them that looks like another option."""

import time

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
  "colon": lambda stem, row: stem + "".join(f"\n{'ABCDEFGHIJ'[i]}: {text}" for i, text in enumerate(row)),
  "carriage return": lambda stem, row: stem + "".join(f"\r\n{'ABCDEFGHIJ'[i]}) {t}" for i, t in enumerate(row)),
}


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stem", STEMS)
def test_stem_and_options_come_apart(stem, options, syntax):
  text, looks_like_a_row = STEMS[stem]
  assert records.cut(SYNTAXES[syntax](text, OPTIONS[options])) == (text, OPTIONS[options], looks_like_a_row)


@pytest.mark.parametrize("text", ["", "What is shown?", "A)", "What? A)one", "Q?\nA) x\nC) y", "B)x, C)y", "? A)x B)y"])
def test_no_options(text):
  with pytest.raises(Rejected, match="no options in") as caught:
    records.cut(text)
  assert caught.value.rule == "options_not_found"


def test_long_texts_are_refused_before_they_take_long():
  start = time.perf_counter()
  with pytest.raises(Rejected, match="a question of 60000 characters"):
    records.cut(" A)x, B)" * 7500)
  stem, options, ambiguous = records.cut(" A)x, B)" * (records.LONGEST // 8))
  assert ambiguous and options == ["x", ""] and stem.endswith("B)")
  assert time.perf_counter() - start < 5
