import math

import pytest

from kepo_jax.reporting import warnings
from tests.conftest import ROOT

HEALTHY = {
  "completion/truncated_frac": 0.1, "reward/format": 0.5, "dead_group_rate": 0.25,
  "hint/accept_rate@1": 0.0, "hint/accept_rate@2": 0.5, "grad_norm": 1.0, "kl/ref": 0.01,
}  # fmt: skip


def after(watch, steps, **figures):
  return [message for _ in range(steps) for message in watch.step(HEALTHY | figures)]


@pytest.mark.parametrize(("figures", "anchor"), [
  ({"completion/truncated_frac": 0.97}, "truncated-answers"),
  ({"reward/format": 0.0}, "format-at-zero"),
  ({"dead_group_rate": 1.0}, "dead-groups"),
  ({"hint/accept_rate@1": 0.0, "hint/accept_rate@2": 0.0}, "hints-never-accepted"),
])  # fmt: skip
def test_a_signature_is_said_once_after_a_window_in_a_row(figures, anchor):
  watch = warnings.Watch(window=3)
  bad = HEALTHY | figures
  assert watch.step(bad) == [] and watch.step(bad) == []
  assert watch.step(HEALTHY) == []  # the streak breaks
  assert watch.step(bad) == [] and watch.step(bad) == []
  (message,) = watch.step(bad)
  assert f"docs/troubleshooting.md#{anchor}" in message
  assert [watch.step(bad) for _ in range(10)] == [[]] * 10


def test_steps_without_failed_prompts_do_not_break_a_streak_of_unaccepted_hints():
  watch = warnings.Watch(window=2)
  assert watch.step({"hint/accept_rate@1": 0.0}) == [] and watch.step({"reward/format": 1.0}) == []
  assert "never" not in "".join(watch.step({})) and len(watch.step({"hint/accept_rate@1": 0.0})) == 1


def test_divergence_is_said_at_once():
  assert after(warnings.Watch(window=3), 50) == [] and warnings.Watch(window=1).step({}) == []  # all is well
  for name, value in (("grad_norm", math.nan), ("loss", math.inf), ("kl/ref", 1.5)):
    (message,) = warnings.Watch().step(HEALTHY | {name: value})
    assert message.startswith(name) and "#divergence" in message


def test_a_gradient_norm_far_above_its_median_for_three_steps_is_divergence():
  watch = warnings.Watch(window=5)
  after(watch, 5)
  assert after(watch, 2, grad_norm=30.0) == []
  assert after(watch, 1) == []  # one healthy step: a spike, not a divergence
  assert len(after(watch, 3, grad_norm=30.0)) == 1
  watch = warnings.Watch(window=5)  # steps without a signal do not set the usual norm
  assert after(watch, 30, grad_norm=0.0) == after(watch, 30, grad_norm=1.0) == []


def test_falling_out_of_domain_while_rising_in_domain():
  watch = warnings.Watch()
  assert watch.evaluation(0.5, 0.60) == [] and watch.evaluation(0.6, 0.58) == []
  (message,) = watch.evaluation(0.7, 0.55)
  assert "55.0%" in message and "#forgetting" in message
  both_fall = warnings.Watch()
  assert [both_fall.evaluation(a, a) for a in (0.7, 0.6, 0.5)] == [[], [], []]


def test_every_warning_has_its_section():
  text = (ROOT / "docs" / "troubleshooting.md").read_text()
  headings = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
  assert set(warnings.MESSAGES) <= headings
