"""The reader, rule by rule, on a data set drawn on the spot, and on the real sample where it is at hand."""

import os

import pytest
from PIL import Image

from kepo_jax.data import cleaning, images
from kepo_jax.data.readers import omnimedvqa
from tests.data.cases import RECORD, Layout, record


@pytest.fixture
def layout(tmp_path):
  return Layout(tmp_path / "OmniMedVQA")


def test_a_record_becomes_an_example(layout):
  layout.write(RECORD)
  (example,), summary = omnimedvqa.read(layout.root)
  assert example.id == "Set A/Set A_0000" and example.dataset == "Set A"
  assert example.options == ("Chest", "Brain", "Knee", "Hand") and example.answer == "B"
  assert example.answer_text == "Brain" and example.modality == "X-Ray"
  assert example.question_type == "Anatomy Identification"
  assert example.images == (os.path.realpath(layout.root / RECORD["image_path"]),)
  assert images.load_image(example.images[0]).size == (40, 40)
  assert (summary.files, summary.records, summary.kept, summary.dropped, summary.rules) == (1, 1, 1, 0, {})


def test_nested_no_and_several_roots(tmp_path):
  Layout(tmp_path / "download" / "OmniMedVQA").write(RECORD)
  for place in (tmp_path, tmp_path / "download", tmp_path / "download" / "OmniMedVQA"):
    assert len(omnimedvqa.read(place)[0]) == 1, place
  other = Layout(tmp_path / "download" / "other").root
  (tmp_path / "empty").mkdir()
  for place, settings, message in [
    (tmp_path / "absent", {}, "no such directory"),
    (tmp_path / "empty", {}, "no QA_information folder"),
    (tmp_path / "download", {}, "holds several data sets .*; name one"),
    (other, {}, r"no JSON files; QA_information has \['Open-access'\]"),
    (other, {"access": "Restricted-access"}, "Restricted-access: no JSON files"),
  ]:
    with pytest.raises(ValueError, match=message):
      omnimedvqa.read(place, **settings)


SPELLINGS = {
  "MR (Mag-netic Resonance Imaging)": "MRI", "CT(Computed Tomography)": "CT", "X-Ray": "X-Ray", "x_ray": "X-Ray",
  "ultrasound": "Ultrasound", "Dermoscopy": "Dermoscopy", "Fundus Photography": "Fundus",
  "OCT (Optical Coherence Tomography": "OCT", "Microscopy Images": "Microscopy", "Infrared Reflectance Imaging": None,
}  # fmt: skip


def test_modality_spellings(layout):
  layout.write(*(record(number, modality_type=spelling) for number, spelling in enumerate(SPELLINGS)))
  examples, summary = omnimedvqa.read(layout.root)
  assert [cleaning.modality_name(spelling) for spelling in SPELLINGS] == [*SPELLINGS.values()]
  assert [example.modality for example in examples] == [name or spelling for spelling, name in SPELLINGS.items()]
  assert summary.rules == {"modality_unlisted": 1, "modality_spelling": 7}


LETTERED = {"option_A": "A. chest", "option_B": "B. brain", "option_C": None, "option_D": ""}
BARE, READ = {"null_option": 1, "option_letters": 1}, {"solution_letter": 1}
GAP = {"null_option": 1, "option_gap": 1}
SPECIES = {"option_A": "A.cereus", "option_B": "B.coli", "option_C": ..., "option_D": ...}
# Changed fields -> options and answer of the example, and the rules that applied; `...` takes a field away.
REPAIRS = {
  "two options": ({"option_C": ..., "option_D": ...}, "Chest Brain", "B", {}),
  "null options": ({"option_C": None, "option_D": ""}, "Chest Brain", "B", {"null_option": 1}),
  "gap": ({"option_A": None}, "Brain Knee Hand", "A", GAP),
  "case and period": ({"gt_answer": "brain."}, "Chest Brain Knee Hand", "B", {"answer_normalised": 1}),
  "period in the option": ({"option_B": "Brain."}, "Chest Brain. Knee Hand", "B", {"answer_normalised": 1}),
  "right twice": ({"option_A": "Brain"}, "Brain Knee Hand", "A", {"repeated_answer": 1}),
  "right in two cases": ({"option_D": "brain"}, "Chest Brain Knee", "B", {"repeated_answer": 1}),
  "exact wins": ({"option_A": "brain", "gt_answer": "Brain"}, "Brain Knee Hand", "A", {"repeated_answer": 1}),
  "wrong twice": ({"option_D": "chest"}, "Chest Brain Knee chest", "B", {"repeated_distractor": 1}),
  "other key": ({"modality_type": ..., "modality": "X-Ray"}, "Chest Brain Knee Hand", "B", {"modality_key": 1}),
  "lettered": (LETTERED | {"gt_answer": "B. brain"}, "chest brain", "B", BARE),
  "lettered, gold is not": (LETTERED | {"gt_answer": "brain"}, "chest brain", "B", BARE),
  "lettered, gold is a letter": (LETTERED | {"gt_answer": "(B) Brain"}, "chest brain", "B", BARE | READ),
  "a letter and a gap": ({"option_A": None, "gt_answer": "B"}, "Brain Knee Hand", "A", GAP | READ),
  "names": (SPECIES | {"gt_answer": "B.coli"}, "A.cereus B.coli", "B", {"option_letters_kept": 1}),
  "names that the answer lacks": (SPECIES | {"gt_answer": "coli"}, "cereus coli", "B", {"option_letters": 1}),
  "no data set": ({"dataset": ...}, "Chest Brain Knee Hand", "B", {"dataset_from_file": 1}),
}  # fmt: skip


def test_repairs(layout):
  for case, (changes, options, answer, expected) in REPAIRS.items():
    layout.write(record(**changes))
    (example,), summary = omnimedvqa.read(layout.root)
    assert (example.options, example.answer) == (tuple(options.split()), answer), case
    assert (example.modality, example.dataset, summary.rules) == ("X-Ray", "Set A", expected), case


def test_drops_are_counted_by_rule(layout):
  layout.image("Images/other.png")
  layout.write(
    record(0),
    record(0),  # the same again
    record(1, gt_answer="Liver"),
    record(2, option_A="brain", option_C=..., option_D=...),
    record(0, question="Another question under the same id?"),
    record(0, question="And a third?"),
    record(0, question_id="other", image_path="Images/other.png"),  # the same about another image
  )
  examples, summary = omnimedvqa.read(layout.root)
  names = ("Set A_0000", "Set A_0000#2", "Set A_0000#3", "other")
  assert [example.id for example in examples] == [f"Set A/{name}" for name in names]
  expected = {"duplicate_record": 1, "answer_unmatched": 1, "too_few_options": 1, "repeated_answer": 1}
  assert summary.rules == expected | {"duplicate_id": 2}
  assert (summary.records, summary.kept, summary.dropped) == (7, 4, 3)
  text = summary.text()
  assert "4 of 7 records kept" in text and "answer_unmatched 1" in text and "record 2 'Set A_0001'" in text


def bad_records(layout, tmp_path):
  """Fields that stop a strict read, by the rule that they meet."""
  outside = tmp_path / "secret.png"
  Image.new("L", (8, 8)).save(outside)
  (layout.root / "Images" / "link.png").symlink_to(outside)
  (layout.root / "Images" / "folder").symlink_to(tmp_path)
  (layout.root / "Images" / "loop.png").symlink_to("loop.png")
  unsafe = ["../secret.png", str(outside), "Images/link.png", "Images/folder/secret.png", "Images/a\0.png", "."]
  unsafe.append("Images/../" + RECORD["image_path"])  # back inside, and still refused
  missing = ["Images/absent.png", "Images", "Images/" + "x" * 300 + ".png", "Images/loop.png"]
  malformed = [{"question": ...}, {"question": 3}, {"gt_answer": None}, {"option_B": ["Brain"]}, {"question_id": ...}]
  malformed += [{"modality_type": ...}, {"image_path": " "}, {"question": "half \ud800 a pair"}]
  return {
    "unsafe_path": [record(1, image_path=path) for path in unsafe],
    "missing_image": [record(1, image_path=path) for path in missing],
    "malformed_record": [*(record(1, **changes) for changes in malformed), "text", None],
    "question_too_long": [record(1, question="a" * 10_000)],
  }


def test_a_bad_record_stops_a_strict_read_and_is_counted_in_a_lenient_one(layout, tmp_path):
  bad = bad_records(layout, tmp_path)
  for rule, entries in bad.items():
    for entry in entries:
      layout.write(record(0), entry)
      with pytest.raises(ValueError, match=rf"Set A\.json, record 1.*1 {rule}"):
        omnimedvqa.read(layout.root)
  layout.write(record(0), *(entry for entries in bad.values() for entry in entries))
  examples, summary = omnimedvqa.read(layout.root, lenient=True)
  assert [example.id for example in examples] == ["Set A/Set A_0000"]
  assert summary.rules == {rule: len(entries) for rule, entries in bad.items()}


def test_broken_files_are_named(layout):
  layout.write(record(0))
  broken = layout.root / "QA_information" / "Open-access" / "Broken.json"
  for content in (b"{", b'{"a": 1}', b"\xff\xfe\x00", b"", b"[" * 100_000, b"1" * 5000, b"[" + b"9" * 5000 + b"]"):
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=r"Broken\.json: .*malformed_file"):
      omnimedvqa.read(layout.root)
    examples, summary = omnimedvqa.read(layout.root, lenient=True)
    assert len(examples) == 1 and summary.rules == {"malformed_file": 1}, content[:20]


def test_links_inside_the_root_are_followed(layout):
  layout.image("Images/store/a.png")
  (layout.root / "Images" / "alias.png").symlink_to("store/a.png")
  layout.write(record(image_path="Images/alias.png"))
  (example,), _ = omnimedvqa.read(layout.root)
  assert example.images == (os.path.realpath(layout.root / "Images" / "store" / "a.png"),)


def test_text_without_images_can_be_read(layout):
  path = layout.write(record(image_path="Images/not here.png"))
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # the byte order mark is no part of the text
  examples, summary = omnimedvqa.read(layout.root, check_images=False)
  assert len(examples) == 1 and summary.rules == {}
  layout.write(record(image_path="../not here.png"))
  with pytest.raises(ValueError, match="unsafe_path"):
    omnimedvqa.read(layout.root, check_images=False)


def test_the_real_sample(shared_directory):
  examples, summary = omnimedvqa.read(shared_directory / "omnimedvqa-mini")
  assert (summary.files, summary.records, summary.kept) == (8, 67, 67)
  assert summary.rules == {"modality_spelling": 49}
  assert {example.modality for example in examples} == set(cleaning.MODALITIES.values())
  assert sorted({len(example.options) for example in examples}) == [2, 4]
  assert len({example.images for example in examples}) == 34
  for example in examples:
    images.load_image(example.images[0])
