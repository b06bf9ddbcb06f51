import collections

import numpy as np

from experiments.studies import figures, page, plan, results, runs, statistics
from kepo_jax.reporting import pages
from tests.experiments.studies import cases


def test_the_overview_shows_means_intervals_and_seeds():
  items = cases.items(8)
  entries = cases.entries(items)
  summary = statistics.summarised(entries, items, references=("grpo",), resamples=60)
  looks = figures.styles(figures.described(entries))
  axis = figures.overview_figure(summary, "", looks).axes[1]
  kepo = summary["methods"]["kepo-tau1"]["statistics"]["out_of_domain"]
  assert (kepo["low"], kepo["high"]) in [tuple(line.get_xdata()) for line in axis.lines]
  dots = [line.get_xdata() for line in axis.lines if line.get_marker() == "."]
  assert any(np.array_equal(values, kepo["values"]) for values in dots) and len(dots) == 3  # untrained models have none
  keys = [key for key in summary["chance"] if key.startswith("modalities")]
  for axis, key in zip(figures.modalities_figure(summary, looks).axes, keys, strict=True):
    means = [method["statistics"][key]["mean"] for method in summary["methods"].values()]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], means, err_msg=key)


def test_every_table_and_figure_is_shown_once_and_what_is_missing_is_named(tmp_path, monkeypatch):
  drawn, shown = [], []

  def undrawn(figure, **fields):  # drawing takes most of the time
    drawn.append(figure)
    return pages.FigureBlock(image=b"", alt=fields["alt"], caption=fields["caption"])

  monkeypatch.setattr(pages, "figure_block", undrawn)
  monkeypatch.setattr(figures, "save", lambda folder, name, figure: shown.append(name))
  monkeypatch.setattr(pages, "rendered", lambda made: shown.append(made) or "")
  summarised = statistics.summarised
  monkeypatch.setattr(statistics, "summarised", lambda *given, **more: summarised(*given, **more, resamples=20))
  benchmark = plan.phantom()
  place, study = runs.Place(benchmark, tmp_path / "runs"), plan.STUDIES["hints"]
  for name in ("hints", "main"):
    (tmp_path / name).mkdir()
    for file in (cases.RESULTS / name).glob("*.json"):
      (tmp_path / name / file.name).write_bytes(file.read_bytes())
  (tmp_path / "items.json").write_bytes((cases.RESULTS / "items.json").read_bytes())
  kept = results.Results(tmp_path / "hints", "hints", benchmark)
  chosen_on = results.Results(tmp_path / "main", "main", benchmark)
  grid = list(plan.grid(study, benchmark, 4))
  rates = results.chosen_rates(grid, place, chosen_on)
  said = page.write(study, place, kept, chosen_on=chosen_on, grid=grid, rates=rates, seeds=4, folder=tmp_path / "all")
  assert "13 of 17 runs; missing: hint and answer, new each round, confused taught by weak: seed 3" in said
  made, *files = shown
  assert files == ["accuracy", "hints"]
  blocks = [block for section in made.sections for block in section.blocks]
  assert any(isinstance(block, pages.TextBlock) and block.warning and "seed 3" in block.text for block in blocks)
  captions = collections.Counter(block.caption for block in blocks if not isinstance(block, pages.TextBlock))
  assert set(captions.values()) == {1} and len(captions) == len(drawn) + len(list((tmp_path / "all").glob("*.csv")))
  text = (tmp_path / "hints" / "tables.md").read_text()
  assert text.count("\n## ") == len(list((tmp_path / "all").glob("*.md"))) and "\n| hints without distillation " in text
