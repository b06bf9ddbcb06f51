"""The questions of a run: whatever way they come in, each of them can be asked, or the run does not begin."""

import dataclasses
import json

import pytest
from PIL import Image

from experiments.configs import kepo
from kepo_jax import training
from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts
from kepo_jax.data.records import LONGEST
from kepo_jax.training import checks, setup
from kepo_jax.training.signals import Interruption
from kepo_jax.types import Hook
from tests.data.cases import Layout, record
from tests.training.cases import example
from tests.training.runs import ASSETS, changed, shrunk


def small(**changes):
  """KEPO on few questions, none of them evaluated; changes as `section__field=value`."""
  sizes = {"train__steps": 1, "eval__every": 0, "eval__test": False, "checkpoint__every": 0}
  return shrunk(changed(kepo), **sizes | changes)


def usable(config, records=None, hooks=()):
  processor = processor_lib.Processor.from_directory(
    ASSETS / "confused",
    templates=prompts.TEMPLATES[config.data.templates],
    resize=config.data.resize,
    prompt_buckets=tuple(config.data.prompt_buckets),
    patch_buckets=tuple(config.data.patch_buckets),
  )
  return setup.usable_questions(config, processor, records, hooks)


@pytest.fixture
def asked(tmp_path):
  """Four questions for training, one for the test; each has an image of its own."""
  examples = []
  for number in range(5):
    path = tmp_path / f"{number}.png"
    Image.new("RGB", (64, 64), (number, 0, 0)).save(path)
    fields = {"id": f"q{number}", "question": "How many bright spots?", "images": (str(path),)}
    examples.append(dataclasses.replace(example("x"), **fields))
  return {"train": examples[:4], "test": examples[4:]}


def test_records_that_fit_are_taken_as_they_are(asked):
  calls = []

  class Progress(Hook):
    def progress(self, what, done, total):
      calls.append((what, done, total))

  questions, summaries = usable(small(), asked, [Progress()])
  assert questions == asked and summaries["reading"] == []
  assert [(each.kept, dict(each.rules)) for each in summaries["checking"]] == [(4, {}), (1, {})]
  assert calls == [("checking images", n, 4) for n in (1, 2, 3, 4)] + [("checking images", 1, 1)]


def test_an_image_that_would_stop_a_later_step(asked, tmp_path, caplog):
  Image.effect_noise((64, 64), 50).save(tmp_path / "1.png")
  whole = (tmp_path / "1.png").read_bytes()
  cut = whole[: len(whole) // 2]  # its header can still be read
  (tmp_path / "1.png").write_bytes(cut)
  with pytest.raises(ValueError, match=r"train question q1: image .*1.png.* set data.lenient to leave them out"):
    usable(small(), asked)
  (tmp_path / "1.png").write_bytes(whole)
  Image.new("L", (3000, 10)).save(tmp_path / "3.png")
  with pytest.raises(ValueError, match=r"train question q3: image .*3.png: an image of 3000 x 10 .* set data.lenient"):
    usable(small(), asked)
  assert len(usable(small(data__resize="squash384"), asked)[0]["train"]) == 4
  (tmp_path / "1.png").write_bytes(cut)
  message = r"train question q1: image .*1.png.* \(1 unreadable_image, 1 image_too_narrow.*"
  with pytest.raises(ValueError, match=message + "data.lenient to leave them out"):
    usable(small(), asked)
  config = small(data__lenient=True)
  with pytest.raises(ValueError, match="the train split has 2 questions and needs 4"):
    usable(config, asked)
  config = config.replace({"batch.prompts": 2})
  with caplog.at_level("WARNING"):
    questions, summaries = usable(config, asked)
  assert {part: [example.id for example in kept] for part, kept in questions.items()} == {
    "train": ["q0", "q2"],
    "test": ["q4"],
  }
  assert summaries["checking"][0].rules == {"unreadable_image": 1, "image_too_narrow": 1}
  assert "2 questions left out: train questions of the run: 2 of 4 records kept" in caplog.text
  assert "image_too_narrow 1: error: " in caplog.text and "first: question q3: " in caplog.text


def test_a_test_image_counts_as_well(asked):
  Image.new("L", (128, 64)).save(asked["test"][0].images[0])
  message = r"test question q4: image .*4.png of 128 x 64 pixels: 128 patch rows, more than"
  with pytest.raises(ValueError, match=message):
    usable(small(data__patch_buckets=(64,)), asked)


def test_prompts_of_training_exploration_and_evaluation(asked):
  longest = "Where are the spots? " + "Look. " * 8
  questions = asked | {"test": [dataclasses.replace(asked["test"][0], question=longest)]}
  # The phantom's words are a token each; the evaluation of the long question needs most.
  for kind, changes in (
    ("evaluation", {"exploration__trigger": "never"}),
    ("hint_and_answer", {"exploration__hint_tokens": 100}),
  ):
    with pytest.raises(ValueError, match=rf"the prompt {kind} has \d+ tokens .*data.prompt_buckets=\(56,\)"):
      usable(small(data__prompt_buckets=(56,), **changes), questions)
  usable(small(data__prompt_buckets=(56,), exploration__trigger="never", exploration__hint_tokens=100), asked)
  asked["train"][1] = dataclasses.replace(asked["train"][1], question="a" * LONGEST)
  with pytest.raises(ValueError, match=r"train question q1: a question of 10006 characters .*1 question_too_long"):
    usable(small(), asked)


def test_the_wordings_that_a_run_uses():
  config = small(data__prompt="no_think", exploration__hint_tokens=17)
  hinted = {"hint_request": 0, "hint_and_answer": 17}
  assert checks.prompt_kinds(config, "train") == {"no_think": 0} | hinted
  assert checks.prompt_kinds(config, "validation") == {"evaluation": 0}
  config = config.replace({"exploration.trigger": "never"})
  assert checks.prompt_kinds(config, "train") == {"no_think": 0}


class Stopped(Hook):
  """Ends a run where its first step would begin."""

  def start(self, plan):
    raise KeyboardInterrupt


def test_a_run_leaves_out_counts_and_writes_down(tmp_path, caplog):
  """On disk, leniently: a repaired record, one without an image, and one whose image no bucket holds."""
  layout = Layout(tmp_path / "data")
  records = []
  for number in range(10):
    path = f"Images/Set A/{number}.png"
    layout.image(path, number)
    options = {"option_C": ..., "option_D": ...}
    records.append(record(number, modality_type="MRI", image_path=path, question="Which organ?", **options))
  records[0]["gt_answer"] = "brain."
  layout.write(*records, record(10, modality_type="MRI", image_path="Images/none.png"))
  Image.new("L", (3000, 10)).save(tmp_path / "data" / records[5]["image_path"])
  config = small(data__directory=str(layout.root), data__train_items=8, data__lenient=True)
  with caplog.at_level("WARNING"), pytest.raises(KeyboardInterrupt):
    training.train(config, workdir=tmp_path / "run", hooks=[Stopped()])
  found = json.loads((tmp_path / "run" / "data_summary.json").read_text())
  (reading,) = found["reading"]
  assert reading["rules"] == {"answer_normalised": 1, "missing_image": 1} and reading["dropped"] == 1
  assert "record 10" in reading["first"]["missing_image"]
  dropped = {each["root"]: each["rules"] for each in found["checking"] if each["rules"]}
  assert list(dropped.values()) == [{"image_too_narrow": 1}]
  questions = json.loads((tmp_path / "run" / "questions.json").read_text())
  assert sum(questions["counts"].values()) == 9  # of ten that were read
  assert "answer_normalised 1: repaired" in caplog.text and "image_too_narrow 1: error" in caplog.text


def test_every_model_of_a_run_computes_attention_as_the_config_says(mesh_of):
  folders = {"student": ASSETS / "confused", "teacher": ASSETS / "weak"}
  for form in ("auto", "plain"):
    models = setup.load_models(small(model__attention=form), mesh_of(), folders, (), Interruption())
    assert {role: each.config.attention for role, each in models.items()} == {"student": form, "teacher": form}
