"""Rules by themselves: notes on options, and summaries."""

import json

import pytest

from kepo_jax.data import cleaning


def test_notes_on_options():
  for options, found in [
    (("Brain", "Chest"), []),
    (("ABC DEF", "Brain"), ["nonsense_option"]),
    (("Brain", "123 456"), ["nonsense_option"]),
    (("Brain", "GHJ OA"), ["nonsense_option"]),
    (("Brain", "RST UVW", "XYZ WXY", "IJK LMN"), ["nonsense_option"]),
    (("CT MRI", "T1 T2", "123", "Grade 123", "PA AP view", "1 2"), []),
    (("Abc def", "DEF CARCINOMA"), []),
    (("Intra type of radimageNet dataset.", "Brain"), ["leaked_label"]),
    (("x_ray", "Brain"), ["class_spelling"]),
    (("Dermoscopy.", "Brain"), ["class_spelling"]),
    (("Brain", "x_ray."), []),  # of a wrong option the score does not speak
    (("X-ray", "MRI"), []),
    (("X-ray", "x_ray."), ["synonym_options"]),
    (("Computed tomography (CT) scan", "CT", "MRI"), ["synonym_options"]),
    (("X-ray imaging", "Ultrasound", "X-ray"), ["synonym_options"]),
    (("Magnetic resonance imaging (MRI)", "MRI"), ["synonym_options"]),
    (("MRI", "mri."), []),  # equal but for case and period: repeated_distractor or repeated_answer
    (("CT angiography", "CT"), []),
  ]:
    assert cleaning.notes(options, 0) == found, options


def test_counting_and_the_text():
  summary = cleaning.Summary(root="a\x1bb\ud800", records=5, kept=3)
  for place in ("file\n1", "file 2"):
    summary.count("null_option", place)
  summary.count("missing_image", "file 3")
  assert summary.dropped == 2 and summary.first == {"null_option": "file\\n1", "missing_image": "file 3"}
  lines = summary.text().splitlines()
  assert lines[0] == "a\\x1bb\\ud800: 3 of 5 records kept, 0 files (OmniMedVQA layout)"
  assert lines[1].startswith("  null_option 2: repaired:") and len(lines) == 3
  assert json.loads(json.dumps(summary.to_dict()))["rules"] == {"null_option": 2, "missing_image": 1}
  with pytest.raises(KeyError):
    summary.count("invented", "file")


def test_the_verdict():
  summary = cleaning.Summary(root="here", records=2, kept=1)
  summary.count("answer_unmatched", "file")
  summary.verdict(lenient=False)  # what is dropped by a rule does not stop a strict reading
  summary.count("malformed_record", "file, record 7")
  with pytest.raises(ValueError, match=r"file, record 7 .*1 malformed_record.*--lenient"):
    summary.verdict(lenient=False)
  summary.verdict(lenient=True)
  summary.kept = 0
  with pytest.raises(ValueError, match="here: none of 2 records is usable"):
    summary.verdict(lenient=True)
