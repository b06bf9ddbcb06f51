import json

import pytest
from absl.testing import flagsaver

from tests.evaluation.scripted import json_lines, output


def written(folder, answers, samples=1, shown=1000, **settings):
  """An evaluation's folder; `answers` are right or wrong, one per completion."""
  folder.mkdir()
  records = [
    output(f"q{n // samples}", correct=bool(right), sample=n % samples, modality=("MRI", "CT", "OCT")[n // samples % 3],
           images=[f"{n // samples % shown:x}"])
    for n, right in enumerate(answers)
  ]  # fmt: skip
  (folder / "outputs.jsonl").write_text(json_lines(records))
  about = {"control": "none", "count": len(answers) // samples, "samples": samples}
  (folder / "about.json").write_text(json.dumps(about | settings))
  return str(folder)


def test_from_folders_to_files(compare_medvqa, tmp_path, capsys):
  # Of the 8 questions in each modality the second gains all in CT, and none elsewhere.
  first = written(tmp_path / "a", [0, 0, 1] * 8)
  written(tmp_path / "b", [0, 1, 1] * 8, control="blank")
  files = {"json": str(tmp_path / "out" / "found.json"), "markdown": str(tmp_path / "out" / "found.md")}
  with flagsaver.flagsaver(**files):
    compare_medvqa.main(["", first, str(tmp_path / "b" / "outputs.jsonl")])
  printed = capsys.readouterr().out
  # p = 2 / 2^8 = 0.0078, times three after Holm.
  (line,) = [line for line in printed.splitlines() if line.split()[:1] == ["CT"]]
  assert line.split() == ["CT", "8", "(8)", "0.0", "100.0", "+100.0", "[+100.0,", "+100.0]", "8", "0", "0.008", "0.023"]
  assert "differ in control none / blank" in printed
  found = json.loads((tmp_path / "out" / "found.json").read_text())
  assert found["modalities"]["CT"]["p_holm"] == 6 / 256 and found["train_modality"] == "MRI"
  assert found["in_domain"]["difference"] == 0 and found["out_of_domain"]["difference"] == 0.5
  assert "| CT | 8 (8) | 0.0 | 100.0 | +100.0 [" in (tmp_path / "out" / "found.md").read_text()


def test_the_training_modality_is_that_of_the_evaluation(compare_medvqa, tmp_path, capsys):
  first, second = (written(tmp_path / name, [0, 1, 1] * 4) for name in "ab")
  (tmp_path / "a" / "evaluation.json").write_text(json.dumps({"train_modality": "CT"}))
  with flagsaver.flagsaver(json=str(tmp_path / "found.json"), field="lenient_correct"):
    compare_medvqa.main(["", first, second])
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["train_modality"], found["field"]) == ("CT", "lenient_correct")
    with flagsaver.flagsaver(train_modality="OCT"):
      compare_medvqa.main(["", first, second])
  assert json.loads((tmp_path / "found.json").read_text())["out_of_domain"]["modalities"] == ["CT", "MRI"]
  assert "Holm" in capsys.readouterr().out
  several = written(tmp_path / "several", [0, 1] * 12, samples=2)
  compare_medvqa.main(["", several, second])
  assert "Holm" not in capsys.readouterr().out  # McNemar's test needs one answer to each question


def test_what_cannot_be_compared(compare_medvqa, tmp_path):
  first = written(tmp_path / "a", [0, 1])
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  with pytest.raises(ValueError, match="give two evaluations"):
    compare_medvqa.main(["", first])
  with pytest.raises(ValueError, match="metrics.jsonl:1 is no record of an evaluation"):
    compare_medvqa.main(["", first, str(tmp_path / "metrics.jsonl")])


def test_what_cannot_be_checked_is_said(compare_medvqa, tmp_path, capsys):
  first, second = written(tmp_path / "a", [0, 1, 1] * 2), written(tmp_path / "b", [1] * 6, shown=5, prompts_hash="x")
  (tmp_path / "a" / "about.json").unlink()
  compare_medvqa.main(["", first, second])
  printed = capsys.readouterr().out
  assert f"{first} has no about.json beside it" in printed and "1 questions have other image files in B" in printed
  third = written(tmp_path / "c", [1] * 6, prompts_hash="y")
  compare_medvqa.main(["", second, third])
  assert "asked in different words" in capsys.readouterr().out
