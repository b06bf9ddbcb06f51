"""Every field of the config arrives at what it names."""

import dataclasses
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import gkd, grpo, kepo, kepo_eq7, sft, sft_teacher
from kepo_jax import rewards, sharding
from kepo_jax.objectives import losses
from kepo_jax.training import optimizer, programs, setup
from kepo_jax.training import update as update_lib
from tests.training.cases import RIGHT, example
from tests.training.runs import changed

LENIENT = "<think>a</think><answer>(b)</answer>"


def total(scorer, text):
  return float(scorer([[text]], [example("x")])["total"][0, 0])


def half_length(completion, example):
  """Half a point per character."""
  del example
  return len(completion) / 2


def test_the_scorer_of_a_config():
  config = changed(grpo, reward__accuracy=3.0, reward__format=0.5)
  scorer = setup.make_scorer(config, {})
  assert total(scorer, RIGHT) == 3.5 and total(scorer, LENIENT) == 0.5 and total(scorer, "B") == 3.0
  product = setup.make_scorer(config.replace({"reward.combination": "product"}), {})
  assert total(product, RIGHT) == 3.0 and total(product, LENIENT) == total(product, "B") == 0.0


def test_the_scorer_follows_its_convention():
  for convention, expected in rewards.CONVENTIONS.items():
    found = setup.make_scorer(changed(grpo, reward__convention=convention), {}).rewards
    assert found == {"accuracy": (expected.accuracy, 1.0), "format": (expected.format, 1.0)}


def test_more_rewards_come_from_the_config_and_the_caller():
  config = changed(grpo, reward__more="lenient_accuracy:0.25, kepo_jax.rewards.answer_format:4")
  scorer = setup.make_scorer(config, {"length": (half_length, 2.0)})
  assert list(scorer.rewards) == ["accuracy", "format", "lenient_accuracy", "answer_format", "length"]
  # 1 + 1 + 0.25 + 0 + 35 characters; 1 + 0 + 0.25 + 4 + 18.
  assert total(scorer, RIGHT) == 2.25 + 35 and total(scorer, "<answer>B</answer>") == 5.25 + 18


def test_rewards_that_cannot_be_are_refused():
  for more, given, message in (
    ("kepo_jax.rewards.accuracy:1", {}, r"\['accuracy'\] are there twice"),  # called by the last part of its name
    ("lenient_accuracy:1", {"lenient_accuracy": (half_length, 1.0)}, "twice; give one of them another name"),
    ("", {"total": (half_length, 1.0)}, "none called 'total'"),
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


def test_the_learning_rate():
  config = changed(grpo, optimizer__learning_rate=0.4, optimizer__warmup_steps=2, train__steps=6)
  # Two steps up to the peak, four down to zero.
  expected = [0.2, 0.4, 0.4, 0.3, 0.2, 0.1, 0.0]
  np.testing.assert_allclose([setup.make_schedule(config)(step) for step in range(7)], expected, rtol=1e-6, atol=1e-9)


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
    "compute_dtype": ("model.compute_dtype", "bfloat16"),
    "chunk": ("objective.chunk", 5),
    "parts": ("batch.micro_batches", 4),
    "updates": ("batch.updates", 3),
    "frozen": ("model.freeze_vision", True),
    "remat": ("model.remat", "dots"),
    "aggregation": ("objective.aggregation", "constant_length"),
    "normaliser": ("objective.distill_normaliser", "group_mean"),
    "max_tokens": ("sampling.max_new_tokens", 77),
    "sequence_ratio": ("objective.ratio", "sequence"),
    "off_context": ("objective.off_context", "drop_unit_shaped"),
    "distill_factor": ("objective.distill_schedule", "linear"),
  }
  found = carried(update_lib.UpdateSettings, table, setup.update_settings)
  assert 0 < float(found.pop("distill_factor")(5)) < 1
  assert found == {name: value for name, (_, value) in table.items() if name != "distill_factor"} | {
    "compute_dtype": jnp.dtype("bfloat16"),
    "frozen": ("visual",),
    "sequence_ratio": True,
  }


def test_token_loss_carries_every_field():
  table = {
    "temperature": ("sampling.temperature", 0.9),
    "policy_coefficient": ("objective.policy_weight", 0.8),
    "clip_low": ("objective.clip_low", 0.1),
    "clip_high": ("objective.clip_high", 0.28),
    "importance_cap": ("objective.importance_cap", 2.0),
    "distill_coefficient": ("objective.distill_weight", 0.7),
    "divergence": ("objective.divergence", "reverse_kl"),
    "jsd_weight": ("objective.divergence_weight", 0.3),
    "top_k": ("objective.divergence_top_k", 100),
    "distill_temperature": ("objective.distill_temperature", 2.5),
    "reference_coefficient": ("objective.reference_weight", 0.04),
    "reference_estimator": ("objective.reference_estimator", "k2"),
    "supervised_coefficient": ("objective.supervised_weight", 0.6),
  }
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
    monkeypatch.setattr(setup.step, "Update", lambda *arguments: made["update"].append(arguments))
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
  assert made.answer is programs.no_teacher
  assert made.decode_weights == jnp.dtype("bfloat16")
  assert made.targets == (["the teacher"], 2)
  ((model, _, loss, update, state_of),) = arguments["update"]
  assert (model, loss.distill_coefficient, update.parts) == ("config", 1.0, 2)
  assert state_of is first and int(first.step) == 0


def test_who_scores_the_rollouts(built):
  for parent, changes, targets in (
    (grpo, {}, []),
    (grpo, {"objective__reference_weight": 0.1}, ["the reference"]),
    (kepo_eq7, {}, ["the teacher", "the reference"]),  # in the order that the loss expects
  ):
    _, made, _ = built(changed(parent, exploration__candidates=5, **changes))
    assert made.targets == (targets, 1) and made.candidate.samples == 5


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


def test_the_optimizer_has_the_fields_of_the_config(built):
  changes = {"b1": 0.5, "b2": 0.6, "eps": 1e-3, "weight_decay": 0.25, "clip_norm": 7.0}
  fields = {f"optimizer.{name}": value for name, value in (changes | {"moments": "bfloat16"}).items()}
  config = changed(grpo, model__freeze_vision=True, batch__updates=2).replace(fields)
  with unittest.mock.patch.object(optimizer, "make_optimizer", wraps=optimizer.make_optimizer) as make:
    first, _, _ = built(config)
  assert make.call_args.kwargs == changes | {"moments_dtype": "bfloat16"}
  # Two moments of the language model; the tower has none.
  assert sum(leaf.shape == (3,) for leaf in jax.tree.leaves(first.opt_state)) == 2
