"""What is refused before anything is loaded: the field is named, and the way out."""

import re

import pytest
from absl import logging

from experiments.configs import gkd, grpo, kepo, kepo_ke, sft, sft_teacher
from kepo_jax.data import prompts
from kepo_jax.models.qwen3_vl.config import Qwen3VLConfig
from kepo_jax.training import checks
from tests.training.runs import ASSETS, changed


def one(field, value):
  """KEPO with one field changed."""
  return changed(kepo, **{field.replace(".", "__"): value})


@pytest.fixture
def warned(monkeypatch):
  """Messages of warnings."""
  said = []
  monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
  return said


def refusal(config):
  """What is said of a config; nothing where it is taken."""
  try:
    checks.check_config(config)
  except ValueError as error:
    return str(error)
  return ""


def test_every_choice_is_taken_and_nothing_else():
  for field, choices in checks.CHOICES.items():
    for value in choices:
      assert refusal(one(field, value)) == ""
    for value in ("else", "", None):
      assert re.match(f"{field}={value!r} is unknown; use one of ", refusal(one(field, value))), (field, value)


def test_every_kind_of_prompt_has_a_wording():
  for field in ("data.prompt", "eval.prompt", "exploration.hint_prompt"):
    assert all(getattr(prompts.BRIEF, kind) for kind in checks.CHOICES[field]), field


def test_names_that_others_use_are_translated():
  for theirs, hint in checks.ELSEWHERE.items():
    assert f"(what others call {theirs} is {hint}" in refusal(one("objective.advantage", theirs))
    named = re.findall(r"(objective\.\w+)=(\w+)", hint)
    assert named and all(value in checks.CHOICES[where] for where, value in named), theirs


def test_values_below_the_least_are_refused():
  for field, least in checks.LEAST.items():
    for value in (least - 1, float("nan")):
      message = rf"{field}={value}(\.0)? is too small; use {least} or more\.$"
      assert re.match(message, refusal(one(field, value))), (field, value)
    assert "too small" not in refusal(one(field, least))
  config = kepo.get_config()
  config.seed = -1  # NumPy's generators refuse it, at the first injection
  assert refusal(config) == "seed=-1 must be 0 or more."


NAN = float("nan")
HALF = {"batch__on_policy_fraction": 0.5}
# What does not fit together: (parent, changes, what is said).
REFUSED = [
  (kepo, {"mesh__data": 0}, "mesh.data=0 .* use -1"),
  # Sampling.
  (kepo, {"sampling__temperature": 0.0}, "sampling.temperature=0.0 gives G equal rollouts; use a value above 0"),
  (kepo, {"sampling__top_p": 0.0}, "sampling.top_p=0.0 must lie above 0 and at most at 1"),
  (kepo, {"sampling__top_p": 1.1}, "sampling.top_p=1.1"),
  (kepo, {"objective__distill_temperature": 0.0}, "objective.distill_temperature=0.0 must lie above 0"),
  # Rows.
  (kepo, {"batch__prompts": 8, "batch__micro_batches": 3}, "batch.prompts=8 does not divide into .*micro_batches=3"),
  (gkd, {"batch__on_policy_fraction": 0.3}, "fraction=0.3 of batch.rollouts=8 is 2.4 rollouts.* multiple of 1/8"),
  (gkd, {"batch__on_policy_fraction": 1.5}, "on_policy_fraction=1.5 .*is 12 rollouts; use a multiple of 1/8"),
  (grpo, HALF, "on_policy_fraction=0.5 leaves rows to others; set supervised.source to"),
  (kepo, {"exploration__replacements": 8}, "exploration.replacements=8 must lie in 0..7, so that a group keeps"),
  # Half of the eight rollouts are the student's, and one of them must stay.
  (kepo, HALF | {"exploration__replacements": 4, "supervised__source": "teacher"}, "=4 must lie in 0..3"),
  (sft, {"sampling__dynamic_rounds": 2}, "dynamic_rounds looks at the student's rollouts, and .*fraction=0 has none"),
  # Teachers.
  (kepo_ke, {"model__teacher": ""}, "need model.teacher; set it, or use experiments/configs/grpo.py"),
  # Terms.
  (kepo, {"objective__divergence_weight": 1.5}, r"objective.divergence_weight=1.5 must lie in \[0, 1\]"),
  (kepo, {"objective__divergence": "sampled_k2", "objective__divergence_top_k": 5}, "set objective.divergence_top_k=0"),
  (grpo, {"objective__supervised_weight": 1.0}, "supervised_weight needs supervised rows; set batch.on_policy_fra"),
  (grpo, {"objective__policy_weight": 0.0}, "nothing is learnt: set objective.policy_weight"),
  # The policy term has no row.
  (sft, {"objective__policy_weight": 1.0, "objective__supervised_weight": 0.0}, "supervised rows enter no term: set"),
  (grpo, {"batch__rollouts": 1}, "no other to be compared with.*raise batch.rollouts"),
  (sft, {"objective__reference_weight": 0.1}, "reference_weight looks at the student's rollouts, and there are none"),
  (grpo, {"objective__importance_cap": 0.5}, "importance_cap=0.5 scales every token down; use 1 or more"),
  (grpo, {"objective__clip_low": 0.0}, "clip_low=0.0 and clip_high=0.2 must be above 0"),
  (grpo, {"objective__clip_high": 0.0}, "clip_high=0.0 must be above 0, .*large numbers switch it off"),
  (kepo, {"objective__gate_threshold": 2.0}, "gate_threshold=2.0 with gate_mode=positive distils nothing: .*0 and 1"),
  (kepo, {"objective__gate_threshold": NAN}, "gate_threshold=nan .* distils nothing"),
  (kepo, {"objective__gate_threshold": 0.0, "objective__gate_mode": "negative"}, "gate_mode=negative distils nothing"),
  (grpo, {"optimizer__b2": 1.0}, r"optimizer.b2=1.0 must lie in \[0, 1\)"),
  (grpo, {"optimizer__eps": 0.0}, "optimizer.eps=0.0 must lie above 0"),
  (grpo, {"optimizer__clip_norm": 0.0}, "optimizer.clip_norm=0.0 leaves no gradient; use a value above 0"),
  # LoRA.
  (grpo, {"model__lora_rank": 8, "model__lora_alpha": 0.0}, "model.lora_alpha=0.0 must lie above 0"),
  (grpo, {"model__lora_rank": 8, "model__lora_targets": ("q_proj", "qkv")}, r"each once; \['qkv'\] are no projections"),
  (grpo, {"model__lora_rank": 8, "model__lora_targets": ()}, r"model.lora_targets=\(\) must name one or more of"),
  (grpo, {"model__lora_rank": 8, "model__lora_targets": ("q_proj",) * 2}, "model.lora_targets=.* each once"),
]


@pytest.mark.parametrize(("parent", "changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused(parent, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    checks.check_config(changed(parent, **changes))
  config = parent.get_config()
  named = re.findall(r"\b([a-z]+)\.([a-z_]+\w)", str(error.value))
  assert any(section in config and field in config[section] for section, field in named)
  checks.check_config(config)  # the parent alone is fine


@pytest.mark.parametrize(
  ("parent", "changes"),
  [
    (gkd, {"batch__on_policy_fraction": 0.0}),
    (gkd, {"batch__rollouts": 3, "batch__on_policy_fraction": 0.6666667}),  # as one types it
    (kepo, {"exploration__replacements": 7}),
    (kepo, {"exploration__replacements": 9, "exploration__trigger": "never"}),
    (kepo, {"model__teacher": "", "objective__distill_weight": 0.0, "exploration__trigger": "never"}),
    (sft, {"model__teacher": ""}),
    (sft_teacher, {"objective__supervised_weight": 0.0, "objective__distill_weight": 1.0}),
    (kepo, {"objective__divergence": "reverse_kl", "objective__divergence_top_k": 5}),
    (kepo, {"objective__gate_signal": "sum", "objective__gate_threshold": 2.0}),
    (kepo, {"mesh__data": -1}),
    (kepo, {"model__lora_rank": 1, "model__lora_targets": ("down_proj",), "model__freeze_vision": True}),
    (kepo, {"model__lora_alpha": 0.0, "model__lora_targets": ("nothing",)}),  # idle
  ],
)
def test_what_fits_is_taken(parent, changes):
  checks.check_config(changed(parent, **changes))


@pytest.mark.parametrize(
  ("parent", "changes", "explores", "teacher_answers", "needs_teacher"),
  [
    (grpo, {}, False, False, False),
    (kepo_ke, {}, False, False, True),
    (kepo, {}, True, False, True),
    (kepo, {"objective__distill_weight": 0.0}, True, False, True),
    (kepo, {"exploration__trigger": "never"}, False, False, True),
    (kepo, {"exploration__rounds": 0}, False, False, True),
    (kepo, {"exploration__replacements": 0, "objective__distill_weight": 0.0}, False, False, False),
    (gkd, HALF, False, True, True),
    (sft, {}, False, False, False),
    (sft_teacher, {}, False, True, True),
    (sft_teacher, {"batch__on_policy_fraction": 1.0}, False, False, False),
  ],
)
def test_who_is_needed(parent, changes, explores, teacher_answers, needs_teacher):
  config = changed(parent, **changes)
  assert checks.explores(config) is explores
  assert checks.teacher_answers(config) is teacher_answers
  assert checks.needs_teacher(config) is needs_teacher


def test_what_is_warned_of(warned, tmp_path):
  k1, weight = {"objective__reference_estimator": "k1"}, {"objective__reference_weight": 0.1}
  parts = changed(grpo, batch__micro_batches=2)  # 8 prompts x 8 rollouts in parts of 4
  other = changed(grpo, data__templates="brief", model__student="other")
  for check, arguments, said in (
    (checks.check_config, [changed(kepo, **k1)], []),  # without weight: idle
    (checks.check_config, [changed(kepo, objective__reference_estimator="k3", **weight)], []),
    (checks.check_config, [changed(kepo, **k1, **weight)], ["objective.reference_estimator=k1: .* use k2 or k3"]),
    *((checks.warn_of_prompts, [parent.get_config()], []) for parent in (kepo, sft, sft_teacher)),
    (checks.warn_of_prompts, [changed(kepo, data__prompt="no_think")], ["data.prompt=no_think .*=med_r1 rewards"]),
    (checks.warn_of_prompts, [changed(kepo, reward__convention="no_think")], ["data.prompt=think .*=no_think rewards"]),
    (checks.warn_of_replication, [parts, {"data": 2, "fsdp": 4}], []),  # 4 prompts on 2, 8 rollouts on 4
    (checks.warn_of_replication, [parts, {"data": 8, "fsdp": 1}], ["a micro-batch: 4 prompts x 8 rollouts do not"]),
    (checks.warn_of_replication, [changed(grpo, eval__prompts=6), {"data": 4, "fsdp": 1}], ["eval.prompts=6 does not"]),
    (checks.warn_of_templates, [changed(grpo, data__templates="brief"), ASSETS / "confused"], []),
    (checks.warn_of_templates, [changed(grpo, data__templates="standard"), tmp_path], []),  # it declares nothing
    (
      checks.warn_of_templates,
      [changed(grpo, data__templates="standard"), ASSETS / "confused"],
      [".*=standard, .*brief"],
    ),
    (checks.warn_of_templates, [other, tmp_path], ["data.templates=brief, but other knows the wordings standard"]),
  ):
    warned.clear()
    check(*arguments)
    assert len(warned) == len(said) and all(map(re.match, said, warned)), (check.__name__, said, warned)


def test_a_rank_that_is_not_low_is_refused():
  student = Qwen3VLConfig.from_directory(ASSETS / "confused")
  smallest = student.text.num_key_value_heads * student.text.head_dim
  checks.check_rank(changed(kepo, model__lora_rank=smallest - 1), student)
  checks.check_rank(changed(kepo, model__lora_rank=smallest, model__lora_targets=("gate_proj",)), student)
  checks.check_rank(changed(kepo, model__lora_rank=0), student)
  message = f"model.lora_rank={smallest} is no lower than a side of .*confused; use {smallest - 1} or less, or 0"
  with pytest.raises(ValueError, match=message):
    checks.check_rank(changed(kepo, model__lora_rank=smallest), student)
