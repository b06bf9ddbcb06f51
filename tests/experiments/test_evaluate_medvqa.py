"""The entry point: an untrained phantom-sized model on a drawn data set, from flags to files."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from rich.console import Console

from experiments import environment, phantom_folder
from experiments.configs import grpo
from experiments.phantom_recipes import SIZES
from kepo_jax import evaluation
from kepo_jax.data import pipeline, prompts, splits, tokenization
from kepo_jax.data.tfds import building, reading
from kepo_jax.data.tfds.omnimedvqa import omnimedvqa_dataset_builder
from kepo_jax.evaluation import journal
from kepo_jax.models.qwen3_vl import conversion, model
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.reporting import progress
from kepo_jax.training import lock, programs
from tests import fake_bucket
from tests.conftest import ROOT
from tests.data.cases import MEDR1, write_records

DISPLAY = progress.Display(Console(quiet=True))
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


def test_from_a_bucket_to_a_bucket(evaluate_medvqa, checkpoint, data, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  bucket = tmp_path / "cloud" / "bucket"
  for name, folder in (("model", checkpoint), ("data", data)):
    shutil.copytree(folder, bucket / name)
  places = {name: f"gs://bucket/{name}" for name in ("model", "data", "output")}
  with fake_bucket.served(tmp_path / "cloud"), flagsaver.flagsaver(**places, batch=4, max_new_tokens=3):
    evaluate_medvqa.main([])
    assert "gs://bucket/data/test: 5 of 5 records kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match="gs://bucket/output holds an evaluation already"):
      evaluate_medvqa.main([])
  assert len((bucket / "output" / "outputs.jsonl").read_text().splitlines()) == 5
  about = json.loads((bucket / "output" / "evaluation.json").read_text())
  assert (about["model"], about["data"]) == ("gs://bucket/model", "gs://bucket/data/test")


def test_from_flags_to_files(evaluate_medvqa, checkpoint, data, tmp_path, capsys):
  chosen = {"model": str(checkpoint), "data": str(data), "output": str(tmp_path / "out"), "batch": 4}
  with flagsaver.flagsaver(**chosen, max_new_tokens=3):
    evaluate_medvqa.main([])
    printed = " ".join(capsys.readouterr().out.split())  # lines break where long paths make them
    assert "5 of 5 records kept" in printed and "templates brief" in printed and "X-Ray" in printed
    assert "5 of 5 questions: the part test" in printed and "resumed" not in printed
    assert "images: native, as the model's folder says, kepo_resize in tokenizer_config.json" in printed
    with pytest.raises(ValueError, match="holds an evaluation already; choose another --output"):
      evaluate_medvqa.main([])
  outputs = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
  assert sorted(output["id"] for output in outputs) == [f"Drawn/Drawn_{n}" for n in range(5)]
  assert len({image for output in outputs for image in output["images"]}) == 5
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


@contextlib.contextmanager
def changed(path):
  """One pixel of an image is another for a while."""
  before, times = path.read_bytes(), path.stat()
  image = Image.open(path)
  image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
  image.save(path)
  yield
  path.write_bytes(before)
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_question_without_room_is_named_before_any_is_asked_or_left_out(evaluate_medvqa, checkpoint, tmp_path):
  write_split(tmp_path / "data" / "test", 3)
  Image.new("RGB", (3000, 10)).save(tmp_path / "data" / "test" / "Images" / "Drawn" / "1.png")
  chosen = {
    "model": str(checkpoint),
    "data": str(tmp_path / "data"),
    "max_new_tokens": 2,
    "output": str(tmp_path / "out"),
  }
  with flagsaver.flagsaver(**chosen):
    with pytest.raises(ValueError, match=r"Drawn_1: image .*1.png: .*crop it"):
      evaluate_medvqa.main([])
  assert not (tmp_path / "out").exists()
  with flagsaver.flagsaver(**chosen, lenient=True):
    evaluate_medvqa.main([])
  outputs = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
  assert sorted(output["id"] for output in outputs) == ["Drawn/Drawn_0", "Drawn/Drawn_2"]


def test_an_interrupted_evaluation_is_continued(evaluate_medvqa, checkpoint, data, tmp_path, capsys, monkeypatch):
  asked = {
    "model": str(checkpoint),
    "data": str(data),
    "batch": 2,
    "max_new_tokens": 3,
    "samples": 2,
    "control": "text",
  }
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  with flagsaver.flagsaver(**asked, output=str(whole)):
    evaluate_medvqa.main([])
  printed = capsys.readouterr().out
  assert "control text" in printed and "temperature 1.0" in printed and "pass@2" in printed and "chance" in printed
  assert "_hash" not in printed
  result = json.loads((whole / "evaluation.json").read_text())
  assert (result["control"], result["samples"], result["temperature"], result["batch"]) == ("text", 2, 1.0, 2)
  assert result["chance"]["overall"]["accuracy"] == 0.5 and list(result["pass_at_k"]) == ["1", "2"]
  # Killed while it wrote the fifth of ten lines: two questions of a batch are whole.
  cut.mkdir()
  content = (whole / "outputs.jsonl").read_bytes()
  (cut / "about.json").write_bytes((whole / "about.json").read_bytes())
  (cut / "outputs.jsonl").write_bytes(b"".join(content.splitlines(keepends=True)[:5])[:-9])
  with pytest.raises(ValueError, match="last line of .*cut/outputs.jsonl is cut short; --resume finishes"):
    journal.read_outputs(cut)
  with flagsaver.flagsaver(**asked, output=str(cut)):
    with pytest.raises(ValueError, match="unfinished evaluation; --resume continues it"):
      evaluate_medvqa.main([])
    with flagsaver.flagsaver(resume=True):
      with flagsaver.flagsaver(seed=1, control="blank"):
        with pytest.raises(ValueError, match=r"\(control: 'text' -> 'blank', seed: 0 -> 1\)"):
          evaluate_medvqa.main([])
      with flagsaver.flagsaver(limit=1):
        with pytest.raises(ValueError, match=r"\(count: 5 -> 2, ids_hash: "):
          evaluate_medvqa.main([])
      # Nor with other neighbours, on other devices, or about other pictures under the same names.
      with flagsaver.flagsaver(batch=4):
        with pytest.raises(ValueError, match=r"\(batch: 2 -> 4\); ask as it did"):
          evaluate_medvqa.main([])
      with flagsaver.flagsaver(tensor=2):
        with pytest.raises(ValueError, match=r"\(mesh: {'data': 8, 'fsdp': 1, 'tensor': 1} -> {'data': 4, "):
          evaluate_medvqa.main([])
      with changed(data / "test" / "Images" / "Drawn" / "3.png"):
        with pytest.raises(ValueError, match=r"\(images_hash: '\w+' -> '\w+'\)"):
          evaluate_medvqa.main([])
      evaluate_medvqa.main([])
      captured = capsys.readouterr()
      assert "evaluation: 5/5" in captured.err
      assert "resumed: 4 of 10 completions are there; the last line was cut short" in captured.out
      # What is complete is counted again; the weights are not even loaded.
      (cut / "evaluation.json").unlink()
      monkeypatch.setattr(conversion, "load_pretrained", None)
      evaluate_medvqa.main([])
  names = {path.name for path in whole.iterdir()}
  assert names == {"about.json", "outputs.jsonl", "evaluation.json"} == {path.name for path in cut.iterdir()}
  for name in names:
    assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


HOLD = """
import sys, time
from kepo_jax.training.lock import WorkdirLock
WorkdirLock(sys.argv[1]).__enter__()
print("held", flush=True)
time.sleep(60)
"""


def test_one_evaluation_at_a_time_writes_into_a_folder(evaluate_medvqa, checkpoint, data, tmp_path):
  output = tmp_path / "out"
  output.mkdir()
  first = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert first.stdout.readline() == "held\n"
    asked = {"model": str(checkpoint), "data": str(data), "batch": 8, "max_new_tokens": 3}
    with flagsaver.flagsaver(**asked, output=str(output)):
      for resume in (False, True):
        with flagsaver.flagsaver(resume=resume):
          with pytest.raises(ValueError, match=f"in use by process {first.pid} .* another --output") as refused:
            evaluate_medvqa.main([])
        assert "\n" not in str(refused.value) and "workdir" not in str(refused.value)
      assert [path.name for path in output.iterdir()] == ["lock.json"]
      first.kill()
      first.wait()
      evaluate_medvqa.main([])  # takes the lock over, and nothing else of the folder stands in its way
  finally:
    first.kill()
    first.wait()
  assert {path.name for path in output.iterdir()} == {"about.json", "outputs.jsonl", "evaluation.json"}
  assert len(journal.read_outputs(output)) == 5


def test_the_folder_is_held_until_the_figures_are_written(evaluate_medvqa, checkpoint, data, tmp_path, monkeypatch):
  asked = {
    "model": str(checkpoint),
    "data": str(data),
    "batch": 8,
    "max_new_tokens": 3,
    "output": str(tmp_path / "out"),
  }
  finish, refused = journal.Journal.finish, []

  def second(self, result):
    with flagsaver.flagsaver(resume=True), pytest.raises(ValueError, match="in use by process") as error:
      evaluate_medvqa.main([])
    refused.append(error)
    finish(self, result)

  monkeypatch.setattr(journal.Journal, "finish", second)
  with flagsaver.flagsaver(**asked):
    evaluate_medvqa.main([])
  assert len(refused) == 1 and (tmp_path / "out" / "evaluation.json").exists()


def test_a_lock_that_another_process_took_ends_the_evaluation(evaluate_medvqa, checkpoint, data, tmp_path, monkeypatch):
  def lost(self):
    raise ValueError("was taken by process 7")

  monkeypatch.setattr(lock.WorkdirLock, "check", lost)
  asked = {
    "model": str(checkpoint),
    "data": str(data),
    "batch": 8,
    "max_new_tokens": 3,
    "output": str(tmp_path / "out"),
  }
  with flagsaver.flagsaver(**asked), pytest.raises(ValueError, match="was taken by process 7"):
    evaluate_medvqa.main([])
  assert (tmp_path / "out" / "outputs.jsonl").read_text() == ""


def test_an_evaluation_that_is_refused_leaves_no_folder(evaluate_medvqa, checkpoint, data, tmp_path):
  with flagsaver.flagsaver(model=str(checkpoint), data=str(data), split="train", output=str(tmp_path / "a" / "out")):
    with pytest.raises(ValueError, match="choose one"):
      evaluate_medvqa.main([])
  assert not (tmp_path / "a" / "out").exists()


def folder_that_says(folder, **settings):
  folder.mkdir(exist_ok=True)
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


@pytest.mark.parametrize(
  ("settings", "flag", "size", "why"),
  [
    ({"kepo_templates": "standard", "kepo_resize": "native"}, "", "native", "as the model's folder says"),
    ({"kepo_templates": "brief", "kepo_resize": "squash384"}, "", "squash384", "as the model's folder says"),
    ({"kepo_resize": "native"}, "squash384", "squash384", "as --resize asks; the model's folder says native"),
    ({}, "native", "native", "as --resize asks; the model's folder says nothing"),
    ({}, "", "squash384", "the default for published checkpoints; the model's folder has no kepo_resize"),
    ({"kepo_templates": "brief"}, "", "native", "the default for wordings brief; "),  # an export of earlier days
    ({"kepo_templates": "mine"}, "", "squash384", "the default for published checkpoints; "),
  ],
)
def test_the_image_size_and_why(evaluate_medvqa, tmp_path, settings, flag, size, why):
  with flagsaver.flagsaver(resize=flag):
    found, said = evaluate_medvqa.image_size(folder_that_says(tmp_path, **settings))
  assert found == size and said.startswith(why)


def test_a_published_folder_has_the_default_and_says_so(evaluate_medvqa, checkpoint, data, tmp_path, capsys):
  shutil.copytree(checkpoint, tmp_path / "base")
  record = json.loads((checkpoint / "tokenizer_config.json").read_text())
  bare = {name: value for name, value in record.items() if not name.startswith("kepo_")}
  folder_that_says(tmp_path / "base", **bare)
  with flagsaver.flagsaver(model=str(tmp_path / "base"), data=str(data), control="text", max_new_tokens=2):
    evaluate_medvqa.main([])
  printed = " ".join(capsys.readouterr().out.split())  # where lines break depends on the length of the path
  assert "images: squash384, the default for published checkpoints; the model's folder has no kepo_resize" in printed
  assert "templates standard" in printed and "resize squash384" in printed


@pytest.mark.parametrize("value", ["squash", ["native"], 384])
def test_an_image_size_that_does_not_exist_is_named(evaluate_medvqa, tmp_path, value):
  with pytest.raises(ValueError, match="tokenizer_config.json: kepo_resize="):
    evaluate_medvqa.image_size(folder_that_says(tmp_path, kepo_resize=value))
  with pytest.raises(ValueError, match="kepo_templates=7 is no text"):
    tokenization.declared_templates(folder_that_says(tmp_path, kepo_templates=7))


def test_the_phantom_models_name_their_image_size():
  names = [path for path in PHANTOM.iterdir() if path.is_dir()]
  assert len(names) == 4 and {tokenization.declared_resize(path) for path in names} == {grpo.get_config().data.resize}


def test_samples_depend_on_question_and_seed_alone(evaluate_medvqa, checkpoint, data):
  examples, _, _ = questions_of(evaluate_medvqa, data)
  processor = pipeline.Processor.from_directory(checkpoint, templates=prompts.BRIEF)
  mesh = environment.device_mesh(fsdp=1, tensor=1)

  def completions(asked, size, seed):
    outputs = []
    with flagsaver.flagsaver(samples=2, seed=seed), jax.set_mesh(mesh):
      settings = evaluate_medvqa.sampling_settings(tokens=4)
      sample = evaluate_medvqa.sampler(str(checkpoint), processor, mesh, "float32", settings)
      evaluation.evaluate(sample, processor, asked, batch_size=size, on_output=outputs.append)
    return {(output["id"], output["sample"]): output["completion"] for output in outputs}

  first = completions(examples, 5, seed=0)
  assert len(first) == 10 and len({first[key] for key in first}) > 5  # questions and samples have streams of their own
  assert completions(examples[::-1], 2, seed=0) == first  # another order, other neighbours, another batch
  assert completions(examples, 5, seed=1) != first


def questions_of(evaluate_medvqa, data):
  with flagsaver.flagsaver(data=str(data)):
    return evaluate_medvqa.questions(DISPLAY)


def test_sampling_settings(evaluate_medvqa):
  assert evaluate_medvqa.sampling_settings(7) == programs.SamplingSettings(1, 7, 0.0)
  with flagsaver.flagsaver(samples=8):
    assert evaluate_medvqa.sampling_settings(7).temperature == 1.0
    with flagsaver.flagsaver(temperature=0.0):
      with pytest.raises(ValueError, match="--samples=8 --temperature=0 would give 8 times the same"):
        evaluate_medvqa.sampling_settings(7)
  with flagsaver.flagsaver(temperature=0.6, top_p=0.9):
    assert evaluate_medvqa.sampling_settings(7) == programs.SamplingSettings(1, 7, 0.6, 0.9)


def test_answers_may_be_as_long_as_in_training(evaluate_medvqa):
  declared = {path.name: tokenization.declared_templates(path) for path in PHANTOM.iterdir() if path.is_dir()}
  assert declared and {evaluate_medvqa.BUDGETS[family] for family in declared.values()} == {
    grpo.get_config().eval.max_new_tokens
  }
  assert evaluate_medvqa.BUDGETS == {"brief": 24, "standard": 1024}


def test_weights_are_shared_over_fsdp(evaluate_medvqa, checkpoint, data, monkeypatch):
  layouts = []

  def load(*_, layout, separate):
    assert separate  # a token loop would slice every layer out of a stack
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
    examples, _, how = evaluate_medvqa.questions(DISPLAY)
    assert examples == trained["test"] and not {e.id for e in examples} & {e.id for e in trained["train"]}
    assert how.startswith("2 of 5 questions: the test part") and "--test_items=1 --split_seed=0" in how
    with flagsaver.flagsaver(split="train"):
      assert evaluate_medvqa.questions(DISPLAY)[0] == trained["train"]
    with flagsaver.flagsaver(split="all", limit=2):
      examples, _, how = evaluate_medvqa.questions(DISPLAY)
      assert len(examples) == 4 and "questions for training included, at most 2 per modality" in how
  with flagsaver.flagsaver(data=root, split="all"):
    assert len(evaluate_medvqa.questions(DISPLAY)[0]) == 5


def test_a_published_split_is_asked_whole(evaluate_medvqa, tmp_path):
  for part, numbers in (("train", range(3)), ("test", range(3, 7))):
    for n in numbers:
      path = tmp_path / "data" / "Images" / f"{n}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("L", (8, 8)).save(path)
    records = [MEDR1 | {"image": f"Images/{n}.png", "problem": f"No. {n}? A)Chest, B)Brain"} for n in numbers]
    write_records(tmp_path / "split" / part / f"CT_{part}.json", *records)
  with flagsaver.flagsaver(data=str(tmp_path / "data"), split_files=str(tmp_path / "split")):
    examples, summary, how = evaluate_medvqa.questions(DISPLAY)
    assert [example.id for example in examples] == [f"CT_test/{n}" for n in range(4)]
    assert summary.format == "split files" and how == "4 of 4 questions: the part test"
    with flagsaver.flagsaver(split="validation"):
      with pytest.raises(ValueError, match=r"--split=validation: .*split has \['test', 'train'\]"):
        evaluate_medvqa.questions(DISPLAY)


def test_a_data_set_that_was_built_is_asked_whole(evaluate_medvqa, data, tmp_path):
  config = omnimedvqa_dataset_builder.split_config(
    train_modality="MRI", train_items=1, validation_items=0, test_items=1, split_seed=0
  )
  built = building.build(tmp_path / "tfds", manual_dir=data / "test", config=config)
  reading.read_splits(built.directory)  # its libraries define flags when first used, which flagsaver would take away
  with flagsaver.flagsaver(data=str(built.directory), limit=1):
    examples, summary, how = evaluate_medvqa.questions(DISPLAY)
  assert summary.format == "TFDS" and how == "2 of 2 questions: the part test, at most 1 per modality"
  assert sorted(example.modality for example in examples) == ["MRI", "X-Ray"]
  with flagsaver.flagsaver(data=str(built.directory), split="validation"):
    with pytest.raises(ValueError, match=r"--split=validation: .* has \['test', 'train'\]; choose one"):
      evaluate_medvqa.questions(DISPLAY)


def test_the_defaults_cut_as_the_config_does(evaluate_medvqa):
  config = grpo.get_config().data
  names = ("train_modality", "train_items", "validation_items", "test_items", "split_seed")
  assert {name: flags.FLAGS[name].default for name in names} == {name: config[name] for name in names}
  assert flags.FLAGS["split"].default == "test"


def test_a_folder_too_small_for_the_cut_names_the_way_out(evaluate_medvqa, data):
  with flagsaver.flagsaver(data=str(data / "test")):
    with pytest.raises(ValueError, match=r"--split=test: .*MRI has 2 questions, too few .*--split=all asks every"):
      evaluate_medvqa.questions(DISPLAY)
  with flagsaver.flagsaver(data=str(data / "test"), train_modality="CT"):
    with pytest.raises(ValueError, match=r"no question of modality 'CT'.*--split=all"):
      evaluate_medvqa.questions(DISPLAY)


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
    examples, summary, _ = evaluate_medvqa.questions(DISPLAY)
  assert sorted(example.modality for example in examples) == ["MRI", "X-Ray"] and summary.kept == 5
