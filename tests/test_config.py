import dataclasses
import json
import re
import typing

import pytest

from experiments.configs import gkd, grpo, kepo, kepo_ke, sft, sft_teacher
from kepo_jax import exploration, rewards
from kepo_jax.config import PROJECTIONS, Config
from kepo_jax.data import images, prompts
from kepo_jax.models.qwen3_vl import attention, layers, lora
from kepo_jax.objectives import advantages, divergences, gate, ratios, weights
from kepo_jax.training import programs, update
from tests.training.runs import changed


def legal(field):
  section, name = field.split(".")
  hint = typing.get_type_hints(type(getattr(Config(), section)))[name]
  return set(typing.get_args(hint))


def test_legal_values_are_those_that_the_library_has():
  for field, values in {
    "model.teacher_memory": programs.PLACES, "model.remat": layers.REMAT, "model.attention": attention.IMPLEMENTATIONS,
    "data.resize": images.RESIZES, "data.templates": prompts.TEMPLATES, "reward.convention": rewards.CONVENTIONS,
    "reward.combination": rewards.COMBINATIONS, "objective.advantage": advantages.ESTIMATORS,
    "objective.aggregation": weights.AGGREGATIONS, "objective.off_context": update.OFF_CONTEXT,
    "objective.divergence": divergences.KINDS, "objective.distill_normaliser": weights.NORMALISERS,
    "objective.gate_signal": gate.SIGNALS, "objective.gate_mode": gate.MODES,
    "objective.reference_estimator": ratios.KL_ESTIMATORS, "exploration.trigger": exploration.TRIGGERS,
    "exploration.hints": exploration.HINTS, "exploration.acceptance": exploration.ACCEPTANCE_RULES,
  }.items():  # fmt: skip
    assert legal(field) == set(values), field
  assert set(PROJECTIONS) == set(lora.TARGETS)
  for field in ("data.prompt", "eval.prompt", "exploration.hint_prompt"):
    assert all(getattr(prompts.BRIEF, kind) for kind in legal(field)), field


def test_a_config_is_changed_by_full_names_and_read_back():
  config = Config().replace({"seed": 3, "train.steps": 5, "data.prompt_buckets": [64]})
  assert (config.seed, config.train.steps, config.data.prompt_buckets) == (3, 5, (64,)) and Config().seed == 0
  assert Config.from_dict(json.loads(config.to_json())) == config != Config()
  assert Config.from_dict({"seed": 3, "train": {"steps": 5}, "data": {"prompt_buckets": [64]}}) == config
  with pytest.raises(ValueError, match="no field train.step; did you mean train.steps?"):
    Config.from_dict({"train": {"step": 5}})
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 1


def test_a_value_of_another_kind_is_refused():
  for field, value, said in (
    ("objective.advantage", "else", "'else' is unknown; use one of ['batch_std', 'group_std', 'no_std', 'rloo']."),
    ("objective.advantage", "dapo", "(what others call dapo is objective.aggregation=token_mean)"),
    ("exploration.trigger", None, "None is unknown; use one of"),
    ("batch.prompts", 0, "=0 is too small; use 1 or more."),
    ("batch.prompts", 2.0, "=2.0 must be an int."), ("train.compile_ahead", 1, "=1 must be a bool."),
    ("model.student", None, "=None must be a str."), ("data.prompt_buckets", (64, "x"), "='x' must be an int."),
    ("mesh.data", -2, "=-2 is too small; use -1 or more."),
    ("optimizer.learning_rate", float("nan"), "=nan is too small; use 0 or more."),
    ("seed", -1, "=-1 is too small; use 0 or more."),  # NumPy's generators refuse it, at the first injection
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f"{field}.*{re.escape(said)}"):
      changed(kepo).replace({field: value}).validate()


NAN = float("nan")
HALF = {"batch__on_policy_fraction": 0.5}


@pytest.mark.parametrize(("parent", "changes", "message"), [  # what does not fit together
  (kepo, {"mesh__data": 0}, "mesh.data=0 .* use -1"),
  (kepo, {"sampling__temperature": 0.0}, "sampling.temperature=0.0 gives G equal rollouts; use a value above 0"),
  (kepo, {"sampling__top_p": 0.0}, "sampling.top_p=0.0 must lie above 0 and at most at 1"),
  (kepo, {"objective__distill_temperature": 0.0}, "objective.distill_temperature=0.0 must lie above 0"),
  (kepo, {"batch__prompts": 8, "batch__micro_batches": 3}, "batch.prompts=8 does not divide into .*micro_batches=3"),
  (gkd, {"batch__on_policy_fraction": 0.3}, "fraction=0.3 of batch.rollouts=8 is 2.4 rollouts.* multiple of 1/8"),
  (gkd, {"batch__on_policy_fraction": 1.5}, "on_policy_fraction=1.5 .*is 12 rollouts; use a multiple of 1/8"),
  (grpo, HALF, "on_policy_fraction=0.5 leaves rows unfilled; set supervised.source to"),
  (kepo, {"exploration__replacements": 8}, "exploration.replacements=8 must lie in 0..7, so that a group keeps"),
  # Half of the eight rollouts are the student's, and one of them must stay.
  (kepo, HALF | {"exploration__replacements": 4, "supervised__source": "teacher"}, "=4 must lie in 0..3"),
  (sft, {"sampling__dynamic_rounds": 2}, "dynamic_rounds looks at the student's rollouts, and .*fraction=0 has none"),
  (kepo_ke, {"model__teacher": ""}, "need model.teacher; set it, or set objective.distill_weight=0"),
  (kepo, {"objective__divergence_weight": 1.5}, r"objective.divergence_weight=1.5 must lie in \[0, 1\]"),
  (kepo, {"objective__divergence": "sampled_k2", "objective__divergence_top_k": 5}, "set objective.divergence_top_k=0"),
  (grpo, {"objective__supervised_weight": 1.0}, "supervised_weight needs supervised rows; set batch.on_policy_fra"),
  (grpo, {"objective__policy_weight": 0.0}, "nothing is learnt: set objective.policy_weight"),
  # The policy term has no row.
  (sft, {"objective__policy_weight": 1.0, "objective__supervised_weight": 0.0}, "supervised rows enter no term: set"),
  (grpo, {"batch__rollouts": 1}, "one rollout per group.*raise batch.rollouts"),
  (sft, {"objective__reference_weight": 0.1}, "reference_weight looks at the student's rollouts, and there are none"),
  (grpo, {"objective__importance_cap": 0.5}, "importance_cap=0.5 scales every token down; use 1 or more"),
  (grpo, {"objective__clip_low": 0.0}, "clip_low=0.0 and clip_high=0.2 must be above 0"),
  (grpo, {"objective__clip_high": 0.0}, "clip_high=0.0 must be above 0; .*large numbers switch it off"),
  (kepo, {"objective__gate_threshold": 2.0}, "gate_threshold=2.0 with gate_mode=positive distils nothing: .*0 and 1"),
  (kepo, {"objective__gate_threshold": NAN}, "gate_threshold=nan .* distils nothing"),
  (kepo, {"objective__gate_threshold": 0.0, "objective__gate_mode": "negative"}, "gate_mode=negative distils nothing"),
  (grpo, {"optimizer__b2": 1.0}, r"optimizer.b2=1.0 must lie in \[0, 1\)"),
  (grpo, {"optimizer__eps": 0.0}, "optimizer.eps=0.0 must lie above 0"),
  (grpo, {"optimizer__clip_norm": 0.0}, "optimizer.clip_norm=0.0 leaves no gradient; use a value above 0"),
  (grpo, {"model__lora_rank": 8, "model__lora_alpha": 0.0}, "model.lora_alpha=0.0 must lie above 0"),
  (grpo, {"model__lora_rank": 8, "model__lora_targets": ("q_proj", "qkv")}, "lora_targets=.qkv. is unknown; use one"),
  (grpo, {"model__lora_rank": 8, "model__lora_targets": ()}, r"model.lora_targets=\(\) must name one or more of"),
  (grpo, {"model__lora_rank": 8, "model__lora_targets": ("q_proj",) * 2}, "model.lora_targets=.* each once"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(parent, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    changed(parent, **changes).validate()
  assert set(re.findall(r"\b[a-z]+\.[a-z_]+\w", str(error.value))) & changed(parent).fields().keys()
  changed(parent).validate()  # the parent alone is fine


def test_what_fits_is_taken():
  for parent, changes in (
    (gkd, {"batch__on_policy_fraction": 0.0}), (sft, {"model__teacher": ""}), (kepo, {"mesh__data": -1}),
    (gkd, {"batch__rollouts": 3, "batch__on_policy_fraction": 0.6666667}),  # as one types it
    (kepo, {"exploration__replacements": 7}),
    (kepo, {"exploration__replacements": 9, "exploration__trigger": "never"}),
    (kepo, {"model__teacher": "", "objective__distill_weight": 0.0, "exploration__trigger": "never"}),
    (sft_teacher, {"objective__supervised_weight": 0.0, "objective__distill_weight": 1.0}),
    (kepo, {"objective__divergence": "reverse_kl", "objective__divergence_top_k": 5}),
    (kepo, {"objective__gate_signal": "sum", "objective__gate_threshold": 2.0}),
    (kepo, {"model__lora_rank": 1, "model__lora_targets": ("down_proj",), "model__freeze_vision": True}),
    (kepo, {"model__lora_alpha": 0.0, "model__lora_targets": ("q_proj",)}),  # idle
  ):  # fmt: skip
    changed(parent, **changes).validate()


def test_who_is_needed():
  for parent, changes, needed in (
    (grpo, {}, ""), (sft, {}, ""), (kepo_ke, {}, "needs_teacher"), (kepo, {}, "explores, needs_teacher"),
    (kepo, {"objective__distill_weight": 0.0}, "explores, needs_teacher"),
    (kepo, {"exploration__trigger": "never"}, "needs_teacher"), (kepo, {"exploration__rounds": 0}, "needs_teacher"),
    (kepo, {"exploration__replacements": 0, "objective__distill_weight": 0.0}, ""),
    (gkd, HALF, "teacher_answers, needs_teacher"), (sft_teacher, {}, "teacher_answers, needs_teacher"),
    (sft_teacher, {"batch__on_policy_fraction": 1.0}, ""),
  ):  # fmt: skip
    config = changed(parent, **changes)
    names = [name for name in ("explores", "teacher_answers", "needs_teacher") if getattr(config, name)]
    assert ", ".join(names) == needed, (parent, changes)
