import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.configs import gkd, grpo, kepo, sft, sft_teacher
from kepo_jax import sharding, training
from kepo_jax.data import processor as processor_lib
from kepo_jax.data import prompts
from kepo_jax.objectives import losses
from kepo_jax.training import programs, setup
from kepo_jax.training import update as update_lib
from kepo_jax.training.signals import Interruption
from kepo_jax.types import Hook
from tests.data.cases import Layout, record
from tests.training.cases import RIGHT, example
from tests.training.runs import ASSETS, changed, shrunk


def total(scorer, text):
  return float(scorer([[text]], [example("x")])["total"][0, 0])


def half_length(completion, example):
  return len(completion) / 2


def test_rewards_come_from_the_config_and_the_caller():
  config = changed(grpo, reward__accuracy=3.0, reward__format=0.5).replace(
    {"reward.more": "lenient_accuracy:0.25, kepo_jax.rewards.answer_format:4"}
  )
  scorer = setup.make_scorer(config, {"length": (half_length, 2.0)})
  assert list(scorer.rewards) == ["accuracy", "format", "lenient_accuracy", "answer_format", "length"]
  # 3 + 0.5 + 0.25 + 0 + 35 characters; 3 + 0 + 0.25 + 4 + 18.
  assert total(scorer, RIGHT) == 3.75 + 35 and total(scorer, "<answer>B</answer>") == 7.25 + 18
  product = setup.make_scorer(changed(grpo, reward__combination="product"), {})
  assert total(product, RIGHT) == 1.0 and total(product, "B") == 0.0
  for more, given, message in (
    ("lenient_accuracy:1", {"lenient_accuracy": (half_length, 1.0)}, "twice; give one of them another name"),
    ("unheard_of:1", {}, "reward 'unheard_of' is neither one of"),
  ):
    with pytest.raises(ValueError, match=message):
      setup.make_scorer(changed(grpo, reward__more=more), given)


def test_own_rollouts():
  # A typed third of 3 is 1 but for rounding.
  for rollouts, fraction, own in ((8, 1.0, 8), (8, 0.0, 0), (8, 0.375, 3), (3, 0.6666667, 2), (3, 0.3333333, 1)):
    found = changed(gkd, batch__rollouts=rollouts, batch__on_policy_fraction=fraction).own_rollouts
    assert found == own and isinstance(found, int)


def test_the_weight_of_the_divergence_is_constant_or_falls_to_zero():
  config = changed(kepo, train__steps=4)
  assert [float(setup.distill_factor(config)(step)) for step in range(5)] == [1.0] * 5
  config = config.replace({"objective.distill_schedule": "linear"})
  assert [float(setup.distill_factor(config)(step)) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def carried(kind, table, made):
  """What a record of `kind` holds after `table`, {field: (field of the config, value)}, was put into a config."""
  record = made(changed(grpo).replace(dict(table.values())))
  found = {field.name: getattr(record, field.name) for field in dataclasses.fields(kind)}
  defaults = {field.name: field.default for field in dataclasses.fields(kind)}
  # A value that equals its default would hide a field that is forgotten.
  assert [name for name in table if found[name] == defaults[name]] == []
  return found


def test_update_settings_carry_every_field():
  table = {
    "compute_dtype": ("model.compute_dtype", "bfloat16"), "chunk": ("objective.chunk", 5),
    "parts": ("batch.micro_batches", 4), "updates": ("batch.updates", 3), "frozen": ("model.freeze_vision", True),
    "remat": ("model.remat", "dots"), "aggregation": ("objective.aggregation", "constant_length"),
    "normaliser": ("objective.distill_normaliser", "group_mean"), "max_tokens": ("sampling.max_new_tokens", 77),
    "sequence_ratio": ("objective.ratio", "sequence"), "off_context": ("objective.off_context", "drop_unit_shaped"),
    "distill_factor": ("objective.distill_schedule", "linear"),
  }  # fmt: skip
  found = carried(update_lib.UpdateSettings, table, setup.update_settings)
  assert 0 < float(found.pop("distill_factor")(5)) < 1
  assert found == {name: value for name, (_, value) in table.items() if name != "distill_factor"} | {
    "compute_dtype": jnp.dtype("bfloat16"), "frozen": ("visual",), "sequence_ratio": True,
  }  # fmt: skip


def test_token_loss_carries_every_field():
  table = {
    "temperature": ("sampling.temperature", 0.9), "policy_coefficient": ("objective.policy_weight", 0.8),
    "clip_low": ("objective.clip_low", 0.1), "clip_high": ("objective.clip_high", 0.28),
    "importance_cap": ("objective.importance_cap", 2.0), "distill_coefficient": ("objective.distill_weight", 0.7),
    "divergence": ("objective.divergence", "reverse_kl"), "jsd_weight": ("objective.divergence_weight", 0.3),
    "top_k": ("objective.divergence_top_k", 100), "distill_temperature": ("objective.distill_temperature", 2.5),
    "reference_coefficient": ("objective.reference_weight", 0.04),
    "reference_estimator": ("objective.reference_estimator", "k2"),
    "supervised_coefficient": ("objective.supervised_weight", 0.6),
  }  # fmt: skip
  allowed = np.array([True, False, True])
  processor = types.SimpleNamespace(allowed=allowed)
  found = carried(losses.KepoTokenLoss, table, lambda config: setup.token_loss(config, processor))
  assert found.pop("allowed").tolist() == allowed.tolist()
  assert found == {name: value for name, (_, value) in table.items()}


@pytest.fixture
def built(monkeypatch, mesh_of):
  """`built(config)`: what the programs of a run are made of: (state, programs, arguments of their makers)."""

  def build(config):
    made = {"teacher": [], "update": []}

    def teacher_program(model, processor, settings):
      made["teacher"].append((model, settings))
      return settings

    for name, maker in {
      "sampling_program": lambda model, processor, settings, name: settings,
      "teacher_program": teacher_program,
      "decode_weights_program": lambda config, params, dtype: dtype,
      "targets_program": lambda models, parts: (models, parts),
    }.items():
      monkeypatch.setattr(programs, name, maker)
    monkeypatch.setattr(setup.update, "Update", lambda *arguments: made["update"].append(arguments))
    params = {name: {"w": np.ones(3, np.float32)} for name in ("visual", "language_model")}
    student = programs.Model("config", jax.device_put(params, sharding.replicated(mesh_of())))
    models = {"student": student, "teacher": "the teacher", "reference": "the reference"}
    processor = types.SimpleNamespace(allowed=np.ones(3, bool))
    return *setup.build_programs(config, processor, models), made

  return build


def test_the_programs_of_kepo(built):
  changes = {"batch.rollouts": 6, "batch.micro_batches": 2, "eval.max_new_tokens": 40}
  changes |= {"sampling.max_new_tokens": 20, "sampling.temperature": 0.9, "sampling.top_p": 0.95, "sampling.top_k": 50}
  changes |= {"exploration.hint_tokens": 30, "exploration.hint_temperature": 0.6}
  changes |= {"model.compute_dtype": "bfloat16", "model.teacher_dtype": "float16"}
  first, made, arguments = built(changed(kepo).replace(changes))
  settings = programs.SamplingSettings
  assert made.rollout == settings(6, 20, 0.9, 0.95, 50)
  assert made.candidate == settings(2, 20, 0.9, 0.95, 50)  # the student's usual settings, K of them
  assert made.greedy == settings(1, 40, 0.0)
  assert made.hint == settings(1, 30, 0.6) and arguments["teacher"] == [("the teacher", made.hint)]
  assert made.answer is programs.no_teacher and made.decode_weights == jnp.dtype("bfloat16")
  assert made.targets == (["the teacher"], 2)
  ((model, _, loss, update, state_of),) = arguments["update"]
  assert (model, loss.distill_coefficient, update.parts) == ("config", 1.0, 2)
  assert state_of is first and int(first.step) == 0


def test_the_teacher_answers_for_the_rows_that_the_student_leaves(built):
  _, made, _ = built(changed(gkd, batch__on_policy_fraction=0.25, supervised__temperature=0.5))
  assert made.rollout.samples == 2 and made.answer == programs.SamplingSettings(6, 24, 0.5)
  _, made, _ = built(changed(sft_teacher))
  assert made.answer.samples == 8 and made.answer.temperature == 1.0
  # Where no teacher is used none is made.
  _, made, arguments = built(changed(sft))
  assert arguments["teacher"] == []
  for ask in (made.hint, made.answer):
    with pytest.raises(ValueError, match="no teacher to ask; see exploration"):
      ask("prompts", "key")


def small(**changes):
  sizes = {"train__steps": 1, "eval__every": 0, "eval__test": False, "checkpoint__every": 0}
  return shrunk(changed(kepo), **sizes | changes)


def usable(config, records=None, hooks=()):
  processor = processor_lib.Processor.from_directory(
    ASSETS / "confused", templates=prompts.TEMPLATES[config.data.templates], resize=config.data.resize,
    prompt_buckets=tuple(config.data.prompt_buckets), patch_buckets=tuple(config.data.patch_buckets),
  )  # fmt: skip
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
  Image.new("L", (3000, 10)).save(tmp_path / "3.png")
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
