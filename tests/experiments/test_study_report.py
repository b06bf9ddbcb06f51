"""What a page says of its study beside the tables: what it cost, what is planned, and what its rates are."""

from experiments import studies, study_report

PAIR = studies.phantom().pairs[0]


def entry(digest, seconds, cpu):
  return {"digest": digest, "cost": {"seconds": seconds, "cpu_seconds": cpu}}


def test_the_time_of_runs_counts_once():
  runs, time = study_report.facts([entry("a", 30.0, 60.0), entry("b", 30.0, 62.0), entry("b", 30.0, 62.0)], 5, 3)
  assert (runs.value, runs.note) == ("3 of 5", "2 are kept, those of the grid in the main study")
  assert time.value == "2 min 02 s" and "of 2 runs" in time.note


def test_runs_of_grids_are_counted_where_they_are_kept():
  runs, *_ = study_report.facts([entry("a", 30.0, 60.0) | {"seed": studies.GRID_SEEDS[0]}], 1, 0)
  assert runs.note == "1 are kept, those of all grids included"


def test_time_of_which_a_part_is_unknown_is_a_lower_bound():
  # The steps of the second one took longer than its process: it went on after an interruption.
  _, time = study_report.facts([entry("a", 30.0, 60.0), entry("b", 38.0, 17.0)], 2, 2)
  assert time.value == "at least 1 min 17 s"
  (runs,) = study_report.facts([{"digest": "a"}], 1, 1)  # nobody measured it
  assert runs.value == "1 of 1"


def test_a_method_with_more_steps_says_whose_rate_it_has():
  methods = [studies.MAIN_METHODS[name] for name in ("grpo", "grpo-long")]
  plain, longer = study_report.planned([studies.Cell(method, PAIR, 1e-4, 0) for method in methods])
  assert "note" not in plain
  assert longer["note"] == "GRPO, twice the steps: at the rate of GRPO, chosen at 1/2 of its steps."
