from kepo_jax import evaluation
from kepo_jax.reporting import tables
from tests.evaluation.scripted import output


def records(samples=1, sets=3):
  """Two modalities, of which CT has four options; every third completion is right, every fourth unparsed."""
  return [
    output(f"q{n // samples}", correct=n % 3 == 0, sample=n % samples, modality=("MRI", "CT")[n // samples % 2],
           dataset=f"set {n // samples % sets}", options=["x", "y", "z", "w"][: 2 + 2 * (n // samples % 2)],
           parsed=None if n % 4 == 0 else "A", truncated=n % 6 == 0, images=[])
    for n in range(12 * samples)
  ]  # fmt: skip


def test_an_evaluation_in_full():
  rows = {row[0]: row for row in tables.evaluation_rows(evaluation.summarised(records()))}
  assert rows[""] == ("", "n (images)", "chance", "strict", "forgiving")
  # Of MRI's questions 0, 2, .. 10 right are 0 and 6.
  assert rows["MRI"] == ("MRI", "6", "50.0", "33.3 [9.7, 70.0]", "100.0 [61.0, 100.0]")
  assert rows["CT"][2] == "25.0" and rows["Lesion Grading"][1:3] == ("12", "37.5")
  assert rows["set 0"][3].startswith("100.0") and rows["set 1"][3].startswith("0.0")
  assert rows["in domain"][:4] == ("in domain", "6", "50.0", "33.3 [9.7, 70.0]")
  assert rows["out of domain, mean"][1:3] == ("6", "25.0") and rows["all"][1:3] == ("12", "37.5")
  # Of MRI's questions 0, 2, .. 10 unparsed are 0, 4, 8, truncated 0, 6.
  assert tables.rate_rows(evaluation.summarised(records())) == [
    ("", "unparsed", "truncated"), ("CT", "0.0", "0.0"), ("MRI", "50.0", "33.3"), ("all", "25.0", "16.7"),
  ]  # fmt: skip


def test_images_stand_beside_questions():
  # Twelve questions about three images, of which MRI's are 0 and 2, CT's 1.
  shown = [record | {"images": [str((0, 1, 2, 1)[n % 4])]} for n, record in enumerate(records())]
  counts = {"MRI": "6 (2)", "CT": "6 (1)", "in domain": "6 (2)", "out of domain, mean": "6 (1)", "all": "12 (3)"}
  for table in (
    tables.evaluation_rows(evaluation.summarised(shown)),
    tables.comparison_rows(evaluation.compared(shown, shown)),
  ):
    assert {row[0]: row[1] for row in table if row[0] in counts} == counts


def test_data_sets_have_rows_when_few():
  # Two data sets are the two modalities again.
  for sets, flag, shown in ((2, None, 0), (3, None, 3), (12, None, 0), (12, True, 12), (3, False, 0)):
    rows = tables.evaluation_rows(evaluation.summarised(records(sets=sets)), datasets=flag)
    assert sum(row[0].startswith("set ") for row in rows) == shown, (sets, flag)


def test_a_comparison():
  first = records()
  second = [record | {"correct": True} for record in first]
  rows = {row[0]: row for row in tables.comparison_rows(evaluation.compared(first, second), ("old", "new"))}
  # Four gained: p = 2 / 2^4 = 0.125, twice that for two modalities; both alike.
  assert rows["MRI"][2:4] == ("33.3", "100.0") and rows["MRI"][5:] == ("4", "0", "0.125", "0.250")
  assert rows["MRI"][4].startswith("+66.7 [+") and rows["all"][7] == "0.008"
  assert rows["in domain"][5:] == ("4", "0", "0.125", "") and rows["out of domain, mean"][5:] == ("", "", "", "")
