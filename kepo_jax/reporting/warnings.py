"""Failure signatures of a run, each said once and in plain words; docs/troubleshooting.md has a section for each."""

import collections
import math
import statistics
from collections.abc import Mapping

_SEE = "See docs/troubleshooting.md#{anchor}."

MESSAGES = {
  "truncated-answers": "{steps} steps in a row nearly every completion was cut off before its end: the model has no "
  "room to answer. Raise sampling.max_new_tokens, or start from a student that stops.",
  "format-at-zero": "{steps} steps in a row no completion had the required format, so nothing can be rewarded in full "
  "or accepted. Look at samples.jsonl: does the prompt ask for the tags, does the chat template open a think block?",
  "dead-groups": "{steps} steps in a row every group had equal rewards, so there was no policy gradient. The questions "
  "are all too easy or all too hard for this student: change the data, raise sampling.temperature or use exploration.",
  "hints-never-accepted": "{steps} steps with hints in a row no hinted candidate was accepted: the hints do not help, "
  "or there are too few rounds. Read the hints in samples.jsonl, try a better teacher or raise exploration.rounds.",
  "forgetting": "Out-of-domain accuracy on the validation set fell twice in a row, to {out:.1%}, while in-domain "
  "accuracy rose to {inside:.1%}. Consider stopping here: an earlier checkpoint generalises better.",
  "divergence": "{name} is {value:.3g}, {reason}. The run is likely diverging: lower optimizer.learning_rate or "
  "optimizer.clip_norm, or raise objective.reference_weight.",
}


class Watch:
  """Follows the figures of a run and returns each warning once."""

  def __init__(self, *, window: int = 10, blow_up: float = 20.0, kl_limit: float = 1.0, tolerated_fall: float = 0.02):
    """Sets the thresholds.

    Args:
      window: steps in a row for which a signature must hold.
      blow_up: a gradient norm this many times its median, three steps in a row, counts as diverging.
      kl_limit: KL to the reference in nats per token from which the policy counts as lost.
      tolerated_fall: fall of out-of-domain accuracy that is taken for noise.
    """
    self._window = window
    self._blow_up = blow_up
    self._kl_limit = kl_limit
    self._tolerated_fall = tolerated_fall
    self._streaks: collections.Counter[str] = collections.Counter()
    self._norms: collections.deque[float] = collections.deque(maxlen=50)
    self._accuracies: list[tuple[float, float]] = []
    self._said: set[str] = set()

  def step(self, metrics: Mapping[str, float]) -> list[str]:
    """Returns the warnings that the metrics of one more step give rise to; an absent metric gives none."""
    messages = []
    for anchor, holds in self._signatures(metrics).items():
      if holds is not None:
        self._streaks[anchor] = self._streaks[anchor] + 1 if holds else 0
      if self._streaks[anchor] >= self._window:
        messages += self._say(anchor, steps=self._window)
    return messages + self._divergence(metrics)

  def evaluation(self, in_domain: float, out_of_domain: float) -> list[str]:
    """Returns the warnings after one more validation: accuracies in [0, 1]."""
    self._accuracies.append((in_domain, out_of_domain))
    if len(self._accuracies) < 3:
      return []
    (inside0, out0), (_, out1), (inside2, out2) = self._accuracies[-3:]
    if out0 > out1 > out2 and out0 - out2 > self._tolerated_fall and inside2 > inside0:
      return self._say("forgetting", inside=inside2, out=out2)
    return []

  def _signatures(self, metrics: Mapping[str, float]) -> dict[str, bool | None]:
    """Signature -> whether it holds at this step, None where the step says nothing about it."""

    def over(name: str, limit: float) -> bool | None:
      return metrics[name] >= limit if name in metrics else None

    wellformed = over("reward/format", 0.01)
    accepted = [value for name, value in metrics.items() if name.startswith("hint/accept_rate@")]
    return {
      "truncated-answers": over("completion/truncated_frac", 0.9),
      "format-at-zero": None if wellformed is None else not wellformed,
      "dead-groups": over("dead_group_rate", 1.0),
      "hints-never-accepted": max(accepted) == 0 if accepted else None,
    }

  def _divergence(self, metrics: Mapping[str, float]) -> list[str]:
    for name in ("loss", "grad_norm", "kl/ref"):
      value = metrics.get(name, 0.0)
      if not math.isfinite(value):
        return self._say("divergence", name=name, value=value, reason="not a finite number")
    if metrics.get("kl/ref", 0.0) > self._kl_limit:
      reason = f"more than {self._kl_limit:g} nats per token away from the reference"
      return self._say("divergence", name="kl/ref", value=metrics["kl/ref"], reason=reason)
    return self._norm_divergence(metrics.get("grad_norm", 0.0))

  def _norm_divergence(self, norm: float) -> list[str]:
    # Steps without any signal have norm 0 and say nothing about the usual size.
    usual = statistics.median(self._norms) if len(self._norms) >= self._window else math.inf
    high = norm > self._blow_up * usual
    self._streaks["norm"] = self._streaks["norm"] + 1 if high else 0
    if norm > 0 and not high:
      self._norms.append(norm)
    if self._streaks["norm"] < 3:
      return []
    reason = f"more than {self._blow_up:g} times its median of {usual:.3g} for three steps"
    return self._say("divergence", name="grad_norm", value=norm, reason=reason)

  def _say(self, anchor: str, **values: float | str) -> list[str]:
    if anchor in self._said:
      return []
    self._said.add(anchor)
    return [f"{MESSAGES[anchor].format(**values)} {_SEE.format(anchor=anchor)}"]
