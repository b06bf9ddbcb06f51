"""Rules by themselves: names, notes on options, summaries, and that the docs list every one."""

import json
import pathlib
import re

import pytest

from kepo_jax.data import images, rules

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_docs_list_every_rule_with_its_text():
  rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", DOCS.read_text(), re.M)
  assert {name: f"{kind}: {text}" for name, kind, text in rows} == dict(rules.RULES)
  assert set(rules.ERRORS) == {name for name, kind, _ in rows if kind == "error"}


@pytest.mark.parametrize(
  ("options", "found"),
  [
    (("Brain", "Chest"), []),
    (("ABC DEF", "Brain"), ["nonsense_option"]),
    (("Brain", "123 456"), ["nonsense_option"]),
    (("Brain", "GHJ OA"), ["nonsense_option"]),
    (("Brain", "RST UVW", "XYZ WXY", "IJK LMN"), ["nonsense_option"]),
    (("CT MRI", "T1 T2", "123", "Grade 123", "PA AP view", "1 2"), []),
    (("Abc def", "DEF CARCINOMA"), []),
    (("Intra type of radimageNet dataset.", "Brain"), ["leaked_label"]),
    (("Brain", "RadimageNet dataset of an unknown type."), ["leaked_label"]),
    (("x_ray.", "Brain"), ["class_spelling"]),
    (("Dermoscopy.", "Brain"), ["class_spelling"]),
    (("Brain", "x_ray."), []),  # of a wrong option the score does not speak
    (("X-ray", "MRI"), []),
    (("X-ray", "x_ray."), ["synonym_options"]),
    (("Magnetic resonance imaging (MRI)", "MRI"), ["synonym_options"]),
    (("Computed tomography (CT) scan", "CT", "MRI"), ["synonym_options"]),
    (("X-ray imaging", "Ultrasound", "X-ray"), ["synonym_options"]),
    (("MRI", "mri."), []),  # equal but for case and period: repeated_distractor or repeated_answer
    (("CT angiography", "CT"), []),
  ],
)
def test_notes(options, found):
  assert rules.notes(options, 0) == found


def test_counting_and_the_text():
  summary = rules.Summary(root="a\x1bb\ud800", records=5, kept=3)
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
  summary = rules.Summary(root="here", records=2, kept=1)
  summary.count("answer_unmatched", "file")
  summary.verdict(lenient=False)  # what is dropped by a rule does not stop a strict reading
  summary.count("malformed_record", "file, record 7")
  with pytest.raises(ValueError, match=r"file, record 7 .*'malformed_record': 1.*--lenient"):
    summary.verdict(lenient=False)
  summary.verdict(lenient=True)
  summary.kept = 0
  with pytest.raises(ValueError, match="here: none of 2 records is usable"):
    summary.verdict(lenient=True)


def test_the_docs_state_what_images_cost():
  settings = {"patch_size": 16, "merge_size": 2, "min_pixels": 65_536, "max_pixels": 16_777_216}
  native, squashed = images.ImageProcessor(**settings), images.ImageProcessor(resize="squash384", **settings)
  rows = re.findall(r"^\| (\d+) x (\d+) \| .* \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", DOCS.read_text(), re.M)
  assert len(rows) == 7
  for width, height, patches, tokens, factor in rows:
    _, high, wide = native.grid(int(height), int(width))
    assert (f"{high * wide:,}", f"{high * wide // 4:,}") == (patches, tokens)
    assert squashed.grid(int(height), int(width)) == (1, 24, 24) and float(factor) == round(high * wide / 576, 1)
