"""The entry point: an untrained phantom-sized model on a drawn data set, from flags to files."""

import json
import pathlib

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from experiments import phantom_folder
from experiments.configs import grpo
from experiments.phantom_recipes import SIZES
from kepo_jax.data import splits, tokenization
from kepo_jax.models.qwen3_vl import conversion, model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig

PHANTOM = pathlib.Path(phantom_folder.__file__).parent / "assets" / "phantom"


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
    assert "5 of 5 questions: the folder test" in printed
    with pytest.raises(ValueError, match="holds an evaluation already; choose another --output"):
      evaluate_medvqa.main([])
  outputs = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
  assert sorted(output["id"] for output in outputs) == [f"Drawn/Drawn_{n}" for n in range(5)]
  assert all(output["tokens"] <= 3 for output in outputs)
  result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  assert result["overall"]["count"] == 5 and result["modalities"]["MRI"]["count"] == 2
  assert result["summary"]["kept"] == 5 and result["max_new_tokens"] == 3
  with flagsaver.flagsaver(**chosen | {"output": str(tmp_path / "cut")}, max_new_tokens=3, fsdp=2, tensor=2):
    evaluate_medvqa.main([])
  shared = json.loads((tmp_path / "cut" / "evaluation.json").read_text())
  assert (result["mesh"], shared["mesh"]) == (
    {"data": 8, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2},
  )  # fmt: skip
  assert (tmp_path / "cut" / "outputs.jsonl").read_text() == (tmp_path / "out" / "outputs.jsonl").read_text()


def test_answers_may_be_as_long_as_in_training(evaluate_medvqa):
  declared = {path.name: tokenization.declared_templates(path) for path in PHANTOM.iterdir() if path.is_dir()}
  assert declared and {evaluate_medvqa.BUDGETS[family] for family in declared.values()} == {
    grpo.get_config().eval.max_new_tokens
  }
  assert evaluate_medvqa.BUDGETS == {"brief": 24, "standard": 1024}


def test_weights_are_shared_over_fsdp(evaluate_medvqa, checkpoint, data, monkeypatch):
  layouts = []

  def load(*_, layout):
    layouts.append(layout)
    raise ValueError("stop here")

  monkeypatch.setattr(conversion, "load_pretrained", load)
  for shared in (1, 4):
    with flagsaver.flagsaver(model=str(checkpoint), data=str(data), fsdp=shared):
      with pytest.raises(ValueError, match="stop here"):
        evaluate_medvqa.main([])
  assert layouts == ["decode", "train"]


def test_a_single_folder_is_cut_as_in_training(evaluate_medvqa, data):
  root = str(data / "test")
  config = grpo.get_config().data
  wanted = {"train_items": 1, "validation_items": 0, "test_items": 1}
  config.update({"directory": root, **wanted})
  trained = splits.load(config)
  with flagsaver.flagsaver(data=root, **wanted):
    examples, _, how = evaluate_medvqa.questions()
    assert examples == trained["test"] and not {e.id for e in examples} & {e.id for e in trained["train"]}
    assert how.startswith("2 of 5 questions: the test part") and "--test_items=1 --split_seed=0" in how
    with flagsaver.flagsaver(split="train"):
      assert evaluate_medvqa.questions()[0] == trained["train"]
    with flagsaver.flagsaver(split="all", limit=2):
      examples, _, how = evaluate_medvqa.questions()
      assert len(examples) == 4 and "questions for training included, at most 2 per modality" in how
  with flagsaver.flagsaver(data=root, split="all"):
    assert len(evaluate_medvqa.questions()[0]) == 5


def test_the_defaults_cut_as_the_config_does(evaluate_medvqa):
  config = grpo.get_config().data
  names = ("train_modality", "train_items", "validation_items", "test_items", "split_seed")
  assert {name: flags.FLAGS[name].default for name in names} == {name: config[name] for name in names}
  assert flags.FLAGS["split"].default == "test"


def test_a_folder_too_small_for_the_cut_names_the_way_out(evaluate_medvqa, data):
  with flagsaver.flagsaver(data=str(data / "test")):
    with pytest.raises(ValueError, match=r"--split=test: .*MRI has 2 questions, too few .*--split=all asks every"):
      evaluate_medvqa.questions()
  with flagsaver.flagsaver(data=str(data / "test"), train_modality="CT"):
    with pytest.raises(ValueError, match=r"no question of modality 'CT'.*--split=all"):
      evaluate_medvqa.questions()


def test_wrong_flags_are_named(evaluate_medvqa, checkpoint, data):
  with flagsaver.flagsaver(model=str(checkpoint), data=str(data), split="train"):
    with pytest.raises(ValueError, match=r"--split=train: .* has \['test', 'validation'\]"):
      evaluate_medvqa.main([])
  with flagsaver.flagsaver(model=str(checkpoint), data=str(data), split="all"):
    with pytest.raises(ValueError, match=r"--split=all: .* has \['test', 'validation'\]; choose one"):
      evaluate_medvqa.main([])
  with flagsaver.flagsaver(model=str(checkpoint), data=str(data), tensor=3):
    with pytest.raises(ValueError, match="--fsdp=1 x --tensor=3 does not divide 8 devices"):
      evaluate_medvqa.main([])
  with flagsaver.flagsaver(model=str(checkpoint), data=str(data), templates="short"):
    with pytest.raises(ValueError, match=r"--templates=short is unknown; use one of \['brief', 'standard'\]"):
      evaluate_medvqa.main([])


def test_the_limit_keeps_as_many_of_each_modality(evaluate_medvqa, data):
  with flagsaver.flagsaver(data=str(data), limit=1):
    examples, summary, _ = evaluate_medvqa.questions()
  assert sorted(example.modality for example in examples) == ["MRI", "X-Ray"] and summary.kept == 5
