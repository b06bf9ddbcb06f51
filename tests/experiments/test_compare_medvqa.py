"""The entry point: two folders of evaluations, from arguments to tables and files."""

import json

import pytest
from absl.testing import flagsaver


@pytest.fixture
def compare_medvqa(program):
  return program("experiments.compare_medvqa")


def written(folder, answers, samples=1, shown=1000, **settings):
  """An evaluation's folder; `answers` are right or wrong, one per completion."""
  folder.mkdir()
  records = [
    {"id": f"q{n // samples}", "sample": n % samples, "modality": ("MRI", "CT", "OCT")[n // samples % 3],
     "images": [f"{n // samples % shown:x}"], "question_type": "", "dataset": "d", "question": "?",
     "options": ["x", "y"], "answer": "A", "completion": "", "parsed": None, "correct": bool(right), "lenient": None,
     "lenient_correct": True, "format": True, "tokens": 1, "truncated": False}
    for n, right in enumerate(answers)
  ]  # fmt: skip
  (folder / "outputs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  about = {"control": "none", "count": len(answers) // samples, "samples": samples}
  (folder / "about.json").write_text(json.dumps(about | settings))
  return str(folder)


def test_from_folders_to_files(compare_medvqa, tmp_path, capsys):
  # Of the 8 questions in each modality the second gains all in CT, and none elsewhere.
  first = written(tmp_path / "a", [0, 0, 1] * 8)
  second = written(tmp_path / "b", [0, 1, 1] * 8, control="blank")
  files = {"json": str(tmp_path / "out" / "found.json"), "markdown": str(tmp_path / "out" / "found.md")}
  with flagsaver.flagsaver(**files):
    compare_medvqa.main(["", first, str(tmp_path / "b" / "outputs.jsonl")])
  printed = capsys.readouterr().out
  # p = 2 / 2^8 = 0.0078, times three after Holm.
  (line,) = [line for line in printed.splitlines() if line.split()[:1] == ["CT"]]
  assert line.split() == ["CT", "8", "(8)", "0.0", "100.0", "+100.0", "[+100.0,", "+100.0]", "8", "0", "0.008", "0.023"]
  assert "corrected for the 3 modalities" in printed and "differ in control none / blank" in printed
  assert f"A: {first}" in printed and "fewer images" not in printed and "other image files" not in printed
  found = json.loads((tmp_path / "out" / "found.json").read_text())
  assert found["modalities"]["CT"]["p_holm"] == 6 / 256 and found["train_modality"] == "MRI"
  assert found["in_domain"]["difference"] == 0 and found["out_of_domain"]["difference"] == 0.5
  markdown = (tmp_path / "out" / "found.md").read_text()
  assert "| CT | 8 (8) | 0.0 | 100.0 | +100.0 [+100.0, +100.0] | 8 | 0 | 0.008 | 0.023 |" in markdown
  assert "| out of domain, mean | 16 (16) | 50.0 | 100.0 | +50.0 [+50.0, +50.0] |  |  |  |  |" in markdown
  with flagsaver.flagsaver(field="lenient_correct"):
    compare_medvqa.main(["", first, second])
  assert "lenient_correct" in capsys.readouterr().out


def test_the_training_modality_is_that_of_the_evaluation(compare_medvqa, tmp_path, capsys):
  first, second = (written(tmp_path / name, [0, 1, 1] * 4) for name in "ab")
  (tmp_path / "a" / "evaluation.json").write_text(json.dumps({"train_modality": "CT"}))
  with flagsaver.flagsaver(json=str(tmp_path / "found.json")):
    compare_medvqa.main(["", first, second])
    assert json.loads((tmp_path / "found.json").read_text())["train_modality"] == "CT"
    with flagsaver.flagsaver(train_modality="OCT"):
      compare_medvqa.main(["", first, second])
  assert json.loads((tmp_path / "found.json").read_text())["out_of_domain"]["modalities"] == ["CT", "MRI"]
  assert "differ in" not in capsys.readouterr().out


def test_several_completions_have_no_p_values(compare_medvqa, tmp_path, capsys):
  first, second = written(tmp_path / "a", [0, 1] * 6, samples=2), written(tmp_path / "b", [1] * 6)
  compare_medvqa.main(["", first, second])
  printed = capsys.readouterr().out
  assert "McNemar's test needs one" in printed and "Holm" not in printed and "+50.0" in printed


def test_what_cannot_be_compared(compare_medvqa, tmp_path):
  first, second = written(tmp_path / "a", [0, 1]), written(tmp_path / "b", [0, 1, 1])
  with pytest.raises(ValueError, match="give two evaluations"):
    compare_medvqa.main(["", first])
  with pytest.raises(ValueError, match=r"a \(first\) and .*b \(second\): .* 1 only in the second \(q2\)"):
    compare_medvqa.main(["", first, second])
  with pytest.raises(ValueError, match="outputs.jsonl does not exist"):
    compare_medvqa.main(["", first, str(tmp_path)])


def damaged(path, change):
  path.write_bytes(change(path.read_bytes()))


def lines(change):
  """A change of the records of outputs.jsonl."""
  return lambda data: b"".join(
    json.dumps(record).encode() + b"\n" for record in change([*map(json.loads, data.splitlines())])
  )


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("outputs.jsonl", lines(lambda found: found[:4]), r"b/outputs.jsonl holds 4 of 6 completions; --resume finishes"),
    ("outputs.jsonl", lambda data: data[:-5], r"last line of .*b/outputs.jsonl is cut short; --resume finishes"),
    ("outputs.jsonl", lambda data: b"", r"b/outputs.jsonl holds no record"),
    ("outputs.jsonl", lines(lambda found: [*found, found[0]]), r"b/outputs.jsonl holds a completion twice"),
    ("outputs.jsonl", lines(lambda found: [*found, found[0] | {"id": "q9"}]), r"holds 7 completions and .* for 6"),
    ("outputs.jsonl", lines(lambda found: [{"step": 1, "loss": 0.0}]), r"b/outputs.jsonl:1 is no record of .* no id, "),
    ("outputs.jsonl", lines(lambda found: [[1, 2]]), r"b/outputs.jsonl:1 is no record .* no JSON object"),
    ("outputs.jsonl", lines(lambda found: [*found[:5], None]), r"b/outputs.jsonl:6 is no record .* no JSON object"),
    ("outputs.jsonl", lines(lambda found: [found[0] | {"correct": "yes"}]), r"outputs.jsonl:1 .*: correct is 'yes'"),
    ("outputs.jsonl", lines(lambda found: [found[0] | {"id": ["q0"]}]), r"""outputs.jsonl:1 .*: id is "\['q0'\]"""),
    ("outputs.jsonl", lines(lambda found: [found[0] | {"images": [1]}]), r"outputs.jsonl:1 .*no lists of texts"),
    ("outputs.jsonl", lines(lambda found: [found[0] | {"options": []}]), r"outputs.jsonl:1 .*no lists of texts"),
    ("outputs.jsonl", lambda data: b"\x89PNG\r\n\x1a\n\xff\n", r"b/outputs.jsonl:1 is not JSON"),
    ("outputs.jsonl", lambda data: b"[" * 100_000 + b"\n", r"b/outputs.jsonl:1 is not JSON"),
    ("about.json", lambda data: b"[]", r"b/about.json is no file of an evaluation: it holds no JSON object"),
    ("about.json", lambda data: data[:10], r"b/about.json is not JSON"),
    ("about.json", lambda data: b"\xff\xfe\x00", r"b/about.json is not JSON"),
    ("about.json", lambda data: b'{"step": 3}', r"b/about.json is not that of an .*: count and samples are None and"),
    ("about.json", lambda data: b'{"count": "6", "samples": 1}', r"b/about.json .* are '6' and 1"),
    ("evaluation.json", lambda data: b"{", r"b/evaluation.json is not JSON"),
    ("evaluation.json", lambda data: b"3", r"b/evaluation.json is no file of an evaluation"),
    ("evaluation.json", lambda data: b'{"train_modality": ["CT"]}', r"b/evaluation.json .*train_modality is no text"),
  ],
)
def test_what_is_no_finished_evaluation_is_named(compare_medvqa, tmp_path, name, change, message):
  first, second = written(tmp_path / "a", [0, 1] * 3), written(tmp_path / "b", [1] * 6)
  (tmp_path / "b" / "evaluation.json").write_text("{}")
  damaged(tmp_path / "b" / name, change)
  for pair in ([first, second], [second, first]):
    with pytest.raises(ValueError, match=message):
      compare_medvqa.main(["", *pair])


def test_files_of_other_kinds_are_named(compare_medvqa, tmp_path):
  first = written(tmp_path / "a", [0, 1])
  for name, content in (("evaluation.json", '{\n  "overall": 1\n}\n'), ("metrics.jsonl", '{"step": 1}\n')):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}:1 is n"):
      compare_medvqa.main(["", first, str(tmp_path / name)])


def test_what_cannot_be_checked_is_said(compare_medvqa, tmp_path, capsys):
  first, second = written(tmp_path / "a", [0, 1, 1] * 2), written(tmp_path / "b", [1] * 6, shown=5, prompts_hash="x")
  (tmp_path / "a" / "about.json").unlink()
  compare_medvqa.main(["", first, second])
  printed = capsys.readouterr().out
  assert f"{first} has no about.json beside it: whether it is whole is not known" in printed
  assert "1 questions have other image files in B" in printed and "different words" not in printed
  third = written(tmp_path / "c", [1] * 6, prompts_hash="y")
  compare_medvqa.main(["", second, third])
  assert "asked in different words" in capsys.readouterr().out


def test_shared_images_widen_the_interval(compare_medvqa, tmp_path, capsys):
  # Sixteen questions of each modality; those about one of four pictures are all answered alike.
  answers = [n // 3 % 4 < 2 for n in range(48)]
  found = {}
  for shown in (1000, 12):
    first = written(tmp_path / f"a{shown}", [0] * 48, shown=shown)
    second = written(tmp_path / f"b{shown}", answers, shown=shown)
    with flagsaver.flagsaver(json=str(tmp_path / "found.json")):
      compare_medvqa.main(["", first, second])
    found[shown] = json.loads((tmp_path / "found.json").read_text())["out_of_domain"]
    assert ("fewer images than questions" in capsys.readouterr().out) == (shown == 12)
  assert (found[12]["count"], found[12]["images"]) == (32, 8) and found[1000]["images"] == 32
  width = {shown: entry["high"] - entry["low"] for shown, entry in found.items()}
  # The variance of a mean of 4 independent figures is four times that of 16.
  assert width[12] == pytest.approx(2 * width[1000], rel=0.1)
