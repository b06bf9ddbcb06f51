"""The entry point: an untrained phantom-sized model on a drawn data set, from flags to files."""

import json

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from experiments import phantom_folder
from experiments.phantom_recipes import SIZES
from kepo_jax.models.qwen3_vl import conversion, model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A phantom student with random weights."""
  source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("model")
  phantom_folder.write_folder(source, phantom_folder.model_config(phantom_folder.make_tokenizer(), **SIZES["student"]))
  config = Qwen3VLConfig.from_directory(source)
  rng = np.random.default_rng(0)  # on the host: `init_params` would be compiled for this test alone
  params = jax.tree.map(
    lambda leaf: 0.02 * rng.normal(size=leaf.shape).astype(leaf.dtype), model.abstract_params(config)
  )
  conversion.save_pretrained(folder, config, params, source=source)
  return folder


def write_split(root, count):
  """Questions of two modalities in OmniMedVQA's layout."""
  rng = np.random.default_rng(count)
  records = []
  for n in range(count):
    path = root / "Images" / "Drawn" / f"{n}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    records.append(
      {
        "dataset": "Drawn",
        "question_id": f"Drawn_{n}",
        "question_type": "Modality Recognition",
        "question": "What modality?",
        "gt_answer": "MRI",
        "image_path": f"Images/Drawn/{n}.png",
        "option_A": "CT",
        "option_B": "MRI",
        "modality_type": ("X-Ray", "MR (Mag-netic Resonance Imaging)")[n % 2],
      }
    )
  (root / "QA_information" / "Open-access").mkdir(parents=True)
  (root / "QA_information" / "Open-access" / "Drawn.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  write_split(root / "test", 5)
  write_split(root / "validation", 2)
  return root


@pytest.fixture
def evaluate_medvqa(program):
  return program("experiments.evaluate_medvqa")


def test_from_flags_to_files(evaluate_medvqa, checkpoint, data, tmp_path, capsys):
  chosen = {"model": str(checkpoint), "data": str(data), "output": str(tmp_path / "out"), "batch": 4}
  with flagsaver.flagsaver(**chosen, max_new_tokens=3):
    evaluate_medvqa.main([])
    printed = capsys.readouterr().out
    assert "5 of 5 records kept" in printed and "templates brief" in printed and "X-Ray" in printed
    with pytest.raises(ValueError, match="holds an evaluation already; choose another --output"):
      evaluate_medvqa.main([])
  outputs = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
  assert sorted(output["id"] for output in outputs) == [f"Drawn/Drawn_{n}" for n in range(5)]
  assert all(output["tokens"] <= 3 for output in outputs)
  result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  assert result["overall"]["count"] == 5 and result["modalities"]["MRI"]["count"] == 2
  assert result["summary"]["kept"] == 5 and result["max_new_tokens"] == 3


def test_wrong_flags_are_named(evaluate_medvqa, checkpoint, data):
  with flagsaver.flagsaver(model=str(checkpoint), data=str(data), split="train"):
    with pytest.raises(ValueError, match=r"--split=train: .* has \['test', 'validation'\]"):
      evaluate_medvqa.main([])
  with flagsaver.flagsaver(model=str(checkpoint), data=str(data), templates="short"):
    with pytest.raises(ValueError, match=r"--templates=short is unknown; use one of \['brief', 'standard'\]"):
      evaluate_medvqa.main([])


def test_the_limit_keeps_as_many_of_each_modality(evaluate_medvqa, data):
  with flagsaver.flagsaver(data=str(data), limit=1):
    examples, summary = evaluate_medvqa.questions()
  assert sorted(example.modality for example in examples) == ["MRI", "X-Ray"] and summary.kept == 5
