"""Tables of the checks."""

import numpy as np

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
  record = {"student": "s", "teacher": "t", "hint_prompt": "hint_only", "modality": "CT", "questions": 1500,
            "prompts": 1200,
            "candidates": 12, "gain": 1.234, "reliance": None, "leak_rate": 0.031, "positive_rate": 0.5,
            "accept_rate": [0.5, 0.75]}  # fmt: skip
  rows = check_tables.hint_rows([record, record | {"accept_rate": []}])
  assert rows[1] == ("s, t", "hint_only", "CT", "1,500", "1,200", "12", "+1.23", "-", "3.1", "50.0", "50.0", "75.0")
  assert rows[2][-2:] == ("-", "-") and len(rows[0]) == len(rows[1])


def test_hint_rows_have_the_intervals_that_were_kept():
  record = studies_data.hint_records()[0] | {"gain": 0.1, "gain_interval": [-0.001, 0.2]}
  record |= {"positive_rate": 0.5, "positive_rate_interval": [0.4, 0.625]}
  header, row = check_tables.hint_rows([record])
  found = dict(zip(header, row, strict=True))
  assert (found["gain, nats per token"], found["reward-positive"]) == ("+0.10 [+0.00, +0.20]", "50.0 [40.0, 62.5]")


def test_correlations_over_modalities():
  records = [each for each in studies_data.hint_records() if each["student"] == "confused"]
  whole = records[0] | {"modality": "all", "gain": 100.0}
  header, *rows = check_tables.correlation_rows([*records, whole], ["Fundus Photography"])
  assert header[3:] == ("r of gain", "r of reliance") and len(rows) == 2 * 2 * 2  # teachers, prompts, with and without
  mine = records[:8]
  r = np.corrcoef([each["gain"] for each in mine], [each["positive_rate"] for each in mine])[0, 1]
  assert rows[0][:3] == ("confused, weak", "hint_and_answer", "8, all") and rows[0][3].startswith(f"{r:+.2f} [")
  assert rows[1][2] == "7, without Fundus Photography" and rows[1][3] != rows[0][3]
  assert len(check_tables.correlation_rows(records)) == 1 + 4
