import json
import re
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from rich.console import Console

from experiments import environment
from experiments.configs import grpo
from experiments.phantom import folder as phantom_folder
from experiments.phantom.recipes import SIZES
from kepo_jax import evaluation
from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts, splits, tokenization
from kepo_jax.evaluation import outputs as outputs_lib
from kepo_jax.models.qwen3_vl import checkpoint as checkpoint_lib
from kepo_jax.models.qwen3_vl import model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.reporting import progress
from kepo_jax.training import lock, programs
from tests import fake_bucket
from tests.data.cases import MEDR1, write_records
from tests.training.runs import lines

DISPLAY = progress.Display(Console(quiet=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A phantom student with random weights."""
  source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("model")
  phantom_folder.write_folder(source, phantom_folder.model_config(phantom_folder.make_tokenizer(), **SIZES["student"]))
  config = Qwen3VLConfig.from_directory(source)
  rng = np.random.default_rng(0)  # on the host: `init_params` would be compiled for this test alone
  shapes = model.abstract_params(config)
  params = jax.tree.map(lambda leaf: 0.02 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
  checkpoint_lib.save_pretrained(folder, config, params, source=source)
  return folder


def write_split(root, count):
  rng = np.random.default_rng(count)
  records = []
  for n in range(count):
    path = root / "Images" / "Drawn" / f"{n}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    records.append(
      {"dataset": "Drawn", "question_id": f"Drawn_{n}", "question_type": "Modality Recognition",
       "question": "What modality?", "gt_answer": "MRI", "image_path": f"Images/Drawn/{n}.png", "option_A": "CT",
       "option_B": "MRI", "modality_type": ("X-Ray", "MR (Mag-netic Resonance Imaging)")[n % 2]}
    )  # fmt: skip
  (root / "QA_information" / "Open-access").mkdir(parents=True)
  (root / "QA_information" / "Open-access" / "Drawn.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  write_split(root / "test", 5)
  write_split(root / "validation", 2)
  return root


_COMPILED = {}  # programs differ from test to test by settings and shapes alone: there is one model


@pytest.fixture
def evaluate_medvqa(program, monkeypatch):
  make = programs.sampling_program

  def made_once(config, processor, settings, *, weight_stationary):
    key = (settings, weight_stationary)
    if key not in _COMPILED:
      _COMPILED[key] = make(config, processor, settings, weight_stationary=weight_stationary)
    return _COMPILED[key]

  monkeypatch.setattr(programs, "sampling_program", made_once)
  return program("experiments.evaluate_medvqa")


def flags_of(checkpoint, data, output="", **changes):
  """Flags of an evaluation; where `batch`, `samples` and `control` are the same, so is its program."""
  given = {"model": str(checkpoint), "data": str(data), "output": str(output), "batch": 4, "max_new_tokens": 3}
  return flagsaver.flagsaver(**given | changes)


def test_wrong_flags_are_named(evaluate_medvqa, checkpoint, data):
  for flag, message in (({"tensor": 3}, "tensor=3 does not divide 8 devices"), ({"templates": "x"}, "=x is unknown")):
    with flags_of(checkpoint, data, **flag), pytest.raises(ValueError, match=message):
      evaluate_medvqa.main([])


def test_from_flags_to_files(evaluate_medvqa, checkpoint, data, tmp_path, capsys):
  with flags_of(checkpoint, data, tmp_path / "out"):
    evaluate_medvqa.main([])
    printed = " ".join(capsys.readouterr().out.split())  # lines break where long paths make them
    assert "5 of 5 questions: the part test" in printed and "templates brief" in printed
    with pytest.raises(ValueError, match="holds an evaluation already; choose another --output"):
      evaluate_medvqa.main([])
  outputs = lines(tmp_path / "out" / "outputs.jsonl")
  assert sorted(output["id"] for output in outputs) == [f"Drawn/Drawn_{n}" for n in range(5)]
  assert len({image for output in outputs for image in output["images"]}) == 5
  assert all(output["tokens"] <= 3 for output in outputs)
  result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  assert result["overall"]["count"] == 5 and result["modalities"]["MRI"]["count"] == 2
  assert result["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.slow
def test_weights_shared_by_devices_give_the_same_answers(evaluate_medvqa, checkpoint, data, tmp_path):
  for name, shared in (("whole", {}), ("shared", {"fsdp": 2, "tensor": 2})):
    with flags_of(checkpoint, data, tmp_path / name, **shared):
      evaluate_medvqa.main([])
  assert json.loads((tmp_path / "shared" / "about.json").read_text())["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
  assert (tmp_path / "shared" / "outputs.jsonl").read_text() == (tmp_path / "whole" / "outputs.jsonl").read_text()


def test_from_a_bucket_to_a_bucket(evaluate_medvqa, checkpoint, data, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  bucket = tmp_path / "cloud" / "bucket"
  for name, folder in (("model", checkpoint), ("data", data)):
    shutil.copytree(folder, bucket / name)
  with fake_bucket.served(tmp_path / "cloud"):
    with flags_of("gs://bucket/model", "gs://bucket/data", "gs://bucket/output"):
      evaluate_medvqa.main([])
  assert len(lines(bucket / "output" / "outputs.jsonl")) == 5
  about = json.loads((bucket / "output" / "evaluation.json").read_text())
  assert (about["model"], about["data"]) == ("gs://bucket/model", "gs://bucket/data/test")


def test_a_question_without_room_is_named_before_any_is_asked_or_left_out(evaluate_medvqa, checkpoint, tmp_path):
  write_split(tmp_path / "data" / "test", 3)
  Image.new("RGB", (3000, 10)).save(tmp_path / "data" / "test" / "Images" / "Drawn" / "1.png")
  with flags_of(checkpoint, tmp_path / "data", tmp_path / "out"):
    with pytest.raises(ValueError, match=r"Drawn_1: image .*1.png: .*crop it"):
      evaluate_medvqa.main([])
    assert not (tmp_path / "out").exists()
    with flagsaver.flagsaver(lenient=True):
      evaluate_medvqa.main([])
  assert sorted(output["id"] for output in lines(tmp_path / "out" / "outputs.jsonl")) == [
    "Drawn/Drawn_0",
    "Drawn/Drawn_2",
  ]


def test_an_interrupted_evaluation_is_continued(evaluate_medvqa, checkpoint, data, tmp_path, capsys, monkeypatch):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  asked = {"samples": 2, "control": "blank", "batch": 2}
  with flags_of(checkpoint, data, whole, **asked):
    evaluate_medvqa.main([])
  result = json.loads((whole / "evaluation.json").read_text())
  assert (result["control"], result["samples"], result["temperature"], result["batch"]) == ("blank", 2, 1.0, 2)
  # Killed while it wrote the seventh of ten lines: the two completions of two questions are a batch.
  cut.mkdir()
  shutil.copy(whole / "about.json", cut)
  written = (whole / "outputs.jsonl").read_bytes().splitlines(keepends=True)
  (cut / "outputs.jsonl").write_bytes(b"".join(written[:7])[:-9])
  with flags_of(checkpoint, data, cut, **asked):
    with pytest.raises(ValueError, match="--resume continues it"):
      evaluate_medvqa.main([])
    with flagsaver.flagsaver(resume=True):
      # Not with other questions or settings, nor with other neighbours or on other devices.
      for flag, change in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"limit": 1}, "count: 5 -> 2, ids_hash: "),
        ({"batch": 4}, "batch: 2 -> 4"),
        ({"tensor": 2}, "mesh: {'data': 8, 'fsdp': 1, 'tensor': 1} -> {'data': 4, "),
      ):
        with flagsaver.flagsaver(**flag), pytest.raises(ValueError, match=rf"something else \({re.escape(change)}"):
          evaluate_medvqa.main([])
      capsys.readouterr()
      evaluate_medvqa.main([])
      assert "resumed: 4 of 10 completions are there" in capsys.readouterr().out
      # What is complete is counted again; the weights are not even loaded.
      (cut / "evaluation.json").unlink()
      monkeypatch.setattr(checkpoint_lib, "load_pretrained", None)
      evaluate_medvqa.main([])
  for name in ("about.json", "outputs.jsonl", "evaluation.json"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_folder_belongs_to_one_evaluation_at_a_time(evaluate_medvqa, checkpoint, data, tmp_path, monkeypatch):
  finish, refused = outputs_lib.Journal.finish, []

  def second(self, result):
    with flagsaver.flagsaver(resume=True), pytest.raises(ValueError, match="in use by .* another --output"):
      evaluate_medvqa.main([])
    refused.append(1)
    finish(self, result)

  monkeypatch.setattr(outputs_lib.Journal, "finish", second)
  with flags_of(checkpoint, data, tmp_path / "out"):
    evaluate_medvqa.main([])
  assert len(refused) == 1

  def lost(self):
    raise ValueError("was taken by process 7")

  monkeypatch.setattr(lock.WorkdirLock, "check", lost)
  with flags_of(checkpoint, data, tmp_path / "taken"), pytest.raises(ValueError, match="was taken by process 7"):
    evaluate_medvqa.main([])
  assert lines(tmp_path / "taken" / "outputs.jsonl") == []


def folder_that_says(folder, **settings):
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


def test_the_image_size_is_that_of_the_flag_the_folder_or_the_training(evaluate_medvqa, tmp_path):
  for settings, flag, size in (
    ({"kepo_templates": "standard", "kepo_resize": "native"}, "", "native"),
    ({"kepo_resize": "native"}, "squash384", "squash384"),
    ({}, "", "squash384"),  # a published checkpoint
    ({"kepo_templates": "brief"}, "", "native"),  # an export of earlier days
  ):
    with flagsaver.flagsaver(resize=flag):
      assert evaluate_medvqa.image_size(folder_that_says(tmp_path, **settings))[0] == size, settings
  with pytest.raises(ValueError, match="tokenizer_config.json: kepo_resize="):
    evaluate_medvqa.image_size(folder_that_says(tmp_path, kepo_resize="squash"))
  with pytest.raises(ValueError, match="kepo_templates=7 is no text"):
    tokenization.declared_templates(folder_that_says(tmp_path, kepo_templates=7))


def test_samples_depend_on_question_and_seed_alone(evaluate_medvqa, checkpoint, data):
  with flagsaver.flagsaver(data=str(data)):
    examples, _, _ = evaluate_medvqa.questions(DISPLAY)
  processor = processor_lib.Processor.from_directory(checkpoint, templates=prompts.BRIEF)
  mesh = environment.device_mesh(fsdp=1, tensor=1)

  def completions(asked, seed=0):
    outputs = []
    with flagsaver.flagsaver(samples=2, seed=seed), jax.set_mesh(mesh):
      settings = evaluate_medvqa.sampling_settings(tokens=3)
      sample = evaluate_medvqa.sampler(str(checkpoint), processor, mesh, "float32", settings)
      evaluation.evaluate(sample, processor, asked, batch_size=2, on_output=outputs.append)
    return {(output["id"], output["sample"]): output["completion"] for output in outputs}

  first = completions(examples)
  assert len(first) == 10 and len({first[key] for key in first}) > 5  # questions and samples have streams of their own
  assert completions(examples[::-1]) == first  # another order, and other neighbours
  assert completions(examples, seed=1) != first


def test_sampling_settings(evaluate_medvqa):
  for given, expected in (({}, (1, 7, 0.0)), ({"temperature": 0.6, "top_p": 0.9}, (1, 7, 0.6, 0.9))):
    with flagsaver.flagsaver(**given):
      assert evaluate_medvqa.sampling_settings(7) == programs.SamplingSettings(*expected), given
  with flagsaver.flagsaver(samples=8):
    assert evaluate_medvqa.sampling_settings(7).temperature == 1.0
  with flagsaver.flagsaver(samples=8, temperature=0.0), pytest.raises(ValueError, match="would give 8 times the same"):
    evaluate_medvqa.sampling_settings(7)


def test_how_a_published_folder_is_loaded_and_asked(evaluate_medvqa, checkpoint, data, tmp_path, monkeypatch, capsys):
  base = shutil.copytree(checkpoint, tmp_path / "base")
  record = json.loads((base / "tokenizer_config.json").read_text())
  folder_that_says(base, **{key: value for key, value in record.items() if not key.startswith("kepo_")})
  layouts = []

  def load(*_, layout, unstack):
    assert unstack  # a token loop would slice every layer out of a stack
    layouts.append(layout)
    raise ValueError("stop here")

  monkeypatch.setattr(checkpoint_lib, "load_pretrained", load)
  for shared in (1, 4):
    with flags_of(base, data, fsdp=shared, max_new_tokens=0), pytest.raises(ValueError, match="stop here"):
      evaluate_medvqa.main([])
  assert layouts == ["decode", "train"]  # with --fsdp weights are not whole on a device
  printed = " ".join(capsys.readouterr().out.split())
  for said in ("templates standard", "resize squash384", "max_new_tokens 1024"):
    assert said in printed, said


def test_a_single_folder_is_cut_as_in_training(evaluate_medvqa, data):
  root = str(data / "test")
  config = grpo.get_config().data
  wanted = {"train_items": 1, "validation_items": 0, "test_items": 1}
  config.update({"directory": root, **wanted})
  trained = splits.load(config)
  with flagsaver.flagsaver(data=root, **wanted):
    examples, _, how = evaluate_medvqa.questions(DISPLAY)
    assert examples == trained["test"] and not {e.id for e in examples} & {e.id for e in trained["train"]}
    assert how.startswith("2 of 5 questions: the test part")
    with flagsaver.flagsaver(split="train"):
      assert evaluate_medvqa.questions(DISPLAY)[0] == trained["train"]
    with flagsaver.flagsaver(split="all", limit=2):
      assert len(evaluate_medvqa.questions(DISPLAY)[0]) == 4
  with flagsaver.flagsaver(data=root, split="all"):
    assert len(evaluate_medvqa.questions(DISPLAY)[0]) == 5


def test_what_is_already_split_is_asked_whole(evaluate_medvqa, tmp_path):
  for part, numbers in (("train", range(3)), ("test", range(3, 7))):
    records = [MEDR1 | {"image": f"{n}.png", "problem": f"No. {n}? A)Chest, B)Brain"} for n in numbers]
    write_records(tmp_path / "split" / part / f"CT_{part}.json", *records)
    for n in numbers:
      (tmp_path / f"{n}.png").write_bytes(b"")  # is there
  with flagsaver.flagsaver(data=str(tmp_path), split_files=str(tmp_path / "split")):
    examples, summary, how = evaluate_medvqa.questions(DISPLAY)
    assert (len(examples), summary.format, how) == (4, "split files", "4 of 4 questions: the part test")
    with flagsaver.flagsaver(split="validation"):
      with pytest.raises(ValueError, match=r"--split=validation: .* has \['test', 'train'\]; choose one"):
        evaluate_medvqa.questions(DISPLAY)


def test_the_defaults_cut_as_the_config_does(evaluate_medvqa, data):
  with flagsaver.flagsaver(data=str(data / "test")):
    with pytest.raises(ValueError, match=r"--split=test: .*MRI has 2 questions, too few .*--split=all asks every"):
      evaluate_medvqa.questions(DISPLAY)
  config = grpo.get_config().data
  names = ("train_modality", "train_items", "validation_items", "test_items", "split_seed")
  assert {name: flags.FLAGS[name].default for name in names} == {name: config[name] for name in names}
  assert flags.FLAGS["split"].default == "test"
  assert evaluate_medvqa.BUDGETS == {"brief": grpo.get_config().eval.max_new_tokens, "standard": 1024}
