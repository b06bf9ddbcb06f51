"""The list of mutations does not rot: every text is there once, every named test exists."""

import pathlib

import pytest

from tests.mutations import MUTATIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_there_are_enough_and_names_are_unique():
  assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 10


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_its_file_and_its_test(mutation):
  assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
  assert mutation.old != mutation.new
  file, function = mutation.test.split("::")
  assert f"def {function.split('[')[0]}(" in (ROOT / file).read_text()
