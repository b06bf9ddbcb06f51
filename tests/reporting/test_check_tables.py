"""Tables of the checks."""

from kepo_jax.evaluation import studies
from kepo_jax.reporting import check_tables
from tests import studies_data

ITEMS = studies_data.items(8)


def test_check_rows():
  settings = studies_data.METHODS["kepo-tau1"]
  methods = {"kepo-b0": settings, "kepo-b5": settings}
  entries = studies_data.entries(ITEMS, methods=methods, seeds=2, free=False)
  summary = studies.summarised(entries, ITEMS, resamples=50)
  pair = {"student": "confused", "teacher": "weak", "seeds": [0, 1, 2]}
  expected = [{"method": f"kepo-b{b}", "label": f"B = {b}", **pair} for b in (0, 1, 5)]
  varied = {"B": {"kepo-b0": 0, "kepo-b5": 5, "kepo-b1": 1}, "tau": {"kepo-b0": 0.5, "kepo-b1": 1.0}}
  spread = studies.stability(entries, ITEMS)
  header, *rows = check_tables.check_rows(summary, varied, stability=spread, expected=expected)
  assert header[:4] == ("method", "B", "tau", "seeds") and header[-2:] == (
    "deviation over seeds", "deviation over the last validations",
  )  # fmt: skip
  assert [row[:4] for row in rows] == [("B = 0", "0", "0.5", "2 of 3"), ("B = 1", "1", "1", "0 of 3"),
                                       ("B = 5", "5", "-", "2 of 3")]  # fmt: skip
  assert set(rows[1][4:]) == {"missing"}
  low, high = (100 * bound for bound in spread["kepo-b0"]["seeds_interval"])
  assert rows[0][-2] == f"{100 * spread['kepo-b0']['seeds']:.1f} [{low:.1f}, {high:.1f}]"
  assert len(check_tables.check_rows(summary, varied)[0]) == len(header) - 2


def test_hint_rows():
  record = {"student": "s", "teacher": "t", "hint_prompt": "hint_only", "modality": "CT", "prompts": 1200,
            "candidates": 12, "gain": 1.234, "reliance": None, "leak_rate": 0.031, "positive_rate": 0.5,
            "accept_rate": [0.5, 0.75]}  # fmt: skip
  rows = check_tables.hint_rows([record, record | {"accept_rate": []}])
  assert rows[1] == ("s, t", "hint_only", "CT", "1,200", "12", "+1.23", "-", "3.1", "50.0", "50.0", "75.0")
  assert rows[2][-2:] == ("-", "-") and len(rows[0]) == len(rows[1])
