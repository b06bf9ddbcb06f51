"""The entry point: two folders of evaluations, from arguments to tables and files."""

import json

import pytest
from absl.testing import flagsaver


@pytest.fixture
def compare_medvqa(program):
  return program("experiments.compare_medvqa")


def written(folder, answers, samples=1, **settings):
  """An evaluation's folder; `answers` are right or wrong, one per completion."""
  folder.mkdir()
  records = [
    {"id": f"q{n // samples}", "sample": n % samples, "modality": ("MRI", "CT", "OCT")[n // samples % 3],
     "correct": bool(right), "lenient_correct": True}
    for n, right in enumerate(answers)
  ]  # fmt: skip
  (folder / "outputs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  (folder / "about.json").write_text(json.dumps({"control": "none"} | settings))
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
  assert line.split() == ["CT", "8", "0.0", "100.0", "+100.0", "[+100.0,", "+100.0]", "8", "0", "0.008", "0.023"]
  assert "corrected for the 3 modalities" in printed and "differ in control none / blank" in printed
  assert f"A: {first}" in printed
  found = json.loads((tmp_path / "out" / "found.json").read_text())
  assert found["modalities"]["CT"]["p_holm"] == 6 / 256 and found["train_modality"] == "MRI"
  assert found["in_domain"]["difference"] == 0 and found["out_of_domain"]["difference"] == 0.5
  markdown = (tmp_path / "out" / "found.md").read_text()
  assert "| CT | 8 | 0.0 | 100.0 | +100.0 [+100.0, +100.0] | 8 | 0 | 0.008 | 0.023 |" in markdown
  assert "| out of domain, mean | 16 | 50.0 | 100.0 | +50.0 [+50.0, +50.0] |  |  |  |  |" in markdown
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
  assert "McNemar's test needs one" in printed and "p (Holm)" not in printed and "+50.0" in printed


def test_what_cannot_be_compared(compare_medvqa, tmp_path):
  first, second = written(tmp_path / "a", [0, 1]), written(tmp_path / "b", [0, 1, 1])
  with pytest.raises(ValueError, match="give two evaluations"):
    compare_medvqa.main(["", first])
  with pytest.raises(ValueError, match=r"a \(first\) and .*b \(second\): .* 1 only in the second \(q2\)"):
    compare_medvqa.main(["", first, second])
  with pytest.raises(ValueError, match="outputs.jsonl does not exist"):
    compare_medvqa.main(["", first, str(tmp_path)])
