"""The page of a study: nothing that was made is left out, and what is missing is named."""

import collections

import pytest
from matplotlib.figure import Figure

from kepo_jax.reporting import pages, study_files, study_page
from tests import studies_data

ITEMS = studies_data.items(6)
SOME = {name: studies_data.METHODS[name] for name in ("grpo", "gkd-1", "kepo-tau1")}


@pytest.fixture(scope="module")
def made():
  """Tables and figures of a main study with a second pair."""
  entries = studies_data.entries(ITEMS, methods=SOME, seeds=2)
  entries += studies_data.entries(ITEMS, methods=SOME, seeds=2, pair=("noisy", "weak"), free=False)
  found = study_files.summaries("main", entries, ITEMS)
  tables = study_files.study_tables_of("main", entries, ITEMS, found, grid=entries[:0], rates=(1e-4,))
  return tables, study_files.study_figures_of("main", entries, ITEMS, found)


def page_of(tables, figures, **more):
  return study_page.study_page("T", subtitle="S", asks="Which?", facts=[], tables=tables, figures=figures, **more)


def blocks_of(page, kind):
  return [block for section in page.sections for block in section.blocks if isinstance(block, kind)]


def test_every_figure_and_every_table_is_shown_once(made):
  tables, figures = made
  page = page_of(tables, figures)
  shown = collections.Counter(block.caption for block in blocks_of(page, pages.TableBlock))
  assert len(shown) == len(tables) and set(shown.values()) == {1}
  captions = [block.caption for block in blocks_of(page, pages.FigureBlock)]
  assert len(captions) == len(set(captions)) == len(figures)
  assert any("(noisy taught by weak)" in caption for caption in captions)
  assert [section.heading for section in page.sections][:2] == ["Question", "Result"]


def test_figures_of_the_checks_have_a_place(made):
  tables, _ = made
  checks = dict.fromkeys(("tau", "budget", "gate", "hints"), Figure(figsize=(1, 1)))
  page = page_of(tables[:1], checks)
  assert len(page.sections[1].blocks) == 5


def test_what_is_missing_is_named_on_top(made):
  warned = page_of(made[0], {}, missing=["RLOO: seeds 3, 4"]).sections[0].blocks[-1]
  assert warned.warning and "RLOO: seeds 3, 4" in warned.text
  assert not any(block.warning for block in blocks_of(page_of(made[0], {}), pages.TextBlock))


def test_a_page_is_small_enough_for_the_repository_and_needs_no_network(made):
  text = pages.rendered(page_of(*made))
  assert len(text.encode()) < 1_000_000 and "Which?" in text
  assert 'src="http' not in text and 'href="http' not in text and "image/svg" not in text
