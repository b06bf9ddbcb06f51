"""Med-R1's and MedVLM-R1's records, drawn here, and the real sample where it is at hand."""

import collections
import json
import os
import pathlib

import pytest
from PIL import Image

from kepo_jax.data import records
from kepo_jax.data.readers import split_files
from tests.data.cases import MEDR1, MEDVLM, write_records


@pytest.fixture
def root(tmp_path):
  """A folder with the two images that the records name."""
  for name in (MEDR1["image"], MEDVLM["image"][0]):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(tmp_path / name)
  return tmp_path


def test_med_r1(root):
  file = write_records(root / "Splits" / "modality" / "test" / "CT(Computed Tomography)_test.json", MEDR1)
  (example,), summary = split_files.read(file)
  assert (example.id, example.dataset) == ("CT(Computed Tomography)_test/0", "Chest CT")
  assert example.question == "Which organ is shown?" and example.answer == "B" and example.modality == "CT"
  assert example.options == ("Chest", "Brain (left)", "No, it's none")
  assert example.images == (os.path.realpath(root / MEDR1["image"]),)
  assert dict(summary.rules) == {"modality_spelling": 1}
  assert (summary.records, summary.kept, summary.format) == (1, 1, "split files")


def test_medvlm_r1(root):
  (example,), summary = split_files.read(write_records(root / "MRI_CT_XRAY_300each_dataset.json", MEDVLM))
  assert (example.id, example.modality, example.dataset) == ("MRI_CT_XRAY_300each_dataset/0", "X-Ray", "OmniMedVQA")
  assert example.options == ("Chest", "Brain") and example.answer_text == "Brain"
  assert example.images == (os.path.realpath(root / "images/a.png"),) and not summary.rules


def test_what_a_name_tells():
  for stem, modality, kind in [
    ("OCT (Optical Coherence Tomography_test", "OCT (Optical Coherence Tomography", ""),
    ("Fundus_test_300", "Fundus", ""),
    ("X-Ray_test", "X-Ray", ""),
    ("modality_MRI_train_600", "MRI", ""),
    ("Lesion Grading_train", "", "Lesion Grading"),
    ("MRI_CT_XRAY_300each_dataset", "", ""),
    ("ACRIMA_filtered_test", "", ""),
    ("unknown_train", "", ""),
  ]:
    assert split_files.described(stem) == (modality, kind), stem


# Changed fields of MEDVLM -> options and answer of the example, and the rules that applied; `...` takes a field away.
REPAIRS = {
  "bare letter": ({"answer": ...}, "Chest Brain", "B", {}),
  "tags": ({"solution": "<answer>A</answer>", "answer": "chest."}, "Chest Brain", "A", {}),
  "text": ({"solution": "brain."}, "Chest Brain", "B", {"answer_normalised": 1, "solution_text": 1}),
  "text in tags": ({"solution": "<answer> Brain </answer>"}, "Chest Brain", "B", {"solution_text": 1}),
  "answer is the letter": ({"answer": "b"}, "Chest Brain", "B", {}),
  "no list": ({"options": ..., "question": ...}, "Chest Brain", "B", {}),
  "other list": ({"options": ["Foot", "Brain"]}, "Foot Brain", "B", {"options_listed": 1}),
  "no options in the text": ({"problem": "Which organ?"}, "Chest Brain", "B", {"options_listed": 1}),
  "empty option": (
    {"problem": "Q?\nA) \nB) Brain\nC) Knee", "options": ...}, "Brain Knee", "A", {"null_option": 1, "option_gap": 1},
  ),
  "two rows": ({"problem": "Of A)x, B)y which? A)Chest, B)Brain"}, "Chest Brain", "B", {"options_ambiguous": 1}),
  "no modality": ({"subset": ...}, "Chest Brain", "B", {"modality_unknown": 1}),
  "option of one letter": ({"problem": "Q?\nA) X\nB) Y", "options": ..., "answer": ..., "solution": "Y"}, "X Y", "B",
                           {"solution_text": 1}),
  "lettered options": ({"options": ["A. Chest", "B. Brain"], "answer": "B. Brain"}, "Chest Brain", "B",
                       {"option_letters": 1}),
  "lettered options of another text": ({"options": ["(A) Foot", "(B) Brain"]}, "Foot Brain", "B",
                                       {"option_letters": 1, "options_listed": 1}),
  "a first word of one letter": ({"options": ["A. Chest", "C. Brain"], "answer": "C. Brain", "problem": "Which?"},
                                 ("A. Chest", "C. Brain"), "B", {"options_listed": 1}),
  "options by letter": ({"problem": "Which?", "options": {"b": "Brain", "a": "Chest"}}, "Chest Brain", "B",
                        {"options_listed": 1}),
  "a list is enough": ({"problem": "Which?", "question": ...}, "Chest Brain", "B", {"options_listed": 1}),
  "padded": ({"options": ["A. Chest", "B. Brain", "", None]}, "Chest Brain", "B",
             {"null_option": 1, "option_letters": 1}),
  "names": ({"problem": "A) A. cereus\nB) B. baumannii", "options": ["A. cereus", "B. baumannii"],
             "answer": "B. baumannii"}, ("A. cereus", "B. baumannii"), "B", {}),
  "instruction": ({"problem": "Q?\nA. Chest\nB. Brain\nAnswer with the option's letter directly."},
                  "Chest Brain", "B", {"text_after_options": 1}),
  **{f"solution {text}": ({"solution": text}, "Chest Brain", "B", {"solution_letter": 1})
     for text in ("b", "(B)", "B.", "B) Brain", r"\boxed{b}", "<answer>B) brain</answer>", "Option B", "[B]", "**B**",
                  "Answer: B", "The answer is B", "B,", "B - Brain", "Brain (B)", r"$\boxed{B}$", r"\boxed{\mathrm{B}}",
                  r"<answer>\boxed{B}</answer>", "<think>x</think>B", "Ｂ", '"B"')},
}  # fmt: skip


def changed(changes):
  return {key: value for key, value in (MEDVLM | changes).items() if value is not ...}


def test_repairs(root):
  for case, (changes, options, answer, expected) in REPAIRS.items():
    (example,), summary = split_files.read(write_records(root / "file.json", changed(changes)))
    options = tuple(options.split()) if isinstance(options, str) else options
    assert (example.options, example.answer) == (options, answer), case
    assert dict(summary.rules) == expected, case


PLACEHOLDERS = (
  "<img>", "<|image|>", "<|image_1|>", "<|vision_start|><|image_pad|><|vision_end|>", "<image/>", "< image >",
  "<ImageHere>", "<image_placeholder>", "[IMG]", "{image}", "<start_of_image>", "<image></image>", "<image>1</image>",
  "<image_0>", "<IMG_1>",
)  # fmt: skip


def test_pictures_as_options_and_words_that_stay(root):
  paths = MEDVLM["image"] + [MEDR1["image"]]
  for first, second in (("<image>", "<image>"), ("<image 1>", "<image 2>")):
    record = changed({"problem": f"Which?\nA) {first}\nB) {second}", "image": paths, "options": ..., "answer": ...})
    (example,), summary = split_files.read(write_records(root / "file.json", record))
    assert example.options == (records.IMAGE,) * 2 and example.answer == "B" and len(example.images) == 2
    assert dict(summary.rules) == {"image_placed": 1}
  record = changed({"problem": "<image> Is <Picture 1> odd, or [image]?\nA) Chest\nB) Brain", "options": ...})
  (example,), summary = split_files.read(write_records(root / "file.json", record))
  assert example.question == "Is <Picture 1> odd, or [image]?"
  assert dict(summary.rules) == {"image_placed": 1, "image_word": 1}


def test_pictures_stand_where_the_text_says(root):
  def read(problem, images=1, options=...):
    paths = MEDVLM["image"] + [MEDR1["image"]]
    record = changed({"problem": problem, "image": paths[:images], "question": ..., "options": options})
    (example,), summary = split_files.read(write_records(root / "file.json", record), lenient=True)
    return example.question, tuple(path.rpartition("/")[2] for path in example.images), summary.rules["image_placed"]

  tail = "\nA) Chest\nB) Brain"
  first, second = (pathlib.PurePath(path).name for path in (MEDVLM["image"][0], MEDR1["image"]))
  assert read("Which organ?" + tail) == ("Which organ?", (first,), 0)
  assert read("<image>\nWhich organ?" + tail) == ("Which organ?", (first,), 1)
  assert read("Of <image> which?" + tail) == (f"Of {records.IMAGE} which?", (first,), 1)
  both = f"{records.IMAGE} or {records.IMAGE}?"
  assert read("<image> or <image>?" + tail, images=2) == (both, (first, second), 1)
  assert read("<image 2> or <image_1>?" + tail, images=2) == (both, (second, first), 1)
  again = f"{records.IMAGE}, {records.IMAGE}; in image 1?"
  assert read("<image 1>, <image 2>; in <image 1>?" + tail, images=2) == (again, (first, second), 1)
  for mark in PLACEHOLDERS:
    assert read(f"Of {mark} which?" + tail) == (f"Of {records.IMAGE} which?", (first,), 1), mark
  assert read("<image_1> or <image_0>?" + tail, images=2) == (both, (second, first), 1)
  assert read("\ufffcOf <|image_\ufffcpad|>?" + tail) == (f"Of {records.IMAGE}?", (first,), 1)  # a sign that PDFs leave
  for problem, images in (("<image> or <image>?", 1), ("<image>?", 2), ("<image 3>?", 1)):
    with pytest.raises(ValueError, match="image_unplaced"):
      read(problem + tail, images)


BAD = {
  "answer_contradicted": [{"answer": "Chest"}, {"answer": "Liver"}],
  "answer_unmatched": [{"solution": "AB"}, {"solution": "A or B"},
                       {"solution": "C"}, {"solution": "Liver"}, {"solution": "<answer> </answer>"}],
  "options_not_found": [{"problem": "Which?", "options": ...}],
  "options_unclear": [
    {"problem": "Q? A) 5 cm (grade B) C) x B) 3", "options": ...}, {"problem": "Q?\nA) x\nC) y\nB) z", "options": ...},
    {"problem": "Q?\nA) x\n(a) y\n(b) z\nB) v", "options": ...}, {"problem": "Q?\nA) x\nB) y C) z", "options": ...},
    {"problem": "Look.\nA) x\nB) y\n\nWhich is it?", "options": ...},
  ],
  "too_many_options": [
    {"problem": "Q?" + "".join(f"\n{c}) {c}1" for c in "ABCDEFGHIJK"), "options": ..., "answer": ...},
  ],
  "malformed_record": [
    {"image": ...}, {"image": []}, {"image": [None]}, {"problem": ["x"]}, {"solution": None}, {"options": "AB"},
    {"options": [1, 2]}, {"problem": "A)x, B)Brain", "options": ..., "question": ...}, {"subset": 7},
    {"options": {"A": "x", "C": "y"}}, {"options": {"A": 1, "B": 2}}, {"problem": "x" * 20_000},
  ],
  "unsafe_path": [{"image": ["images/a.png", "images/../../a.png"]}, {"image": ""}, {"image": "a\ud800.png"}],
  "missing_image": [{"image": "images/b.png"}],
}  # fmt: skip


def test_bad_records(root):
  for rule, changes in ((rule, changes) for rule, entries in BAD.items() for changes in entries):
    file = write_records(root / "file.json", MEDVLM, changed(changes))
    examples, summary = split_files.read(file, lenient=True)
    assert [example.id for example in examples] == ["file/0"], changes
    assert summary.rules[rule] == summary.dropped == 1, changes
    assert summary.first[rule].startswith(f"{file}, record 1: ")


def test_odd_values_and_repeated_keys(root):
  text = json.dumps([MEDVLM, MEDVLM | {"extra": [1, {"a": None}]}])[:-1]
  text += ', {"problem": "Q?\\nA) x\\nB) y", "problem": "Q?\\nA) y\\nB) x", "solution": "A"}, [], NaN, -Infinity]'
  (root / "file.json").write_text(text)
  with pytest.raises(ValueError, match="record 2: the key 'problem' stands there twice"):
    split_files.read(root / "file.json")
  found = split_files.read(root / "file.json", lenient=True)[1].rules
  assert found == {"duplicate_record": 1, "malformed_record": 4}


def test_endings_and_lines(root):
  """Endings in capitals, one record per line, and what else lies there."""
  write_records(root / "A.JSON", MEDVLM)
  lines = [json.dumps(MEDVLM | {"question": f"Q{i}", "problem": f"Q{i}\nA) Chest\nB) Brain"}) for i in range(3)]
  (root / "b").mkdir()
  (root / "b" / "c.JsonL").write_text(f"\ufeff{lines[0]}\n\n \r\n{lines[1]}\r\n[\n3\n{lines[2]}", encoding="utf-8")
  for name in (".hidden", "b/notes.csv", *(f"{number:02}.txt" for number in range(12))):
    (root / name).write_text("")
  with pytest.raises(ValueError, match=r"c\.JsonL, record 2: line 5 is not readable as JSON"):
    split_files.read(root)
  examples, summary = split_files.read(root, lenient=True)
  assert [example.id for example in examples] == ["A/0", "c/0", "c/1", "c/4"]
  assert dict(summary.rules) == {"malformed_record": 2, "file_skipped": 13} and summary.files == 2
  assert summary.first["file_skipped"].endswith("07.txt and 5 more")


def test_the_folder_tells_the_modality_that_record_and_file_do_not(root):
  for name, modality in (
    ("modality_MRI_train_600/records.json", "MRI"), ("set_MRI_600/train/a.json", "MRI"),
    ("set_MRI_600/data/a.json", "MRI"), ("MRI_600/CT_test.json", "CT"),
  ):  # fmt: skip
    (example,), summary = split_files.read(write_records(root / name, MEDVLM | {"subset": ""}), image_root=root)
    assert example.modality == modality and not summary.rules, name
    (example,), _ = split_files.read(write_records(root / name, MEDVLM), image_root=root)
    assert example.modality == "X-Ray", name


def test_files_that_are_links_or_no_files(root, tmp_path_factory):
  outside = write_records(tmp_path_factory.mktemp("outside") / "secret.json", MEDVLM)
  folder = root / "splits"
  write_records(folder / "a.json", MEDVLM)
  (folder / "b.json").symlink_to(outside)
  os.mkfifo(folder / "c.json")  # opening it would wait for ever
  (folder / "d.json").mkdir()
  (folder / "e.json").symlink_to("e.json")
  (folder / "f.json").write_text("[{]}")
  examples, summary = split_files.read(folder, lenient=True)
  assert len(examples) == 1 and dict(summary.rules) == {"malformed_file": 5}
  with pytest.raises(ValueError, match=r"b\.json: is a symbolic link out of"):
    split_files.read(folder)


def test_the_real_sample_of_med_r1(shared_directory):
  """Every record is an example with the letter of its record; the same cut as the sample's own."""
  number, rules = 0, collections.Counter()
  for file in sorted((shared_directory / "omnimedvqa-qa-sample" / "med-r1").rglob("*.json")):
    examples, summary = split_files.read(file, check_images=False)
    rules += summary.rules
    for number, (example, entry) in enumerate(zip(examples, json.loads(file.read_text()), strict=True), number + 1):
      assert entry["solution"] == f"<answer> {example.answer} </answer>"
      row = ", ".join(f"{'ABCDEFGHIJ'[i]}){text}" for i, text in enumerate(example.options))
      assert f"{example.question} {row}" == entry["problem"]
  expected = {"repeated_distractor": 11, "class_spelling": 22, "nonsense_option": 2, "leaked_label": 8}
  del rules["modality_spelling"]
  assert number == 1090 and rules == expected | {"modality_unknown": 1}


def test_the_real_sample_of_medvlm_r1(shared_directory):
  file = shared_directory / "omnimedvqa-qa-sample" / "medvlm-r1" / "MRI_CT_XRAY_sample.json"
  examples, summary = split_files.read(file, check_images=False)
  stored = json.loads(file.read_text())
  assert summary.kept == summary.records == len(stored) == 210 and "options_listed" not in summary.rules
  for example, entry in zip(examples, stored, strict=True):
    assert (example.question, list(example.options)) == (entry["question"], entry["options"])
    assert example.answer == entry["solution"] and example.answer_text == entry["answer"]
