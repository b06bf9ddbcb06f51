from collections import Counter

from kepo_jax.reporting.pages import choice
from tests.reporting.pages.cases import sample


def uneven():
  """Cells of 100, 10 and 1 questions; a tenth of the first has a tag."""
  sizes = {("MRI", "right"): 100, ("MRI", "wrong"): 10, ("CT", "right"): 1}
  return [
    sample(f"{modality} {outcome} {n}", modality=modality, outcome=outcome, tags=("gated",) if n % 10 == 5 else ())
    for (modality, outcome), size in sizes.items()
    for n in range(size)
  ]


def cells(samples):
  return Counter((each.modality, each.outcome) for each in samples)


def test_any_beginning_is_balanced():
  ordered = choice.balanced(uneven())
  assert len(ordered) == 111 and len({each.key for each in ordered}) == 111
  assert set(cells(ordered[:3]).values()) == {1}
  assert cells(ordered[:9]) == {("MRI", "right"): 4, ("MRI", "wrong"): 4, ("CT", "right"): 1}
  assert cells(ordered[:21]) == {("MRI", "right"): 10, ("MRI", "wrong"): 10, ("CT", "right"): 1}


def test_tags_take_turns_inside_a_cell():
  rights = [each for each in choice.balanced(uneven()) if (each.modality, each.outcome) == ("MRI", "right")]
  assert sum(bool(each.tags) for each in rights[:10]) == 5


def test_sources_are_cells_of_their_own():
  samples = [sample(f"{source}{n}", source=source) for source, size in (("a", 50), ("b", 5)) for n in range(size)]
  assert Counter(each.source for each in choice.balanced(samples)[:10]) == {"a": 5, "b": 5}


def test_the_order_of_the_questions_does_not_matter():
  samples = uneven()
  first = [each.key for each in choice.balanced(samples)]
  again = [each.key for each in choice.balanced(samples[::-1])]
  assert first == again != [each.key for each in samples]
